"""benchmarks/rate_distortion.py: budgets, scores of codecs and runs, and its command."""

import json
from pathlib import Path

import image_codecs
import numpy as np
import pytest
import rate_distortion
import torch
from image_codecs import ACCOUNTINGS, CODECS
from models import make_prior, save_model
from rate_distortion import Originals, measure_codec
from rate_distortion_report import RULES, SCORES, table

from dataset import load_split
from evaluation import metrics
from modules import VQVAE
from mri.hipmri import find_hipmri
from prior import coding
from prior.model import CodePrior
from training.checkpoint import load_model
from utils import UserError

CPU = torch.device("cpu")
SCALE_RATE = 32 / 32768  # bits per pixel for the numbers that scale a slice


def originals(images: np.ndarray, low: float = 0.0, span: float = 30000.0) -> Originals:
    """Return slices (N, 256, 128) in [0, 1] as originals in another unit."""
    tensor = torch.from_numpy(images).float()[:, None] * span + low
    mean = tensor.mean((1, 2, 3), keepdim=True)
    std = tensor.std((1, 2, 3), correction=0, keepdim=True)
    return Originals(tensor, mean, std, ["040", "040", "041"][: len(tensor)])


def load_test_split(data: Path) -> Originals:
    args = rate_distortion.parse_arguments(["--data", str(data)])
    slices, _ = rate_distortion.load(args)
    return slices


@pytest.fixture
def run(tmp_path, write_run, write_slices) -> Path:
    """Return the folder of an untrained run on <tmp_path>/data, which has two test slices."""
    data = write_slices(tmp_path / "data", train=1, validate=1, test=2)
    return write_run(tmp_path / "runs" / "untrained", data)


# ---------------------------------------------------------------- codecs


def test_a_codec_that_does_not_fit_every_slice_has_no_score(smooth_slices):
    noise = np.random.default_rng(1).random((256, 128))
    slices = originals(np.stack([smooth_slices[0], noise]))
    rows = measure_codec(CODECS["jpeg"], slices, (0.3, 1.125))
    by_rate = {(row["rate"], row["accounting"]): row for row in rows}
    assert len(by_rate) == 4
    assert by_rate[0.3, "file"]["misfits"] == 1
    assert "scores" not in by_rate[0.3, "file"]
    assert by_rate[1.125, "file"]["misfits"] == 0
    assert by_rate[1.125, "file"]["depth"] == 8
    assert "does not fit (1 of 2 slices)" in table(rows, 2)


def test_more_bits_score_higher(smooth_slices):
    rows = measure_codec(CODECS["jpeg"], originals(smooth_slices), (0.5, 2.0))
    for accounting in ACCOUNTINGS:
        few, many = (row for row in rows if row["accounting"] == accounting)
        assert 0.4 < few["bits_per_pixel"] <= 0.5 + SCALE_RATE < many["bits_per_pixel"]
        for name in SCORES:
            assert few["scores"][name]["mean"] < many["scores"][name]["mean"], name
        assert list(few["scores"]["ssim"]["by_case"]) == ["040", "041"]


def test_the_unit_of_the_intensities_does_not_matter(smooth_slices):
    scores = []
    for low, span in ((0, 30000), (-8000, 20000)):
        slices = originals(smooth_slices, low, span)
        row = measure_codec(CODECS["jpeg"], slices, (0.5,))[0]
        scores.append(row["scores"]["ssim"]["mean"])
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)


# ---------------------------------------------------------------- runs


def test_the_scores_of_a_run_are_those_of_predict_py(run, tmp_path):
    """Scaling numbers in float16, and intensities instead of z-scores, change hardly anything."""
    slices = load_split(find_hipmri(tmp_path / "data"), "test")
    model = load_model(VQVAE, run / "best.pt")
    expected = metrics.evaluate(model, slices, 2, CPU, metrics.SCORE_NAMES).scores
    loaded = load_test_split(tmp_path / "data")
    (row,) = rate_distortion.measure_run(run, loaded, CPU, entropy_coded=False)
    for name, values in expected.items():
        tolerance = 0.02 if name == "psnr" else 2e-3
        mean = row["scores"][name]["mean"]
        assert mean == pytest.approx(float(values.mean()), abs=tolerance), name


def test_a_run_without_a_prior_is_counted_at_fixed_length(run, tmp_path, capsys):
    loaded = load_test_split(tmp_path / "data")
    rows = rate_distortion.measure_run(run, loaded, CPU, entropy_coded=True)
    assert [row["accounting"] for row in rows] == ["fixed length"]
    assert "has no causal prior and is counted at fixed length only" in capsys.readouterr().out


