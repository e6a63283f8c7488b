"""The comparison with image codecs: what is counted, that budgets hold, and its command from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import rate_distortion
from rate_distortion import ACCOUNTINGS, CODECS, RATES, Originals, measure_codec, ms_ssim, search

import utils
from dataset import load_split
from evaluation import metrics
from modules import VQVAE
from mri.hipmri import find_hipmri
from prior.model import CodePrior
from training.checkpoint import CHECKPOINT_FORMAT, load_model, write_checkpoint


@pytest.fixture(scope="module")
def smooth() -> np.ndarray:
    """(3, 256, 128) in [0, 1]: smooth shapes and a little noise, which every codec can make small."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((3, 1, 12, 6)))
    images = torch.nn.functional.interpolate(coarse, (256, 128), mode="bicubic")[:, 0].numpy()
    images += 0.01 * rng.standard_normal(images.shape)
    low, high = images.min((1, 2), keepdims=True), images.max((1, 2), keepdims=True)
    return (images - low) / (high - low)


def originals(images: np.ndarray, low: float = 0.0, span: float = 30000.0) -> Originals:
    tensor = torch.from_numpy(images).float()[:, None] * span + low
    mean, std = (
        tensor.mean((1, 2, 3), keepdim=True),
        tensor.std((1, 2, 3), correction=0, keepdim=True),
    )
    return Originals(tensor, mean, std, ["040", "040", "041"][: len(tensor)])


CODERS = [(name, depth) for name, codec in CODECS.items() for depth in codec.depths]


