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
HIPMRI_SEGMENTATION_NAME = re.compile(r"seg_|.*semantic", re.I)
SEGMENTATION_SUFFIX = re.compile(r"[_-](d?seg|segmentation|mask|label)s?(\.nii|$)", re.I)
SEGMENTATION_FOLDER_PREFIXES = (
    "keras_slices_seg",
    "semantic_labels",
    "labels",
    "masks",
    "segmentations",
)


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


# ---------------------------------------------------------------- segmentations and outputs


def is_segmentation(path: Path) -> bool:
    """Return whether the name of a file or of its folder marks it as a segmentation."""
    return bool(
        SEGMENTATION_SUFFIX.search(path.name)
        or HIPMRI_SEGMENTATION_NAME.match(path.name)
        or path.parent.name.lower().startswith(SEGMENTATION_FOLDER_PREFIXES)
    )


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


# ---------------------------------------------------------------- folders


def files_below(folder: Path, ending: str) -> list[Path]:
    """Return the files at any depth of a folder whose names match, in no particular order.

    Args:
        folder: the folder to search; hidden files and folders, and `__MACOSX`, are left out.
        ending: regular expression to search for in the file name, such as r"\\.nii$".
    """
    files = []
    for path in folder.rglob("*"):
        if not re.search(ending, path.name, re.I) or not path.is_file():
            continue
        parts = path.relative_to(folder).parts
        if not any(part.startswith((".", "__MACOSX")) for part in parts):
            files.append(path)
    return files


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the subfolders and the NIfTI images of a folder, each in natural order.

    Hidden entries and segmentations with HipMRI's names are left out. Some copies of HipMRI have
    folders called `x.nii.gz` with the .nii inside; such a folder counts as the file inside it.

    Raises:
        OSError: if the folder cannot be read.
    """
    folders, files = [], []
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: natural_key(entry.name))
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        path = folder / entry.name
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link to itself; reading the file will report the error
            is_folder = False
        if not NIFTI_NAME.search(entry.name):
            if is_folder:
                folders.append(path)
            continue
        if is_folder:
            path = _file_inside(path)
        if not HIPMRI_SEGMENTATION_NAME.match(entry.name):
            files.append(path)
    return folders, files


def _file_inside(folder: Path) -> Path:
    """Return the NIfTI file inside a folder called `x.nii.gz`.

    If it does not contain exactly one such file, return the folder itself, which is then reported
    as a bad file.
    """
    names = []
    for name in os.listdir(folder):
        if NIFTI_NAME.search(name) and not name.startswith("."):
            names.append(name)
    return folder / names[0] if len(names) == 1 else folder


def format_listing(lines: list[str], most: int = 100) -> str:
    """Indent and join the first `most` lines, and append the number of lines left out."""
    shown = lines[:most]
    if len(lines) > most:
        shown = [*shown, f"... and {len(lines) - most:,} more"]
    return "\n".join("  " + printable(line) for line in shown)