def make_models(grid: tuple[int, int] = (8, 16)) -> tuple[CodePrior, VQVAE]:
    """Return an untrained prior, and the VQ-VAE of the fixture `run`, whose codebook it has."""
    prior = make_prior(16, 4, grid)
    model = VQVAE(hidden_channels=8, residual_channels=4, embedding_dim=4, num_embeddings=16)
    prior.initialize(model.vector_quantization.embedding.weight, torch.randint(16, (8, *grid)))
    return prior, model


# ---------------------------------------------------------------- data and command


def test_a_volume_is_cut_into_undistorted_coronal_planes(tmp_path, write_nifti):
    right, _, up = np.meshgrid(np.arange(100), np.arange(9), np.arange(90), indexing="ij")
    disc = (right - 49.5) ** 2 + (up - 44.5) ** 2 < 20**2
    volume = disc * 70000.0 + right  # 70,000 is out of the range of float16
    path = write_nifti(tmp_path / "head.nii.gz", volume.astype(np.float32))
    args = rate_distortion.parse_arguments(["--volume", str(path), "--planes", "5"])
    loaded, num_excluded = rate_distortion.load(args)
    assert loaded.images.shape == (5, 1, 256, 128)
    assert num_excluded == 0
    assert set(loaded.cases) == {"head"}
    assert 8192 < loaded.images.max() <= 16384
    inside = loaded.images[0, 0] > loaded.images.max() / 2
    assert int(inside.any(1).sum()) == pytest.approx(int(inside.any(0).sum()), abs=2)  # round


def test_a_missing_range_coder_is_reported_before_slices_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(coding, "constriction", None)
    flags = ["--data", str(tmp_path / "missing"), "--codecs", "jpeg", "--entropy-coded"]
    with pytest.raises(UserError, match="run pip install constriction"):
        rate_distortion.main(flags)


def test_the_command_compares_runs_with_codecs(tmp_path, run, write_nifti, capsys):
    prior, _ = make_models((64, 32))
    embedding = load_model(VQVAE, run / "best.pt").vector_quantization.embedding.weight
    prior.initialize(embedding, torch.randint(16, (8, 64, 32)))
    save_model(run / "causal_prior" / "best.pt", prior)
    constant = tmp_path / "data" / "keras_slices_test" / "case_041_week_0_slice_0.nii.gz"
    write_nifti(constant, np.zeros((256, 128), np.int16))
    out = tmp_path / "results" / "rd"
    flags = ["--data", tmp_path / "data", "--runs", run, "--codecs", "jpeg", "--rates", 0.25, 6]
    flags += ["--device", "cpu", "--out", out, "--entropy-coded"]
    assert rate_distortion.main([str(flag) for flag in flags]) == 0
    assert "untrained (tuned)" in capsys.readouterr().out

    result = json.loads(out.with_suffix(".json").read_text())
    assert (result["slices"], result["excluded_slices"], result["split"]) == (2, 1, "test")
    assert {"imagecodecs", "jpeg", "torch", "commit"} <= result["versions"].keys()
    assert str(tmp_path) not in json.dumps(result)
    run_rows = {row["accounting"]: row for row in result["rows"] if "weights" in row}
    fixed, coded = run_rows["fixed length"], run_rows["entropy-coded"]
    assert fixed["method"] == "untrained (tuned)"
    assert fixed["bits_per_pixel"] == 0.25 + SCALE_RATE
    assert coded["scores"] == fixed["scores"]
    assert coded["bits_per_pixel"] * 32768 % 16 == 0  # a mean of two streams of 32-bit words
    assert coded["bits_per_pixel"] < 0.6
    model = load_model(VQVAE, run / "best.pt")
    assert fixed["weights"] == sum(p.numel() for p in model.parameters())
    assert coded["weights"] == fixed["weights"] + sum(p.numel() for p in prior.parameters())
    codec_rows = [row for row in result["rows"] if "weights" not in row]
    assert [row["misfits"] for row in codec_rows] == [2, 2, 0, 0]  # noise does not fit 0.25
    text = out.with_suffix(".md").read_text()
    assert "1 constant slices excluded" in text
    assert RULES in text
    assert f"| 0.2500 | untrained (tuned), {fixed['weights']:,} weights | fixed length |" in text
    assert out.with_suffix(".png").stat().st_size > 1000


def test_without_imagecodecs_the_command_ends_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(image_codecs, "imagecodecs", None)
    with pytest.raises(UserError, match=r"^imagecodecs"):
        rate_distortion.main(["--data", str(tmp_path)])
