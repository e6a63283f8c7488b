"""The speed benchmark: its other methods train the same model, what it counts is right, and its table says it."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import speed

from modules import VectorQuantizer

CPU = torch.device("cpu")


def test_the_usual_quantiser_computes_what_ours_does():
    torch.manual_seed(0)
    usual, ours = speed.UsualQuantizer(16, 8), VectorQuantizer(16, 8)
    torch.nn.init.normal_(usual.embedding.weight)
    ours.embedding.load_state_dict(usual.embedding.state_dict())
    z = torch.randn(2, 8, 4, 4)
    quantized, loss, perplexity = usual(z)
    expected = ours(z)
    torch.testing.assert_close(quantized, expected.quantized)
    torch.testing.assert_close(loss, expected.codebook_loss + 0.25 * expected.commitment_loss)
    share = expected.counts / expected.counts.sum()
    torch.testing.assert_close(perplexity, torch.special.entr(share).sum().exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "method", [name for name in (*speed.USUAL, *speed.OWN) if "compiled" not in name]
)
def test_each_method_trains(write_slices, tmp_path, monkeypatch, method):
    """Two epochs, at the slices' full size; the libraries' quantisers among them."""
    monkeypatch.setattr(speed, "BATCH", 2)
    monkeypatch.setattr(speed.utils, "keep_freed_memory", lambda: None)
    data = write_slices(tmp_path / "data", train=3, validate=1)
    found = speed.measure_training(CPU, data, method, epochs=1, batch=2)
    assert found["slices_per_second"] > 0 and found["memory"] > 0


def test_multiply_adds_are_the_documents():
    from torch.utils.flop_counter import FlopCounterMode

    counts = {}
    for name in ("the usual script", "the same with MONAI's VQVAE"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            speed.USUAL[name]().eval()(torch.zeros(1, 1, 256, 128))
        counts[name] = counter.get_total_flops() / 2e9
    assert counts["the usual script"] == pytest.approx(
        0.81 + 0.067, abs=0.01
    )  # the second product with K embeddings
    assert counts["the same with MONAI's VQVAE"] == pytest.approx(0.81, abs=0.01)


def test_traffic_counts_what_is_read_and_written():
    x, y = torch.zeros(1000), torch.zeros(1000)
    with speed.Traffic() as traffic:
        _ = x.view(10, 100)[2:].T  # views move nothing
        assert traffic.bytes == 0
        z = x + y
        z.copy_(torch.empty_like(x))
        z.add_(y)
    assert traffic.bytes == (3 + 2 + 3) * 4000


def test_a_measurement_is_a_process_and_its_failure_a_line(write_slices, tmp_path):
    data = write_slices(tmp_path / "data", train=3, validate=1)
    args = type("Arguments", (), {"device": "cpu"})
    found = speed.measure(args, "first batch", data)
    assert found["slices"] == 3 and 0 < found["seconds"] < 60
    failed = speed.measure(args, "first batch", tmp_path / "nowhere")
    assert "nowhere is missing" in failed["failed"] and "Give the folder" not in failed
    rows = [
        {"slices_per_second": fast, "first_epoch": first}
        for fast, first in ((3, 9), (1, 1), (2, 2))
    ]
    assert speed.medians([*rows, failed]) == {"slices_per_second": 2, "first_epoch": 9}
    assert speed.medians([failed]) == failed


def test_result_files(tmp_path, monkeypatch, capsys):
    """Written after each part, with what made them."""
    row = {"slices_per_second": 20.0, "first_epoch": 1.0, "memory": 1.5}

    def parts(args, on_gpu, folder, write):
        write({"training": {"the usual script": row}, "bound": {"float32": {"failed": "x"}}})
        assert (tmp_path / "out.md").exists() and not on_gpu

    monkeypatch.setattr(speed, "run_all", parts)
    monkeypatch.setattr(
        sys, "argv", ["speed.py", "--device", "cpu", "--out", str(tmp_path / "out")]
    )
    monkeypatch.setenv("HIPMRI_CACHE", "restored")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "restored")
    assert speed.main() == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert (
        result["command"].startswith("python benchmarks/speed.py --device cpu")
        and "cpu (" in result["device"]
    )
    assert {"commit", "torch", "monai", "vector-quantize-pytorch"} <= result["versions"].keys()
    assert "| the usual script | 20.0 | 1.00 |" in capsys.readouterr().out


def test_table():
    row = {"slices_per_second": 20.0, "first_epoch": 1.0, "memory": 1.5}
    bound = {
        "flops": 74e9,
        "bytes": 2e9,
        "matrix_rate": 1e12,
        "bandwidth": 2e10,
        "slices_per_second": 100.0,
    }
    result = {
        "training": {
            "the usual script": row,
            "this project": row | {"slices_per_second": 50.0},
            "broken": {"failed": "x"},
        },
        "bound": {"float32": bound, "bfloat16": bound | {"slices_per_second": 200.0}},
        "others": {
            "1,000 files into a new cache": {"seconds": 3.0, "over_inflate": 2.0, "memory": 0.5}
        },
    }
    lines = speed.table(result, CPU).splitlines()
    assert lines[2] == "| the usual script | 20.0 | 1.00 | 20% | 1.50 | 1.0 s |"
    assert lines[3].startswith("| this project | 50.0 | 2.50 | ") and lines[4].startswith(
        "| broken: failed, x |"
    )
    assert lines[-1] == "| 1,000 files into a new cache |  | 3.00 | 2.00 | 0.50 |"


def test_repeated_sets_are_of_the_size_asked_for(write_slices, tmp_path):
    data = write_slices(tmp_path / "data", train=3, validate=1)
    slices = speed.load(speed.repeated(data, tmp_path, 70))
    assert len(slices) == 70 and len({str(name) for name in slices.names}) == 70
