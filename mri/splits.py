"""Find the data and divide it into splits: HipMRI's own splits, or other scans split by subject.

    path, line = find_data(args.data)      # --data, else $HIPMRI_DATA; else None (sample data)
    source = find_source(path)             # HipMRI, or 2D slices in train/ validate/ test/
    source = find_source(path, "axial")    # any folder of scans

Without an axis, `find_source` uses HipMRI's splits (listed in mri/hipmri.py) or the user's split
folders. With an axis, it splits scans in two steps. First, each file gets a subject. Then one of
four policies assigns files to splits: a table, the manifest of a run (both in
mri/listed_splits.py), split folders, or fractions of the subjects (both in this file).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mri.files import (
    SPLITS,
    Source,
    format_listing,
    path_key,
    printable,
    split_of_path,
)
from mri.folders import find_images
from mri.formats import describe_archive, describe_formats
from mri.hipmri import find_hipmri, is_volume
from mri.listed_splits import Manifest, RecordedSplits, Splits, splits_from_table
from mri.subjects import check_guesses, find_subjects, note_on_unnamed, report_splits
from utils import DataError

FRACTIONS = (0.8, 0.1, 0.1)  # fractions of the subjects in train, validate and test
MIN_SUBJECTS = 3  # with fewer, splits share subjects
# Splits that must not share subjects; validation and test may (see `RecordedSplits`).
TRAIN_PAIRS = (("train", "validate"), ("train", "test"))


def find_data(data: str | Path | None, run: str | Path | None = None) -> tuple[Path | None, str]:
    """Return the data path (None: the sample data), and a line to print about its origin.

    Args:
        data: the value of --data; if it is None, $HIPMRI_DATA is used.
        run: folder of the run whose config.json has recorded `data`; None if the user typed it.

    Raises:
        DataError: if the path does not exist. A typo must not select the sample data.
    """
    name, origin = data, f"{run}/config.json" if run else "--data"
    if data is None:
        name, origin = os.environ.get("HIPMRI_DATA") or None, "$HIPMRI_DATA"
    if name is None:
        return None, "data: the sample data, because neither --data nor $HIPMRI_DATA is set"
    path = Path(name).expanduser()
    try:
        os.stat(path if str(name).strip() else "")  # Path("") would be the current folder
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        advice = "Give an existing folder, or leave out both --data and $HIPMRI_DATA."
        if run:
            advice = "If the data were moved, give their new folder with --data."
        raise DataError(
            f"cannot open the data that {origin} names, '{name}': {reason}.\n{advice}"
        ) from error
    return path, f"data: {path}, from {origin}"


def find_source(
    root: str | Path,
    axis: str | None = None,
    split: Sequence[str] | None = None,
    seed: int = 0,
    subject_pattern: str | None = None,
    manifest: Manifest | None = None,
    include_new_subjects: bool = True,
) -> Source:
    """Return the files of each split, by `find_scans` if an axis is given, else by `find_hipmri`.

    `axis` is the value of --axis. The other arguments are those of `find_scans`.

    Raises:
        DataError: if no data is found, or it cannot be split.
    """
    if axis is not None:
        return find_scans(root, split, seed, subject_pattern, manifest, include_new_subjects)
    if split is not None or subject_pattern is not None:
        raise DataError(
            "--split or --subjects is given without --axis; both apply only to folders of scans. "
            "Add --axis coronal, sagittal or axial, or omit --split and --subjects."
        )
    return find_hipmri(root)


# ---------------------------------------------------------------- scans


def find_scans(
    root: str | Path,
    split: Sequence[str] | None = None,
    seed: int = 0,
    subject_pattern: str | None = None,
    manifest: Manifest | None = None,
    include_new_subjects: bool = True,
) -> Source:
    """Find all NIfTI volumes and slices at any depth of a folder, and split them by subject.

    The first of these policies that applies determines the splits: the manifest; the table or
    fractions in `split`; folders that are named after splits; the default fractions.

    Args:
        root: the folder, or a single file.
        split: the value of --split: three fractions of the subjects, or the path of a CSV file.
        seed: seed of the random order in which subjects are divided into fractions.
        subject_pattern: regular expression that extracts the subject from a path (see
            `subject_of`).
        manifest: the splits of an earlier run, from `to_manifest`.
        include_new_subjects: whether to put files that the manifest does not list into validation
            and test, unless they may belong to a training subject. If false, they are left out.

    Raises:
        DataError: if there are no files, or they cannot be split.
    """
    path = Path(os.path.abspath(Path(root).expanduser()))
    folder = path.parent if path.is_file() else path
    recorded = RecordedSplits(manifest or {}, folder)
    files, list_notes = _list_scans(path, recorded)
    subjects, unnamed = find_subjects(files, folder, subject_pattern)
    policy_notes: list[str] = []
    pairs = TRAIN_PAIRS
    if manifest:
        policy_notes = recorded.notes(files)
        splits = recorded.split(files, subjects, include_new_subjects)
        subjects = subjects | recorded.subjects(files)
    elif split is None and _has_split_folders(files, folder):
        splits = splits_from_folders(files, folder)
        policy_notes = ["the splits are taken from the names of the folders"]
    elif split is not None and len(split) == 1:
        splits = splits_from_table(files, subjects, folder, Path(split[0]))
    else:
        check_guesses(unnamed, folder, subject_pattern)
        splits = splits_from_fractions(files, subjects, parse_fractions(split), seed)
        policy_notes = _notes_on_fractions(files, subjects, unnamed)
        if len(set(subjects.values())) < MIN_SUBJECTS:
            pairs = ()  # the notes already contain this warning
    splits = {name: paths for name, paths in splits.items() if paths}
    notes = _notes_on_scans(files, subjects, folder) + list_notes + policy_notes
    notes += report_splits(splits, subjects, "scans", pairs)
    return Source(folder, "scans", splits, notes, subjects)


def to_manifest(source: Source) -> Manifest:
    """Return the manifest of the scans, from which `find_scans` restores their splits.

    Paths are converted by `path_key`, so that the manifest can be used on any platform.
    """
    manifest: Manifest = {}
    for split, files in source.splits.items():
        for file in files:
            names = manifest.setdefault(split, {}).setdefault(source.subjects[file], [])
            names.append(path_key(file.relative_to(source.root)))
    return manifest


def _list_scans(root: Path, recorded: RecordedSplits) -> tuple[list[Path], list[str]]:
    """Return the scans in natural order, and notes on other files.

    If `root` is a file, it is the only scan. Files that an earlier run recorded always count as
    scans.

    Raises:
        DataError: if there are no scans.
    """
    if not root.is_file():
        return find_images(root, recorded)
    if describe_archive(root):
        raise DataError(f"{root} is a file; {describe_archive(root)}")
    other_format = describe_formats([root], read_files=True)
    if other_format:
        raise DataError(f"{root} is not a NIfTI file: {other_format[0]}")
    return [root], []


def _notes_on_scans(files: list[Path], subjects: dict[Path, str], root: Path) -> list[str]:
    """Return a note on the numbers of scans and subjects."""
    num_subjects = len(set(subjects.values()))
    example = printable(str(files[0].relative_to(root)))
    return [
        f"{root}: {len(files):,} scan(s) of {num_subjects:,} subject(s); for example, {example} "
        f"belongs to subject {subjects[files[0]]}"
    ]


def _notes_on_fractions(
    files: list[Path], subjects: dict[Path, str], unnamed: list[Path]
) -> list[str]:
    """Return notes on unnamed subjects, on HipMRI's splits (unused), and on too few subjects."""
    notes = []
    for note in note_on_unnamed(unnamed, subjects, "scan(s)"):
        notes.append(f"{note} (--subjects changes this)")
    if any(is_volume(file) for file in files):
        notes.append(
            "HipMRI's own splits are not used with --axis: its cases are divided at random; to use "
            "HipMRI's splits, leave out --axis"
        )
    num_subjects = len(set(subjects.values()))
    if num_subjects < MIN_SUBJECTS:
        sharing = "validation and test" if num_subjects == 2 else "training, validation and test"
        notes.append(
            f"warning: {num_subjects} subject(s) for three splits: {sharing} use the same subject, "
            "so the scores do not generalise to other subjects"
        )
    return notes


