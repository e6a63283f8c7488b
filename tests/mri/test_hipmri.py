"""HipMRI's 2D and 3D versions: where they are found, how they are split, what is refused."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import resize

from mri.files import SliceName
from mri.hipmri import find_hipmri
from mri.preprocessing import Preprocessing
from mri.splits import find_source
from utils import DataError


def noise(shape: tuple[int, ...] = (256, 128), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)


@pytest.fixture
def deny(monkeypatch):
    """deny(path): listing this folder, or any folder of this name, fails."""

    def deny(path: Path | str):
        scandir = os.scandir

        def scandir_or_fail(folder):
            if path in (Path(folder), Path(folder).name):
                raise PermissionError(errno.EACCES, "Permission denied", str(folder))
            return scandir(folder)

        monkeypatch.setattr(os, "scandir", scandir_or_fail)

    return deny


# ---------------------------------------------------------------- 2D version


@pytest.mark.parametrize("prefix", ["keras_slices_", "", "KERAS_SLICES_"])
def test_split_folders_are_found(tmp_path, write_slices, prefix):
    source = find_hipmri(write_slices(tmp_path / "d", prefix=prefix))
    assert source.form == "2D"
    assert source.root == tmp_path / "d"
    counts = [(split, len(files)) for split, files in source.splits.items()]
    assert counts == [("train", 4), ("validate", 2), ("test", 2)]
    assert source.notes == [f"{tmp_path / 'd'}: train 4, validate 2, test 2 slices"]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validate"])
def test_validation_folder_may_have_several_names(tmp_path, write_nifti, name):
    write_nifti(tmp_path / "d" / name / "a.nii", noise())
    assert list(find_hipmri(tmp_path / "d").splits) == ["validate"]


@pytest.mark.parametrize(
    ("folder", "note"),
    [
        ("top", "two levels below"),
        ("top/mid", "one level below"),
        ("top/mid/data", "data:"),
        ("top/mid/data/keras_slices_test", "one level above"),
        ("top/mid/data/keras_slices_seg_test", "one level above"),
    ],
)
def test_data_is_found_above_or_below_the_given_folder(
    tmp_path, write_slices, write_nifti, folder, note
):
    data = write_slices(tmp_path / "top/mid/data")
    write_nifti(data / "keras_slices_seg_test/seg_040_week_0_slice_0.nii.gz", noise())
    source = find_hipmri(tmp_path / folder)
    assert source.root == data
    assert len(source.splits["train"]) == 4
    assert note in source.notes[0]
    assert str(data) in source.notes[0]


def test_search_does_not_go_above_an_unrelated_folder(tmp_path, write_slices):
    write_slices(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no slices found"):
        find_hipmri(tmp_path / "empty")


def test_several_data_sets_are_an_error(tmp_path, write_slices):
    write_slices(tmp_path / "d/one")
    write_slices(tmp_path / "d/two")
    with pytest.raises(DataError, match="2 data sets") as error:
        find_hipmri(tmp_path / "d")
    assert "one (2D version)" in str(error.value)
    assert "two (2D version)" in str(error.value)


def test_two_folders_for_one_split_are_an_error(tmp_path, write_nifti):
    for name in ("val", "validation"):
        write_nifti(tmp_path / "d" / name / "a.nii", noise())
    message = "two folders for the validate split, val and validation"
    with pytest.raises(DataError, match=message):
        find_hipmri(tmp_path / "d")


def test_images_below_a_folder_named_like_segmentations_are_found(tmp_path, write_slices):
    folder = tmp_path / "for_semantic_segmentation"
    data = write_slices(folder / "keras_slices_data")
    assert find_hipmri(folder).root == data


def test_cases_in_two_splits_are_reported(tmp_path, write_slices, write_nifti):
    data = write_slices(tmp_path / "d")
    assert not any("warning" in note for note in find_hipmri(data).notes)
    write_nifti(data / "keras_slices_test/case_4_week_9_slice_0.nii.gz", noise())
    warnings = [note for note in find_hipmri(data).notes if note.startswith("warning")]
    assert len(warnings) == 1
    assert "1 subject(s) in both train and test (004)" in warnings[0]


# ---------------------------------------------------------------- folders without data


def test_error_lists_the_folders_found(tmp_path, write_nifti):
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


def test_missing_folder_and_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist; expected"):
        find_hipmri(tmp_path / "nothing")
    (tmp_path / "x.nii").write_bytes(b"")
    with pytest.raises(DataError, match="is a file; expected"):
        find_hipmri(tmp_path / "x.nii")


@pytest.mark.parametrize("axis", [None, "axial"])
@pytest.mark.parametrize("given", ["my data.ZIP", "d.tar.gz", "."])
def test_archives_must_be_unpacked_first(tmp_path, axis, given):
    """They are recognised in a folder without other data, too."""
    (tmp_path / "my data.ZIP").write_bytes(b"")
    (tmp_path / "d.tar.gz").write_bytes(b"")
    commands = {
        "my data.ZIP": f"unzip '{tmp_path}/my data.ZIP' -d '{tmp_path}/my data'",
        "d.tar.gz": f"mkdir {tmp_path}/d && tar -xf {tmp_path}/d.tar.gz -C {tmp_path}/d",
    }
    with pytest.raises(DataError, match=r"is a file; expected a folder\. Unpack it") as error:
        find_source(tmp_path / given, axis)
    for name, command in commands.items():
        assert (command in str(error.value)) == (given in (name, "."))


def test_empty_split_folder_is_an_error(tmp_path):
    (tmp_path / "d/keras_slices_train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"(?s)no slices found.*keras_slices_train/: 0 NIfTI"):
        find_hipmri(tmp_path / "d")


def test_loading_a_missing_or_empty_split_is_an_error(tmp_path, write_slices, load):
    data = write_slices(tmp_path / "d", test=0)
    for _ in range(2):  # the folder is missing, then empty
        with pytest.raises(DataError, match=r"test split .* missing or empty") as error:
            load(find_hipmri(data), "test")
        assert "keras_slices_train/: 4 NIfTI image(s)" in str(error.value)
        (data / "keras_slices_test").mkdir(exist_ok=True)
    with pytest.raises(DataError, match="split is 'tset'"):
        load(find_hipmri(data), "tset")


@pytest.mark.parametrize("part", ["", "keras_slices_train"])
def test_unreadable_data_folder_is_an_error(tmp_path, write_slices, deny, part):
    data = write_slices(tmp_path / "d")
    deny(data / part)
    with pytest.raises(DataError, match=f"{data / part} cannot be read: Permission denied"):
        find_hipmri(data)


def test_unreadable_folder_next_to_the_data_is_ignored(tmp_path, write_slices, deny):
    data = write_slices(tmp_path / "top/data")
    (tmp_path / "top/lost+found").mkdir()
    deny("lost+found")
    assert find_hipmri(tmp_path / "top").root == data
    data.rename(tmp_path / "elsewhere")
    message = r"(?s)no slices found.*lost\+found cannot be read: Permission denied"
    with pytest.raises(DataError, match=message):
        find_hipmri(tmp_path / "top")


# ---------------------------------------------------------------- 3D version


def volume(seed: int = 0, shape: tuple[int, ...] = (24, 20, 16)) -> np.ndarray:
    """Return a volume in RAS orientation; one corner of its coronal planes is bright."""
    data = noise(shape, seed)
    data[: shape[0] // 2, :, shape[2] // 2 :] += 2000
    return data


def write_volumes(root: Path, write_nifti, cases: tuple[int, ...] = (4, 36, 42)) -> Path:
    """Write volumes and segmentations in HipMRI's layout, stored as left, superior, posterior."""
    affine = np.array([[-2.0, 0, 0, 40], [0, 0, -2, 30], [0, 2, 0, -10], [0, 0, 0, 1]])
    labels = root / "semantic_labels_anon"
    for case in cases:
        stored = volume(case)[::-1, ::-1].transpose(0, 2, 1)
        image = root / "semantic_MRs_anon" / f"Case_{case:03d}_Week0_LFOV.nii.gz"
        write_nifti(image, stored, affine)
        write_nifti(labels / f"Case_{case:03d}_Week0_SEMANTIC_LFOV.nii.gz", stored, affine)
    return root


