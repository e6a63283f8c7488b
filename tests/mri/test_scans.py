"""A person's own files: they come back as they were, at their own size; codes out and in; organs; odd ones."""

import csv
import gzip

import nibabel as nib
import numpy as np
import pytest
import torch

import dataset
import predict
import utils
from evaluation import reconstruct
from modules import VQVAE
from mri import nifti, splits
from training.checkpoint import write_checkpoint

AFFINE = np.array([[1.7, 0, 0, -20], [0, 1.5, 0, 7], [0, 0, 2, 3], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a best.pt of a small, untrained model, whose training slices had voxels of 1.7 x 2 mm."""
    torch.manual_seed(0)
    model = VQVAE(hidden_channels=8, residual_channels=4, num_embeddings=16, embedding_dim=4)
    folder = tmp_path_factory.mktemp("runs") / "x"
    folder.mkdir()
    slices = {"size": [256, 128], "spacing": [1.7, 2.0], "axis": "coronal"}
    kept = {
        "format": 3,
        "model_args": model.arguments,
        "model": model.state_dict(),
        "slices": slices,
    }
    write_checkpoint(folder / "best.pt", kept)
    return folder


@pytest.fixture
def reconstruct(run, tmp_path):
    """reconstruct(path, "--flags") -> output folder."""

    def reconstruct(path, flags="", out="out"):
        command = [
            str(path),
            "-o",
            str(tmp_path / out),
            "--run",
            str(run),
            "--device",
            "cpu",
            *flags.split(),
        ]
        assert predict.main(command) == 0
        return tmp_path / out

    return reconstruct


def volume(shape=(20, 24, 28), dtype=np.int16):
    return np.random.default_rng(0).integers(0, 900, shape).astype(dtype)


def write(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header["descrip"] = b"DOE^JANE"
    path.write_bytes(gzip.compress(image.to_bytes()))
    return path


def rows_of(folder):
    with open(folder / "scores.csv") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- files as slices, and back


@pytest.fixture
def study(tmp_path):
    """Five subjects as BIDS has them, two scans each of 20 x 24 x 28, the outer planes empty."""
    for subject in "ABCDE":
        for session in (1, 2):
            array = volume() + 50
            array[:4] = array[:, :5] = array[..., :6] = 0
            name = f"sub-{subject}_ses-{session}_T2w.nii.gz"
            write(tmp_path / "study" / f"sub-{subject}" / f"ses-{session}" / "anat" / name, array)
    return tmp_path / "study"


def subjects(source):
    return {
        split: {source.subjects[file] for file in files} for split, files in source.splits.items()
    }


@pytest.mark.parametrize(("axis", "count", "size"), [
    ("sagittal", 16, (32, 32)), ("coronal", 19, (16, 32)), ("axial", 22, (16, 32)), ("2", 22, (16, 32)),
])  # fmt: skip
def test_scans_are_cut_and_empty_slices_left_out(study, tmp_path, axis, count, size):
    source = splits.find_source(study, axis)
    train_slices = dataset.load_split(
        source, "train", axis=axis, cache_dir=tmp_path / "cache", progress=False
    )
    assert len(train_slices) == 6 * count and train_slices.size == size
    through = int(axis) if axis == "2" else nifti.AXES[axis]
    plane = np.moveaxis(nib.load(train_slices.files[0]).get_fdata(), through, 0)[
        train_slices.names[0].slice
    ]
    resized = dataset.load_split(
        source, "train", axis=axis, size=plane.shape, cache_dir=tmp_path / "c", progress=False
    )
    expected = torch.from_numpy((plane - plane.mean()) / plane.std()).float()
    torch.testing.assert_close(resized[0][0], expected, atol=1e-3, rtol=0)
    spacing = np.delete([1.7, 1.5, 2.0], through)
    np.testing.assert_allclose(resized.description["spacing"], spacing, rtol=1e-5)


def test_slices_and_volumes_take_the_room_that_they_need(tmp_path):
    """Each file has as many rows of the cache as it has planes, whatever the deepest of them has."""
    for i in range(6):
        write(tmp_path / "mixed" / f"sub-{i}.nii.gz", volume((20, 28)) + i)
    write(tmp_path / "mixed" / "sub-3.nii.gz", volume((20, 40, 28)))
    everyone = {"train": {str(i): [f"sub-{i}.nii.gz"] for i in range(6)}}
    source = splits.find_source(tmp_path / "mixed", "coronal", manifest=everyone)
    slices = dataset.load_split(
        source, "train", axis="coronal", size=(16, 32), cache_dir=tmp_path, progress=False
    )
    assert [name.case for name in slices.names] == ["0", "1", "2", *["3"] * 40, "4", "5"]
    assert np.load(next(tmp_path.glob("*/pixels.npy")), mmap_mode="r").shape == (45, 16, 32)
    means = [volume((20, 28)).mean() + i for i in (0, 1, 2, 4, 5)]
    np.testing.assert_allclose(slices.mean[[0, 1, 2, 43, 44]], means, atol=5)
    np.testing.assert_allclose(slices.mean[3:43], volume((20, 40, 28)).mean((0, 2)), atol=15)


def test_a_file_that_grows_while_it_is_read_takes_no_other_files_rows(tmp_path, monkeypatch):
    for i in range(3):
        write(tmp_path / "study" / f"sub-{i}.nii.gz", volume())
    everyone = {"train": {str(i): [f"sub-{i}.nii.gz"] for i in range(3)}}
    source = splits.find_source(tmp_path / "study", "coronal", manifest=everyone)
    real = nifti.read_header
    write(tmp_path / "before.nii.gz", volume((20, 5, 28)))
    names = {"sub-1.nii.gz": tmp_path / "before.nii.gz"}
    monkeypatch.setattr(nifti, "read_header", lambda path: real(names.get(path.name, path)))
    with pytest.raises(
        utils.DataError, match=r"(?s)1 of the 3 files.*sub-1.nii.gz was changed while it was read"
    ):
        dataset.load_split(source, "train", axis="coronal", cache_dir=tmp_path, progress=False)


def test_slices_get_the_size_that_most_have(tmp_path):
    """Not that of the first files, and what is resized by much is told."""
    write(tmp_path / "d" / "sub-0.nii.gz", volume((20, 24, 3)))
    for i in range(1, 4):
        write(tmp_path / "d" / f"sub-{i}.nii.gz", volume((64, 96, 3)))
    everyone = {"train": {str(i): [f"sub-{i}.nii.gz"] for i in range(4)}}
    source = splits.find_source(tmp_path / "d", "axial", manifest=everyone)
    slices = dataset.load_split(source, "train", axis="axial", cache_dir=tmp_path, progress=False)
    assert slices.size == (64, 96)
    assert any("3 slice(s) of 20 x 24 are resized to 64 x 96" in note for note in slices.notes)
    slices = dataset.load_split(
        source, "train", axis="axial", size=(32, 48), cache_dir=tmp_path, progress=False
    )
    assert any("9 slice(s) of 64 x 96 are resized to 32 x 48" in note for note in slices.notes)


def test_what_is_little_larger_is_cut_not_resampled(tmp_path):
    """SliceDataset, their segmentations and their affine; what would lose over a tenth is resized."""
    labels = np.random.default_rng(0).integers(0, 6, (34, 4, 50)).astype(np.uint8)
    for case in ("004", "005"):
        shape = (34, 4, 50) if case == "004" else (34, 4, 60)
        array = np.resize(labels, shape).astype(np.int16) * 100
        array[:, 1] += 7
        write(tmp_path / "semantic_MRs_anon" / f"Case_{case}_Week0_LFOV.nii.gz", array)
        write(
            tmp_path / "semantic_labels_anon" / f"Case_{case}_Week0_SEMANTIC_LFOV.nii.gz",
            np.resize(labels, shape),
        )
    everyone = {
        "train": {c: [f"semantic_MRs_anon/Case_{c}_Week0_LFOV.nii.gz"] for c in ("004", "005")}
    }
    source = splits.find_source(tmp_path, "coronal", manifest=everyone)
    slices = dataset.load_split(source, "train", axis="coronal", cache_dir=tmp_path, progress=False)
    assert slices.size == (32, 48) and slices.fit == "trim" and len(slices) == 8
    inside = labels[1:33, :, 1:49]
    images = slices.denormalise(slices.batch(torch.arange(4)), torch.arange(4))[:, 0].round()
    assert torch.equal(slices.labels()[:4], torch.from_numpy(inside).movedim(1, 0))
    assert torch.equal(images[0], torch.from_numpy(inside[:, 0]).float() * 100)
    np.testing.assert_allclose(
        slices.description["spacing"], [1.753125, 2.25], rtol=1e-5
    )  # medians of 1.7 and 1.80625, 2 and 2.5
    assert any("4 slice(s) of 34 x 50 are cut to 32 x 48" in note for note in slices.notes)
    assert slices.labels()[4:].shape == (4, 32, 48) and any(
        "34 x 60 are resized" in note for note in slices.notes
    )


def test_places_in_volumes_are_by_file(tmp_path):
    """Two volumes of one person are two volumes; 2D slices keep the numbers that their names have."""
    for depth, name in ((5, "a"), (9, "b")):
        write(tmp_path / "d" / f"sub-0_{name}.nii.gz", volume((16, 16, depth)))
    for number in (3, 4, 7):
        write(tmp_path / "d" / f"case_007_week_0_slice_{number}.nii.gz", volume((16, 16)))
    files = [path.name for path in (tmp_path / "d").iterdir()]
    everyone = {
        "train": {"0": [n for n in files if n[0] == "s"], "007": [n for n in files if n[0] == "c"]}
    }
    source = splits.find_source(tmp_path / "d", "axial", manifest=everyone)
    slices = dataset.load_split(source, "train", axis="axial", cache_dir=tmp_path, progress=False)
    expected = [0, 0.25, 1, *np.linspace(0, 1, 5), *np.linspace(0, 1, 9)]
    np.testing.assert_allclose(slices.positions, expected)
    assert [slices.names[i].stem for i in (1, 4)] == ["case_007_week_0_slice_4", "sub-0_a_slice_1"]


def test_headers_that_claim_more_than_files_hold_take_no_room(tmp_path):
    write(tmp_path / "d" / "sub-0.nii.gz", volume((16, 16, 4)))
    image = nib.Nifti1Image(np.zeros((16, 16, 4), np.int16), np.eye(4))
    content = bytearray(image.to_bytes())
    content[46:48] = (30000).to_bytes(2, "little")  # planes
    (tmp_path / "d" / "sub-1.nii").write_bytes(content)
    (tmp_path / "d" / "sub-2.nii.gz").write_bytes(gzip.compress(content))
    everyone = {"train": {"0": ["sub-0.nii.gz"], "1": ["sub-1.nii"], "2": ["sub-2.nii.gz"]}}
    source = splits.find_source(tmp_path / "d", "axial", manifest=everyone)
    options = {"axis": "axial", "cache_dir": tmp_path, "progress": False}
    with pytest.raises(
        utils.DataError,
        match=r"(?s)2 of the 3 files.*sub-1.nii is truncated.*sub-2.nii.gz is trunc",
    ):
        dataset.load_split(source, "train", **options)
    assert len(dataset.load_split(source, "train", skip_bad_files=True, **options)) == 4
    assert np.load(next(tmp_path.glob("*/pixels.npy")), mmap_mode="r").shape[0] == 6
