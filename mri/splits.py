"""Which files are in which split: HipMRI's forms, plain folders of slices, and scans of any kind.

    path, line = find_data(args.data)          # --data, else $HIPMRI_DATA, else None: the sample
    source = find_source(path)                 # HipMRI, or train/ validate/ test/ folders of 2D slices
    source = find_source(path, "axial")        # any folder of scans, split by subject

Files are found, not read. What is wrong is a `DataError`: what was found, what was expected, what to do. What is merely
worth knowing stands in `Source.notes`, for the script to print.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mri.files import (
    NIFTI_NAME,
    SPLIT_NAMES,
    Source,
    files_below,
    format_listing,
    is_output,
    is_segmentation,
    natural_key,
    parse_name,
    printable,
    split_of_folder,
)
from mri.hipmri import HIPMRI_CASES, find_hipmri
from utils import DataError


def find_data(data: str | Path | None) -> tuple[Path | None, str]:
    """The data folder: `data` (--data), else $HIPMRI_DATA, else None, which means the sample.

    Also returns the line to print that says which it is and why. Raises DataError where a path was given,
    by either, and is missing: a mistyped path must never end in training on the sample.
    """
    environment = os.environ.get("HIPMRI_DATA") or None
    given, by = (data, "--data") if data is not None else (environment, "$HIPMRI_DATA")
    if given is None:
        return None, "data: the sample, as neither --data nor $HIPMRI_DATA is given"
    path = Path(given).expanduser()
    try:
        os.stat(path if str(given).strip() else "")  # Path("") would be the current folder
    except (OSError, ValueError) as error:
        raise DataError(
            f"can't open the data that {by} names, '{given}': {getattr(error, 'strerror', error)}.\n"
            "Give an existing folder, or leave both --data and $HIPMRI_DATA out."
        ) from error
    return path, f"data: {path}, from {by}"


def find_source(
    root: str | Path, axis: str | None = None, split: Sequence | None = None, seed: int = 0,
    subjects: str | None = None, known: dict | None = None, others: bool = True,
) -> Source:  # fmt: skip
    """`find_hipmri`, or, where an axis is named, `find_scans`. Raises DataError."""
    if axis is not None:
        return find_scans(root, split, seed, subjects, known, others)
    if split is not None or subjects is not None:
        raise DataError(
            "--split and --subjects are for scans of any kind, which --axis asks for: name it, or neither."
        )
    return find_hipmri(root)


def find_scans(
    root: str | Path, split: Sequence | None = None, seed: int = 0, pattern: str | None = None,
    known: dict | None = None, others: bool = True,
) -> Source:  # fmt: skip
    """Any NIfTI files, volumes or slices, in a folder at any depth, or a single file; split by subject.

    split: shares of the subjects, (0.8, 0.1, 0.1) by default, drawn by the seed; or a CSV file, which has the columns
    `split` and `subject` or `file` (a path within the folder). Files that it does not name are left out. Without it,
    folders that are named as splits (train, val, test ...) are the splits.
    pattern: a regular expression that finds in a path whose scan it is, see `_owner`.
    known: {split: {subject: [file within the folder]}} of a run, as `placed` gives it: its files stay where they were,
    and scans of nobody it was trained on, which have come since or are in another folder, are in validate and test,
    or, without `others`, left out. Raises DataError.
    """
    root = Path(os.path.abspath(Path(root).expanduser()))
    if root.is_file():
        files, root, left = [root], root.parent, 0
    else:
        found = sorted(
            files_below(root, NIFTI_NAME.pattern), key=lambda path: natural_key(str(path))
        )
        files = [path for path in found if not is_segmentation(path) and not is_output(path)]
        left = len(found) - len(files)
    if not files:
        raise DataError(
            f"no .nii or .nii.gz file in {root}, at any depth; point --data at a folder of scans."
        )
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise DataError(f"--subjects {pattern!r} is no regular expression: {error}.") from error
    by_folder = {} if known or split is not None else _splits_by_folder(files, root)
    drawing = not known and not by_folder and not (split is not None and len(split) == 1)
    subjects, rule = _subjects(files, root, pattern, needed=drawing)
    names, several = sorted(set(subjects.values())), []
    notes = [f"{root}: {len(files):,} scan(s) of {len(names):,} subject(s), {rule}"]
    if left:
        notes.append(
            f"{left:,} file(s) that are named as segmentations or as outputs of predict.py are left out"
        )
    if known:
        chosen = _as_known(known, files, subjects, root, others)
    elif by_folder:
        chosen = by_folder
        notes.append("the splits are those that the folders name")
    elif drawing:
        drawn, several = _draw_splits(names, _shares(split), seed)
        notes += several
        chosen = {part: [file for file in files if subjects[file] in drawn[part]] for part in drawn}
    else:
        chosen = _read_splits(Path(split[0]), files, subjects, root)
    source = Source(
        root, "scans", {part: found for part, found in chosen.items() if found}, notes, subjects
    )
    counts = ", ".join(f"{part} {len(found):,}" for part, found in source.splits.items())
    notes = [*notes, f"{counts} scan(s)"]
    trained = {subjects[file] for file in source.splits.get("train", [])}
    for part in ("validate", "test"):
        if several:  # of few subjects it has been said
            break
        if both := sorted(trained & {subjects[file] for file in source.splits.get(part, [])}):
            notes.append(f"warning: {len(both)} subject(s) in both train and {part} ({', '.join(both[:5])}): "
                         "if these are the same people, scores are too good")  # fmt: skip
    return replace(source, notes=notes)


def to_manifest(source: Source) -> dict[str, dict[str, list[str]]]:
    """Where each scan is, for `find_scans(known=...)` later on."""
    found: dict[str, dict[str, list[str]]] = {}
    for split, files in source.splits.items():
        for file in files:
            found.setdefault(split, {}).setdefault(source.subjects[file], []).append(
                str(file.relative_to(source.root))
            )
    return found


def _owner(file: Path, root: Path, pattern: str | None) -> str | None:
    """Whose a file is, by what its path says: what `pattern` finds there, or `sub-<name>`, or the case of its name."""
    path = file.relative_to(root)
    if pattern:
        found = re.search(pattern, path.as_posix())
        return found and (found[1] if found.re.groups else found[0])
    bids = [part[4:] for part in path.parts[:-1] if part.startswith("sub-")]
    bids += re.findall("^sub-([A-Za-z0-9]+)", file.name)
    name = parse_name(file)
    return bids[0] if bids else name.case if name.case != name.stem else None


def _subjects(
    files: list[Path], root: Path, pattern: str | None, needed: bool
) -> tuple[dict[Path, str], str]:
    """Whose each file is, and a line that says how that was told, with an example.

    Where its path does not say (see `_owner`), files in one folder are each somebody's, and in several its folder says;
    but if it is `needed` to know, and a folder has several, a DataError: a wrong guess would put one person into two
    splits.
    """
    owners = {file: _owner(file, root, pattern) for file in files}
    unknown = [file for file in files if not owners[file]]
    if unknown and pattern and needed:
        names = format_listing([str(file.relative_to(root)) for file in unknown], most=5)
        raise DataError(f"--subjects {pattern!r} finds nothing in the path of {len(unknown)} scan(s):\n{names}\n"
                        "expected a regular expression that finds in each path whose scan it is.")  # fmt: skip
    paths = {
        file: [part for part in file.relative_to(root).parts if not split_of_folder(Path(part))]
        for file in unknown
    }
    while (
        paths
        and min(map(len, paths.values())) > 1
        and len({parts[0] for parts in paths.values()}) == 1
    ):
        paths = {
            file: parts[1:] for file, parts in paths.items()
        }  # a folder that all are in tells nobody's name
    tops = Counter(parts[0] if len(parts) > 1 else None for parts in paths.values())
    if needed and len(tops) > 1 and max(tops.values()) > 1:
        some = next(file for file in unknown if len(paths[file]) > 1).relative_to(root)
        shared, folders = (
            os.path.commonpath([file.parent for file in unknown]),
            len(set(tops) - {None}),
        )
        start = "".join(f"{re.escape(part)}/" for part in Path(shared).relative_to(root).parts)
        raise DataError(
            f"whose scan is whose can't be told in {root}: {len(unknown)} files in {folders} folders, such as {some}, "
            "and no sub-<name> in their paths. Say it, so that nobody gets into two splits, by a regular expression:\n"
            f"  --subjects '^{start}([^/]+)/'   each of these folders is somebody's\n"
            "  --subjects '([^/]+)\\.nii'   each name is somebody's, in whatever folder\n"
            "  --subjects 'IXI\\d+'   whatever in a path is of this kind\n"
            "or by a table: --split splits.csv, with columns split and file."
        )
    by_folder = len(tops) > 1
    for file in unknown:
        stem = NIFTI_NAME.sub("", paths[file][-1])
        owners[file] = paths[file][0] if by_folder and len(paths[file]) > 1 else stem
    subjects = {file: printable(owner or "") for file, owner in owners.items()}
    told = f"{files[0].relative_to(root)} is of {subjects[files[0]]}"
    if unknown and needed and len(files) > 1:
        told += "; each file is taken for another person's (--subjects tells it otherwise)"
    return subjects, printable(told)


def _splits_by_folder(files: list[Path], root: Path) -> dict[str, list[Path]]:
    """The splits that folders name, if at least two are; then every file must be below one. Else none."""
    chosen: dict[str | None, list[Path]] = {split: [] for split in (*HIPMRI_CASES, None)}
    for file in files:
        named = [
            split
            for part in file.relative_to(root).parts[:-1]
            if (split := split_of_folder(Path(part)))
        ]
        chosen[named[0] if named else None].append(file)
    others = chosen.pop(None)
    if sum(map(bool, chosen.values())) < 2:
        return {}
    if others:
        raise DataError(
            f"{len(others)} scan(s) of {root} are in none of the folders that are named as splits:\n"
            f"{format_listing([str(file.relative_to(root)) for file in others], most=5)}\nMove them away, or say with --split "
            "0.8 0.1 0.1, or a CSV file, what the splits are."
        )
    return chosen


def _as_known(
    known: dict, files: list[Path], subjects: dict[Path, str], root: Path, others: bool
) -> dict[str, list[Path]]:
    """The splits of a run; who it was trained on is in no other. Its files are whose they were: `subjects` is changed.

    Another file is no stranger if its name, or a folder that it is in, is called as somebody of training is.
    """
    chosen: dict[str, list[Path]] = {split: [] for split in HIPMRI_CASES}
    owners = {split: {root / name: subject for subject, names in those.items() for name in names}
              for split, those in known.items()}  # fmt: skip
    trained = set(known.get("train", {}))
    for file in files:
        splits = [
            split for split, those in owners.items() if file in those
        ]  # with few subjects, one file is in several
        if splits:
            subjects[file] = owners[splits[0]][file]
        elif others and not trained & {
            subjects[file],
            parse_name(file).stem,
            *file.relative_to(root).parts,
        }:
            splits = ["validate", "test"]
        for split in splits:
            chosen[split].append(file)
    return chosen


def _shares(split: Sequence | None) -> list[float]:
    """Three shares that add up to 1, of train, validate and test."""
    try:
        shares = [float(share) for share in (split or (0.8, 0.1, 0.1))]
    except (TypeError, ValueError):
        shares = []
    if (
        len(shares) != 3
        or not min(shares) >= 0
        or not shares[0] * shares[1]
        or not abs(sum(shares) - 1) <= 1e-6
    ):
        given = " ".join(map(str, split or []))
        raise DataError(
            f"--split is {given}; expected three shares that add up to 1, such as 0.8 0.1 0.1, or a CSV file. Only the "
            "last, of the test split, may be 0: validation chooses the checkpoint."
        )
    return shares


def _draw_splits(
    subjects: list[str], shares: list[float], seed: int
) -> tuple[dict[str, set[str]], list[str]]:
    """Subjects of each split, at least one where its share is not 0; and what to note where there are too few."""
    order = [subjects[i] for i in np.random.default_rng(seed).permutation(len(subjects))]
    if len(order) < 3:
        note = f"warning: {len(order)} subject(s) for three splits: validation and test are of the same person"
        note += " as training" * (len(order) == 1) + ": scores say nothing about other people"
        return dict(zip(HIPMRI_CASES, ({order[0]}, {order[-1]}, {order[-1]}), strict=True)), [note]
    wanted = [max(1, round(share * len(order))) if share else 0 for share in shares[1:]]
    while sum(wanted) >= len(order):
        wanted[wanted.index(max(wanted))] -= 1
    ends = [len(order) - sum(wanted), len(order) - wanted[1]]
    parts = (order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] :])
    return {split: set(part) for split, part in zip(HIPMRI_CASES, parts, strict=True)}, []


def _read_splits(
    path: Path, files: list[Path], subjects: dict[Path, str], root: Path
) -> dict[str, list[Path]]:
    """The files of each split, as a CSV file has them."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"--split {path} can't be read ({error}); expected three shares, or a CSV file."
        ) from error
    chosen: dict[str, list[Path]] = {split: [] for split in HIPMRI_CASES}
    for number, row in enumerate(rows, start=2):
        split = SPLIT_NAMES.get((row.get("split") or "").strip().lower())
        name, by_file = (row.get("file") or "").strip(), bool((row.get("file") or "").strip())
        name = name or (row.get("subject") or "").strip().removeprefix("sub-")
        found = [
            file for file in files if (file == root / name if by_file else subjects[file] == name)
        ]
        if not split or not found:
            raise DataError(
                f"{path}, line {number}: {dict(row)}; expected a split of train, validate or test, and a subject or a "
                f"file that {root} holds."
            )
        chosen[split] += found
    placed = [file for found in chosen.values() for file in found]
    if len(set(placed)) < len(placed):
        twice = next(file for file in placed if placed.count(file) > 1)
        raise DataError(
            f"{path} names {twice.relative_to(root)} twice; expected each scan in one split."
        )
    return chosen
