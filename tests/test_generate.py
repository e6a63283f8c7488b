"""Tests of generate.py: its files, its repeatability, and its errors."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from models import make_prior, save_model

import generate
import utils
from modules import VQVAE
from prior import realism, sampling
from prior.codes import hash_codebook
from prior.evaluate import RealSlices
from prior.flow import FlowPrior
from prior.sampling import Sampler, describe_slices
from training.run_folder import load_run_data
from utils import UserError

SLICE = "data/keras_slices_test/case_040_week_0_slice_1.nii.gz"
OTHER_SLICE = "data/keras_slices_test/case_040_week_0_slice_2.nii.gz"


def make_vqvae() -> VQVAE:
    return VQVAE(hidden_channels=8, residual_channels=4, embedding_dim=4, num_embeddings=16)


@pytest.fixture
def make_run(tmp_path, write_slices, monkeypatch):
    """make_run(size): an untrained VQ-VAE and flow, and 8 + 3 + 3 slices of three splits."""
    monkeypatch.chdir(tmp_path)
    return partial(write_run, tmp_path, write_slices)


def write_run(root: Path, write_slices: Callable, size: tuple[int, int] = (64, 32)) -> Path:
    data = write_slices(root / "data", size, train=8, validate=3, test=3)
    torch.manual_seed(0)
    vqvae = make_vqvae()
    rows, columns = (side // vqvae.stride for side in size)
    prior = FlowPrior(4, (rows, columns), components=2, channels=12)
    prior.pca.fit(torch.randn(8, 4, rows, columns))
    folder = root / "runs" / "a"
    save_model(folder / "best.pt", vqvae)
    fingerprint = f"train validate {hash_codebook(vqvae)}"
    arguments = {
        "data": str(data),
        "size": size,
        "fit": "resize",
        "planes": 60,
        "cache_dir": None,
        "skip_bad_files": False,
    }
    utils.write_json(folder / "config.json", {"arguments": arguments})
    slices = describe_slices(load_run_data(folder, "train")[0])
    content = {"fingerprint": fingerprint, "slices": slices}
    save_model(folder / "prior" / "best.pt", prior, **content)
    return folder


@pytest.fixture
def run(make_run) -> Path:
    return make_run()


def call_generate(flags: str) -> Path:
    """Call generate.py for the newest prior; return its usual output folder."""
    assert generate.main(["--device", "cpu", *flags.split()]) == 0
    return Path("runs/a/generated")


def read_images(folder: Path, name: str = "sample") -> np.ndarray:
    """Read all images of that name, (N, H, W), in the order of their numbers."""
    paths = sorted(folder.glob(f"{name}_*.nii.gz"))
    return np.stack([nib.load(path).get_fdata()[..., 0] for path in paths])


# ---------------------------------------------------------------- sampling


def test_samples_are_a_picture_and_nifti_files(run, capsys):
    folder = call_generate("--count 3")
    assert folder == run.relative_to(Path.cwd()) / "generated"
    assert (folder / "slices.png").stat().st_size > 5000
    assert len(list(folder.iterdir())) == 4
    nifti = nib.load(folder / "sample_002.nii.gz")
    assert nifti.shape == (64, 32, 1)
    assert nifti.get_data_dtype() == np.float32
    assert nifti.header["descrip"] == b""
    assert nifti.header.get_xyzt_units()[0] == "mm"
    train, _ = load_run_data(run, "train")
    np.testing.assert_allclose(nifti.affine, train.affine)
    assert read_images(folder).mean() == pytest.approx(train.mean.mean(), rel=0.5)
    assert "models: runs/a/best.pt, runs/a/prior/best.pt" in capsys.readouterr().out


def test_more_slices_than_a_picture_holds_are_all_written(run, monkeypatch):
    monkeypatch.setattr(generate, "MAX_PICTURES", 2)
    assert len(read_images(call_generate("--count 4"))) == 4
    folder = call_generate(f"--count 4 --complete {SLICE}")
    assert len(read_images(folder, "completion")) == 4


def test_the_same_flags_give_the_same_slices(run):
    first = read_images(call_generate("--count 2 --seed 5"))
    again = read_images(call_generate("--count 2 --seed 5"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    other_seed = read_images(call_generate("--count 2 --seed 6"))
    assert not np.array_equal(first, other_seed)


def test_slices_of_an_earlier_call_are_removed(run):
    assert len(read_images(call_generate("--count 2"))) == 2
    assert len(read_images(call_generate("--count 1"))) == 1


def test_out_sets_the_output_folder(run):
    call_generate("--count 1 --out elsewhere")
    assert len(read_images(Path("elsewhere"))) == 1
    assert not (run / "generated").exists()


def test_positions_are_the_flag_or_those_of_the_training_slices(run, monkeypatch):
    calls = []
    original = FlowPrior.sample

    def record(self, position, *rest, **options):
        calls.append(position)
        return original(self, position, *rest, **options)

    monkeypatch.setattr(FlowPrior, "sample", record)
    monkeypatch.setattr(sampling, "BATCH_SIZE", 3)
    call_generate("--count 2 --position 0.25")
    assert calls.pop().tolist() == [0.25, 0.25]
    call_generate("--count 4")
    assert [len(position) for position in calls] == [3, 1]
    torch.testing.assert_close(torch.cat(calls), torch.tensor([0, 2 / 7, 5 / 7, 1]))


def test_sampling_needs_no_data(run, capsys):
    """The checkpoint describes the training slices."""
    shutil.rmtree(run.parents[1] / "data")
    assert len(read_images(call_generate("--count 2"))) == 2


def test_the_bundled_flow_is_used_if_no_run_has_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--count", "2", "--steps", "1", "--device", "cpu"]) == 0
    assert read_images(Path("generated")).shape == (2, 256, 128)
    printed = capsys.readouterr().out
    assert "no run in runs has a flow, so the bundled one is used" in printed
    assert "its slices show no real patient" in printed
    assert (sampling.PELVIS_PRIOR.stat().st_size) <= 5e6


def test_real_slices_next_to_samples_have_their_positions():
    """Which of several slices at a position is chosen depends on the seed."""
    positions = torch.linspace(0, 1, 11).repeat(20)
    held_out = RealSlices(torch.zeros(220, 1), torch.zeros(220, 1), positions, [])
    chosen = generate.match_positions(torch.tensor([0.0, 0.52, 1.0]), held_out, seed=0)
    torch.testing.assert_close(positions[chosen], torch.tensor([0.0, 0.5, 1.0]))
    other = generate.match_positions(torch.tensor([0.0, 0.52, 1.0]), held_out, seed=1)
    assert not torch.equal(chosen, other)
    for position in (0.5, math.nan):  # slices at the same or an unknown position differ
        repeated = generate.match_positions(torch.full((9,), position), held_out, seed=0)
        assert len(set(repeated.tolist())) > 3


# ---------------------------------------------------------------- completing


def half_of(images: np.ndarray, half: str) -> np.ndarray:
    """Return the rows of a half, without those near the middle, which the decoder mixes."""
    return images[:, :14] if half == "left" else images[:, 50:]


@pytest.mark.parametrize(("half", "other_half"), [("left", "right"), ("right", "left")])
def test_completions_keep_one_half(run, half, other_half):
    """The VQ-VAE is untrained, so the kept half is the same in all, but does not look like it."""
    folder = call_generate(f"--complete {SLICE} --keep {half} --count 3")
    assert (folder / "completion.png").stat().st_size > 5000
    images = read_images(folder, "completion")
    kept = half_of(images, half)
    sampled = half_of(images, other_half)
    assert np.array_equal(kept[0], kept[1])
    assert np.array_equal(kept[1], kept[2])
    assert not np.array_equal(sampled[0], sampled[1])
    folder = call_generate(f"--complete {OTHER_SLICE} --keep {half} --count 1")
    others = half_of(read_images(folder, "completion"), half)
    assert not np.array_equal(others[0], kept[0])


def test_the_encoder_sees_nothing_of_the_other_half():
    """Neither its pixels nor, by z-scoring, its brightness."""
    half = torch.rand(1, 128, 128, generator=torch.Generator().manual_seed(0))
    results = []
    for hidden in (torch.zeros(1, 128, 128), 9 + torch.rand(1, 128, 128)):
        image = torch.cat([half, hidden], 1)
        results.append(generate.mirrored_half((image - image.mean()) / image.std()))
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)
    assert results[0].mean() == pytest.approx(0, abs=1e-5)
    assert results[0].std() == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------- evaluating


def test_an_evaluation_measures_realism_and_searches_for_copies(make_run, monkeypatch, capsys):
    monkeypatch.setattr(realism, "SHIFT", 1)
    make_run((256, 128))  # the features need slices of this size
    folder = call_generate("--evaluate --count 4")
    printed = capsys.readouterr().out
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["settings"] == "40 steps, guidance 1.5, seed 0"
    assert result["sampled_slices"] == 4
    assert result["held_out_slices"] == 6
    assert result["training_slices"] == 8
    assert result["cases"] == 1
    assert result["dice"] == {}
    sets = ["held-out", "reconstructed", "sampled", "chimeras", "independent codes"]
    assert list(result["measures"]) == ["training", *sets]
    for name, row in result["measures"].items():
        assert math.isfinite(row["kernel_distance"])
        assert row["half_range"] >= 0
        assert ("coverage" in row) == (name not in ("held-out", "reconstructed"))
        assert "mean_z" not in row
    assert list(result["audit"]) == ["pixels", "features"]
    for search in result["audit"].values():
        assert 0 <= search["flagged"] <= 1
        assert len(search["nearest"]) == 4
        assert sum(search["flagged_by_case"].values()) == round(search["flagged"] * 4)
    assert str(Path.cwd()) not in json.dumps(result)
    assert (folder / "closest.png").stat().st_size > 5000
    assert (folder / "slices.png").exists()
    for text in (
        "kernel distance",
        "60 training cases to detect disordered anatomy; there are 1",
        "anatomy is not measured, because no training slice has a segmentation",
        "flagged",
        "about 1 % are flagged by chance",
    ):
        assert text in printed


def test_a_prior_that_copies_is_detected(make_run, monkeypatch):
    """The prior samples four constant code grids, which the VQ-VAE decodes to training slices."""
    run = make_run((256, 128))
    slices, _ = load_run_data(run, "train")
    images = slices.batch(torch.arange(8))
    copied_codes = torch.arange(4).view(4, 1, 1).expand(4, 64, 32)

    def decode(self, codes):
        is_copy = (codes.float().std((1, 2)) == 0).view(-1, 1, 1, 1)
        generator = torch.Generator().manual_seed(len(codes))
        noise = torch.randn(len(codes), 1, 256, 128, generator=generator)
        return torch.where(is_copy, images[codes[:, 0, 0] % 8].flip(2), noise)

    monkeypatch.setattr(Sampler, "sample", lambda self, positions: copied_codes)
    monkeypatch.setattr(Sampler, "decode", decode)
    folder = call_generate("--evaluate --count 4")
    audit = json.loads((folder / "evaluation.json").read_text())["audit"]
    for search in audit.values():
        assert search["flagged"] == 1
        assert search["flagged_by_case"] == {"004": 4}
        assert search["nearest"] == [0, 1, 2, 3]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--count 0", "--count is 0; expected 1 to"),
        ("--evaluate --count 1", "--count is 1; expected 2 to"),
        ("--steps 0", "--steps is 0; expected 1 to 1000"),
        ("--guidance -1", "--guidance is -1.0; expected 0 to 100"),
        ("--guidance nan", "--guidance is nan"),
        ("--seed -1", "--seed is -1"),
        ("--position 1.5", "--position is 1.5; expected 0 to 1"),
        ("--keep right", "--keep chooses the half that --complete keeps; add --complete FILE"),
        ("--evaluate --complete x.nii.gz", "--evaluate and --complete cannot be combined"),
        ("--complete nowhere.nii.gz", r"nowhere.nii.gz"),
        ("--complete runs/a/config.json", "is not a NIfTI file"),
        ("--run nowhere", "checkpoint nowhere.* does not exist"),
        ("--evaluate --runs-dir nowhere", "no run in nowhere has a flow to evaluate; train one"),
        ("--evaluate --count 4", "needs at least 4 training slices of at least 80 x 80 pixels"),
        ("--data data", "--data and --cache-dir are only for --evaluate"),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(run, flags, message):
    with pytest.raises(UserError, match=message):
        call_generate(flags)
    assert not list((run / "generated").glob("*"))


def test_a_causal_prior_does_not_sample(run):
    save_model(run / "causal_prior" / "best.pt", make_prior(), slices={})
    message = (
        r"causal_prior/best\.pt is a causal prior, which gives code lengths only; train a flow "
        r"with .*train_prior\.py --run runs/a"
    )
    with pytest.raises(UserError, match=message):
        call_generate("--run runs/a --prior runs/a/causal_prior/best.pt")
    (run / "prior" / "best.pt").unlink()
    with pytest.raises(UserError, match=message):
        call_generate("--run runs/a")


def test_a_prior_of_an_earlier_version_is_an_error(run):
    """It does not describe the training slices."""
    checkpoint = torch.load(run / "prior" / "best.pt")
    del checkpoint["slices"]
    torch.save(checkpoint, run / "prior" / "best.pt")
    with pytest.raises(UserError, match=r"was trained by an earlier version; train it again with"):
        call_generate("")


def test_a_prior_of_another_model_is_refused(run):
    save_model(run / "best.pt", make_vqvae())
    message = r"prior/best\.pt was trained on .* different model, not on those of runs/a/best\.pt"
    with pytest.raises(UserError, match=message):
        call_generate("")
