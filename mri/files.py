"""Interpret the names of NIfTI files and folders, without opening any image."""

from __future__ import annotations

import os
import re
import unicodedata
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
# Matches "case_004_week_0_slice_12", "Case_004_Week0_LFOV" and "B006_Week0_LFOV". The last form
# requires the week, because names of other data may also start with a letter and a number.
HIPMRI_NAME = re.compile(
    r"(?:case[ _-]?|(?P<letter>[a-z])(?=\d+[ _-]?week[ _-]?\d))(?P<number>\d+)"
    r"(?:[ _-]?week[ _-]?(?P<week>\d+))?(?:[ _-]?slice[ _-]?(?P<slice>\d+))?(?![^\W_])",
    re.I,
)
OUTPUT_NAME = re.compile(r"_(reconstruction|error)\.nii(\.gz)?$", re.I)


@dataclass(frozen=True)
class Source:
    """The files of each split, as `mri.splits.find_source` returns them."""

    root: Path  # the folder that contains all files
    form: str  # type of data: "2D" slices, "3D" HipMRI volumes, or "scans" (`splits.find_scans`)
    splits: dict[str, list[Path]]  # split -> files in natural order; empty splits are left out
    notes: list[str]  # for the script to print
    subjects: dict[Path, str] = field(default_factory=dict)  # file -> its subject


# ---------------------------------------------------------------- names


@dataclass(frozen=True)
class SliceName:
    """The parts of a slice's file name, for titles and tables."""

    case: str  # the subject: "004" or "B006"; the stem if the name is not in HipMRI's format
    week: str  # "0"; "" if the name has none
    slice: int  # 12; 0 if the name has none
    stem: str  # the file name without its ending, "case_004_week_0_slice_12"

    def __str__(self) -> str:
        return f"case {self.case} week {self.week} slice {self.slice}" if self.week else self.stem


def parse_name(path: str | Path) -> SliceName:
    """Parse a name such as `case_004_week_0_slice_12.nii.gz` or `B006_Week0_LFOV.nii.gz`.

    A file with any other name counts as a case of its own. If a file is inside a folder called
    `x.nii.gz`, the name of the folder is parsed instead.
    """
    stem = stem_of(path)
    match = HIPMRI_NAME.match(stem)
    if not match:
        return SliceName(stem, "", 0, stem)
    case = f"{(match['letter'] or '').upper()}{int(match['number']):03d}"
    return SliceName(case, match["week"] or "", int(match["slice"] or 0), stem)


def stem_of(path: str | Path) -> str:
    """Return the printable name of a file without .nii or .nii.gz.

    If the file is inside a folder called `x.nii.gz`, the name of the folder is used instead.
    """
    folder, name = os.path.split(path)
    folder_name = os.path.basename(folder)
    if NIFTI_NAME.search(folder_name):
        name = folder_name
    return printable(NIFTI_NAME.sub("", name))


def path_key(path: str | Path) -> str:
    """Return a platform-independent key for comparing paths: with forward slashes, and in NFC.

    Windows separates folders by backslashes. macOS decomposes accented letters (NFD).
    """
    text = path.as_posix() if isinstance(path, Path) else path
    return nfc(text.replace("\\", "/"))


def nfc(text: str) -> str:
    """Normalise text to Unicode NFC, so that names from different platforms can be compared."""
    return unicodedata.normalize("NFC", text)


def printable(text: str) -> str:
    """Escape control characters and undecodable bytes so that a file name is safe to print."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def natural_key(text: str) -> list:
    """Return a sort key that puts slice_2 before slice_10."""
    parts = re.split(r"(\d+)", text.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts


def split_of_folder(folder: Path) -> str | None:
    """Return the split that a folder is named after, or None.

    For example, the split of `keras_slices_validate` and of `val` is "validate".
    """
    return SPLIT_NAMES.get(folder.name.lower().removeprefix("keras_slices_"))


def split_of_path(path: Path) -> str | None:
    """Return the split of the outermost split folder in a path, or None if there is none."""
    for parent in reversed(path.parents):
        split = split_of_folder(parent)
        if split:
            return split
    return None


def is_output(path: Path) -> bool:
    """Return whether a file is named like an output of predict.py."""
    return bool(OUTPUT_NAME.search(path.name))


def find_segmentation(image: Path) -> Path | None:
    """Return the segmentation of an image in HipMRI's 2D or 3D layout, or None if there is none.

    2D: for an image in `keras_slices_train/` or `train/`, the segmentation is
    `keras_slices_seg_train/seg_004_week_0_slice_0.nii.gz`, or has the same name in `seg_train/`.
    3D: the segmentation is `semantic_labels_anon/Case_004_Week0_SEMANTIC_LFOV.nii.gz` or
    `semantic_labels_only/B006_Week0_SEMANTIC.nii.gz`, next to the folder of the image. Upper and
    lower case may differ, and so may the endings .nii and .nii.gz.
    """
    if NIFTI_NAME.search(image.parent.name):  # a folder called x.nii.gz with the .nii inside
        image = image.parent
    stem = NIFTI_NAME.sub("", image.name)
    endings = dict.fromkeys((image.name[len(stem) :], ".nii.gz", ".nii"))  # its own ending first
    for folder, name in _segmentation_names(image.parent, stem):
        for ending in endings:
            path = folder / f"{name}{ending}"
            if path.is_dir():
                path = file_inside(path)
            if path.is_file():
                return path
    return None


def _segmentation_names(folder: Path, stem: str) -> list[tuple[Path, str]]:
    """Return candidates (folder, name without ending) for the segmentation of an image."""
    masks = [re.sub("^(case_)?", mark, stem, flags=re.I) for mark in ("seg_", "SEG_")]
    names = []
    if stem.lower().startswith("case_"):
        names = [(folder, mask) for mask in masks]
    if split_of_folder(folder):
        for mark in ("seg_", "SEG_"):
            sibling = re.sub("^(keras_slices_)?", rf"\g<1>{mark}", folder.name, flags=re.I)
            for place in (folder.parent / sibling, folder.parent / sibling.lower()):
                names += [(place, name) for name in (*masks, stem)]
    if re.search("_LFOV", stem, re.I) or folder.name.lower().startswith("semantic_mrs"):
        for labels in ("semantic_labels_anon", "semantic_labels_only"):
            for mark in ("_SEMANTIC_LFOV", "_SEMANTIC", "_semantic_lfov", "_semantic"):
                name = re.sub("_LFOV", mark, stem, flags=re.I)
                names.append((folder.parent / labels, name))
    return list(dict.fromkeys(names))


def real_path(path: Path) -> Path:
    """Resolve the links in a path, even if they form a loop.

    Before Python 3.13, `Path.resolve` fails for such a loop.
    """
    return Path(os.path.realpath(path))


def file_inside(folder: Path) -> Path:
    """Return the NIfTI file inside a folder called `x.nii.gz`.

    If the folder does not contain exactly one NIfTI file, the folder itself is returned. It is then
    reported as a bad file.
    """
    names = []
    for name in os.listdir(folder):
        if NIFTI_NAME.search(name) and not name.startswith("."):
            names.append(name)
    return folder / names[0] if len(names) == 1 else folder


def format_listing(lines: list[str], most: int = 100) -> str:
    """Indent and join the first `most` lines, and append the number of omitted lines."""
    shown = lines[:most]
    if len(lines) > most:
        shown = [*shown, f"... and {len(lines) - most:,} more"]
    return "\n".join("  " + printable(line) for line in shown)
