"""HipMRI as it is distributed: the course cluster's folders, the public download, copies of them.

Splits, subjects and segmentations depend on names only, so the files are empty.
"""

from pathlib import Path

import pytest

from mri.files import find_segmentation
from mri.hipmri import find_hipmri
from mri.splits import find_source
from utils import DataError

CASES = {"train": ("B006", "L011"), "validate": ("K037",), "test": ("W041",)}
PUBLIC = "Labelled_weekly_MR_images_of_the_male_pelvis-x/data/HipMRI_study_complete_release_v1"


def make_files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def make_volumes(root: Path, form: str = "{}_Week{}_LFOV.nii.gz") -> Path:
    """Make volumes of two weeks of each case, and their segmentations."""
    for case in (case for cases in CASES.values() for case in cases):
        for week in (0, 5):
            make_files(root / "semantic_MRs", form.format(case, week))
            make_files(root / "semantic_labels_only", f"{case}_Week{week}_SEMANTIC.nii.gz")
    return root


def make_slices(root: Path, prefix: str = "keras_slices_", mask_prefix: str = "keras_slices_seg_"):
    """Make two slices of one case per split, and their segmentations."""
    for split, case in (("train", "004"), ("validate", "036"), ("test", "040")):
        for i in range(2):
            make_files(root / f"{prefix}{split}", f"case_{case}_week_0_slice_{i}.nii.gz")
            make_files(root / f"{mask_prefix}{split}", f"seg_{case}_week_0_slice_{i}.nii.gz")
    return root


def files_of(source) -> dict[str, list[tuple[str, str]]]:
    """Return the names and subjects of each split's files."""
    files = {}
    for split, paths in source.splits.items():
        files[split] = [(path.name, source.subjects[path]) for path in paths]
    return files


VOLUMES = {
    split: [(f"{case}_Week{week}_LFOV.nii.gz", case) for case in sorted(cases) for week in (0, 5)]
    for split, cases in CASES.items()
}
SLICES = {
    split: [(f"case_{case}_week_0_slice_{i}.nii.gz", case) for i in range(2)]
    for split, case in (("train", "004"), ("validate", "036"), ("test", "040"))
}


@pytest.mark.parametrize("given", ["semantic_MRs", "semantic_labels_only"])
def test_volumes_of_the_course_are_split_by_the_number_of_their_case(tmp_path, given):
    source = find_hipmri(make_slices(make_volumes(tmp_path)) / given)
    assert source.form == "3D"
    assert source.root == tmp_path / "semantic_MRs"
    assert files_of(source) == VOLUMES
    for files in source.splits.values():
        for file in files:
            mask = tmp_path / "semantic_labels_only" / file.name.replace("LFOV", "SEMANTIC")
            assert find_segmentation(file) == mask


@pytest.mark.parametrize("form", ["{}_week{}_lfov.nii", "{}_Week_{}.nii.gz", "{}-WEEK-{}-LFOV.NII"])
def test_names_of_volumes_may_be_written_in_other_ways(tmp_path, form):
    source = find_hipmri(make_volumes(tmp_path, form))
    for split, cases in CASES.items():
        assert sorted({subject for _, subject in files_of(source)[split]}) == sorted(cases)
        assert len(source.splits[split]) == 2 * len(cases)


def test_numbers_outside_hipmri_are_refused(tmp_path):
    make_files(tmp_path / "semantic_MRs", "B050_Week0_LFOV.nii.gz", "B006_Week0_LFOV.nii.gz")
    with pytest.raises(DataError, match=r"(?s)1 of the 2 volumes.*B050.*--axis coronal"):
        find_hipmri(tmp_path)


@pytest.mark.parametrize(
    "place", ["keras_slices_data", "keras_slices_data/HipMRI_study_keras_slices_data", "."]
)
def test_slices_are_preferred_to_volumes(tmp_path, place):
    """At any level; one line says how to select the volumes."""
    make_slices(make_volumes(tmp_path / "HipMRI_Study_open") / place)
    source = find_hipmri(tmp_path / "HipMRI_Study_open")
    assert source.form == "2D"
    assert source.root == tmp_path / "HipMRI_Study_open" / place
    assert files_of(source) == SLICES
    volumes = tmp_path / "HipMRI_Study_open" / "semantic_MRs"
    notes = [note for note in source.notes if "volumes" in note]
    assert len(notes) == 1
    assert f"--data {volumes} selects the volumes" in notes[0]
    assert find_hipmri(tmp_path).splits == source.splits


