"""benchmarks/speed.py: measurements are processes, and the table shows their results."""

import importlib.metadata
import json
from argparse import Namespace

import pytest
import speed
import torch

from utils import UserError

CPU = torch.device("cpu")
ROW = {"slices_per_second": 20.0, "first_epoch": 1.0, "memory": 1.5}


def test_a_measurement_runs_in_a_process(write_slices, tmp_path):
    data = write_slices(tmp_path / "data", train=3, validate=1)
    result = speed.measure(Namespace(device="cpu"), "first batch", data)
    assert result["slices"] == 3
    assert 0 < result["seconds"] < 600


def test_a_failed_measurement_is_one_line(tmp_path, monkeypatch):
    script = tmp_path / "failing.py"
    script.write_text("raise OSError('missing does not exist')")
    monkeypatch.setattr(speed.speed_measurements, "__file__", str(script))
    result = speed.measure(Namespace(device="cpu"), "first batch", tmp_path / "missing")
    assert "missing does not exist" in result["failed"]
    assert "\n" not in result["failed"]


def test_medians_skip_failed_rounds():
    failed = {"failed": "x"}
    rows = []
    for speed_of_round, first_epoch in ((3, 9), (1, 1), (2, 2)):
        rows.append({"slices_per_second": speed_of_round, "first_epoch": first_epoch})
    assert speed.medians([*rows, failed]) == {"slices_per_second": 2, "first_epoch": 9}
    assert speed.medians([failed]) == failed


@pytest.mark.parametrize("on_gpu", [False, True])
def test_methods_take_turns(tmp_path, monkeypatch, on_gpu):
    measured = []

    def measure(args, name, data, method, epochs):
        measured.append(method)
        return ROW

    monkeypatch.setattr(speed, "measure", measure)
    results = speed.measure_methods(Namespace(device="cpu"), on_gpu, tmp_path, 1, rounds=2)
    assert measured == [*results, *results]
    assert "typical script" in results and "this project, tuned" in results
    assert ("- not compiled" in results) == on_gpu
    assert ("- compiled" in results) != on_gpu


def test_results_are_written_after_each_part(tmp_path, monkeypatch, capsys):
    def run_all(args, on_gpu, folder, write):
        failed = {"failed": "x"}
        training = {"typical script": ROW}
        write({"training": training, "bound": {"float32": failed}, "convolutions": failed})
        assert (tmp_path / "out.md").exists()
        assert not on_gpu

    monkeypatch.setattr(speed, "run_all", run_all)
    # The command sets both; monkeypatch puts them back.
    monkeypatch.setenv("HIPMRI_CACHE", "")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    assert speed.main(["--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["command"].startswith("python benchmarks/speed.py --device cpu")
    assert "cpu (" in result["device"]
    assert {"commit", "torch", "monai", "vector-quantize-pytorch"} <= result["versions"].keys()
    assert "| typical script | 20.0 | 1.00 |" in capsys.readouterr().out


def test_missing_libraries_are_an_error(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(speed.importlib.metadata, "version", version)
    with pytest.raises(UserError, match="monai is not installed; run pip install"):
        speed.library_versions()


def test_the_table_shows_speeds_bounds_and_failures():
    bound = {"flops": 74e9, "bytes": 2e9, "matrix_rate": 1e12, "bandwidth": 2e10}
    bound["slices_per_second"] = 100.0
    result = {
        "training": {
            "typical script": ROW,
            "this project": ROW | {"slices_per_second": 50.0},
            "broken": {"failed": "x"},
        },
        "bound": {"float32": bound, "bfloat16": bound | {"slices_per_second": 200.0}},
        "convolutions": [
            {
                "layer": "encoder.conv1",
                "number": 1,
                "gflop": 0.131,
                "forward": 50.0,
                "input gradient": 40.0,
                "weight gradient": 9.6,
            }
        ],
        "others": {"1,000 files": {"seconds": 3.0, "over_inflate": 2.0, "memory": 0.5}},
    }
    lines = speed.table(result, CPU).splitlines()
    assert lines[2] == "| typical script | 20.0 | 1.00 | 20% | 1.50 | 1.0 s |"
    assert lines[3].startswith("| this project | 50.0 | 2.50 | ")
    assert lines[4].startswith("| broken: failed, x |")
    assert lines[6].startswith("Bound in float32: 100 slices per second. ")
    assert "the slower of 74 GFLOP per step at 1.00 TFLOP/s, and 2.00 GB per step" in lines[6]
    assert "| encoder.conv1 | 1 | 0.13 | 50 | 40 | 10 |" in lines
    assert lines[-1] == "| 1,000 files |  | 3.00 | 2.00 | 0.50 |"


def test_each_method_is_compared_with_the_bound_of_its_own_arithmetic():
    """On GPUs, the other implementations compute convolutions in TF32, torch's default."""
    gpu = torch.device("cuda")
    assert speed.precision_of("typical script", CPU) == "float32"
    assert speed.precision_of("typical script", gpu) == "tf32"
    assert speed.precision_of("- in float32", gpu) == "float32"
    assert speed.precision_of("this project", CPU) == speed.utils.pick_precision("auto", CPU)


def test_instruction_sets_are_vector_and_matrix_instructions(monkeypatch):
    capabilities = {"avx2": True, "amx_bf16": False, "sse4_2": True, "cpu_name": "X"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert speed.instruction_sets() == ["avx2"]


def test_training_sets_of_any_size_are_linked(write_slices, tmp_path):
    data = write_slices(tmp_path / "data", train=3, validate=1)
    slices = speed.load(speed.link_training_set(data, tmp_path, 70))
    assert len(slices) == 70
    assert len({str(name) for name in slices.names}) == 70
