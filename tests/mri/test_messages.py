"""Messages about splits: notes on resized, cropped and constant slices, and lists of bad files."""

import numpy as np
import pytest

from mri.cache import BAD_DTYPE
from mri.files import Source
from mri.hipmri import find_hipmri
from mri.messages import bad_files_error, missing_split_error
from mri.preprocessing import Preprocessing
from mri.splits import find_source


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)


# ---------------------------------------------------------------- notes


def test_slices_of_the_right_proportions_need_no_note(load_images):
    assert load_images(noise((256, 128)), noise((512, 256))).notes == []
    assert load_images(noise((256, 132))).notes == []  # 3 % off


def test_notes_count_slices_whose_proportions_change(load_images):
    wide = [noise((256, 144), seed) for seed in range(3)]
    (note,) = load_images(noise((256, 128)), *wide).notes
    assert "train: 3 slice(s) of 256 x 144 are resized to 256 x 128" in note
    assert "12.5%" in note
    assert "--fit crop" in note


def test_notes_count_slices_that_are_cropped(load_images):
    wide = [noise((256, 144), seed) for seed in range(3)]
    (note,) = load_images(noise((256, 128)), noise((256, 132)), *wide, fit="crop").notes
    assert "train: 3 slice(s) of 256 x 144 lose their edges" in note


def test_notes_name_constant_slices(load_images):
    (note,) = load_images(noise((256, 128)), np.full((256, 128), 77, np.int16)).notes
    assert "1 slice(s) with a single value:\n  case_004_week_0_slice_1" in note


def test_notes_count_scans_that_are_resized_or_trimmed(tmp_path, write_nifti, load):
    for i in range(4):
        shape = (20, 24, 3) if i == 0 else (64, 96, 3)
        write_nifti(tmp_path / "d" / f"sub-{i}.nii.gz", noise(shape))
    manifest = {"train": {str(i): [f"sub-{i}.nii.gz"] for i in range(4)}}
    source = find_source(tmp_path / "d", "axial", manifest=manifest)

    def notes(size: tuple[int, int]) -> str:
        preprocessing = Preprocessing.resolve(source, size=size, axis="axial")
        return "\n".join(load(source, "train", preprocessing).notes)

    text = notes(size=(64, 96))
    assert (
        "12 slices of 4 volume(s), cut with --axis axial, without empty slices (planes 0-2)" in text
    )
    assert "3 slice(s) of 20 x 24 are resized to 64 x 96, which changes" in text
    assert "9 slice(s)" not in text
    assert "9 slice(s) of 64 x 96 are resized to 32 x 48; --size H W" in notes(size=(32, 48))
    assert "9 slice(s) of 64 x 96 are cut to 60 x 90" in notes(size=(60, 90))


# ---------------------------------------------------------------- errors


def test_bad_files_are_listed_with_their_reasons(tmp_path):
    files = [tmp_path / f"{name}.nii.gz" for name in "abc"]
    source = Source(tmp_path, "2D", {"train": files}, [])
    bad = np.array([(0, "is empty"), (2, "is a folder")], BAD_DTYPE)
    lines = str(bad_files_error(source, "train", bad)).splitlines()
    assert lines[0] == "2 of the 3 files of the train split cannot be used:"
    assert lines[1:3] == ["  a.nii.gz is empty", "  c.nii.gz is a folder"]
    assert "--skip-bad-files" in lines[3]
    source = Source(tmp_path, "2D", {"train": files[:2]}, [])
    bad = np.array([(0, "is empty"), (1, "is a folder")], BAD_DTYPE)
    assert "No file of this split is left" in str(bad_files_error(source, "train", bad))


@pytest.mark.parametrize("split", ["validate", "test"])
def test_missing_splits_are_described(tmp_path, write_nifti, split):
    write_nifti(tmp_path / "keras_slices_train" / "case_004_week_0_slice_0.nii", noise((256, 128)))
    message = str(missing_split_error(find_hipmri(tmp_path), split))
    assert f"the {split} split of {tmp_path} is missing or empty" in message
    assert "keras_slices_train" in message
    source = Source(tmp_path, "3D", {}, [])
    cases = {"validate": "036 to 039", "test": "040 to 042"}[split]
    assert f"Add volumes of the {split} cases, {cases}" in str(missing_split_error(source, split))
    source = Source(tmp_path, "scans", {"train": [tmp_path / "a.nii"]}, [])
    assert "(train 1)" in str(missing_split_error(source, split))
    assert "--split" in str(missing_split_error(source, split))
