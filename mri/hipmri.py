"""HipMRI's 2D and 3D forms."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from mri.files import (
    HIPMRI_NAME,
    NIFTI_NAME,
    Source,
    format_listing,
    list_folder,
    parse_name,
    split_of_folder,
)
from utils import DataError

HIPMRI_CASES = {"train": range(4, 36), "validate": range(36, 40), "test": range(40, 43)}
EXPECTED = """expected one of
  keras_slices_train/ keras_slices_validate/ keras_slices_test/   (HipMRI's 2D form)
  semantic_MRs_anon/Case_004_Week0_LFOV.nii.gz ...                (HipMRI's 3D form)
  train/ validate/ test/                                          (your own 2D .nii or .nii.gz slices)
  any folder of scans, or one scan                                (with --axis coronal, sagittal or axial)"""


def find_hipmri(root: str | Path) -> Source:
    """Find the splits in `root`, one level below, two below, or (where `root` is one of the parts) one above.

    Raises DataError where there are none, several at one level, or a folder that can't be read.
    """
    root = Path(os.path.abspath(Path(root).expanduser()))
    if not root.is_dir():
        raise DataError(f"{root} is {'a file' if root.exists() else 'missing'}; {EXPECTED}")
    folders, unreadable = [root], []
    for where in ("", "one level below", "two levels below", "one level above"):
        if where == "one level above":
            is_part = split_of_folder(root) or root.name.lower().startswith(
                ("keras_slices_", "semantic_")
            )
            folders = [root.parent] if is_part else []
        found, below = [], []
        for folder in folders:
            try:
                subfolders, files = list_folder(folder)
            except OSError as error:  # not a mistake unless nothing is found elsewhere
                unreadable.append(f"  {folder} can't be read: {error.strerror}")
                continue
            found += _recognise(folder, subfolders, files)
            below += subfolders
        if found:
            return _only(found, root, f" ({where} the folder given)" if where else "")
        folders = below
    raise DataError(
        "\n".join(
            [
                f"no slices found in {root}:",
                *describe_folder(root),
                *unreadable,
                EXPECTED,
                "Rename the folders, or point --data at the one that holds them.",
            ]
        )
    )


def _recognise(folder: Path, subfolders: list[Path], files: list[Path]) -> list[Source]:
    """The data sets that `folder` holds: none, one, or (a mistake that `_only` reports) several."""
    parts: dict[str, list[Path]] = {}
    no_volumes = (
        split_of_folder(folder) or "label" in folder.name.lower()
    )  # slices, or masks whatever their names
    volumes = [(folder, files)] if not no_volumes and any(map(_is_volume, files)) else []
    for sub in subfolders:
        split, is_3d = split_of_folder(sub), sub.name.lower().startswith("semantic_mrs")
        if not split and not is_3d:
            continue
        try:
            images = list_folder(sub)[1]
        except OSError as error:
            raise DataError(
                f"{sub} can't be read: {error.strerror}. Expected a readable folder."
            ) from error
        if images and is_3d:
            volumes.append((sub, images))
        elif images and split in parts:
            raise DataError(
                f"{folder} holds two folders for the {split} split, of which {sub.name} is one; "
                "expected one. Move the other away."
            )
        elif images:
            parts[split] = images
    found = [_volumes_by_case(*volume) for volume in volumes]
    if parts:
        splits = {split: parts[split] for split in HIPMRI_CASES if split in parts}
        found.append(Source(folder, "2D", splits, []))
    return found


def _is_volume(path: Path) -> bool:
    """Whether a file is named as HipMRI's volumes are: case and week, no slice."""
    match = HIPMRI_NAME.match(NIFTI_NAME.sub("", path.name))
    return bool(match and match[2] and not match[3])


def _volumes_by_case(folder: Path, files: list[Path]) -> Source:
    """Split volumes by case as HipMRI's 2D form is. Volumes whose case is in no range are a DataError."""
    splits: dict[str, list[Path]] = {split: [] for split in HIPMRI_CASES}
    others = []
    for file in files:
        case = parse_name(file).case
        found = [s for s, cases in HIPMRI_CASES.items() if case.isdecimal() and int(case) in cases]
        splits[found[0]].append(file) if found else others.append(file.name)
    if others:
        raise DataError(
            f"{len(others)} of the {len(files)} volumes in {folder} are in no split:\n"
            f"{format_listing(others)}\nexpected HipMRI's cases, 004-035 train, 036-039 validate, "
            "040-042 test.\nMove others away, or cut them into slices in train/ validate/ test/."
        )
    note = (
        "volumes (3D form) are cut into coronal slices here: these are not the course's 12,660 slices, "
        "and scores on them can't be set against published ones"
    )
    return Source(folder, "3D", {split: files for split, files in splits.items() if files}, [note])


def _only(found: list[Source], root: Path, where: str) -> Source:
    """The one data set found, with notes of what was chosen and of shared cases. Several are a DataError."""
    if len(found) > 1:
        names = "\n".join(f"  {source.root} ({source.form} form)" for source in found)
        raise DataError(
            f"{root} holds {len(found)} data sets, expected one:\n{names}\nPoint --data at one."
        )
    source = found[0]
    counts = ", ".join(f"{split} {len(files):,}" for split, files in source.splits.items())
    unit = "slices" if source.form == "2D" else "volumes"
    notes = [f"{source.root}{where}: {counts} {unit}", *source.notes]
    cases = {
        split: {parse_name(file).case for file in files} for split, files in source.splits.items()
    }
    for one, other in combinations(cases, 2):
        if both := sorted(cases[one] & cases[other]):
            notes.append(
                f"warning: {len(both)} case(s) in both {one} and {other} ({', '.join(both[:5])}"
                f"{', ...' * (len(both) > 5)}): if these are the same patients, scores are too good"
            )
    return replace(source, notes=notes)


def describe_folder(root: Path) -> list[str]:
    """What is in a folder where no data was recognised, for the error message."""
    lines = []
    try:
        subfolders, files = list_folder(root)
        lines.append(
            f"  {len(files)} NIfTI image(s), masks not counted, and {len(subfolders)} folder(s)"
        )
        for sub in subfolders[:10]:
            lines.append(f"  {sub.name}/: {len(list_folder(sub)[1])} NIfTI image(s)")
        if pairs := sum(len(list(where.glob("*.hdr"))) for where in [root, *subfolders[:10]]):
            lines.append(
                f"  {pairs} .hdr file(s): pairs of .hdr and .img aren't read; convert them to .nii or .nii.gz"
            )
    except OSError:
        pass  # the search has noted it already
    return lines