@pytest.mark.parametrize(
    "folder", ["", "release", "release/semantic_MRs_anon", "release/semantic_labels_anon"]
)
def test_volumes_are_split_by_case(tmp_path, write_nifti, folder):
    write_volumes(tmp_path / "top/release", write_nifti)
    source = find_hipmri(tmp_path / "top" / folder)
    assert source.form == "3D"
    assert source.root == tmp_path / "top/release/semantic_MRs_anon"
    names = {split: [file.name[:8] for file in files] for split, files in source.splits.items()}
    assert names == {"train": ["Case_004"], "validate": ["Case_036"], "test": ["Case_042"]}
    assert "12,660" in source.notes[1]


def test_segmentations_with_image_names_are_not_volumes(tmp_path, write_nifti):
    labels = tmp_path / "release/semantic_labels_anon"
    write_nifti(labels / "Case_004_Week0_LFOV.nii.gz", noise((8, 8, 8)))
    with pytest.raises(DataError, match="no slices found"):
        find_hipmri(labels)


def test_volumes_are_cut_into_coronal_slices(tmp_path, write_nifti, load):
    source = find_hipmri(write_volumes(tmp_path / "release", write_nifti))
    slices = load(source, "train", Preprocessing.resolve(source, planes=4))
    assert slices.names[0] == SliceName("004", "0", 8, "Case_004_Week0_LFOV_slice_8")
    assert [name.slice for name in slices.names] == [8, 9, 10, 11]
    assert "4 slices of 1 volume(s), the central coronal slices (planes 8-11)" in slices.notes[0]
    for i, plane in enumerate(range(8, 12)):
        coronal = torch.from_numpy(volume(4)[:, plane].astype(np.float64))
        expected = resize(coronal[None], [256, 128], antialias=True)
        image = slices.denormalise(slices[i][None], torch.tensor([i]))[0]
        assert (image - expected).abs().max() < 3000 / 131070 + 1e-3
        # Rows run from the left, columns from below.
        assert image[0, :128, 64:].mean() > image[0, 128:].mean() + 1000


