"""Write messages about a split: errors for missing or unusable files, and notes on the slices.

`records` and `bad` are the tables of slices and of unusable files (see mri/cache.py).
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from mri.files import Source, format_listing, printable
from mri.folders import missing_content
from mri.hipmri import EXPECTED, HIPMRI_CASES, describe_layout
from mri.preprocessing import Preprocessing, crop_box
from utils import DataError


def missing_split_error(source: Source, split: str) -> DataError:
    """Return the error for a split without files."""
    if source.form == "scans":
        counts = ", ".join(f"{name} {len(files):,}" for name, files in source.splits.items())
        return DataError(
            f"no scan in {source.root} belongs to the {split} split ({counts}): its fraction is 0, "
            "or no table row, folder or earlier run assigns a scan to it. Give other fractions or "
            "a table with --split, or name a folder after the split."
        )
    advice = f"Give the {split} folder one of these names and put slices in it"
    if source.form == "3D":
        cases = HIPMRI_CASES[split]
        advice = f"Add volumes of the {split} cases, {cases[0]:03d} to {cases[-1]:03d}"
    folders = "\n".join(describe_layout(source.root))
    return DataError(
        f"the {split} split of {source.root} is missing or empty. Found:\n{folders}\n{EXPECTED}\n"
        f"{advice}, or point --data elsewhere."
    )


def bad_files_error(source: Source, split: str, bad: np.ndarray) -> DataError:
    """Return the error that lists every unusable file of a split."""
    files = source.splits[split]
    total = len(files)
    advice = "Repair them, or leave them out with --skip-bad-files."
    if len(bad) == total:
        advice = "No file of this split is left: point --data at other data."
    for index in bad["file"]:
        reason = missing_content(files[index])
        if reason:
            advice += f" {printable(files[index].name)} {reason}."
            break
    return DataError(
        f"{len(bad):,} of the {total:,} files of the {split} split cannot be used:\n"
        f"{_list_bad_files(source, split, bad)}\n"
        f"Expected complete NIfTI files with finite values. {advice}"
    )


def _list_bad_files(source: Source, split: str, bad: np.ndarray) -> str:
    """Return one indented line for each unusable file, with the reason."""
    files = source.splits[split]
    lines = [f"{files[index].relative_to(source.root)} {reason}" for index, reason in bad.tolist()]
    return format_listing(lines, most=1000)


def describe_split(
    source: Source,
    split: str,
    preprocessing: Preprocessing,
    stems: list[str],
    records: np.ndarray,
    bad: np.ndarray,
) -> list[str]:
    """Return notes on a split for the user.

    Args:
        source: the files of each split.
        split: "train", "validate" or "test".
        preprocessing: the settings that turned files into slices.
        stems: N file names without endings, one per slice.
        records: (N,) table of the slices.
        bad: (M,) table of the M unusable files.

    Returns:
        Lines on unusable files, slices taken from volumes, slices that are cropped or resized, and
        constant slices.
    """
    notes = []
    if len(bad):
        lines = _list_bad_files(source, split, bad)
        notes.append(f"warning: {split}: {len(bad):,} bad file(s) skipped:\n{lines}")
    if source.form != "2D":
        notes.append(f"{split}: {_describe_planes(records, preprocessing)}")
    shapes = Counter(zip(records["height"].tolist(), records["width"].tolist(), strict=True))
    for shape, count in sorted(shapes.items()):
        change = _describe_fit(shape, preprocessing)
        if change:
            notes.append(f"{split}: {count:,} slice(s) of {shape[0]} x {shape[1]} {change}")
    constant = [stems[index] for index in np.flatnonzero(records["constant"])]
    if constant:
        lines = format_listing(constant, most=5)
        notes.append(f"warning: {split}: {len(constant):,} slice(s) with a single value:\n{lines}")
    return notes


def _describe_planes(records: np.ndarray, preprocessing: Preprocessing) -> str:
    """Describe which planes of the volumes are used as slices."""
    cut = "the central coronal slices"
    if preprocessing.form == "scans":
        cut = f"cut with --axis {preprocessing.axis}, without empty slices"
    planes = f"{records['plane'].min()}-{records['plane'].max()}"
    volumes = len(np.unique(records["file"]))
    return f"{len(records):,} slices of {volumes:,} volume(s), {cut} (planes {planes})"


def _describe_fit(shape: tuple[int, int], preprocessing: Preprocessing) -> str:
    """Describe how fitting changes slices of this shape.

    Returns:
        A predicate that follows "12 slice(s) of 300 x 200", or "" if the slices hardly change.
    """
    rows, columns = preprocessing.size
    if preprocessing.fit == "trim":
        *_, height, width = crop_box(shape, preprocessing.fit, preprocessing.size)
        if (height, width) != shape:
            return f"are cut to {height} x {width}"
    row_scale = shape[0] / rows
    column_scale = shape[1] / columns
    distortion = max(row_scale / column_scale, column_scale / row_scale) - 1
    scale = math.sqrt(row_scale * column_scale)
    advice = "--size H W sets another size"
    if distortion > 0.05 and preprocessing.fit == "crop":
        return "lose their edges (--fit crop)"
    if distortion > 0.05:
        text = (
            f"are resized to {rows} x {columns}, which changes their proportions by "
            f"{distortion:.1%}; --fit crop cuts their edges off instead"
        )
        return f"{text}; {advice}" if preprocessing.form == "scans" else text
    if preprocessing.form == "scans" and max(scale, 1 / scale) > 1.5:
        return f"are resized to {rows} x {columns}; {advice}"
    return ""
