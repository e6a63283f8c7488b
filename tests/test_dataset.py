"""dataset.py: what is found, read, refused, normalised and cached."""

import errno
import gzip
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchvision.transforms.v2.functional import resize

import dataset
import utils
from mri import cache, hipmri, nifti, preprocessing
from mri.files import SliceName, format_listing, parse_name
from mri.hipmri import find_hipmri
from mri.splits import find_data
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


@pytest.mark.parametrize(("path", "expected"), [
    ("a/case_004_week_0_slice_12.nii.gz", SliceName("004", "0", 12, "case_004_week_0_slice_12")),
    ("a/case_040_week_10_slice_0.nii", SliceName("040", "10", 0, "case_040_week_10_slice_0")),
    ("Case_004_Week0_LFOV.nii.gz", SliceName("004", "0", 0, "Case_004_Week0_LFOV")),
    ("a/case_004_week_0_slice_3.nii.gz/case_4.nii", SliceName("004", "0", 3, "case_004_week_0_slice_3")),
    ("a/patient-7.b.nii.gz", SliceName("patient-7.b", "", 0, "patient-7.b")),
    ("a/case_12x.nii.gz", SliceName("case_12x", "", 0, "case_12x")),
    ("a/casework.nii", SliceName("casework", "", 0, "casework")),
])  # fmt: skip
def test_names(path, expected):
    assert parse_name(path) == parse_name(Path(path)) == expected


def test_natural_order(tmp_path, write_nifti, load):
    for number in (10, 2, 1, 0):
        write_nifti(
            tmp_path / "d/keras_slices_train" / f"case_004_week_0_slice_{number}.nii.gz",
            noise(seed=number),
        )
    slices = load(find_hipmri(tmp_path / "d"), "train")
    assert [name.slice for name in slices.names] == [0, 1, 2, 10]
    for i, number in enumerate((0, 1, 2, 10)):
        image = slices.denormalise(slices[i][None], torch.tensor([i]))[0, 0]
        assert np.array_equal(image.round().numpy(), noise(seed=number))


@pytest.mark.parametrize("prefix", ["keras_slices_", "", "KERAS_SLICES_"])
def test_2d_forms(tmp_path, write_slices, prefix):
    source = find_hipmri(write_slices(tmp_path / "d", prefix=prefix))
    assert source.form == "2D" and source.root == tmp_path / "d"
    assert [(split, len(files)) for split, files in source.splits.items()] == [
        ("train", 4),
        ("validate", 2),
        ("test", 2),
    ]
    assert source.notes == [f"{tmp_path / 'd'}: train 4, validate 2, test 2 slices"]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validate"])
def test_names_of_the_validation_folder(tmp_path, write_nifti, name):
    write_nifti(tmp_path / "d" / name / "a.nii", noise())
    assert list(find_hipmri(tmp_path / "d").splits) == ["validate"]


@pytest.mark.parametrize(("given", "says"), [
    ("top", "two levels below"), ("top/mid", "one level below"), ("top/mid/data", "data:"),
    ("top/mid/data/keras_slices_test", "one level above"),
    ("top/mid/data/keras_slices_seg_test", "one level above"),
])  # fmt: skip
def test_too_high_or_too_deep(tmp_path, write_slices, write_nifti, given, says):
    data = write_slices(tmp_path / "top/mid/data")
    write_nifti(data / "keras_slices_seg_test/seg_040_week_0_slice_0.nii.gz", noise())
    source = find_hipmri(tmp_path / given)
    assert source.root == data and len(source.splits["train"]) == 4
    assert says in source.notes[0] and str(data) in source.notes[0]


