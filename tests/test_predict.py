"""Evaluation of a run: the figures, the files, and mistakes at the command line."""

import csv
import json

import pytest
import torch

import dataset
import predict
import train
import utils
from evaluation import metrics, plots
from evaluation.metrics import SCORE_NAMES
from modules import VQVAE
from mri import hipmri
from mri.files import SliceName
from training.checkpoint import load_model
from utils import CheckpointError, UserError

FILES = [
    "best_median_worst.png",
    "code_map.png",
    "code_use.png",
    "metrics.json",
    "slices.csv",
    "ssim_histogram.png",
]


@pytest.fixture
def trained(tmp_path, write_slices, write_nifti, monkeypatch, own_signals, small):
    """A run of one epoch, on data whose test split has a constant slice and a second case."""
    data = write_slices(tmp_path / "data", train=6, validate=2, test=4)
    test = data / "keras_slices_test"
    array = torch.zeros(256, 128, dtype=torch.int16).numpy()
    write_nifti(test / "case_040_week_0_slice_9.nii.gz", array)
    write_nifti(
        test / "case_041_week_1_slice_0.nii.gz",
        array + torch.arange(128, dtype=torch.int16).numpy(),
    )
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", str(data), *small, "--epochs", "1", "--name", "a"]) == 0
    return tmp_path / "runs" / "a"


def test_it_writes_table_files_and_figures(trained, capsys):
    assert predict.main([]) == 0  # finds the run, its data, and the test split
    printed = capsys.readouterr().out
    folder = trained / "test"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert all(path.stat().st_size > 1000 for path in folder.glob("*.png"))

    summary = json.loads((folder / "metrics.json").read_text())
    keys = {
        *SCORE_NAMES,
        "bits_per_pixel",
        "codes_used",
        "perplexity",
        "slices",
        "excluded_slices",
        "checkpoint",
        "data",
    }
    assert keys <= summary.keys()
    assert (summary["slices"], summary["excluded_slices"]) == (5, 1)
    assert summary["bits_per_pixel"] == 0.25 and summary["split"] == "test"
    assert "0.2500 bits per pixel" in printed and "1 constant ones excluded" in printed
    assert "too few for a confidence interval" in printed

    with open(folder / "slices.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["week"], row["slice"]) for row in rows][-2:] == [
        ("040", "0", "9"),
        ("041", "1", "0"),
    ]
    assert [row["ssim"] == "" for row in rows] == [False] * 4 + [True, False]
    for name in SCORE_NAMES:
        values = [float(row[name]) for row in rows if row[name]]
        assert summary[name]["mean"] == pytest.approx(sum(values) / 5, abs=1e-5)
        assert summary[name]["by_case"] == pytest.approx(
            {"040": sum(values[:4]) / 4, "041": values[4]}, abs=1e-5
        )
        assert name in printed


def test_figures_are_those_of_the_model_on_the_slices(trained):
    """Recomputed by hand from checkpoint and data, one slice at a time."""
    predict.main(["--split", "validate"])
    summary = json.loads((trained / "validate" / "metrics.json").read_text())
    model = load_model(VQVAE, trained / "best.pt")
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


def test_many_cases_get_an_interval(capsys):
    by_case = {f"{n:03d}": 0.8 + 0.01 * n for n in range(12)}
    summary = {name: {"mean": 0.85, "by_case": by_case} for name in SCORE_NAMES}
    summary |= {
        "bits_per_pixel": 0.5625,
        "codes_used": 5,
        "perplexity": 3.0,
        "slices": 12,
        "excluded_slices": 0,
    }
    predict.print_table(summary, 512)
    printed = capsys.readouterr().out
    assert "95 %" in printed and "12 cases" in printed and "case 004" not in printed
    low, high = predict.interval(list(by_case.values()))
    deviation = torch.tensor(list(by_case.values())).std(correction=0).item() / 12**0.5
    assert (low + high) / 2 == pytest.approx(0.855, abs=0.001)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.05)


def test_figure_shows_worst_median_and_best(trained, monkeypatch):
    """Ten scripted scores and a constant slice: the panels show ranks 1-2, 5-6 and 9-10."""
    shown = {}
    monkeypatch.setattr(
        plots, "plot_reconstructions", lambda path, a, b, titles, *others: shown.update(t=titles)
    )

    class Data:
        names = tuple(SliceName("040", "0", i, f"s{i}") for i in range(11))
        constant = torch.arange(11) == 3
        description = {"spacing": None}  # noqa: RUF012

        def batch(self, indices):
            return torch.randn(len(indices), 1, 256, 128)

    ssim = torch.tensor([0.5, 0.1, 0.9, float("nan"), 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.0])
    scores = dict.fromkeys(SCORE_NAMES, ssim)
    model = load_model(VQVAE, trained / "best.pt")
    predict.draw(trained / "test", model, Data(), scores, torch.ones(16), "title")
    picked = [
        (title.split("\n")[0], int(title.split("slice ")[1].split()[0])) for title in shown["t"]
    ]
    assert picked == [
        ("worst", 10),
        ("worst", 1),
        ("median", 8),
        ("median", 0),
        ("best", 5),
        ("best", 2),
    ]


def test_other_data_can_be_named(trained, tmp_path, write_slices, capsys):
    other = write_slices(tmp_path / "other", test=3)
    assert predict.main(["--run", str(trained), "--data", str(other)]) == 0
    assert json.loads((trained / "test" / "metrics.json").read_text())["slices"] == 3


def test_figures_of_a_single_slice_and_of_equal_scores(trained, tmp_path, write_slices):
    for count in (1, 2, 3):
        data = write_slices(tmp_path / str(count), test=count)
        assert predict.main(["--run", str(trained), "--data", str(data)]) == 0
    plots.plot_score_histogram(
        tmp_path / "a.png", {"ssim": torch.tensor([0.5, 0.50000006]).numpy()}, "equal"
    )
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("embeddings", [1, 2, 16])
def test_code_colours(embeddings):
    model = VQVAE(
        hidden_channels=8, residual_channels=4, embedding_dim=2, num_embeddings=embeddings
    )
    colours = predict.code_colours(model)
    assert colours.shape == (embeddings, 3) and colours.min() >= 0 and colours.max() <= 1


def test_mistakes(tmp_path, trained, monkeypatch):
    with pytest.raises(UserError, match=r"no run with a best.pt in nowhere"):
        predict.main(["--runs-dir", "nowhere"])
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        predict.main(["--run", "nowhere"])
    with pytest.raises(utils.DataError, match="nowhere"):
        predict.main(["--data", "nowhere"])
    with pytest.raises(UserError, match="--batch-size is 0"):
        predict.main(["--batch-size", "0"])
    (trained / "config.json").write_text("{}")
    with pytest.raises(UserError, match="names no data"):
        predict.main([])