def test_all_planes_are_used_if_there_are_few(tmp_path, write_nifti, load):
    release = write_volumes(tmp_path / "release", write_nifti, cases=(4,))
    deep = volume(5, (16, 70, 16))
    write_nifti(release / "semantic_MRs_anon/Case_005_Week0_LFOV.nii.gz", deep)
    slices = load(find_hipmri(release), "train")
    assert [name.slice for name in slices.names] == [*range(20), *range(5, 65)]
    assert slices.mean[-1].item() == pytest.approx(deep[:, 64].mean(), rel=0.05)


def test_bad_volumes_are_listed_or_skipped(tmp_path, write_nifti, load):
    release = write_volumes(tmp_path / "release", write_nifti, cases=(4, 5))
    broken = volume(6).astype(np.float32)
    broken[0, 10, 0] = np.nan
    write_nifti(release / "semantic_MRs_anon/Case_006_Week0_LFOV.nii.gz", broken)
    write_nifti(release / "semantic_MRs_anon/Case_007_Week0_LFOV.nii.gz", noise())
    with pytest.raises(DataError) as error:
        load(find_hipmri(release), "train")
    assert "2 of the 4 files" in str(error.value)
    assert "expected a 3D volume" in str(error.value)
    slices = load(find_hipmri(release), "train", skip_bad_files=True)
    assert {name.case for name in slices.names} == {"004", "005"}
    assert len(slices) == 40


def test_volumes_of_unknown_cases_are_an_error(tmp_path, write_nifti):
    release = write_volumes(tmp_path / "release", write_nifti, cases=(4, 50))
    write_nifti(release / "semantic_MRs_anon/prostate.nii.gz", volume())
    with pytest.raises(DataError, match="2 of the 3 volumes") as error:
        find_hipmri(release)
    assert "Case_050_Week0_LFOV.nii.gz" in str(error.value)
    assert "prostate.nii.gz" in str(error.value)


@pytest.mark.parametrize("name", ["case_004.nii", "case_004_week_0_slice_1.nii", "brain.nii"])
def test_files_with_other_names_are_not_volumes(tmp_path, write_nifti, name):
    write_nifti(tmp_path / "d" / name, noise())
    with pytest.raises(DataError, match=r"(?s)no slices found.*1 NIfTI image"):
        find_hipmri(tmp_path / "d")


@pytest.mark.parametrize("options", [{"planes": 0}, {"planes": 257}, {"fit": "pad"}])
def test_invalid_preprocessing_is_refused(tmp_path, write_slices, options):
    source = find_hipmri(write_slices(tmp_path / "d"))
    with pytest.raises(DataError, match="; expected"):
        Preprocessing.resolve(source, **options)
