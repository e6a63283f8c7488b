"""dataset.py: what is found, read, refused, normalised and cached."""

import errno
import gzip
import logging
import os
import shutil
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import dataset
import utils
from mri import cache, hipmri, preprocessing
from mri.files import format_listing
from mri.hipmri import find_hipmri
from utils import DataError

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


def bad_contents() -> dict[str, tuple[bytes, str]]:
    """Name -> (content of the file, what the message must say of it)."""

    def nifti(array):
        return nib.Nifti1Image(array, np.eye(4)).to_bytes()

    with_nan, with_inf = noise(dtype=np.float32), noise(dtype=np.float32)
    with_nan[3, 4:6], with_inf[0, 0] = np.nan, np.inf
    whole = nifti(noise())
    rgb = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    return {
        "truncated": (gzip.compress(whole)[:5000], "truncated or damaged gzip"),
        "cut": (
            whole[:5000],
            "truncated or damaged: its header tells of 65,888 bytes, it has 5,000",
        ),
        "nan": (nifti(with_nan), "2 NaN or infinite"),
        "inf": (nifti(with_inf), "1 NaN or infinite"),
        "fourd": (nifti(noise((16, 16, 3, 2))), "has shape 16 x 16 x 3 x 2, expected a 2D slice"),
        "volume": (nifti(noise((16, 16, 3))), "has shape 16 x 16 x 3, expected a 2D slice"),
        "thin": (nifti(noise((256, 2))), "has shape 256 x 2, expected"),
        "empty": (b"", "is empty (zero bytes)"),
        "text": (b"slice,score\n" * 99, "is not a NIfTI file"),
        "short": (b"hello", "is not a NIfTI file"),
        "complex": (nifti(noise().astype(np.complex64)), "holds complex64 values"),
        "rgb": (nifti(rgb), "expected one real number a pixel"),
        "huge": (
            nifti(np.linspace(0, 1e300, 256 * 128).reshape(SHAPE)),
            "intensities up to 1e+300",
        ),
    }


def test_bad_files_are_listed_in_one_error(tmp_path, write_slices, load):
    data = write_slices(tmp_path / "d")
    for name, (content, _) in bad_contents().items():
        (data / "keras_slices_train" / f"{name}.nii.gz").write_bytes(content)
    (data / "keras_slices_train/dangling.nii.gz").symlink_to(tmp_path / "nowhere")
    reasons = {name: reason for name, (_, reason) in bad_contents().items()} | {
        "dangling": "No such file"
    }
    for _ in range(2):  # decoded, then from the cache
        with pytest.raises(DataError) as error:
            load(find_hipmri(data), "train")
        lines = str(error.value).splitlines()
        for name, reason in reasons.items():
            assert [reason in line for line in lines if f"/{name}.nii.gz" in line] == [True], name
        assert lines[0].startswith(f"{len(reasons)} of the {len(reasons) + 4} files")
        assert len(lines) == len(reasons) + 2
        assert "--skip-bad-files" in lines[-1]
    good = load(find_hipmri(write_slices(tmp_path / "good")), "train")
    for _ in range(2):
        slices = load(find_hipmri(data), "train", skip_bad_files=True)
        assert slices.names == good.names
        assert torch.equal(slices.batch(torch.arange(4)), good.batch(torch.arange(4)))
        assert f"{len(reasons)} bad file(s) skipped" in slices.notes[0]
        assert all(f"/{name}.nii.gz " in slices.notes[0] for name in reasons)
    load(find_hipmri(data), "validate")  # the other splits don't suffer


def test_no_file_left(tmp_path, write_slices, load):
    data = write_slices(tmp_path / "d", train=0)
    (data / "keras_slices_train").mkdir()
    (data / "keras_slices_train/a.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)a.nii.gz is empty.*No file of this split is left"):
        load(find_hipmri(data), "train", skip_bad_files=True)
    assert caches(tmp_path / "cache") == []


