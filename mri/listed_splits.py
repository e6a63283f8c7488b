"""Split files as listed in a table of the user, or in the manifest of an earlier run.

    splits = splits_from_table(files, subjects, root, Path("splits.csv"))     # --split splits.csv
    splits = RecordedSplits(manifest, root).split(files, subjects)            # a run's config.json

The table or manifest may come from another platform, so paths are compared by `mri.files.path_key`.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from pathlib import Path

from mri.files import SPLIT_NAMES, SPLITS, nfc, parse_name, path_key, printable
from mri.subjects import subject_of
from utils import DataError

Splits = dict[str, list[Path]]  # split -> its files
Manifest = dict[str, dict[str, list[str]]]  # split -> subject -> its files, relative to the root

# Names of a table's columns, in lower case. BIDS tables have a column `participant_id`.
COLUMN_NAMES = {
    "split": "split",
    "subject": "subject",
    "subject_id": "subject",
    "participant": "subject",
    "participant_id": "subject",
    "patient": "subject",
    "patient_id": "subject",
    "file": "file",
    "filename": "file",
    "path": "file",
}
DELIMITERS = ",;\t"  # the one that occurs most often in the first line is used


# ---------------------------------------------------------------- table


def splits_from_table(
    files: list[Path], subjects: dict[Path, str], root: Path, table: Path
) -> Splits:
    """Split files by a CSV file that has a column `split`, and a column `subject` or `file`.

    Paths in the column `file` are absolute or relative to `root`. Scans that are not listed are
    left out.

    Args:
        files: all scans.
        subjects: file -> its subject.
        root: the folder of the scans.
        table: the CSV file (see `read_table`).

    Raises:
        DataError: if the table cannot be read, a row is unusable, or a scan is listed twice.
    """
    files_of_path: dict[str, list[Path]] = {}
    files_of_subject: dict[str, list[Path]] = {}
    for file in files:
        files_of_path.setdefault(path_key(file.relative_to(root)), []).append(file)
        files_of_subject.setdefault(_subject_key(subjects[file]), []).append(file)
    splits: Splits = {split: [] for split in SPLITS}
    for number, row in read_table(table):
        split = SPLIT_NAMES.get(row.get("split", "").lower())
        name, subject = row.get("file", ""), row.get("subject", "")
        if name:
            matches = files_of_path.get(_table_path_key(name, root), [])
        else:
            named = subject_of(Path(subject)) or ""  # the subject of "sub-A_ses-1" is A
            keys = (_subject_key(subject), _subject_key(named))
            matches = files_of_subject.get(keys[0]) or files_of_subject.get(keys[1], [])
        if not split or not matches:
            found = f"the split is {row['split']!r}" if row.get("split") else "there is no split"
            if split:
                what, names = ("file", files_of_path) if name else ("subject", files_of_subject)
                example = next(iter(names))
                found = f"no scan has the {what} {name or subject!r} (one scan has {example!r})"
            raise DataError(
                f"{table}, line {number}: {found}; expected train, validate or test in the column "
                f"split, and the name of a subject or file in {root} in the column subject or file."
            )
        splits[split] += matches
    counts = Counter(path for paths in splits.values() for path in paths)
    for path, count in counts.items():
        if count > 1:
            raise DataError(
                f"{table} lists {path.relative_to(root)} more than once; expected each scan in one "
                "split."
            )
    return splits


def read_table(table: Path) -> list[tuple[int, dict[str, str]]]:
    """Read a table with a header, as spreadsheet programs write it.

    Columns are separated by commas, semicolons or tabs. The text is UTF-8 or UTF-16 with a byte
    order mark, else Windows-1252. Spaces around cells and empty rows are ignored.

    Returns:
        The line number and the cells {column: text} of each row. Columns are renamed as in
        COLUMN_NAMES; other columns keep their names in lower case.

    Raises:
        DataError: if the table cannot be read.
    """
    try:
        lines = _decode(table.read_bytes()).splitlines()
        header = next((line for line in lines if line.strip()), "")
        delimiter = max(DELIMITERS, key=header.count)
        rows = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"cannot read --split {table} ({error}); expected three fractions or a CSV file."
        ) from error
    columns: list[str] = []
    table_rows = []
    for number, row in enumerate(rows, start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if columns:
            table_rows.append((number, dict(zip(columns, cells, strict=False))))
        else:
            names = [cell.lower() for cell in cells]
            columns = [COLUMN_NAMES.get(name, name) for name in names]
    return table_rows


def _decode(data: bytes) -> str:
    """Decode a table: UTF-16 with a byte order mark, UTF-8, or else Windows-1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252")
    if "\0" in text:
        raise ValueError("it contains no text")
    return text


