"""File names and folders: what is parsed, listed, and left out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mri.files import SliceName, parse_name
from mri.hipmri import find_hipmri
from utils import DataError


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, (256, 128)).astype(np.int16)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "a/case_004_week_0_slice_12.nii.gz",
            SliceName("004", "0", 12, "case_004_week_0_slice_12"),
        ),
        (
            "a/case_040_week_10_slice_0.nii",
            SliceName("040", "10", 0, "case_040_week_10_slice_0"),
        ),
        ("Case_004_Week0_LFOV.nii.gz", SliceName("004", "0", 0, "Case_004_Week0_LFOV")),
        (
            "a/case_004_week_0_slice_3.nii.gz/case_4.nii",
            SliceName("004", "0", 3, "case_004_week_0_slice_3"),
        ),
        ("a/patient-7.b.nii.gz", SliceName("patient-7.b", "", 0, "patient-7.b")),
        ("a/case_12x.nii.gz", SliceName("case_12x", "", 0, "case_12x")),
        ("a/casework.nii", SliceName("casework", "", 0, "casework")),
    ],
)
def test_file_names_are_parsed(path, expected):
    assert parse_name(path) == expected
    assert parse_name(Path(path)) == expected


def test_files_are_in_natural_order(tmp_path, write_nifti, load):
    folder = tmp_path / "d" / "keras_slices_train"
    for number in (10, 2, 1, 0):
        write_nifti(folder / f"case_004_week_0_slice_{number}.nii.gz", noise(number))
    slices = load(find_hipmri(tmp_path / "d"), "train")
    assert [name.slice for name in slices.names] == [0, 1, 2, 10]
    for i, number in enumerate((0, 1, 2, 10)):
        image = slices.denormalise(slices[i][None], torch.tensor([i]))[0, 0]
        assert np.array_equal(image.round().numpy(), noise(number))


def test_folders_with_file_names_count_as_the_file_inside(tmp_path, write_nifti, load):
    folder = tmp_path / "d" / "keras_slices_train"
    for number in (10, 9):
        inner_folder = folder / f"case_004_week_0_slice_{number}.nii.gz"
        write_nifti(inner_folder / f"x{20 - number}.nii", noise(number))
    write_nifti(folder / "case_004_week_0_slice_11.nii.gz" / "._junk.nii", noise())
    write_nifti(folder / "case_004_week_0_slice_11.nii.gz" / "inner.nii", noise())
    slices = load(find_hipmri(tmp_path / "d"), "train")
    assert [name.slice for name in slices.names] == [9, 10, 11]
    (folder / "case_004_week_0_slice_12.nii.gz").mkdir()
    with pytest.raises(DataError, match=r"slice_12.nii.gz is a folder, expected exactly one"):
        load(find_hipmri(tmp_path / "d"), "train")


def test_junk_and_segmentations_are_not_listed(tmp_path, write_slices, write_nifti):
    data = write_slices(tmp_path / "d")
    splits = find_hipmri(data).splits
    for junk in (
        "keras_slices_train/._case_004_week_0_slice_0.nii.gz",
        "keras_slices_train/.DS_Store",
        "keras_slices_train/notes.txt",
        "__MACOSX/keras_slices_train/case_005_week_0_slice_0.nii",
    ):
        (data / junk).parent.mkdir(parents=True, exist_ok=True)
        (data / junk).write_bytes(b"junk")
    for segmentation in (
        "keras_slices_seg_train/seg_004_week_0_slice_0.nii.gz",
        "keras_slices_train/SEG_004_week_0.nii.gz",
        "semantic_labels_anon/Case_004_Week0_SEMANTIC_LFOV.nii.gz",
        "keras_slices_train/Case_004_Week0_SEMANTIC_LFOV.nii.gz",
    ):
        write_nifti(data / segmentation, noise())
    assert find_hipmri(data).splits == splits


def test_macosx_folders_are_not_searched(tmp_path, write_slices):
    write_slices(tmp_path / "zip" / "__MACOSX")
    write_slices(tmp_path / "zip" / "data")
    assert find_hipmri(tmp_path / "zip").root == tmp_path / "zip" / "data"


def test_compression_is_detected_from_the_content(tmp_path, write_nifti, load):
    write_nifti(tmp_path / "d" / "train" / "a.nii.gz", noise(1), compress=False)
    write_nifti(tmp_path / "d" / "train" / "b.nii", noise(2), compress=True)
    slices = load(find_hipmri(tmp_path / "d"), "train")
    expected = torch.tensor([noise(1).mean(), noise(2).mean()])
    assert torch.equal(slices.mean, expected.float())
