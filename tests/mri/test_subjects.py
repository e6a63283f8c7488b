"""Subjects: how they are read from paths, and the warning when a subject is in two splits."""

from pathlib import Path

import numpy as np
import pytest
from layouts import make_files

from mri import hipmri, splits
from mri.files import natural_key
from mri.subjects import subject_of
from utils import DataError

PATIENTS = [f"p{i:02d}" for i in range(4)]
LAYOUTS = {  # paths without endings, subjects, --subjects
    "BIDS": ([f"sub-{p}/anat/sub-{p}_T1w" for p in PATIENTS], PATIENTS, None),
    "sub- in file names": (
        [f"sub-{p}_ses-{n}_T1w" for p in PATIENTS for n in (1, 2)],
        PATIENTS,
        None,
    ),
    "HipMRI's file names": (
        ["a/Case_004_Week0", "a/Case_004_Week1", "b/Case_005_Week0"],
        ["004", "005"],
        None,
    ),
    "one folder of files": (PATIENTS, PATIENTS, None),
    "one folder of files, deeper": ([f"a/b/{p}" for p in PATIENTS], PATIENTS, None),
    "folders with one file each": ([f"images/{p}/T1" for p in PATIENTS], PATIENTS, None),
    "a folder per subject": (
        [f"{p}/{sequence}" for p in PATIENTS for sequence in ("T1", "T2")],
        PATIENTS,
        "^([^/]+)/",
    ),
    "a folder per sequence": (
        [f"{sequence}/{p}" for p in PATIENTS for sequence in ("T1", "T2")],
        PATIENTS,
        r"([^/]+)\.nii",
    ),
    "IXI": (
        [f"IXI-{sequence}/{p}-{sequence}" for p in PATIENTS for sequence in ("T1", "T2")],
        PATIENTS,
        r"p\d+",
    ),
    "nnU-Net's channels": (
        [f"imagesT{s}/x{p}_000{i}" for s, p in zip("rrrs", PATIENTS, strict=True) for i in (0, 1)],
        [f"x{p}" for p in PATIENTS],
        None,
    ),
    "a folder per site": ([f"site{p[-1] in '01'}/{p}" for p in PATIENTS], PATIENTS, r"p\d+"),
}
GUESSED_LAYOUTS = {  # one subject per file, without any sign of it in the path
    "one folder of files",
    "one folder of files, deeper",
    "folders with one file each",
}


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("sub-A/ses-1/sub-B_T1w.nii", None, "A"),
        ("sub-A_ses-1_T1w.nii", None, "A"),
        ("sub-A/case_004_week_0.nii", None, "A"),
        ("train/case_4_week_0_slice_1.nii", None, "004"),
        ("case_004_week_0_slice_1.nii.gz/x.nii", None, "004"),
        ("p01/T1.nii", None, None),
        ("sub-A/p01.nii", r"p\d+", "p01"),
        ("sub-A/p01.nii", r"p(\d+)", "01"),
        ("sub-A/x.nii", r"p\d+", None),
        ("sub-A\a/x.nii", None, r"A\x07"),
        # BIDS: entities end at _
        ("sub-A_ses-1/T1.nii", None, "A"),
        ("site/sub-A_ses-2_acq-3/anat/T1.nii", None, "A"),
        ("sub-A-1_ses-1/T1.nii", None, "A-1"),
        ("Sub-A_ses-1.nii", None, "A"),
        ("sub-01_slice-03.nii.gz", None, "01"),
        ("sub-01_slice-03.nii.gz/x.nii", None, "01"),
        ("sub-Mu\u0308ller_T1w.nii", None, "M\xfcller"),
        ("sub-Mu\u0308ller/T1w.nii", None, "M\xfcller"),
        ("Mu\u0308ller/T1w.nii", "M\xfc[a-z]+", "M\xfcller"),
        # HipMRI, with a letter or in a folder
        ("B006_Week0_LFOV.nii.gz", None, "B006"),
        ("b006_week10.nii", None, "B006"),
        ("B6-Week-0.nii", None, "B006"),
        ("B006_Week0_slice_3.nii", None, "B006"),
        ("Case_004_week0.nii", None, "004"),
        ("case 004 week 0 (copy).nii", None, "004"),
        ("Case_004_Week0/LFOV.nii.gz", None, "004"),
        ("x/B006_Week5/LFOV.nii.gz", None, "B006"),
        ("B006.nii", None, None),
        ("AB006_Week0.nii", None, None),
        # nnU-Net
        ("imagesTr/X_0001.nii.gz", None, "X"),
        ("imagests/BRATS_001_0000.nii.gz", None, "BRATS_001"),
        ("imagesTr/X.nii.gz", None, None),
        ("scans/X_0001.nii.gz", None, None),
    ],
)
def test_subject_is_read_from_the_path(path, pattern, expected):
    assert subject_of(Path(path), pattern) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_subjects_of_a_layout(tmp_path, layout):
    """Where a wrong guess would put a subject into two splits, --subjects is required."""
    paths, expected, pattern = LAYOUTS[layout]
    data = make_files(tmp_path / "data", *paths)
    if pattern:
        with pytest.raises(DataError, match="cannot determine the subject of each scan") as error:
            splits.find_source(data, "axial")
        if pattern.startswith(("^", "(")):  # one of the patterns that the error proposes
            assert f"--subjects '{pattern}'" in str(error.value)
    source = splits.find_source(data, "axial", None, 0, pattern)
    assert set(source.subjects.values()) == set(expected)
    for file, subject in source.subjects.items():
        assert subject in str(file.relative_to(tmp_path))
    assert "belongs to subject" in source.notes[0]
    is_guess = any("a subject of its own" in note for note in source.notes)
    assert is_guess == (layout in GUESSED_LAYOUTS)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["X_0000", "X_0001", "Y_0000", "Y_0001"], ["X", "X", "Y", "Y"]),
        (["IMG_0000", "IMG_0001", "IMG_0002"], ["IMG_0000", "IMG_0001", "IMG_0002"]),
        (["X_0000", "X_0001", "Y_0003"], ["X_0000", "X_0001", "Y_0003"]),
        (["x_0_adc", "x_0_t2", "y-1-ADC", "y-1-T2", "z_t2"], ["x_0", "x_0", "y-1", "y-1", "z"]),
        (["OAS1_MR1", "OAS1_MR2", "OAS2_MR1", "OAS2_MR2"], ["OAS1", "OAS1", "OAS2", "OAS2"]),
        (["NYU_01", "NYU_02", "UCLA_01", "UCLA_02"], ["NYU_01", "NYU_02", "UCLA_01", "UCLA_02"]),
        (["x_slice_1", "x_slice_10", "y-slice-1", "z"], ["x", "x", "y", "z"]),
        (["A/train/p1", "A/val/p2", "B/train/q1", "B/test/q2"], ["p1", "p2", "q2", "q1"]),
        (["a/p1/test/x", "a/p2/test/x"], ["p1", "p2"]),
        (["train/p1/T1", "train/p1/T2", "val/p2/T1"], ["p1", "p1", "p2"]),
        (["train/p1.nii.gz/x", "val/p2.nii.gz/x"], ["p1", "p2"]),
    ],
)
def test_subjects_are_guessed_from_names_and_folders(tmp_path, names, expected):
    source = splits.find_source(make_files(tmp_path, *names), "axial")
    files = sorted(source.subjects, key=lambda file: natural_key(str(file)))
    assert [source.subjects[file] for file in files] == expected


