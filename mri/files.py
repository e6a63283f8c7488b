"""The meaning of the names of NIfTI files and folders. Nothing here opens an image."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "validate", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validate",
    "valid": "validate",
    "validate": "validate",
    "validation": "validate",
    "test": "test",
    "testing": "test",
}

NIFTI_NAME = re.compile(r"\.nii(?:\.gz)?$", re.I)
HIPMRI_NAME = re.compile(
    r"case[_-]?(\d+)(?:[_-]?week[_-]?(\d+))?(?:[_-]?slice[_-]?(\d+))?(?=[_-]|$)", re.I
)
OUTPUT_NAME = re.compile(r"_(reconstruction|error)\.nii(\.gz)?$", re.I)


@dataclass(frozen=True)
class Source:
    """The files of each split, as `mri.splits.find_source` returns them."""

    root: Path  # the folder that contains all files
    form: str  # kind of files: "2D" slices, "3D" HipMRI volumes, or "scans" (`splits.find_scans`)
    splits: dict[str, list[Path]]  # split -> files in natural order; empty splits are left out
    notes: list[str]  # for the script to print
    subjects: dict[Path, str] = field(default_factory=dict)  # file -> its subject


# ---------------------------------------------------------------- names


@dataclass(frozen=True)
class SliceName:
    """The parts of a slice's file name, for titles and tables."""

    case: str  # "004"; the stem if the name is not like HipMRI's
    week: str  # "0"; "" if the name has none
    slice: int  # 12; 0 if the name has none
    stem: str  # the file name without its ending, "case_004_week_0_slice_12"

    def __str__(self) -> str:
        return f"case {self.case} week {self.week} slice {self.slice}" if self.week else self.stem


def parse_name(path: str | Path) -> SliceName:
    """Parse `case_004_week_0_slice_12.nii.gz` or `Case_004_Week0_LFOV.nii.gz`.

    A file with any other name counts as a case of its own. If a file is inside a folder called
    `x.nii.gz`, the name of the folder is parsed instead.
    """
    folder, name = os.path.split(path)
    folder_name = os.path.basename(folder)
    if NIFTI_NAME.search(folder_name):
        name = folder_name
    stem = printable(NIFTI_NAME.sub("", name))
    match = HIPMRI_NAME.match(stem)
    if not match:
        return SliceName(stem, "", 0, stem)
    case, week, number = match.groups()
    return SliceName(f"{int(case):03d}", week or "", int(number or 0), stem)


def printable(text: str) -> str:
    """Escape control characters and undecodable bytes so that a file name is safe to print."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def natural_key(text: str) -> list:
    """Return a sort key that puts slice_2 before slice_10."""
    parts = re.split(r"(\d+)", text.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts


def split_of_folder(folder: Path) -> str | None:
    """Return the split after which a folder is named, or None.

    Both `keras_slices_validate` and `val` are named after "validate".
    """
    return SPLIT_NAMES.get(folder.name.lower().removeprefix("keras_slices_"))


def split_of_path(path: Path) -> str | None:
    """Return the split of the outermost split folder in a path; None if it has no split folder."""
    for parent in reversed(path.parents):
        split = split_of_folder(parent)
        if split:
            return split
    return None


def is_output(path: Path) -> bool:
    """Return whether a file is named like an output of predict.py."""
    return bool(OUTPUT_NAME.search(path.name))


def find_segmentation(image: Path) -> Path | None:
    """Return the segmentation of an image in HipMRI's 2D or 3D layout, or None if there is none."""
    folder = image.parent
    folder_2d = folder.name.lower().replace("keras_slices_", "keras_slices_seg_")
    name_2d = re.sub("^case_", "seg_", image.name, flags=re.I)
    name_3d = re.sub("_LFOV", "_SEMANTIC_LFOV", image.name, flags=re.I)
    for path in (
        folder.parent / folder_2d / name_2d,
        folder.parent / "semantic_labels_anon" / name_3d,
    ):
        if path != image and path.is_file():
            return path
    return None


def format_listing(lines: list[str], most: int = 100) -> str:
    """Indent and join the first `most` lines, and append the number of lines left out."""
    shown = lines[:most]
    if len(lines) > most:
        shown = [*shown, f"... and {len(lines) - most:,} more"]
    return "\n".join("  " + printable(line) for line in shown)
