"""Drawing, completing and measuring, by generate.py: its files, that it repeats, and its mistakes."""

import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import dataset
import generate
import utils
from modules import VQVAE
from mri import hipmri
from prior.model import CodePrior
from training.checkpoint import CHECKPOINT_FORMAT, write_checkpoint
from training.run_folder import load_run_data
from utils import UserError


def save(path: Path, model) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(
        path,
        {"format": CHECKPOINT_FORMAT, "model_args": model.arguments, "model": model.state_dict()},
    )


@pytest.fixture
def run(tmp_path, write_slices, monkeypatch) -> Path:
    """A run with an untrained VQ-VAE and a prior that knows how often codes are, on 8, 3 and 3 slices."""
    monkeypatch.chdir(tmp_path)
    data = write_slices(tmp_path / "data", train=8, validate=3, test=3)
    torch.manual_seed(0)
    vqvae = VQVAE(hidden_channels=8, residual_channels=4, embedding_dim=4, num_embeddings=16)
    prior = CodePrior(16, 4, 64, 32, channels=8, num_layers=1, num_heads=2, num_outlines=8)
    prior.initialize(
        vqvae.vector_quantization.embedding.weight.detach(),
        torch.randn(16),
        torch.randint(16, (8, 64, 32)),
        torch.rand(8),
    )
    folder = tmp_path / "runs" / "a"
    save(folder / "best.pt", vqvae)
    save(folder / "prior" / "best.pt", prior)
    arguments = {
        "data": str(data),
        "fit": "resize",
        "planes": 60,
        "cache_dir": None,
        "skip_bad_files": False,
    }
    utils.write_json(folder / "config.json", {"arguments": arguments})
    return folder


def start(flags: str) -> Path:
    """generate.py on the newest prior; returns the folder that it writes to."""
    assert generate.main(["--device", "cpu", *flags.split()]) == 0
    return Path("runs/a/generated")


def pixels(folder: Path, name="drawn") -> np.ndarray:
    return np.stack(
        [nib.load(path).get_fdata()[..., 0] for path in sorted(folder.glob(f"{name}_*.nii.gz"))]
    )


def test_drawing_leaves_a_picture_and_slices_to_open(run, capsys):
    folder = start("--count 3")
    assert folder == run.relative_to(Path.cwd()) / "generated"
    assert (folder / "slices.png").stat().st_size > 5000 and len(list(folder.iterdir())) == 4
    nifti = nib.load(folder / "drawn_002.nii.gz")
    assert nifti.shape == (256, 128, 1) and nifti.get_data_dtype() == np.float32
    assert nifti.header["descrip"] == b"" and nifti.header.get_xyzt_units()[0] == "mm"
    source = hipmri.find_hipmri(Path("data"))
    train = dataset.load_split(source, "train")
    np.testing.assert_allclose(nifti.affine, train.affine)
    images = pixels(folder)
    assert images.mean() == pytest.approx(train.mean.mean(), rel=0.5)
    assert "models: runs/a/best.pt, runs/a/prior/best.pt" in capsys.readouterr().out


def test_more_slices_than_a_picture_holds(run, monkeypatch):
    """A hundred are drawn; the picture shows the first 64."""
    zeros = torch.zeros(70, 64, 32, dtype=torch.long)
    monkeypatch.setattr(
        generate.Drawer, "draw", lambda self, position, *given: zeros[: len(position)]
    )
    assert len(pixels(start("--count 70"))) == 70
    path = Path("data/keras_slices_test/case_040_week_0_slice_1.nii.gz")
    assert len(pixels(start(f"--count 70 --complete {path}"), "completion")) == 70