def test_a_folder_of_nnunet_is_recognised_from_inside(tmp_path):
    make_files(tmp_path / "imagesTr", "X_0000", "X_0001", "Y_0000", "Z_0000")
    source = splits.find_source(tmp_path / "imagesTr", "axial")
    assert [source.subjects[file] for file in sorted(source.subjects)] == ["X", "X", "Y", "Z"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q", r"matches nothing in the paths of 2 scan"),
        ("(", "is not a regular expression"),
    ],
)
def test_unusable_subject_patterns_are_refused(tmp_path, pattern, message):
    make_files(tmp_path, "a", "b")
    with pytest.raises(DataError, match=message):
        splits.find_source(tmp_path, "axial", None, 0, pattern)


def test_subjects_in_two_splits_are_reported(tmp_path):
    make_files(tmp_path, "train/sub-1", "val/sub-2", "test/sub-1")
    notes = splits.find_source(tmp_path, "axial").notes
    assert any("1 subject(s) in both train and test (1)" in note for note in notes)
    manifest = {split: {"1": ["train/sub-1.nii.gz"]} for split in ("train", "validate", "test")}
    notes = splits.find_source(tmp_path, "axial", manifest=manifest).notes
    assert sum("in both train and" in note for note in notes) == 2


def test_2d_slices_of_a_subject_in_two_splits_are_reported(tmp_path):
    make_files(tmp_path, "train/sub-1_slice_1", "validate/sub-2_slice_1", "test/sub-1_slice_2")
    source = hipmri.find_hipmri(tmp_path)
    assert set(source.subjects.values()) == {"1", "2"}
    assert any("1 subject(s) in both train and test (1)" in note for note in source.notes)


def test_slices_of_a_subject_are_one_case(tmp_path, write_nifti, load):
    """In tables and confidence intervals, in every form of data."""
    image = np.random.default_rng(0).integers(0, 900, (32, 32)).astype(np.int16)
    for split in ("train", "val", "test"):
        for i in range(2):
            write_nifti(tmp_path / "2d" / split / f"sub-01_slice-0{i}.nii.gz", image)
            write_nifti(tmp_path / "2d" / split / f"x_slice_{i}.nii.gz", image)
    volumes = [f"{case}_Week{week}_LFOV.nii" for case in ("B006", "W011") for week in (0, 1)]
    for name in volumes:
        write_nifti(tmp_path / "3d" / "semantic_MRs" / name, np.stack([image] * 3, 1))
    slices = splits.find_source(tmp_path / "2d")
    assert sum("2 subject(s) in both" in note for note in slices.notes) == 3
    for source, expected in (
        (slices, ["01", "01", "x", "x"]),
        (splits.find_source(tmp_path / "3d"), ["B006"] * 6 + ["W011"] * 6),
        (splits.find_source(tmp_path / "2d", "axial"), ["01", "01", "x", "x"]),
    ):
        assert [name.case for name in load(source, "train").names] == expected
