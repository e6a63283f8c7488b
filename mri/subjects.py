"""Determine the subject (patient or volunteer) that each file belongs to, from its path.

    subject_of(Path("sub-07/ses-1/T2w.nii.gz"))        # "07"
    subject_of(Path("case_004_week_0_slice_3.nii"))    # "004"

`find_subjects` determines the subjects of all data: 2D slices, HipMRI's volumes and scans. Tables
and confidence intervals call each subject a case.

No subject should be in both training and test; `report_splits` warns if one is.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

from mri.files import (
    NIFTI_NAME,
    SPLITS,
    format_listing,
    nfc,
    parse_name,
    printable,
    real_path,
    split_of_folder,
    split_of_path,
    stem_of,
)
from utils import DataError

NNUNET_FOLDER = re.compile(r"images(tr|ts|va|val)$", re.I)  # images in nnU-Net's layout
CHANNEL = re.compile(r"_(\d{4})$")  # nnU-Net numbers the channels of a case: X_0000, X_0001
# The last part of a name, if it has a letter: the sequence or session in "p01_T2" and "p01-MR1".
LAST_WORD = re.compile(r"[ _-](?=[^ _-]*[^\W\d_])[^ _-]+$")
SLICE_NUMBER = re.compile(r"[ _-]slice[ _-]?\d+$", re.I)


def subject_of(path: Path, subject_pattern: str | None = None, root: Path = Path()) -> str | None:
    """Return the subject that a path names, or None if it names none.

    Without a pattern, the subject is taken from the first of these that is in the path:

    - BIDS's `sub-<name>`, in a folder or else in the file name. In a folder, the name ends at `_`;
      in a file name, it ends at the first character that is not a letter or a digit;
    - HipMRI's case, in the file name or else in a folder: "004" or, with a letter, "B006";
    - the case of a file `<case>_0000` in nnU-Net's folders imagesTr and imagesTs.

    Args:
        path: path of a file, relative to the data folder.
        subject_pattern: regular expression to search for in the path. The subject is the match of
            its first group, or the whole match if it has no group.
        root: the data folder, which may be one of nnU-Net's folders.

    Returns:
        The subject, printable and normalised to NFC, so that it is the same on all platforms.
    """
    if subject_pattern:
        match = re.search(nfc(subject_pattern), nfc(path.as_posix()))
        if not match:
            return None
        subject = match[1] if match.re.groups else match[0]
        return printable(subject) if subject else None
    if NIFTI_NAME.search(path.parent.name):  # a folder called x.nii.gz with the .nii inside
        path = path.parent
    folders = [nfc(part) for part in path.parts[:-1]]
    name = nfc(NIFTI_NAME.sub("", path.name))
    for folder in folders:
        match = re.match(r"sub-([^_]+)", folder, re.I)
        if match:
            return printable(match[1])
    match = re.match(r"sub-([^\W_]+)", name, re.I)
    if match:
        return match[1]
    for part in (name, *folders):
        parsed = parse_name(part)
        if parsed.case != parsed.stem:
            return parsed.case
    if NNUNET_FOLDER.match(path.parent.name or root.name) and CHANNEL.search(name):
        return printable(CHANNEL.sub("", name))
    return None


def find_subjects(
    files: list[Path], root: Path, subject_pattern: str | None = None
) -> tuple[dict[Path, str], list[Path]]:
    """Return the subject of each file, and a list of the files whose paths name no subject.

    The subjects of the listed files are guessed by `subjects_from_layout`.

    Raises:
        DataError: if the pattern is not a regular expression.
    """
    try:
        re.compile(subject_pattern or "")
    except re.error as error:
        raise DataError(
            f"--subjects {subject_pattern!r} is not a regular expression: {error}."
        ) from error
    subjects: dict[Path, str] = {}
    unnamed = []
    for file in files:
        subject = subject_of(file.relative_to(root), subject_pattern, root)
        if subject:
            subjects[file] = subject
        else:
            unnamed.append(file)
    return subjects | subjects_from_layout(unnamed, root), unnamed


def subjects_from_layout(files: list[Path], root: Path) -> dict[Path, str]:
    """Guess the subjects of files whose paths name no subject.

    If a file is in a subfolder, the name of the outermost subfolder is its subject. Folders do not
    count as subfolders if they are split folders, contain split folders, or contain all files.

    Any other file is a subject of its own, unless the names of several files mark them as parts of
    one subject `x`: slices (`x_slice_1`, `x_slice_2`), nnU-Net's channels (`x_0000`, `x_0001`), or
    sequences that several subjects have (`x_T1`, `x_T2`).
    """
    subjects = {}
    loose = []
    for file, parts in _distinctive_parts(files, root).items():
        if len(parts) > 1:
            subjects[file] = printable(nfc(parts[0]))
        else:
            subjects[file] = SLICE_NUMBER.sub("", nfc(stem_of(parts[0])))
            loose.append(file)
    stems = [subjects[file] for file in loose]
    if _are_channels(stems):
        subjects |= {file: CHANNEL.sub("", subjects[file]) for file in loose}
    else:
        sequences = _shared_last_words(stems)
        for file in loose:
            match = LAST_WORD.search(subjects[file])
            if match and match[0][1:].lower() in sequences:
                subjects[file] = subjects[file][: match.start()]
    return subjects


def _are_channels(stems: list[str]) -> bool:
    """Return whether the names end with nnU-Net's channel numbers.

    There must be at least two cases, all with the same channels. The numbers of a single series,
    such as IMG_0000 to IMG_0099, may be subjects.
    """
    channels: dict[str, set[str]] = {}
    for stem in stems:
        match = CHANNEL.search(stem)
        if not match:
            return False
        channels.setdefault(CHANNEL.sub("", stem), set()).add(match[1])
    sets = list(channels.values())
    return len(sets) > 1 and "0000" in sets[0] and all(other == sets[0] for other in sets)


def _shared_last_words(stems: list[str]) -> set[str]:
    """Return the last words that distinguish the scans of a subject, such as "t1" and "t2".

    A last word counts if at least two subjects have it, and each of these also has another one.
    """
    words_of: dict[str, set[str]] = {}
    for stem in stems:
        match = LAST_WORD.search(stem)
        if match:
            words_of.setdefault(stem[: match.start()], set()).add(match[0][1:].lower())
    counts = Counter[str]()
    for words in words_of.values():
        if len(words) > 1:
            counts.update(words)
    return {word for word, count in counts.items() if count > 1}


def _distinctive_parts(files: list[Path], root: Path) -> dict[Path, tuple[str, ...]]:
    """Return the parts of each path that may name its subject.

    Split folders, and folders that contain all files, are left out. If there are several splits,
    the folders above the split folders are left out, too: in `site/train/p1.nii`, the site is not a
    subject. A file inside a folder called `x.nii.gz` counts as the file `x.nii.gz`.
    """
    splits = {split_of_path(file.relative_to(root)) for file in files} - {None}
    parts_of: dict[Path, tuple[str, ...]] = {}
    for file in files:
        path = file.relative_to(root)
        path = path.parent if NIFTI_NAME.search(path.parent.name) else path
        is_split = [split_of_folder(Path(part)) is not None for part in path.parts]
        start = is_split.index(True) if len(splits) > 1 and True in is_split else 0
        parts = zip(path.parts[start:], is_split[start:], strict=True)
        parts_of[file] = tuple(part for part, skipped in parts if not skipped)
    num_shared = 0
    for folders in zip(*(parts[:-1] for parts in parts_of.values()), strict=False):
        if len(set(folders)) > 1:
            break
        num_shared += 1
    return {file: parts[num_shared:] for file, parts in parts_of.items()}


def note_on_unnamed(unnamed: list[Path], subjects: dict[Path, str], unit: str) -> list[str]:
    """Return a list with a note on files whose paths name no subject; [] if there are none."""
    if not unnamed or len(subjects) == 1:
        return []
    names = {subjects[file] for file in unnamed}
    if len(names) == len(unnamed):
        rule = f"each of these {unit.replace('(s)', 's')} counts as a subject of its own"
    else:
        rule = f"they count as {len(names):,} subject(s), by the names of files and folders"
    return [f"the paths of {len(unnamed):,} {unit} name no subject; {rule}"]


def check_guesses(unnamed: list[Path], root: Path, subject_pattern: str | None) -> None:
    """Check that `subjects_from_layout` cannot split one subject into two.

    Two layouts are accepted: all files in one folder, or one file in each folder. In both, each
    file counts as a subject. In other layouts, a folder could be a subject, a sequence or a site,
    and a wrong guess would put a subject into two splits.

    Args:
        unnamed: the files whose paths name no subject.
        root: the data folder.
        subject_pattern: the value of --subjects, which does not match these files.

    Raises:
        DataError: if the layout is ambiguous, or a pattern is given that does not match all files.
    """
    if unnamed and subject_pattern:
        names = format_listing([str(file.relative_to(root)) for file in unnamed], most=5)
        raise DataError(
            f"--subjects {subject_pattern!r} matches nothing in the paths of {len(unnamed)} "
            f"scan(s):\n{names}\n"
            "expected a regular expression that finds the subject in each path."
        )
    parts_of = _distinctive_parts(unnamed, root)
    in_subfolders = [file for file in unnamed if len(parts_of[file]) > 1]
    counts = Counter(parts_of[file][0] for file in in_subfolders)
    num_loose = len(unnamed) - len(in_subfolders)
    if not counts or max(num_loose, *counts.values()) == 1:
        return
    example = in_subfolders[0].relative_to(root)
    parent = Path(os.path.commonpath([file.parent for file in unnamed])).relative_to(root)
    prefix = "".join(f"{re.escape(part)}/" for part in parent.parts)
    raise DataError(
        f"cannot determine the subject of each scan in {root}: the paths of {len(unnamed)} files "
        f"in {len(counts)} folders contain no sub-<name> (for example, {example}). To keep each "
        "subject in one split, extract it from the path by a regular expression:\n"
        f"  --subjects '^{prefix}([^/]+)/'   if each of these folders is a subject\n"
        "  --subjects '([^/]+)\\.nii'   if each file name is a subject, in any folder\n"
        "  --subjects 'IXI\\d+'   if the paths contain identifiers such as IXI012\n"
        "or list the files in a table: --split splits.csv, with the columns split and file."
    )


def report_splits(
    splits: dict[str, list[Path]],
    subjects: dict[Path, str],
    unit: str,
    pairs: Iterable[tuple[str, str]] = tuple(combinations(SPLITS, 2)),
) -> list[str]:
    """Count the files of each split, and warn about subjects and files that are in two splits.

    Args:
        splits: split -> its files.
        subjects: file -> its subject.
        unit: name of the files in the notes, such as "slices".
        pairs: splits that must not share subjects.

    Returns:
        A line such as "train 6, validate 2, test 2 slices", followed by warnings for each pair of
        splits that shares subjects or files.
    """
    counts = ", ".join(f"{split} {len(files):,}" for split, files in splits.items())
    notes = [f"{counts or 'no'} {unit}"]
    for one, other in pairs:
        one_subjects = {subjects[file] for file in splits.get(one, [])}
        other_subjects = {subjects[file] for file in splits.get(other, [])}
        shared = sorted(one_subjects & other_subjects)
        if shared:
            examples = ", ".join(shared[:5]) + (", ..." if len(shared) > 5 else "")
            notes.append(
                f"warning: {len(shared)} subject(s) in both {one} and {other} ({examples}): "
                "if these are the same patients, the scores are too high"
            )
        linked = _files_in_both(splits.get(one, []), splits.get(other, []))
        if linked:
            example = " and ".join(printable(str(file)) for file in linked[0])
            notes.append(
                f"warning: {len(linked)} file(s) of {one} and {other} are links to the same file "
                f"(for example, {example}), so the scores are too high"
            )
    return notes


def _files_in_both(one: list[Path], other: list[Path]) -> list[tuple[Path, Path]]:
    """Return the pairs of different paths that lead to the same file."""
    folders = {folder: real_path(folder) for folder in {file.parent for file in (*one, *other)}}

    def target(file: Path) -> Path:
        """Resolve the links in a path; each folder is resolved only once."""
        return real_path(file) if file.is_symlink() else folders[file.parent] / file.name

    paths = {target(file): file for file in one}
    pairs = [(paths.get(target(file), file), file) for file in other]
    return [(first, second) for first, second in pairs if first != second]