def _subject_key(subject: str) -> str:
    """Return a key for comparing subjects, without BIDS's prefix `sub-`."""
    return re.sub("^sub-", "", printable(nfc(subject)), flags=re.I)


def _table_path_key(name: str, root: Path) -> str:
    """Return the `path_key`, relative to `root`, of a relative or absolute path in a table."""
    path = os.path.normpath(path_key(name))
    if os.path.isabs(path):
        path = os.path.relpath(path, root)
    return path_key(path)


# ---------------------------------------------------------------- manifest


class RecordedSplits:
    """The splits that an earlier run recorded in its manifest (see `mri.splits.to_manifest`)."""

    def __init__(self, manifest: Manifest, root: Path):
        """Read a manifest, which may come from another platform or an earlier version.

        Args:
            manifest: the splits, with paths relative to the data folder of the run.
            root: the present folder of the scans.
        """
        self.root = root
        # Path -> split -> subject. With fewer than three subjects, a file may be in several splits.
        self.recorded: dict[str, dict[str, str]] = {}
        for split, subjects in manifest.items():
            for subject, names in subjects.items():
                for name in names:
                    self.recorded.setdefault(path_key(name), {})[split] = nfc(subject)

    def __contains__(self, file: Path) -> bool:
        """Return whether a scan is recorded."""
        return self._key(file) in self.recorded

    def subjects(self, files: list[Path]) -> dict[Path, str]:
        """Return {file: subject} for the files that are recorded."""
        subjects = {}
        for file in files:
            splits = self.recorded.get(self._key(file))
            if splits:
                subjects[file] = next(iter(splits.values()))
        return subjects

    def split(
        self, files: list[Path], subjects: dict[Path, str], include_new_subjects: bool = True
    ) -> Splits:
        """Assign files to the splits that were recorded for them.

        Args:
            files: all scans.
            subjects: file -> its subject, by `find_subjects`.
            include_new_subjects: whether to put files that are not recorded into both validation
                and test, unless they may belong to a training subject. If false, they are left out.
        """
        training_subjects = self._training_subjects(files, subjects)
        splits: Splits = {split: [] for split in SPLITS}
        for file in files:
            file_splits = list(self.recorded.get(self._key(file), {}))
            if not file_splits and include_new_subjects:
                folders = self._key(file).split("/")
                names = {subjects[file], nfc(parse_name(file).stem), *folders}
                if names.isdisjoint(training_subjects):
                    file_splits = ["validate", "test"]
            for split in file_splits:
                splits[split].append(file)
        return splits

    def notes(self, files: list[Path]) -> list[str]:
        """Return a warning if some of the recorded files are missing, and a note if all are."""
        missing = sorted(self.recorded.keys() - {self._key(file) for file in files})
        if not missing:
            return []
        example = printable(missing[0])
        if len(missing) == len(self.recorded):
            return [
                f"none of the {len(missing):,} scan(s) that the run recorded is in {self.root} "
                f"(for example, {example}), so its training subjects are recognised by name only"
            ]
        return [
            f"warning: {len(missing):,} of the {len(self.recorded):,} scan(s) that the run recorded"
            f" are not in {self.root}; for example, {example}"
        ]

    def _training_subjects(self, files: list[Path], subjects: dict[Path, str]) -> set[str]:
        """Return the training subjects, as recorded and as this version would name them.

        The names can differ: for the folder sub-A_ses-1, earlier versions recorded "A_ses-1"
        instead of "A".

        Args:
            files: all scans.
            subjects: file -> its subject, by `find_subjects`.
        """
        names = set()
        for key, splits in self.recorded.items():
            if "train" in splits:
                names |= {splits["train"], subject_of(Path(key), root=self.root)}
        for file in files:
            if "train" in self.recorded.get(self._key(file), {}):
                names.add(subjects[file])
        return names - {None}

    def _key(self, file: Path) -> str:
        """Return the `path_key` of a file relative to `root`."""
        return path_key(file.relative_to(self.root))