# ---------------------------------------------------------------- policies


def splits_from_folders(files: list[Path], root: Path) -> Splits:
    """Split files by the split folders that contain them.

    Raises:
        DataError: if a file is not in a split folder.
    """
    splits: Splits = {split: [] for split in SPLITS}
    outside = []
    for file in files:
        split = split_of_path(file.relative_to(root))
        if split:
            splits[split].append(file)
        else:
            outside.append(str(file.relative_to(root)))
    if outside:
        raise DataError(
            f"{len(outside)} scan(s) in {root} are not in a folder that is named after a split:\n"
            f"{format_listing(outside, most=5)}\n"
            "Move them elsewhere, or use --split with fractions (0.8 0.1 0.1) or a CSV file."
        )
    return splits


def _has_split_folders(files: list[Path], root: Path) -> bool:
    """Return whether the files are in folders of at least two splits."""
    splits = {split_of_path(file.relative_to(root)) for file in files}
    return len(splits - {None}) >= 2


def parse_fractions(split: Sequence[str] | None) -> list[float]:
    """Parse --split as the fractions of train, validate and test; None: the default fractions.

    Raises:
        DataError: if they are not three fractions that add up to 1.
    """
    try:
        fractions = [float(value) for value in split or FRACTIONS]
    except (TypeError, ValueError):
        fractions = []
    are_valid = (
        len(fractions) == 3
        and min(fractions[:2]) > 0
        and fractions[2] >= 0
        and abs(sum(fractions) - 1) <= 1e-6
    )
    if not are_valid:
        raise DataError(
            f"--split is {' '.join(map(str, split or []))}; expected three fractions that add up "
            "to 1, such as 0.8 0.1 0.1, or a CSV file. Only the last one (test) may be 0, because "
            "validation selects the checkpoint."
        )
    return fractions


def splits_from_fractions(
    files: list[Path], subjects: dict[Path, str], fractions: Sequence[float], seed: int
) -> Splits:
    """Divide the subjects at random into train, validate and test.

    Each split with a positive fraction gets at least one subject. With fewer than three subjects,
    splits share a subject.
    """
    names = sorted(set(subjects.values()))
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    if len(order) < MIN_SUBJECTS:
        groups = [order[:1], order[-1:], order[-1:]]
    else:
        num_validate, num_test = _count_held_out(len(order), fractions)
        num_train = len(order) - num_validate - num_test
        test_start = num_train + num_validate
        groups = [order[:num_train], order[num_train:test_start], order[test_start:]]
    splits: Splits = {}
    for split, group in zip(SPLITS, map(set, groups), strict=True):
        splits[split] = [file for file in files if subjects[file] in group]
    return splits


def _count_held_out(num_subjects: int, fractions: Sequence[float]) -> list[int]:
    """Return the numbers of validation and test subjects, leaving at least one for training."""
    counts = [max(1, round(part * num_subjects)) if part else 0 for part in fractions[1:]]
    while sum(counts) >= num_subjects:
        counts[counts.index(max(counts))] -= 1
    return counts
