"""dataset.py: what is found, read, refused, normalised and cached."""

import errno
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import resize

import dataset
from mri.files import SliceName, parse_name
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