def test_the_other_form_is_found_from_a_folder_of_segmentations(tmp_path):
    make_slices(make_volumes(tmp_path))
    assert find_hipmri(tmp_path / "semantic_labels_only").form == "3D"
    assert find_hipmri(tmp_path / "keras_slices_seg_test").form == "2D"


@pytest.mark.parametrize("levels_above", [0, 1, 2, 3])
def test_the_public_download_is_found_from_its_top_folder(tmp_path, levels_above):
    make_files(tmp_path / PUBLIC / "semantic_MRs_anon", "Case_004_Week0_LFOV.nii.gz")
    make_files(tmp_path / PUBLIC / "semantic_labels_anon", "Case_004_Week0_SEMANTIC_LFOV.nii.gz")
    given = [tmp_path / PUBLIC, *(tmp_path / PUBLIC).parents][levels_above]
    source = find_hipmri(given)
    assert source.root == tmp_path / PUBLIC / "semantic_MRs_anon"
    assert files_of(source) == {"train": [("Case_004_Week0_LFOV.nii.gz", "004")]}
    mask = tmp_path / PUBLIC / "semantic_labels_anon" / "Case_004_Week0_SEMANTIC_LFOV.nii.gz"
    assert find_segmentation(source.splits["train"][0]) == mask


@pytest.mark.parametrize(
    ("prefix", "mask_prefix"),
    [("", "seg_"), ("keras_slices_", "keras_slices_seg_"), ("KERAS_SLICES_", "KERAS_SLICES_SEG_")],
)
def test_segmentations_of_slices_are_found(tmp_path, prefix, mask_prefix):
    source = find_hipmri(make_slices(tmp_path, prefix, mask_prefix))
    assert files_of(source) == SLICES
    for split, files in source.splits.items():
        for file in files:
            name = file.name.replace("case", "seg")
            found = find_segmentation(file)
            assert found.name == name
            assert found.parent.name.lower() == f"{mask_prefix}{split}".lower()


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("train/case_004_week_0_slice_0.nii.gz", "seg_train/seg_004_week_0_slice_0.nii"),
        ("train/case_004_week_0_slice_0.nii.gz", "seg_train/case_004_week_0_slice_0.nii.gz"),
        ("val/case_036_slice_0.nii.gz/x.nii", "seg_val/seg_036_slice_0.nii.gz/y.nii"),
        ("Train/CASE_004.nii", "SEG_Train/SEG_004.nii"),
        ("train/a.nii", "seg_train/a.nii"),
        ("train/B006_week_0_slice_3.nii.gz", "seg_train/seg_B006_week_0_slice_3.nii.gz"),
    ],
)
def test_a_segmentation_may_differ_in_ending_and_letters(tmp_path, image, mask):
    make_files(tmp_path, image, mask)
    assert find_segmentation(tmp_path / image) == tmp_path / mask


@pytest.mark.parametrize(
    ("image", "other"),
    [
        ("train/a.nii", "train/a.nii.gz"),
        ("scans/a.nii", "seg_scans/a.nii"),
        ("train/a.nii", "train/seg_a.nii"),
        ("train/case_004_week_0_slice_1.nii", "seg_train/seg_004_week_0_slice_10.nii"),
        ("semantic_MRs/B006_Week0_LFOV.nii", "semantic_labels_only/B006_Week5_SEMANTIC.nii"),
    ],
)
def test_other_files_are_not_segmentations_of_an_image(tmp_path, image, other):
    make_files(tmp_path, image, other)
    assert find_segmentation(tmp_path / image) is None


def test_weeks_of_a_patient_are_one_subject_with_an_axis(tmp_path):
    make_volumes(tmp_path)
    for seed in range(3):
        source = find_source(tmp_path / "semantic_MRs", "coronal", None, seed)
        assert set(source.subjects.values()) == {"B006", "L011", "K037", "W041"}
        subjects = [{source.subjects[file] for file in files} for files in source.splits.values()]
        assert sum(map(len, subjects)) == 4
        assert sum(map(len, source.splits.values())) == 8
