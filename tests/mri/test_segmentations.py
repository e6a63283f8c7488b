"""Segmentations: their names and headers, and the labels that are read from them."""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mri.segmentations import (
    has_label_intent,
    is_segmentation,
    is_segmentation_folder,
    read_labels,
)

# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        "p0_seg",
        "p0-Segmentation",
        "segmentation-0",  # LiTS
        "case_00000/segmentation",  # KiTS
        "patient001_frame01_gt",  # ACDC
        "A0S9V9_sa_gt",
        "aseg",  # FreeSurfer
        "aparc+aseg",
        "aparc.DKTatlas+aseg.deep",
        "wmparc",
        "lh.ribbon",
        "sub-1_dseg",  # BIDS
        "sub-1_label-GM_probseg",
        "sub-1_space-MNI_desc-brain_mask",
        "T1_fast_pveseg",  # FSL
        "T1_all_fast_firstseg",
        "BraTS-GLI-00001-000-seg",
        "BraTS20_Training_001_seg",
        "label0001",  # BTCV
        "IBSR_01_segTRI_ana",
        "seg35",
        "p0Seg",
        "p0seg",
        "P0SEG",
        "brainMask",
        "T1_brainmask",
        "maskBrain",
        "lesion_msk",
        "p0_ground_truth",
        "p0-groundTruth",
        "p0_annotations_2",
        "p0_contour",
        "truth",
        "p0_labelmap",
        "p0_LabelMap",
        "p0__GTVt",  # gross tumour volume, a contour
        "T1.seg",
        "seg_004_week_0_slice_0",  # HipMRI
        "Case_004_Week0_SEMANTIC_LFOV",
    ],
)
def test_names_of_segmentations(name):
    assert is_segmentation(Path(f"{name}.nii.gz"))
    assert is_segmentation(Path(f"{name}.nii"))
    assert is_segmentation(Path(f"{name}.nii.gz/x.nii"))


@pytest.mark.parametrize(
    "name",
    [
        "volume-0",
        "case_00000/imaging",
        "Case_004_Week0_LFOV",
        "semantic_MRs_anon/Case_004_Week0_LFOV",
        "case_004_week_0_slice_0",
        "sub-Seger_T1w",
        "Seger",
        "sub-mask01_T1w",
        "sub-gt/anat/sub-gt_T1w",
        "T1_masked",
        "damask",
        "Maskell_T2",
        "unlabelled_T2",
        "no_mask_T2",
        "segment_1",
        "gtx",
        "G1GT2X",
        "T1w",
        "rt_scan",
        "angt",
        "Labelled_weekly_MR_images_of_the_male_pelvis/x",
        "brain_tumor_segmentation/p0",
        "for_semantic_segmentation/p0",
        "images_and_masks/p0",
        "seg_challenge/p0",
        "prostate_masks/imagesTr/p0",
        "Totalsegmentator_dataset/s0001/mri",
    ],
)
def test_names_of_images(name):
    assert not is_segmentation(Path(f"{name}.nii.gz"))


@pytest.mark.parametrize(
    "name",
    [
        "labels",
        "labelsTr",
        "labelsTs",
        "labels_final_v2",
        "masks",
        "Masks2",
        "mask",
        "masksTr",
        "prostate_masks",
        "liver_seg",
        "segmentation",
        "segmentations",
        "SegmentationsTr",
        "seg_train",
        "train_seg",
        "keras_slices_seg_train",
        "semantic_labels_anon",
        "LabelMaps",
        "gt",
        "GT_manual",
        "ground_truth",
        "groundTruth",
        "annotations",
        "label-maps",
    ],
)
def test_names_of_folders_of_segmentations(name):
    assert is_segmentation_folder(name)
    assert is_segmentation(Path(name, "p0.nii.gz"))
    assert is_segmentation(Path(name, "sub-1", "p0.nii.gz"))


# ---------------------------------------------------------------- headers


def write_intent(path: Path, image_class, code: int, big_endian: bool = False) -> Path:
    image = image_class(np.zeros((9, 9, 9), np.int16), np.eye(4))
    header = image.header.as_byteswapped(">" if big_endian else "<")
    header["intent_code"] = code
    data = header.binaryblock + bytes(2000)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_label_maps_are_recognised_by_their_headers(tmp_path, image_class, big_endian, ending):
    path = tmp_path / f"p0.{ending}"
    assert has_label_intent(write_intent(path, image_class, 1002, big_endian))
    assert not has_label_intent(write_intent(path, image_class, 0, big_endian))
    assert not has_label_intent(write_intent(path, image_class, 1001, big_endian))


def test_unusable_files_and_hipmri_slices_are_not_label_maps(tmp_path):
    path = tmp_path / "x.nii.gz"
    for content in (b"", b"text", b"\x1f\x8b", gzip.compress(b"text")):
        path.write_bytes(content)
        assert not has_label_intent(path)
    assert not has_label_intent(tmp_path / "nothing.nii")
    os.mkfifo(tmp_path / "pipe.nii")
    assert not has_label_intent(tmp_path / "pipe.nii")
    path = tmp_path / "case_004_week_0_slice_0.nii"
    assert not has_label_intent(write_intent(path, nib.Nifti1Image, 1002))


# ---------------------------------------------------------------- labels


def test_labels_that_were_saved_from_floats_are_rounded(tmp_path):
    """nibabel then stores int16 with a scale factor, and reads 2.9999999993 instead of 3."""
    labels = np.random.default_rng(0).integers(0, 6, (12, 10, 8)).astype(np.float64)
    image = nib.Nifti1Image(labels, np.eye(4))
    image.set_data_dtype(np.int16)
    image.to_filename(tmp_path / "seg.nii")
    values = nib.load(tmp_path / "seg.nii").get_fdata()
    assert not np.array_equal(values.astype(np.uint8), labels)
    expected = np.moveaxis(labels, 2, 0)
    result = read_labels(tmp_path / "seg.nii", (8, 12, 10), 2)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)
    result = read_labels(tmp_path / "seg.nii", (8, 12, 10), 2, 3, [5, 0])
    np.testing.assert_array_equal(result, expected[[5, 0]])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.float32])
def test_labels_of_every_data_type_keep_their_values(tmp_path, dtype):
    labels = np.zeros((9, 8), dtype)
    labels[0] = 0, 1, 2, 3, 4, 5, 127, 120
    nib.Nifti1Image(labels, np.eye(4), dtype=dtype).to_filename(tmp_path / "seg.nii")
    np.testing.assert_array_equal(read_labels(tmp_path / "seg.nii", (1, 9, 8), 0)[0], labels)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (261, "has labels from 0 to 261, expected 0 to 255"),
        (-1, "has labels from -1 to 0, expected 0 to 255"),
        (np.nan, "has NaN or infinite values"),
        (np.inf, "has NaN or infinite values"),
        (1.37, "has values that are not whole, such as 1.37; expected labels from 0 to 255"),
    ],
)
def test_values_that_are_not_labels_are_refused(tmp_path, write_nifti, value, message):
    labels = np.zeros((9, 8), np.float32)
    labels[3, 3] = value
    path = write_nifti(tmp_path / "seg.nii", labels)
    with pytest.raises(ValueError, match=message):
        read_labels(path, (1, 9, 8), 0)


def test_labels_of_another_shape_are_refused(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "seg.nii", np.zeros((16, 8), np.uint8))
    with pytest.raises(ValueError, match=r"differ in shape: 1 x 16 x 8 and 1 x 8 x 16 planes"):
        read_labels(path, (1, 8, 16), 0)
