"""dataset.py: what is found, read, refused, normalised and cached."""

import os
import shutil
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import resize

import dataset
from mri import nifti, preprocessing
from mri.hipmri import find_hipmri

SHAPE = (256, 128)


@pytest.fixture
def load(tmp_path):
    """`load_split` without a progress bar, its cache in the test's folder."""
    return partial(dataset.load_split, cache_dir=tmp_path / "cache", progress=False)


@pytest.fixture
def one(tmp_path, write_nifti, load):
    """one(arrays, **options): a training split of these arrays, in order, loaded."""

    def make(*arrays: np.ndarray, affine=None, **options) -> dataset.SliceDataset:
        shutil.rmtree(tmp_path / "one", ignore_errors=True)
        for i, array in enumerate(arrays):
            write_nifti(tmp_path / "one/train" / f"case_004_week_0_slice_{i}.nii", array, affine)
        return load(find_hipmri(tmp_path / "one"), "train", **options)

    return make


def noise(shape=SHAPE, seed=0, dtype=np.int16, high=900) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def no_decoding(*_, **__):
    raise AssertionError("decoded a file although the cache holds it")


def die(*_):
    os._exit(1)  # what the kernel does to a process when memory runs out, seen from outside


def caches(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


# --------------------------------------------------------------------------------- names and finding


def test_trailing_dimensions_of_one_and_scale_factors(tmp_path, one, load):
    assert torch.equal(one(noise()[..., None, None])[0], one(noise())[0])
    image = nib.Nifti1Image(noise(), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    (tmp_path / "s/train").mkdir(parents=True)
    (tmp_path / "s/train/a.nii").write_bytes(image.to_bytes())
    slices = load(find_hipmri(tmp_path / "s"), "train")
    values = slices.denormalise(slices[0][None], torch.tensor([0]))[0, 0]
    assert np.allclose(values, noise() * 0.5 + 10, atol=900 * 0.5 / 131070 + 1e-3)


@pytest.mark.parametrize("make", [nib.Nifti2Image, nib.Nifti1Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_nifti_versions_and_byte_orders(tmp_path, load, make, order):
    image = make(noise(), np.eye(4), make.header_class(endianness=order))
    (tmp_path / "s/train").mkdir(parents=True)
    (tmp_path / "s/train/a.nii").write_bytes(image.to_bytes())
    slices = load(find_hipmri(tmp_path / "s"), "train")
    assert np.array_equal(
        slices.denormalise(slices[0][None], torch.tensor([0]))[0, 0].round(), noise()
    )


@pytest.mark.parametrize("shape", [(256, 144), (128, 64), (300, 100), (511, 255)])
def test_resize_matches_torchvision(one, shape):
    image = noise(shape, dtype=np.float32)
    slices = one(image)
    expected = resize(torch.from_numpy(image)[None], list(SHAPE), antialias=True)
    got = slices.denormalise(slices[0][None], torch.tensor([0]))[0]
    assert slices[0].shape == (1, *SHAPE)
    assert (got - expected).abs().max() < 900 / 131070 + 1e-3


def test_crop_is_exact_where_it_can_be(one):
    image = noise((256, 144))
    assert torch.equal(one(image, fit="crop")[0], one(image[:, 8:136])[0])
    tall = noise((300, 128))
    assert torch.equal(one(tall, fit="crop")[0], one(tall[22:278])[0])
    large = noise((512, 300), dtype=np.float32)
    assert torch.allclose(one(large, fit="crop")[0], one(large[:, 22:278])[0], atol=1e-6)


def test_notes_on_proportions_count_slices(one):
    wide = [noise((256, 144), seed=i) for i in range(3)]
    notes = one(
        noise(), noise((512, 256)), noise((256, 132)), *wide
    ).notes  # 132: 3 %, not worth a note
    assert len(notes) == 1 and "train: 3 slice(s) of 256 x 144" in notes[0]
    assert "12.5%" in notes[0] and "--fit crop" in notes[0]
    assert one(noise()).notes == []
    notes = one(noise(), noise((256, 132)), *wide, fit="crop").notes
    assert len(notes) == 1 and "train: 3 slice(s) of 256 x 144 lose their edges" in notes[0]


def test_an_affine_keeps_voxels_where_they_are(tmp_path, write_nifti):
    """Resized, cut out of a volume that is stored in another orientation, or cropped: sizes in mm, axes, and centre."""
    affine = np.array(
        [[1.5, 0, 0, -80], [0, 0, 3.0, 7], [0, 2.0, 0, 11], [0, 0, 0, 1]]
    )  # rows right, columns up
    path = write_nifti(tmp_path / "slice.nii.gz", np.zeros((128, 64, 1), np.int16), affine)
    found = preprocessing.slice_affine(path)
    np.testing.assert_allclose(found[:3, :3], [[0.75, 0, 0], [0, 0, 3], [0, 1, 0]])
    np.testing.assert_allclose(found @ [127.5, 63.5, 0, 1], [0, 0, 0, 1], atol=1e-6)
    wide = write_nifti(
        tmp_path / "wide.nii.gz", np.zeros((256, 144), np.int16), np.diag([1.5, 2.0, 3.0, 1])
    )
    resized, cropped = (
        np.diag(preprocessing.slice_affine(wide, fit=fit)) for fit in ("resize", "crop")
    )
    np.testing.assert_allclose(resized, [1.5, 2 * 144 / 128, 3, 1])
    np.testing.assert_allclose(cropped, [1.5, 2, 3, 1])
    turned = np.array(
        [[0, 0, -1.68, 200], [2.5, 0, 0, -90], [0, 1.56, 0, -100], [0, 0, 0, 1]]
    )  # A, S, L
    volume = write_nifti(tmp_path / "volume.nii.gz", np.zeros((60, 128, 256), np.int16), turned)
    found = preprocessing.slice_affine(volume, "3D")
    np.testing.assert_allclose(found[:3, :3], [[1.68, 0, 0], [0, 0, 2.5], [0, 1.56, 0]], atol=1e-6)


def test_a_slice_that_is_written_reads_back(tmp_path):
    image = torch.arange(256.0 * 128).view(1, 256, 128) / 10 - 5
    affine = np.array([[1.68, 0, 0, -214], [0, 0, 1.68, 0], [0, 1.56, 0, -99], [0, 0, 0, 1]])
    (tmp_path / "x.nii.gz").write_bytes(nifti.nifti_bytes(image[0].numpy()[..., None], affine))
    written = nib.load(tmp_path / "x.nii.gz")
    np.testing.assert_allclose(written.get_fdata()[..., 0], image[0])
    np.testing.assert_allclose(written.affine, affine, atol=1e-4)
    assert written.shape == (256, 128, 1) and written.header["descrip"] == b""
    standard = dataset.read_slice(tmp_path / "x.nii.gz") * image.std(correction=0) + image.mean()
    torch.testing.assert_close(standard, image, atol=0.1, rtol=0)
