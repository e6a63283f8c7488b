"""NIfTI files by their names: subjects, slices, segmentations, folders."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validate",
    "valid": "validate",
    "validate": "validate",
}
SPLIT_NAMES |= {"validation": "validate", "test": "test", "testing": "test"}
NIFTI_NAME = re.compile(r"\.nii(?:\.gz)?$", re.I)
SEGMENTATION_NAME = re.compile(r"seg_|.*semantic", re.I)
HIPMRI_NAME = re.compile(
    r"case[_-]?(\d+)(?:[_-]?week[_-]?(\d+))?(?:[_-]?slice[_-]?(\d+))?(?=[_-]|$)", re.I
)


@dataclass(frozen=True)
class SliceName:
    """Whose slice it is, and its file's name without the ending, for titles and tables."""

    case: str  # "004"; the stem where the name follows no known pattern
    week: str  # "0"; "" where the name has none
    slice: int  # 12; 0 where the name has none
    stem: str  # "case_004_week_0_slice_12"

    def __str__(self) -> str:
        return f"case {self.case} week {self.week} slice {self.slice}" if self.week else self.stem


def parse_name(path: str | Path) -> SliceName:
    """Read case, week and slice from `case_004_week_0_slice_12.nii.gz` or `Case_004_Week0_LFOV.nii.gz`.

    Any other name is a case of its own. A file inside a folder called `x.nii.gz` takes the folder's name.
    """
    folder, name = os.path.split(path)
    folder = os.path.basename(folder)
    stem = NIFTI_NAME.sub("", folder if NIFTI_NAME.search(folder) else name)
    stem = printable(stem)
    match = HIPMRI_NAME.match(stem)
    if not match:
        return SliceName(stem, "", 0, stem)
    case, week, number = match.groups()
    return SliceName(f"{int(case):03d}", week or "", int(number or 0), stem)


def printable(text: str) -> str:
    """A name as tables, figures and terminals can bear it: control characters and bytes that are no text, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_segmentation(path: Path) -> bool:
    """Whether a file is a segmentation, by its name or its folder's: never an image."""
    folders = ("keras_slices_seg", "semantic_labels", "labels", "masks", "segmentations")
    named = re.search(
        r"[_-](d?seg|segmentation|mask|label)s?(\.nii|$)", path.name, re.I
    ) or SEGMENTATION_NAME.match(path.name)
    return bool(named) or path.parent.name.lower().startswith(folders)


def is_output(path: Path) -> bool:
    """Whether a file is named as what predict.py writes."""
    return bool(re.search(r"_(reconstruction|error)\.nii(\.gz)?$", path.name, re.I))


def find_segmentation(image: Path) -> Path | None:
    """The segmentation that lies beside a file of HipMRI's 2D or 3D form; None where there is none."""
    folder, name = image.parent, image.name
    where = (
        (
            folder.name.lower().replace("keras_slices_", "keras_slices_seg_"),
            re.sub("^case_", "seg_", name, flags=re.I),
        ),
        ("semantic_labels_anon", re.sub("_LFOV", "_SEMANTIC_LFOV", name, flags=re.I)),
    )
    for folder_name, file_name in where:
        path = folder.parent / folder_name / file_name
        if path != image and path.is_file():
            return path
    return None


def natural_entry_key(entry: os.DirEntry) -> list:
    return natural_key(entry.name)


def natural_key(text: str) -> list:
    """Sort key under which slice_2 comes before slice_10."""
    parts = re.split(r"(\d+)", text.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts


@dataclass(frozen=True)
class Source:
    """The files of each split, found by `find_hipmri`."""

    root: Path  # the folder that was used in the end
    form: str  # "2D": a file is a slice; "3D": a volume of HipMRI's; "scans": any, see `find_scans`
    splits: dict[
        str, list[Path]
    ]  # of "train", "validate", "test" those that have files, in natural order
    notes: list[str]  # to print
    subjects: dict[Path, str] = field(default_factory=dict)  # of scans: whose each file is


def files_below(folder: Path, ending: str) -> list[Path]:
    """Files at any depth whose names match the pattern, none of them hidden; in no order."""
    found = (
        path for path in folder.rglob("*") if re.search(ending, path.name, re.I) and path.is_file()
    )
    return [path for path in found
            if not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)]  # fmt: skip


def split_of_folder(folder: Path) -> str | None:
    return SPLIT_NAMES.get(folder.name.lower().removeprefix("keras_slices_"))


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Subfolders and NIfTI images of a folder in natural order, without junk and masks. Raises OSError.

    Some copies of HipMRI hold folders called `x.nii.gz` with the .nii inside: the file inside is listed. If
    there isn't exactly one, the folder itself is, to be reported with the other bad files.
    """
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=natural_entry_key):
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            path, is_nifti = folder / entry.name, NIFTI_NAME.search(entry.name)
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link that leads to itself: reading it will say so
                is_folder = False
            if is_folder and is_nifti:
                inside = [
                    n for n in os.listdir(path) if NIFTI_NAME.search(n) and not n.startswith(".")
                ]
                path = path / inside[0] if len(inside) == 1 else path
            if is_nifti and not SEGMENTATION_NAME.match(entry.name):
                files.append(path)
            elif not is_nifti and is_folder:
                folders.append(path)
    return folders, files


def format_listing(lines: list[str], most: int = 100) -> str:
    """Lines, indented; after `most` of them only how many more there are."""
    more = [f"... and {len(lines) - most:,} more"] if len(lines) > most else []
    return "\n".join("  " + printable(line) for line in lines[:most] + more)