def test_equal_flags_draw_equal_slices_and_others_do_not(run):
    first, again = (pixels(start("--count 2 --seed 5")) for _ in range(2))
    assert np.array_equal(first, again) and not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, pixels(start("--count 2 --seed 6")))
    one, other = (pixels(start(f"--count 1 --temperature 0 --seed {seed}")) for seed in (1, 2))
    assert len(one) == 1 and np.array_equal(one, other)  # the folder holds the last drawing alone
    assert np.array_equal(one, pixels(start("--count 1 --top-k 1")))
    assert np.array_equal(one, pixels(start("--count 1 --top-p 1e-9")))
    elsewhere = start("--count 1 --top-k 1 --out elsewhere") and Path("elsewhere")
    assert np.array_equal(one, pixels(elsewhere))


def test_places_are_as_asked_or_as_training_slices_lie(run, monkeypatch):
    seen, real = [], CodePrior.sample

    def watched(self, position, *rest, **options):
        seen.append(position)
        return real(self, position, *rest, **options)

    monkeypatch.setattr(CodePrior, "sample", watched)
    monkeypatch.setattr(generate, "BATCH", 3)
    start("--count 2 --position 0.25")
    assert seen.pop().tolist() == [0.25, 0.25]
    start("--count 4")
    torch.testing.assert_close(torch.cat(seen), torch.tensor([0, 2 / 7, 5 / 7, 1]))


@pytest.mark.parametrize("half", ["left", "right"])
def test_completions_keep_the_given_half(run, half):
    """A trained decoder is needed to see the half itself: here, its codes' part of the picture is always the same."""
    path = Path("data/keras_slices_test/case_040_week_0_slice_1.nii.gz")
    folder = start(f"--complete {path} --keep {half} --count 3")
    assert (folder / "completion.png").stat().st_size > 5000
    images = pixels(folder, "completion")
    kept, drawn = (
        (images[:, :110], images[:, 146:]) if half == "left" else (images[:, 146:], images[:, :110])
    )
    assert np.array_equal(kept[0], kept[1]) and np.array_equal(kept[1], kept[2])
    assert not np.array_equal(drawn[0], drawn[1])
    other = Path("data/keras_slices_test/case_040_week_0_slice_2.nii.gz")
    others = pixels(start(f"--complete {other} --keep {half} --count 1"), "completion")
    assert not np.array_equal(others[0, :110] if half == "left" else others[0, 146:], kept[0])


def test_a_prior_that_saw_no_mirrored_slice_keeps_the_left_half_alone(run):
    utils.write_json(run / "prior" / "config.json", {"arguments": {"mirrored": 0.0}})
    path = Path("data/keras_slices_test/case_040_week_0_slice_1.nii.gz")
    with pytest.raises(UserError, match="has seen no mirrored slice"):
        start(f"--complete {path} --keep right")
    assert len(pixels(start(f"--complete {path} --count 1"), "completion")) == 1


def test_nothing_of_the_hidden_half_reaches_the_encoder():
    """Neither what is there nor, by z-scoring, how bright it is."""
    half, shown = torch.rand(1, 128, 128, generator=torch.Generator().manual_seed(0)), []
    for hidden in (torch.zeros(1, 128, 128), 9 + torch.rand(1, 128, 128)):
        whole = torch.cat([half, hidden], 1)
        shown.append(generate.shown_half((whole - whole.mean()) / whole.std()))
    torch.testing.assert_close(*shown, atol=1e-4, rtol=0)
    assert shown[0].mean() == pytest.approx(0, abs=1e-5) and shown[0].std() == pytest.approx(
        1, abs=1e-5
    )


