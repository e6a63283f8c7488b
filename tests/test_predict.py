"""Evaluation of a run: scores, files, figures, and mistakes on the command line."""

import csv
import json

import numpy as np
import pytest
import torch

import dataset
import predict
import train
from evaluation import metrics
from evaluation.metrics import SCORE_NAMES
from modules import VQVAE
from mri import hipmri
from training.checkpoint import load_model
from utils import CheckpointError, DataError, UserError

FILES = [
    "best_median_worst.png",
    "code_map.png",
    "code_use.png",
    "metrics.json",
    "slices.csv",
    "ssim_histogram.png",
]


@pytest.fixture
def run(tmp_path, write_slices, write_nifti, monkeypatch, small):
    """A run of one epoch; the test split has a constant slice and a second case."""
    data = write_slices(tmp_path / "data", train=6, validate=2, test=4)
    test = data / "keras_slices_test"
    constant = np.zeros((256, 128), np.int16)
    ramp = constant + np.arange(128, dtype=np.int16)
    write_nifti(test / "case_040_week_0_slice_9.nii.gz", constant)
    write_nifti(test / "case_041_week_1_slice_0.nii.gz", ramp)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", str(data), *small, "--epochs", "1", "--name", "a"]) == 0
    return tmp_path / "runs" / "a"


def test_evaluation_writes_table_files_and_figures(run, capsys):
    assert predict.main([]) == 0  # finds the run, its data, and the test split
    printed = capsys.readouterr().out
    folder = run / "test"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert all(path.stat().st_size > 1000 for path in folder.glob("*.png"))

    summary = json.loads((folder / "metrics.json").read_text())
    assert list(summary) == [
        *SCORE_NAMES, "codes_used", "perplexity", "slices", "excluded_slices", "bits_per_pixel",
        "num_embeddings", "split", "checkpoint", "data", "device", "versions",
    ]  # fmt: skip
    assert (summary["slices"], summary["excluded_slices"]) == (5, 1)
    assert summary["bits_per_pixel"] == 0.25
    assert summary["split"] == "test"
    assert "0.2500 bits per pixel" in printed
    assert "1 constant slices excluded" in printed
    assert "2 case(s) are too few for a confidence interval" in printed

    with open(folder / "slices.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["case", "week", "slice", "file", *SCORE_NAMES]
    slices = [(row["case"], row["week"], row["slice"]) for row in rows]
    assert slices[-2:] == [("040", "0", "9"), ("041", "1", "0")]
    assert rows[-1]["file"] == "keras_slices_test/case_041_week_1_slice_0.nii.gz"
    assert [row["ssim"] == "" for row in rows] == [False] * 4 + [True, False]
    for name in SCORE_NAMES:
        values = [float(row[name]) for row in rows if row[name]]
        by_case = {"040": sum(values[:4]) / 4, "041": values[4]}
        assert summary[name]["mean"] == pytest.approx(sum(values) / 5, abs=1e-5)
        assert summary[name]["by_case"] == pytest.approx(by_case, abs=1e-5)
        assert name in printed


def test_results_are_those_of_the_model_on_the_slices(run):
    """Recomputed from checkpoint and data, one slice at a time."""
    predict.main(["--split", "validate"])
    summary = json.loads((run / "validate" / "metrics.json").read_text())
    model = load_model(VQVAE, run / "best.pt")
    data = dataset.load_split(hipmri.find_hipmri(summary["data"]), "validate")
    ssim, codes = [], []
    with torch.no_grad():
        for i in range(len(data)):
            image = data[i][None]
            indices = model.encode(image)
            codes.append(indices.flatten())
            ssim.append(metrics.slice_scores(image, model.decode_codes(indices))["ssim"].item())
    assert summary["ssim"]["mean"] == pytest.approx(sum(ssim) / len(ssim), abs=1e-4)
    assert summary["codes_used"] == len(torch.cat(codes).unique())


def test_ten_or_more_cases_get_an_interval(capsys):
    by_case = {f"{i:03d}": 0.8 + 0.01 * i for i in range(12)}
    summary = {name: {"mean": 0.855, "by_case": by_case} for name in SCORE_NAMES}
    summary |= {"bits_per_pixel": 0.5625, "codes_used": 5, "num_embeddings": 512}
    summary |= {"perplexity": 3.0, "slices": 12, "excluded_slices": 0}
    predict.print_table(summary)
    printed = capsys.readouterr().out
    low, high = metrics.bootstrap_interval(list(by_case.values()))
    assert f"{low:.4f} to {high:.4f}" in printed
    assert "95 % interval" in printed
    assert "12 cases" in printed
    assert "case 004" not in printed


def test_worst_median_and_best_slices_are_picked():
    """Of ten scored slices, ranks 1-2, 5-6 and 9-10; the constant slice has no rank."""
    ssim = torch.tensor([0.5, 0.1, 0.9, float("nan"), 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.0])
    labels = predict.pick_slices(ssim, torch.arange(11) == 3)
    assert list(labels.items()) == [
        (10, "worst"), (1, "worst"), (8, "median"), (0, "median"), (5, "best"), (2, "best"),
    ]  # fmt: skip


def test_other_data_can_be_evaluated(run, tmp_path, write_slices):
    other = write_slices(tmp_path / "other", test=3)
    assert predict.main(["--run", str(run), "--data", str(other)]) == 0
    assert json.loads((run / "test" / "metrics.json").read_text())["slices"] == 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_slices_have_figures(run, tmp_path, write_slices, count):
    data = write_slices(tmp_path / "few", test=count)
    assert predict.main(["--run", str(run), "--data", str(data)]) == 0
    assert sorted(path.name for path in (run / "test").iterdir()) == FILES


def test_mistakes_are_reported(run):
    with pytest.raises(UserError, match=r"nowhere"):
        predict.main(["--runs-dir", "nowhere"])
    with pytest.raises(CheckpointError, match="nowhere"):
        predict.main(["--run", "nowhere"])
    with pytest.raises(DataError, match="nowhere"):
        predict.main(["--data", "nowhere"])
    with pytest.raises(UserError, match="--batch-size is 0"):
        predict.main(["--batch-size", "0"])
    (run / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        predict.main([])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("scan.nii", "the output folder is missing; name it with -o"),
        ("--export", "the output folder is missing; name it with -o"),
        ("--entropy-coded", "--entropy-coded is for your own files"),
        ("scan.nii -o x --entropy-coded", "--entropy-coded is for --export-codes; add it"),
        ("--error-map", "--error-map is for your own files"),
        ("--axis 0", "--axis is for your own files"),
        ("scan.nii -o x --axis 3", "invalid choice: '3'"),
        ("-o x", "--out is for your own files"),
        ("scan.nii -o x --html", "--html is for the evaluation of a split"),
        ("scan.nii -o x --split train", "--split is for the evaluation of a split"),
        ("--export -o x --data y", "--data is for the evaluation of a split"),
        ("scan.nii --export -o x", "--export takes no PATH"),
    ],
)
def test_flags_of_different_tasks_cannot_be_combined(capsys, command, message):
    with pytest.raises(SystemExit):
        predict.main(command.split())
    assert message in capsys.readouterr().err