def test_a_file_that_recovers_is_read_again(tmp_path, write_slices, load, monkeypatch):
    data, read = write_slices(tmp_path / "d"), Path.read_bytes

    def refuse(path):
        if path.name == "case_004_week_0_slice_2.nii.gz":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(DataError, match=r"slice_2.nii.gz can't be read \(Permission denied\)"):
            load(find_hipmri(data), "train")
        assert len(load(find_hipmri(data), "train", skip_bad_files=True)) == 3
    assert len(load(find_hipmri(data), "train")) == 4


def test_long_lists_are_cut():
    lines = format_listing([str(i) for i in range(250)]).splitlines()
    assert lines[99:] == ["  99", "  ... and 150 more"]


def test_nibabel_does_not_flood_the_terminal(tmp_path, write_nifti, load, capfd):
    path = write_nifti(tmp_path / "d/train/a.nii", noise())
    data = bytearray(path.read_bytes())
    data[76:80] = np.float32(7).tobytes()  # pixdim[0] should be 1 or -1
    path.write_bytes(data)
    load(find_hipmri(tmp_path / "d"), "train")
    assert (
        capfd.readouterr() == ("", "")
        and logging.getLogger("nibabel.global").level == logging.CRITICAL
    )


# --------------------------------------------------------------------------------------------- pixels


def test_z_score(one):
    images = [noise(seed=i, high=10 ** (i + 2)) for i in range(3)]
    slices = one(*images)
    batch = slices.batch(torch.tensor([2, 0]))
    assert batch.shape == (2, 1, *SHAPE) and batch.dtype == torch.float32
    assert slices.mean.dtype == slices.std.dtype == torch.float32
    assert len(slices) == 3 and slices.split == "train"
    for got, image in zip(batch[:, 0].double().numpy(), (images[2], images[0]), strict=True):
        assert np.allclose(got, (image - image.mean()) / image.std(), atol=2e-6)
    assert torch.equal(slices[1], slices.batch(torch.tensor([1]))[0]) and torch.equal(
        slices[-1], slices[2]
    )
    with pytest.raises(IndexError):
        slices[3]


def test_deviation_has_a_floor_and_constants_are_zero(one):
    nearly_empty = np.zeros(SHAPE, np.int16)
    nearly_empty[0, 0] = 1
    slices = one(nearly_empty, np.full(SHAPE, 77, np.int16), *(noise(seed=i) for i in range(5)))
    floor = 0.05 * np.median([nearly_empty.std(), *(noise(seed=i).std() for i in range(5))])
    assert slices.std[:2].tolist() == pytest.approx([floor, floor], rel=1e-6)
    assert slices[0].abs().max() < 0.1  # not 181, its z-score by its own deviation
    assert slices.constant.tolist() == [False, True] + [False] * 5
    assert slices[1].count_nonzero() == 0
    assert torch.all(slices.denormalise(slices[1][None], torch.tensor([1])) == 77)
    assert (
        len(slices.notes) == 1
        and "1 slice(s) of one value:\n  case_004_week_0_slice_1" in slices.notes[0]
    )


def test_only_constants(one):
    slices = one(
        np.full(SHAPE, 0.1), np.full((511, 255), 0.7)
    )  # the second is resized: rounding noise
    assert slices.constant.all() and slices.batch(torch.arange(2)).count_nonzero() == 0
    assert torch.isfinite(slices.std).all() and (slices.std > 0).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_integers_come_back_exactly(one, dtype):
    limit = np.iinfo(dtype).max + 1 if np.dtype(dtype).kind in "iu" else 65536
    image = noise(dtype=dtype, high=min(65536, limit))
    slices = one(image)
    back = slices.denormalise(slices[0][None], torch.tensor([0]))[0, 0].double().round().numpy()
    assert np.array_equal(back, image.astype(np.float64))


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, (8, 8), elements=st.floats(-1e30, 1e30)))
def test_rounding_is_at_most_half_a_step(image):
    low = image.min()
    steps, scale = cache.quantize(image, low, image.max())
    back = (steps.astype(np.float64) + 32768) * scale + low
    half = np.ptp(image) / 131070
    assert steps.dtype == np.int16
    assert np.abs(back - image).max() <= half * (1 + 1e-9) + 1e-15 * np.abs(image).max() + 1e-300