def test_evaluation_measures_and_audits(run, capsys):
    folder = start("--evaluate --count 4")
    printed = capsys.readouterr().out
    result = json.loads((folder / "evaluation.json").read_text())
    assert (
        result["drawn"],
        result["slices_a_side"],
        result["training_slices"],
        result["cases"],
    ) == (4, 3, 8, 1)
    rows = {row["set"]: row for row in result["distances"]}
    assert list(rows) == ["training, two halves", "test, real", "test, reconstructed", "training, reconstructed",
                          "drawn from the prior", "codes drawn independently"]  # fmt: skip
    for row in rows.values():
        for name in ("kernel", "frechet"):
            assert math.isfinite(row[name]["mean"]) and row[name]["spread"] >= 0
    for found in result["audit"].values():
        assert 0 <= found["flagged"] <= 1 and len(found["nearest"]) == 4
        assert sum(found["flagged_by_case"].values()) == round(found["flagged"] * 4)
    assert str(Path.cwd()) not in json.dumps(result)
    assert (folder / "closest.png").stat().st_size > 5000 and (folder / "slices.png").exists()
    for part in (
        "kernel distance",
        "of the way from the first row to the last",
        "one training case",
        "flagged",
    ):
        assert part in printed
    assert (
        start("--evaluate --count 4")
        and json.loads((folder / "evaluation.json").read_text()) == result
    )


def test_a_prior_that_copies_is_caught(run, monkeypatch):
    """What it draws are the codes of training slices, and its VQ-VAE returns what it was given."""
    slices, _ = load_run_data(run, "train")
    images = slices.batch(torch.arange(8))
    monkeypatch.setattr(
        generate.Drawer,
        "draw",
        lambda self, position: torch.arange(4).view(4, 1, 1).expand(4, 64, 32),
    )

    def decode(self, codes):
        copies = codes.float().std((1, 2)) == 0
        held_out = torch.randn(
            len(codes), 1, 256, 128, generator=torch.Generator().manual_seed(len(codes))
        )
        return torch.where(copies.view(-1, 1, 1, 1), images[codes[:, 0, 0] % 8].flip(2), held_out)

    monkeypatch.setattr(generate.Drawer, "decode", decode)
    folder = start("--evaluate --count 4")
    for name, found in json.loads((folder / "evaluation.json").read_text())["audit"].items():
        assert found["flagged"] == 1 and found["flagged_by_case"] == {"004": 4}, name
        assert found["nearest"] == [0, 1, 2, 3]


def test_halves_share_no_case():
    cases = [f"{i // 4:03d}" for i in range(40)]
    seen = set()
    for seed in range(5):
        first, second = generate.halves(cases, torch.Generator().manual_seed(seed))
        assert {cases[i] for i in first} & {cases[i] for i in second} == set() and len(
            first
        ) == len(second) == 20
        seen.add(tuple(first.tolist()))
    assert len(seen) > 1
    first, second = generate.halves(["004"] * 9, torch.Generator())
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(9)) and len(first) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--count 0", "--count is 0; expected 1 to"),
        ("--evaluate --count 1", "--count is 1; expected 2 to"),
        ("--temperature -1", "--temperature is -1.0; expected 0 to 100"),
        ("--temperature nan", "--temperature is nan"),
        ("--top-p 0", "--top-p is 0.0; expected 1e-09 to 1"),
        ("--top-k -1", "--top-k is -1"),
        ("--position 1.5", "--position is 1.5; expected 0 to 1"),
        ("--keep right", "--keep says which half of a slice is given: it needs --complete"),
        ("--evaluate --complete x.nii.gz", "--evaluate and --complete are two different things"),
        ("--complete nowhere.nii.gz", r"nowhere.nii.gz can't be read \(No such file"),
        ("--complete runs/a/config.json", "is not a NIfTI file"),
        ("--run nowhere", "there is no checkpoint nowhere"),
        ("--runs-dir nowhere", "no run with a prior in nowhere; train one with train_prior.py"),
    ],
)
def test_mistakes(run, flags, message):
    with pytest.raises((UserError, utils.DataError, ValueError), match=message):
        start(flags)
    assert not (run / "generated" / "slices.png").exists()


def test_a_prior_of_other_codes_is_refused(run):
    save(
        run / "best.pt",
        VQVAE(hidden_channels=8, residual_channels=4, embedding_dim=4, num_embeddings=16),
    )
    with pytest.raises(
        UserError, match=r"was trained on other codes than those of runs/a/best\.pt; train it again"
    ):
        start("")