@pytest.mark.parametrize(("name", "depth"), CODERS)
def test_headers_are_told_from_payload(smooth, name, depth):
    codec = CODECS[name]
    headers = []
    for image, share in ((smooth[0], 4), (smooth[1], 4), (smooth[1], 2)):
        coded = codec.encode(image, codec.settings[len(codec.settings) // share], depth)
        assert 0 < coded.payload < coded.file <= len(coded.data)
        headers.append(coded.file - coded.payload)
        error = np.abs(codec.decode(coded.data, depth) - image).mean()
        assert error < 0.1
    assert error < 0.01
    if name == "jpeg":  # whichever tables are smaller: what is left out differs
        assert min(headers) > 100
    elif name == "webp":  # chunks are padded to even lengths
        assert {size // 2 for size in headers} == {15}
    else:
        assert max(headers) - min(headers) <= 2  # AVIF's lengths take a byte or two


def test_jpegs_tables_count_unless_they_are_the_standards(smooth):
    levels = np.rint(smooth[0] * 255).astype(np.uint8)
    standard, optimised = (
        rate_distortion.imagecodecs.jpeg8_encode(levels, level=50, optimize=o) for o in (0, 1)
    )
    scans = [file[file.index(b"\xff\xda") + 10 : -2] for file in (standard, optimised)]
    assert rate_distortion.jpeg_payload(standard) == len(scans[0]) + 1
    tables = sum(end - start for marker, start, end in marked(optimised) if marker == 0xFFC4)
    assert rate_distortion.jpeg_payload(optimised) == len(scans[1]) + tables + 1 and tables > 34


def marked(file: bytes) -> list[tuple[int, int, int]]:
    """The segments up to the scan."""
    found = []
    for segment in rate_distortion.segments(file):
        found.append(segment)
        if segment[0] == 0xFFDA:
            return found


def test_jpeg_xl_headers_are_the_same_for_all_slices(smooth):
    for depth in CODECS["jpegxl"].depths:
        coded = [
            CODECS["jpegxl"].encode(image, setting, depth)
            for image in smooth
            for setting in (5, 60)
        ]
        assert (
            len({one.data[:8] for one in coded}) == 1 and len({one.data[8:12] for one in coded}) > 1
        )


@pytest.mark.parametrize("name", CODECS)
def test_each_slice_is_within_budget(smooth, name):
    codec = CODECS[name]
    found = search(codec, 8, RATES[-2:], smooth[0])
    for (rate, accounting), coded in found.items():
        size = getattr(coded, accounting)
        assert 0.7 * rate < 8 * size / smooth[0].size <= rate
        assert codec.payload(coded.data) <= coded.file
    assert found[RATES[-1], "payload"].payload >= found[RATES[-1], "file"].payload


def test_what_does_not_fit_gets_no_score(smooth):
    noise = np.random.default_rng(1).random((256, 128))
    rows = measure_codec(CODECS["jpeg"], originals(np.stack([smooth[0], noise])), (0.3, 1.125))
    by_rate = {(row["rate"], row["accounting"]): row for row in rows}
    assert len(by_rate) == 4
    assert by_rate[0.3, "file"]["misfits"] == 1 and "scores" not in by_rate[0.3, "file"]
    assert by_rate[1.125, "file"]["misfits"] == 0 and by_rate[1.125, "file"]["depth"] == 8
    assert "does not fit (1 of 2 slices)" in rate_distortion.table(rows, 2)


def test_more_bits_score_better_in_any_unit(smooth):
    low = measure_codec(CODECS["jpeg"], originals(smooth), (0.5, 2.0))
    for accounting in ACCOUNTINGS:
        few, many = (row for row in low if row["accounting"] == accounting)
        assert 0.4 < few["bits_per_pixel"] <= 0.5 + 32 / 32768 < many["bits_per_pixel"]
        assert all(
            few["scores"][name]["mean"] < many["scores"][name]["mean"]
            for name in rate_distortion.SCORES
        )
        assert list(few["scores"]["ssim"]["by_case"]) == ["040", "041"]
    far = measure_codec(CODECS["jpeg"], originals(smooth, low=-8000, span=20000), (0.5,))
    assert far[0]["scores"]["ssim"]["mean"] == pytest.approx(
        low[0]["scores"]["ssim"]["mean"], abs=2e-3
    )


def test_ms_ssim_is_torchmetrics_slice_by_slice(smooth):
    images = originals(smooth).images
    assert torch.equal(ms_ssim(images, images), torch.ones(3))
    noisy = images + 1500 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    values = ms_ssim(images, noisy)
    assert values.shape == (3,)
    pair = [x[:1] / 30000 for x in (noisy.clamp(0, 30000), images)]
    betas = tuple(np.array([0.0448, 0.2856, 0.3001, 0.2363]) / 0.8668)
    expected = multiscale_structural_similarity_index_measure(*pair, data_range=1.0, betas=betas)
    assert sum(betas) == pytest.approx(1) and 0.2 < expected < 0.95
    assert values[0] == pytest.approx(float(expected), abs=1e-5)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with an untrained model, as if trained on <tmp_path>/data."""
    torch.manual_seed(0)
    model = VQVAE(hidden_channels=8, residual_channels=4, embedding_dim=4, num_embeddings=16)
    folder = tmp_path / "runs" / "untrained"
    folder.mkdir(parents=True)
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "model_args": model.arguments,
        "model": model.state_dict(),
    }
    write_checkpoint(folder / "best.pt", checkpoint)
    arguments = {"recipe": "tuned", "data": str(tmp_path / "data"), "fit": "resize", "planes": 60}
    arguments |= {"skip_bad_files": False, "cache_dir": None}
    utils.write_json(folder / "config.json", {"arguments": arguments})
    return folder


def test_the_command_measures_runs_and_codecs(tmp_path, run, write_slices, write_nifti, capsys):
    prior = CodePrior(16, 4, 64, 32, channels=8, num_layers=1, num_heads=2, num_outlines=8)
    table = load_model(VQVAE, run / "best.pt").vector_quantization.embedding.weight
    prior.initialize(table.detach(), torch.randn(16), torch.randint(16, (8, 64, 32)), torch.rand(8))
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "model_args": prior.arguments,
        "model": prior.state_dict(),
    }
    (run / "prior").mkdir()
    write_checkpoint(run / "prior" / "best.pt", checkpoint)
    data = write_slices(tmp_path / "data", train=1, validate=1, test=2)
    write_nifti(
        data / "keras_slices_test" / "case_041_week_0_slice_0.nii.gz",
        np.zeros((256, 128), np.int16),
    )
    out = tmp_path / "results" / "rd"
    command = [
        "--data",
        data,
        "--runs",
        run,
        "--codecs",
        "jpeg",
        "--rates",
        0.25,
        6,
        "--device",
        "cpu",
        "--out",
        out,
    ]
    command += ["--entropy-coded"]
    assert rate_distortion.main(list(map(str, command))) == 0
    assert "untrained (tuned)" in capsys.readouterr().out
    result = json.loads(out.with_suffix(".json").read_text())
    assert (result["slices"], result["excluded_slices"], result["split"]) == (2, 1, "test")
    assert {"imagecodecs", "jpeg", "torch", "commit"} <= result["versions"].keys()
    assert str(tmp_path) not in json.dumps(result)
    rows = {row["accounting"]: row for row in result["rows"] if "weights" in row}
    first, second = rows["fixed length"], rows["entropy-coded"]
    codecs = [row for row in result["rows"] if "weights" not in row]
    assert second["accounting"] == "entropy-coded" and second["scores"] == first["scores"]
    assert (
        second["bits_per_pixel"] * 32768 % 16 == 0 and second["bits_per_pixel"] < 0.6
    )  # of two streams' words
    assert first["method"] == "untrained (tuned)" and first["accounting"] == "fixed length"
    assert first["bits_per_pixel"] == 0.25 + 32 / 32768
    model = load_model(VQVAE, run / "best.pt")
    assert first["weights"] == sum(p.numel() for p in model.parameters())
    assert second["weights"] == first["weights"] + sum(p.numel() for p in prior.parameters())
    assert len(codecs) == 4 and [row["misfits"] for row in codecs] == [
        2,
        2,
        0,
        0,
    ]  # noise is beyond 0.25
    text = out.with_suffix(".md").read_text()
    assert "1 constant ones excluded" in text and rate_distortion.RULES in text
    assert f"| 0.2500 | untrained (tuned), {first['weights']:,} weights | fixed length |" in text
    assert out.with_suffix(".png").stat().st_size > 1000


def test_a_runs_scores_are_predicts_up_to_the_rounded_scale(tmp_path, run, write_slices):
    """The scale in float16, and raw intensities instead of z-scores, move no score by more than rounding does."""
    data = write_slices(tmp_path / "data", train=1, validate=1, test=2)
    slices = load_split(find_hipmri(data), "test")
    device = torch.device("cpu")
    expected, _, _ = metrics.evaluate(
        load_model(VQVAE, run / "best.pt"), slices, 2, device, metrics.SCORE_NAMES
    )
    loaded, _ = rate_distortion.load(rate_distortion.parse_arguments(["--data", str(data)]))
    (row,) = rate_distortion.measure_run(run, loaded, device, entropy_coded=False)
    scores = row["scores"]
    for name, values in expected.items():
        assert scores[name]["mean"] == pytest.approx(
            float(values.mean()), abs=2e-3 if name != "psnr" else 0.02
        )


def test_a_volume_is_cut_into_undistorted_coronal_planes(tmp_path, write_nifti):
    right, _, up = np.meshgrid(np.arange(100), np.arange(9), np.arange(90), indexing="ij")
    disc = (
        (right - 49.5) ** 2 + (up - 44.5) ** 2 < 20**2
    ) * 70000.0 + right  # beyond float16, if left alone
    path = write_nifti(tmp_path / "head.nii.gz", disc.astype(np.float32))
    args = rate_distortion.parse_arguments(["--volume", str(path), "--planes", "5"])
    loaded, excluded = rate_distortion.load(args)
    assert (
        loaded.images.shape == (5, 1, 256, 128) and excluded == 0 and set(loaded.cases) == {"head"}
    )
    assert 8192 < loaded.images.max() <= 16384
    inside = loaded.images[0, 0] > loaded.images.max() / 2
    assert int(inside.any(1).sum()) == pytest.approx(int(inside.any(0).sum()), abs=2)  # still round


def test_without_imagecodecs_it_says_what_to_install(tmp_path):
    (tmp_path / "imagecodecs.py").write_text("raise ImportError")  # found before the real one
    command = [sys.executable, rate_distortion.__file__, "--data", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: imagecodecs")
    assert "pip install -r benchmarks/requirements.txt" in done.stderr


def test_a_run_without_a_prior_is_counted_at_fixed_length(tmp_path, run, write_slices, capsys):
    write_slices(tmp_path / "data", train=1, validate=1, test=2)
    loaded, _ = rate_distortion.load(
        rate_distortion.parse_arguments(["--data", str(tmp_path / "data")])
    )
    rows = rate_distortion.measure_run(run, loaded, torch.device("cpu"), entropy_coded=True)
    assert [row["accounting"] for row in rows] == ["fixed length"]
    assert "has no prior/best.pt, and is counted at fixed length alone" in capsys.readouterr().out


def test_codes_that_do_not_come_back_are_no_figure(run, monkeypatch):
    prior = CodePrior(16, 4, 8, 16, channels=8, num_layers=1, num_heads=2, num_outlines=8).eval()
    codes = torch.randint(16, (2, 8, 16))
    prior.initialize(
        torch.randn(16, 4), torch.randn(16), torch.randint(16, (8, 8, 16)), torch.rand(8)
    )
    assert rate_distortion.coded_bits(prior, codes, run) > 0
    monkeypatch.setattr(rate_distortion.entropy, "decode", lambda prior, streams: codes + 1)
    with pytest.raises(utils.UserError, match="do not come back from their streams"):
        rate_distortion.coded_bits(prior, codes, run)
    with pytest.raises(utils.UserError, match="is of 8 x 16 codes, the run of other grids"):
        rate_distortion.coded_bits(prior, codes[:, :4], run)