@pytest.mark.parametrize(("image", "step"), [
    ([0, 65535], 1), ([-32768, 0, 32767], 1), ([0, 65536], 65536 / 65535), ([0, 0.5, 1], 1 / 65535), ([7], 1),
])  # fmt: skip
def test_size_of_a_step(image, step):
    steps, scale = cache.quantize(np.array([image], np.float64), min(image), max(image))
    assert scale == step
    assert steps.min() == -32768 and (len(image) == 1 or steps.max() == 32767)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.int64, (8, 8), elements=st.integers(0, 65535)), st.integers(-(2**31), 2**31))
def test_integers_within_65535_steps_are_exact(image, offset):
    image += offset
    steps, scale = cache.quantize(image.astype(np.float64), float(image.min()), float(image.max()))
    assert scale == 1 and np.array_equal((steps.astype(np.int64) + 32768) + image.min(), image)


# -------------------------------------------------------------------------------------------- volumes


def test_real_slices(real_data, load):
    source = find_hipmri(real_data)
    assert [len(source.splits[split]) for split in ("train", "validate", "test")] == [86, 38, 106]
    assert any("1 subject(s) in both train and validate (218)" in note for note in source.notes)
    assert not any("and test" in note for note in source.notes)
    for split, files in source.splits.items():
        slices = load(source, split)
        assert len(slices) == len(files) and slices.notes == [] and not slices.constant.any()
        batch = slices.batch(torch.arange(len(slices)))
        back = slices.denormalise(batch, torch.arange(len(slices)))[:, 0].round().numpy()
        for image, file in zip(back, files, strict=True):
            assert np.array_equal(image, np.asarray(nib.load(file).dataobj))
        assert batch.mean((1, 2, 3)).abs().max() < 1e-5
        assert (batch.std((1, 2, 3), correction=0) - 1).abs().max() < 1e-4


# ---------------------------------------------------------------- augmentation


def test_crops_are_squares_of_the_slices_at_every_place():
    torch.manual_seed(0)
    slices = torch.arange(500 * 1 * 6 * 4.0).view(500, 1, 6, 4)
    squares = dataset.random_crop(slices, 3)
    assert squares.shape == (500, 1, 3, 3)
    seen = set()
    for i, square in enumerate(squares[:, 0]):
        top, left = divmod(int(square[0, 0]) - 24 * i, 4)
        assert torch.equal(square, slices[i, 0, top : top + 3, left : left + 3])
        seen.add((top, left))
    assert seen == {(top, left) for top in range(4) for left in range(2)}


def test_flips_are_drawn_for_each_slice():
    torch.manual_seed(0)
    images = torch.rand(1, 1, 8, 4).expand(64, 1, 8, 4)
    kinds = [images[0], images[0].flip(-1), images[0].flip(-2), images[0].flip(-1, -2)]
    seen = [
        [torch.equal(image, kind) for kind in kinds].index(True)
        for image in dataset.random_flip(images)
    ]
    assert set(seen) == {0, 1, 2, 3}


def test_squares_are_turned_all_eight_ways():
    torch.manual_seed(0)
    square = torch.rand(1, 1, 4, 4)
    turned = dataset.random_flip(square.expand(200, 1, 4, 4))
    ways = {
        tuple(x.flip(axes).flatten().tolist())
        for x in (square, square.mT)
        for axes in ((), (-1,), (-2,), (-1, -2))
    }
    assert {tuple(x.flatten().tolist()) for x in turned} == ways and len(ways) == 8


# -------------------------------------------------------------------------------- batches on a device