def test_never_goes_above_an_unrelated_folder(tmp_path, write_slices):
    write_slices(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no slices found"):
        find_hipmri(tmp_path / "empty")


def test_several_candidates_are_an_error(tmp_path, write_slices):
    write_slices(tmp_path / "d/one")
    write_slices(tmp_path / "d/two")
    with pytest.raises(DataError, match="2 data sets") as error:
        find_hipmri(tmp_path / "d")
    assert "one (2D form)" in str(error.value) and "two (2D form)" in str(error.value)


def test_two_folders_for_one_split_are_an_error(tmp_path, write_nifti):
    for name in ("val", "validation"):
        write_nifti(tmp_path / "d" / name / "a.nii", noise())
    with pytest.raises(DataError, match="two folders for the validate split"):
        find_hipmri(tmp_path / "d")


def test_folders_with_file_names(tmp_path, write_nifti, load):
    folder = tmp_path / "d/keras_slices_train"
    for number in (10, 9):
        inner = folder / f"case_004_week_0_slice_{number}.nii.gz" / f"x{20 - number}.nii"
        write_nifti(inner, noise(seed=number))
    write_nifti(folder / "case_004_week_0_slice_11.nii.gz" / "._junk.nii", noise())
    write_nifti(folder / "case_004_week_0_slice_11.nii.gz" / "inner.nii", noise())
    slices = load(find_hipmri(tmp_path / "d"), "train")
    assert [name.slice for name in slices.names] == [9, 10, 11]
    (folder / "case_004_week_0_slice_12.nii.gz").mkdir()
    with pytest.raises(DataError, match=r"slice_12.nii.gz is a folder, expected exactly one"):
        load(find_hipmri(tmp_path / "d"), "train")


def test_gzip_is_told_by_content(tmp_path, write_nifti, load):
    write_nifti(tmp_path / "d/train/a.nii.gz", noise(seed=1), compress=False)
    write_nifti(tmp_path / "d/train/b.nii", noise(seed=2), compress=True)
    slices = load(find_hipmri(tmp_path / "d"), "train")
    assert torch.equal(
        slices.mean, torch.tensor([noise(seed=1).mean(), noise(seed=2).mean()]).float()
    )


def test_junk_and_masks_are_never_read(tmp_path, write_slices, write_nifti):
    data = write_slices(tmp_path / "d")
    good = find_hipmri(data).splits
    for junk in (
        "keras_slices_train/._case_004_week_0_slice_0.nii.gz",
        "keras_slices_train/.DS_Store",
        "keras_slices_train/notes.txt",
        "__MACOSX/keras_slices_train/case_005_week_0_slice_0.nii",
    ):
        (data / junk).parent.mkdir(parents=True, exist_ok=True)
        (data / junk).write_bytes(b"junk")
    for mask in (
        "keras_slices_seg_train/seg_004_week_0_slice_0.nii.gz",
        "keras_slices_train/SEG_004_week_0.nii.gz",
        "semantic_labels_anon/Case_004_Week0_SEMANTIC_LFOV.nii.gz",
        "keras_slices_train/Case_004_Week0_SEMANTIC_LFOV.nii.gz",
    ):
        write_nifti(data / mask, noise())
    assert find_hipmri(data).splits == good
    write_slices(tmp_path / "zip/__MACOSX")
    write_slices(tmp_path / "zip/data")
    assert find_hipmri(tmp_path / "zip").root == tmp_path / "zip/data"


def test_masks_with_image_names_and_images_under_a_mask_like_folder(
    tmp_path, write_slices, write_nifti
):
    labels = tmp_path / "release/semantic_labels_anon"
    write_nifti(labels / "Case_004_Week0_LFOV.nii.gz", noise((8, 8, 8)))
    with pytest.raises(DataError, match="no slices found"):
        find_hipmri(labels)
    data = write_slices(tmp_path / "for_semantic_segmentation/keras_slices_data")
    assert find_hipmri(tmp_path / "for_semantic_segmentation").root == data


def test_cases_in_two_splits(tmp_path, write_slices, write_nifti):
    data = write_slices(tmp_path / "d")
    assert not any("warning" in note for note in find_hipmri(data).notes)
    write_nifti(data / "keras_slices_test/case_4_week_9_slice_0.nii.gz", noise())
    warnings = [note for note in find_hipmri(data).notes if note.startswith("warning")]
    assert len(warnings) == 1 and "1 case(s) in both train and test (004)" in warnings[0]


def test_find_data(tmp_path, monkeypatch):
    assert find_data(None)[0] is None and "sample" in find_data(None)[1]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.setenv("HIPMRI_DATA", str(tmp_path / "a"))
    assert find_data(None) == (tmp_path / "a", f"data: {tmp_path / 'a'}, from $HIPMRI_DATA")
    assert find_data(str(tmp_path / "b")) == (
        tmp_path / "b",
        f"data: {tmp_path / 'b'}, from --data",
    )
    with pytest.raises(DataError, match=r"--data names, '.*missing': No such file"):
        find_data(tmp_path / "missing")
    with pytest.raises(DataError, match="--data names, ''"):
        find_data("")
    monkeypatch.setenv("HIPMRI_DATA", str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"\$HIPMRI_DATA names"):
        find_data(None)
    monkeypatch.setenv("HIPMRI_DATA", "")
    assert find_data(None)[0] is None


# -------------------------------------------------------------------------------------- wrong layouts


def test_wrong_split_names_say_what_was_found(tmp_path, write_nifti):
    write_nifti(tmp_path / "d/keras_slices_trainset/case_004_week_0_slice_0.nii.gz", noise())
    with pytest.raises(DataError) as error:
        find_hipmri(tmp_path / "d")
    for part in (
        "keras_slices_trainset/: 1 NIfTI",
        "expected one of",
        "keras_slices_train/",
        "Rename",
    ):
        assert part in str(error.value)


def test_missing_folder_and_file_as_folder(tmp_path):
    with pytest.raises(DataError, match="missing; expected"):
        find_hipmri(tmp_path / "nothing")
    (tmp_path / "data.zip").write_bytes(b"")
    with pytest.raises(DataError, match="a file; expected"):
        find_hipmri(tmp_path / "data.zip")


def test_no_slices(tmp_path):
    (tmp_path / "d/keras_slices_train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"(?s)no slices found.*keras_slices_train/: 0 NIfTI"):
        find_hipmri(tmp_path / "d")


def test_missing_or_empty_split(tmp_path, write_slices, load):
    data = write_slices(tmp_path / "d", test=0)
    for _ in range(2):
        with pytest.raises(DataError, match=r"test split .* missing or empty") as error:
            load(find_hipmri(data), "test")
        assert "keras_slices_train/: 4 NIfTI image(s)" in str(error.value)
        (data / "keras_slices_test").mkdir(exist_ok=True)
    with pytest.raises(DataError, match="split is 'tset'"):
        load(find_hipmri(data), "tset")


@pytest.mark.parametrize("part", ["", "keras_slices_train"])
def test_unreadable_folder(tmp_path, write_slices, monkeypatch, part):
    data, scandir = write_slices(tmp_path / "d"), os.scandir

    def refuse(path):
        if Path(path) == data / part:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=f"{data / part} can't be read: Permission denied"):
        find_hipmri(data)


def test_an_unreadable_folder_beside_the_data_does_no_harm(tmp_path, write_slices, monkeypatch):
    data, scandir = write_slices(tmp_path / "top/data"), os.scandir
    (tmp_path / "top/lost+found").mkdir()

    def refuse(path):
        if Path(path).name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_hipmri(tmp_path / "top").root == data
    data.rename(tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match=r"(?s)no slices found.*lost\+found can't be read: Permission denied"
    ):
        find_hipmri(tmp_path / "top")


# ------------------------------------------------------------------------------------------ bad files


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


def volume(rng_seed=0, shape=(24, 20, 16)) -> np.ndarray:
    """Right, anterior, superior axes; the left-superior corner of every coronal plane is marked."""
    data = noise(shape, seed=rng_seed)
    data[: shape[0] // 2, :, shape[2] // 2 :] += 2000
    return data


def as_lsp(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same volume stored with axes left, superior, posterior, and the affine that says so."""
    stored = data[::-1, ::-1].transpose(0, 2, 1)
    affine = np.array([[-2.0, 0, 0, 40], [0, 0, -2, 30], [0, 2, 0, -10], [0, 0, 0, 1]])
    return stored, affine


def write_3d(root: Path, write_nifti, cases=(4, 36, 42), **kwargs) -> Path:
    for case in cases:
        stored, affine = as_lsp(volume(case, **kwargs))
        write_nifti(
            root / "semantic_MRs_anon" / f"Case_{case:03d}_Week0_LFOV.nii.gz", stored, affine
        )
        labels = root / "semantic_labels_anon" / f"Case_{case:03d}_Week0_SEMANTIC_LFOV.nii.gz"
        write_nifti(labels, stored, affine)
    return root


@pytest.mark.parametrize("given", [
    "", "release", "release/semantic_MRs_anon", "release/semantic_labels_anon",
])  # fmt: skip
def test_3d_form(tmp_path, write_nifti, load, given):
    write_3d(tmp_path / "top/release", write_nifti)
    source = find_hipmri(tmp_path / "top" / given)
    assert source.form == "3D" and source.root == tmp_path / "top/release/semantic_MRs_anon"
    assert {s: [f.name[:8] for f in files] for s, files in source.splits.items()} == {
        "train": ["Case_004"],
        "validate": ["Case_036"],
        "test": ["Case_042"],
    }
    assert "12,660" in source.notes[1]


def test_3d_slices_are_coronal(tmp_path, write_nifti, load):
    source = find_hipmri(write_3d(tmp_path / "release", write_nifti))
    slices = load(source, "train", planes=4)
    assert slices.names[0] == SliceName("004", "0", 8, "Case_004_Week0_LFOV_slice_8")
    assert [name.slice for name in slices.names] == [8, 9, 10, 11]
    assert "4 slices, the central coronal planes (of 8-11) of 1 volume(s)" in slices.notes[0]
    for i, plane in enumerate(range(8, 12)):
        coronal = torch.from_numpy(volume(4)[:, plane].astype(np.float64))
        expected = resize(coronal[None], list(SHAPE), antialias=True)
        got = slices.denormalise(slices[i][None], torch.tensor([i]))[0]
        assert (got - expected).abs().max() < 3000 / 131070 + 1e-3
        assert (
            got[0, :128, 64:].mean() > got[0, 128:].mean() + 1000
        )  # rows from the left, columns from below


def test_3d_takes_all_planes_where_there_are_fewer(tmp_path, write_nifti, load):
    release = write_3d(tmp_path / "release", write_nifti, cases=(4,))
    write_nifti(release / "semantic_MRs_anon/Case_005_Week0_LFOV.nii.gz", volume(5, (16, 70, 16)))
    slices = load(find_hipmri(release), "train")
    assert [name.slice for name in slices.names] == [*range(20), *range(5, 65)]
    expected = volume(5, (16, 70, 16))[:, 64].mean()
    assert slices.mean[-1].item() == pytest.approx(expected, rel=0.05)


def test_3d_bad_volumes(tmp_path, write_nifti, load):
    release = write_3d(tmp_path / "release", write_nifti, cases=(4, 5))
    broken = volume(6).astype(np.float32)
    broken[0, 10, 0] = np.nan
    write_nifti(release / "semantic_MRs_anon/Case_006_Week0_LFOV.nii.gz", broken)
    write_nifti(release / "semantic_MRs_anon/Case_007_Week0_LFOV.nii.gz", noise())
    with pytest.raises(DataError) as error:
        load(find_hipmri(release), "train")
    assert "2 of the 4 files" in str(error.value) and "expected a 3D volume" in str(error.value)
    slices = load(find_hipmri(release), "train", skip_bad_files=True)
    assert {name.case for name in slices.names} == {"004", "005"} and len(slices) == 40


def test_3d_cases_outside_the_ranges_are_an_error(tmp_path, write_nifti):
    release = write_3d(tmp_path / "release", write_nifti, cases=(4, 50))
    write_nifti(release / "semantic_MRs_anon/prostate.nii.gz", volume())
    with pytest.raises(DataError, match="2 of the 3 volumes") as error:
        find_hipmri(release)
    assert "Case_050_Week0_LFOV.nii.gz" in str(error.value) and "prostate.nii.gz" in str(
        error.value
    )


@pytest.mark.parametrize("name", ["case_004.nii", "case_004_week_0_slice_1.nii", "brain.nii"])
def test_loose_files_are_no_volumes(tmp_path, write_nifti, name):
    write_nifti(tmp_path / "d" / name, noise())
    with pytest.raises(DataError, match=r"(?s)no slices found.*1 NIfTI image"):
        find_hipmri(tmp_path / "d")


def test_planes_and_fit_are_checked(tmp_path, write_slices, load):
    source = find_hipmri(write_slices(tmp_path / "d"))
    for options in ({"planes": 0}, {"planes": 257}, {"fit": "pad"}):
        with pytest.raises(DataError, match="expected a split of"):
            load(source, "train", **options)


# ---------------------------------------------------------------------------------------------- cache


def test_second_load_decodes_nothing(tmp_path, write_slices, load, monkeypatch):
    data = write_slices(tmp_path / "d")
    first = load(find_hipmri(data), "train")
    monkeypatch.setattr(dataset.nifti, "read_nifti", no_decoding)
    again = load(find_hipmri(data), "train")
    assert again.names == first.names
    assert torch.equal(again.batch(torch.arange(4)), first.batch(torch.arange(4)))
    with pytest.raises(
        DataError, match="AssertionError"
    ):  # the patch works: another split must be decoded
        load(find_hipmri(data), "test")


@pytest.mark.parametrize("change", ["mtime", "size", "added", "removed"])
def test_changed_files_are_noticed_and_old_caches_deleted(
    tmp_path, write_slices, write_nifti, load, change
):
    data = write_slices(tmp_path / "d")
    load(find_hipmri(data), "train")
    load(find_hipmri(data), "test")
    before, path = (
        caches(tmp_path / "cache"),
        data / "keras_slices_train/case_004_week_0_slice_1.nii.gz",
    )
    expected, stat = 4, path.stat()
    if change == "mtime":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "size":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 9) + b"\0" * 8)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "added":
        expected = 5
        write_nifti(path.with_name("case_004_week_0_slice_9.nii.gz"), noise())
    else:
        expected = 3
        path.unlink()
    assert len(load(find_hipmri(data), "train")) == expected
    after = caches(tmp_path / "cache")
    assert len(after) == 2 and [a == b for a, b in zip(before, after, strict=True)] == [True, False]


def test_each_preprocessing_has_its_cache(tmp_path, one, monkeypatch):
    wide = noise((256, 144))
    resized, cropped = one(wide)[0], one(wide, fit="crop")[0]
    assert not torch.equal(resized, cropped) and len(caches(tmp_path / "cache")) == 2
    monkeypatch.setattr(dataset, "CACHE_FORMAT", 999)
    one(wide)
    assert len(caches(tmp_path / "cache")) == 3


def test_planes_have_their_own_caches(tmp_path, write_nifti, load):
    source = find_hipmri(write_3d(tmp_path / "release", write_nifti))
    assert [len(load(source, "train", planes=planes)) for planes in (2, 3, 2)] == [2, 3, 2]


@pytest.mark.parametrize(
    "damage", ["pixels.npy", "slices.npz", "both missing", "other type", "fewer rows"]
)
def test_damaged_cache_is_rebuilt(tmp_path, write_slices, load, damage):
    data = write_slices(tmp_path / "d")
    expected = load(find_hipmri(data), "train").batch(torch.arange(4))
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    if damage.startswith(("pixels", "slices")):
        (folder / damage).write_bytes((folder / damage).read_bytes()[:-100])
    elif damage == "other type":
        np.save(folder / "pixels.npy", np.zeros((4, *SHAPE), np.float32))
    elif damage == "fewer rows":
        np.save(folder / "pixels.npy", np.zeros((3, *SHAPE), np.int16))
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    assert torch.equal(load(find_hipmri(data), "train").batch(torch.arange(4)), expected)
    assert caches(tmp_path / "cache") == [folder.name]


def test_the_first_of_two_runs_wins(tmp_path, write_slices, load, monkeypatch):
    """Another run finishes the same cache while this one builds: its folder stays, ours goes."""
    source, build = find_hipmri(write_slices(tmp_path / "d")), cache.build

    def race(folder, *args):
        build(folder, *args)
        final = folder.with_name(folder.name.split(".tmp-")[0])
        shutil.copytree(folder, final)
        (final / "winner").touch()

    monkeypatch.setattr(dataset, "build", race)
    assert len(load(source, "train")) == 4
    (folder,) = caches(tmp_path / "cache")
    assert (tmp_path / "cache" / folder / "winner").exists()


def test_leftovers_of_killed_runs(tmp_path, write_slices, load):
    source = find_hipmri(write_slices(tmp_path / "d"))
    load(source, "train")
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    old, young = (folder.with_name(f"{folder.name}.tmp-1-{age}") for age in ("old", "young"))
    folder.rename(young)
    shutil.copytree(young, old)
    os.utime(old, (0, 0))
    assert len(load(source, "train")) == 4
    assert caches(tmp_path / "cache") == [
        folder.name,
        young.name,
    ]  # the young one's run may be alive


def test_an_interrupted_build_leaves_nothing(tmp_path, write_slices, load, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "decode_jobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(find_hipmri(write_slices(tmp_path / "d")), "train")
    assert caches(tmp_path / "cache") == []


def test_processes_give_the_same_cache_as_none(tmp_path, write_slices, load):
    data = write_slices(tmp_path / "d", train=150, shape=(64, 36))
    (data / "keras_slices_train/case_004_week_0_slice_70.nii.gz").write_bytes(b"")
    source = find_hipmri(data)
    here = load(source, "train", workers=1, skip_bad_files=True)
    there = load(source, "train", workers=2, skip_bad_files=True, cache_dir=tmp_path / "other")
    assert len(here) == 149 and here.names == there.names and here.notes == there.notes
    assert torch.equal(here.batch(torch.arange(149)), there.batch(torch.arange(149)))


def test_small_jobs_start_no_processes(tmp_path, write_slices, load, monkeypatch):
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", no_decoding)
    source = find_hipmri(write_slices(tmp_path / "d"))
    assert len(load(source, "train")) == 4
    monkeypatch.setattr(dataset, "POOL_FROM", 2)
    monkeypatch.setattr(dataset, "cores", lambda: 2)
    with pytest.raises(AssertionError):
        load(source, "train", cache_dir=tmp_path / "other")


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_workers_of_every_kind(tmp_path, write_slices, method):
    """What a pool is given pickles, a fresh interpreter can run it, and workers know when their parent has ended."""
    files = find_hipmri(write_slices(tmp_path / "d")).splits["train"]
    jobs = [cache.Job(i, file, range(i, i + 1)) for i, file in enumerate(files)]
    task = (tmp_path / "pixels.npy", jobs, preprocessing.Preprocessing("2D", "resize", 1))
    cache.reserve(task[0], 4, preprocessing.SIZE)
    expected = cache.decode_jobs(*pickle.loads(pickle.dumps(task)))
    pixels = np.load(task[0])
    cache.reserve(task[0], 4, preprocessing.SIZE)
    with ProcessPoolExecutor(1, multiprocessing.get_context(method), cache.start_worker) as pool:
        time.sleep(1)  # long enough for a worker that takes another process for its parent
        assert pool.submit(cache.decode_jobs, *task).result() == expected
    assert np.array_equal(np.load(task[0]), pixels) and pixels.any()


def test_a_killed_worker_is_reported(tmp_path, write_slices, load, monkeypatch):
    monkeypatch.setattr(dataset, "decode_jobs", die)
    with pytest.raises(DataError, match="want of memory"):
        load(find_hipmri(write_slices(tmp_path / "d")), "train", workers=2)
    assert caches(tmp_path / "cache") == []


def test_no_room_for_the_cache(tmp_path, write_slices, load, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000)
    )
    with pytest.raises(DataError, match=r"(?s)0.00 GB needed, 0.00 GB free.*--cache-dir"):
        load(find_hipmri(write_slices(tmp_path / "d")), "train")
    assert caches(tmp_path / "cache") == []


def test_a_full_quota_is_an_error_at_the_start(tmp_path, write_slices, load, monkeypatch):
    def full(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DataError, match=r"(?s)Disk quota exceeded.*--cache-dir"):
        load(find_hipmri(write_slices(tmp_path / "d")), "train")

    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert len(load(find_hipmri(tmp_path / "d"), "train")) == 4


def test_cache_that_cannot_be_written(tmp_path, write_slices, load, monkeypatch):
    source = find_hipmri(write_slices(tmp_path / "d"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"can't write the cache .* (Not a directory|File exists)"):
        load(source, "train", cache_dir=tmp_path / "file")
    load(source, "train")

    def read_only(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert len(load(source, "train")) == 4  # a finished cache needs no writing
    with pytest.raises(DataError, match="Permission denied"):
        load(source, "test")


def test_where_the_cache_goes(tmp_path, write_slices, monkeypatch):
    source = find_hipmri(write_slices(tmp_path / "d"))
    for folder, argument in (("argument", tmp_path / "argument"), ("variable", None)):
        monkeypatch.setenv("HIPMRI_CACHE", str(tmp_path / "variable"))
        dataset.load_split(source, "train", cache_dir=argument, progress=False)
        assert len(caches(tmp_path / folder)) == 1
    monkeypatch.delenv("HIPMRI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root(None) == tmp_path / "xdg/hipmri-vqvae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    for platform, place in (
        ("linux", ".cache"),
        ("darwin", "Library/Caches"),
        ("win32", "AppData/Local"),
    ):
        monkeypatch.setattr(dataset.sys, "platform", platform)
        assert cache.cache_root(None) == tmp_path / place / "hipmri-vqvae"


# ------------------------------------------------------------------------------------------ real data


def test_real_slices(real_data, load):
    source = find_hipmri(real_data)
    assert [len(source.splits[split]) for split in ("train", "validate", "test")] == [86, 38, 106]
    assert any("1 case(s) in both train and validate (218)" in note for note in source.notes)
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