def test_batches_are_the_same_on_every_path(write_slices, tmp_path, monkeypatch):
    """As they are read, out of a device's memory, and read ahead by a thread; a last group may be small, or empty."""
    split = dataset.load_split(
        hipmri.find_hipmri(write_slices(tmp_path / "data", train=9, validate=1)), "train"
    )
    groups = [
        *torch.randperm(9, generator=torch.Generator().manual_seed(0)).split(4),
        torch.tensor([], dtype=torch.long),
    ]
    expected = [split.batch(group) for group in groups]
    cpu = torch.device("cpu")

    def check(device=cpu):
        found = [images.clone() for images in split.batches(groups, device)]
        assert [len(images) for images in found] == [4, 4, 1, 0]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    check()
    real = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda x, device, **_: real(x, cpu if device == torch.device("mps") else device),
    )
    check(torch.device("mps"))  # neither CPU nor placed: the thread reads
    monkeypatch.undo()
    monkeypatch.setattr(dataset, "free_memory", lambda device: 9 * 256 * 128 * 2 * 4)
    assert "over 20% of cpu's free memory" in split.place(cpu, share=0.2)
    assert split._placed is None
    assert "in the memory of cpu" in split.place(cpu, share=0.25)
    monkeypatch.setattr(split, "_stored", None)  # nothing is read any more
    check()
    assert list(split.batches([], cpu)) == []


def test_reading_ahead_keeps_order_and_bounds():
    """At most `depth` groups wait; an error reaches the reader, and a reader that stops stops the thread."""
    read = []
    found = []
    for number in dataset.prefetch(
        lambda group: read.append(group) or 2 * group, range(20), depth=2
    ):
        found.append(number)
        assert len(read) <= len(found) + 3
    assert read == list(range(20)) and found == [2 * group for group in read]
    with pytest.raises(ZeroDivisionError):
        list(dataset.prefetch(lambda group: 1 // group, [1, 0]))
    reader = dataset.prefetch(lambda group: read.append(group), range(100), depth=2)
    next(reader)
    reader.close()
    assert len(read) < 30


# ---------------------------------------------------------------- single slices, and where they lie


def test_positions_are_between_the_ends_of_each_volume(tmp_path, write_nifti):
    """By week and case; unknown where a name tells no slice, or is alone."""
    image = np.arange(256 * 128, dtype=np.int16).reshape(256, 128)
    names = [f"case_004_week_0_slice_{n}" for n in (0, 5, 20)] + [
        f"case_004_week_1_slice_{n}" for n in (3, 7)
    ]
    for name in [*names, "case_005_week_0_slice_4", "scan"]:
        write_nifti(tmp_path / "data" / "train" / f"{name}.nii.gz", image)
    slices = dataset.load_split(hipmri.find_hipmri(tmp_path / "data"), "train", progress=False)
    found = dict(zip((name.stem for name in slices.names), slices.positions.tolist(), strict=True))
    assert [found[name] for name in names] == [0, 0.25, 1, 0, 1]
    assert np.isnan(found["case_005_week_0_slice_4"]) and np.isnan(found["scan"])


@pytest.mark.parametrize("shape", [(256, 128), (300, 144), (256, 128, 1)])
def test_a_single_slice_is_read_as_the_data_set_reads_it(tmp_path, write_nifti, shape):
    image = np.random.default_rng(0).integers(0, 900, shape).astype(np.int16)
    path = write_nifti(tmp_path / "data" / "train" / "case_004_week_0_slice_0.nii.gz", image)
    slices = dataset.load_split(hipmri.find_hipmri(tmp_path / "data"), "train", progress=False)
    torch.testing.assert_close(dataset.read_slice(path), slices[0], rtol=1e-4, atol=1e-4)


def test_single_slices_that_cannot_be_read(tmp_path, write_nifti):
    flat = write_nifti(tmp_path / "flat.nii.gz", np.full((256, 128), 7, np.int16))
    volume = write_nifti(tmp_path / "volume.nii.gz", np.zeros((20, 20, 20), np.int16))
    for path, message in (
        (flat, "is of one value"),
        (volume, "has shape 20 x 20 x 20"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(utils.DataError, match=message):
            dataset.read_slice(path)
    with pytest.raises(utils.DataError, match="No such file"):
        preprocessing.slice_affine(tmp_path / "no")
