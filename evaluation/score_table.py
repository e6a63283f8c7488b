"""Maintain scores.csv in the output folder of predict.py, and choose the names of outputs.

scores.csv has one row per input. Its columns `path` and `file` map each input to its output name.
A later call with the same input replaces its outputs. An input of the same name from another folder
gets a numbered output name.

A killed process may leave outputs that are not in scores.csv. Until a call ends, .unfinished.csv
therefore lists the output names of its inputs.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import utils
from mri import files
from mri.files import nfc, printable
from utils import DataError

# Of output files
ENDINGS = ("_reconstruction.nii.gz", "_error.nii.gz", "_codes.npz", "_codes.vqc", ".png")
SHEET_NAME = re.compile(r"contact_sheet_(\d+)\.png", re.I)  # figures of several inputs
MAX_PRINTED = 20  # maximum number of files in the printed table
WRITE_INTERVAL = 2.0  # minimum time between two writes of scores.csv, in seconds
# Bytes to reserve for the longest ending, a number, and `write_atomically`'s temporary name.
RESERVED_BYTES = 56


class ScoreTable:
    """The rows of scores.csv, which grows while files are reconstructed.

    Attributes:
        rows: output name -> row; the columns may differ between rows.
    """

    def __init__(self, out: Path):
        """Read the rows of earlier calls.

        Raises:
            DataError: if scores.csv was not written by predict.py, or is damaged.
        """
        self.out = out
        self._path = out / "scores.csv"
        self._unfinished = out / ".unfinished.csv"
        self.rows = {row["file"]: row for row in read_table(self._path)}
        self._unwritten = False
        self._next_write = 0.0

    def claim_names(self, inputs: list[Path]) -> list[str]:
        """Choose an output name for each input, and list the names in .unfinished.csv.

        Raises:
            OSError: if the folder cannot be written.
        """
        owners: dict[str, str] = {}
        for row in [*self.rows.values(), *read_table(self._unfinished)]:
            owners.setdefault(printable(str(input_path(row["path"]))), row["file"])
        present = {_name_key(name) for name in os.listdir(self.out)}

        def has_outputs(name: str) -> bool:
            """Return whether an output of this name exists, or the name is that of a sheet."""
            if SHEET_NAME.fullmatch(name + ".png"):
                return True
            return any(_name_key(name + ending) in present for ending in ENDINGS)

        names = output_names(inputs, owners, has_outputs, _max_name_bytes(self.out))
        rows = []
        for name, path in zip(names, map(input_path, inputs), strict=True):
            owners[printable(str(path))] = name
        for path, name in owners.items():
            if name not in self.rows:
                rows.append({"file": name, "path": path})
        if rows:
            utils.write_csv(self._unfinished, rows)
        return names

    def add(self, row: dict) -> None:
        """Add or replace the row of an input; write scores.csv if it was not written recently."""
        self.rows[row["file"]] = row
        self._unwritten = True
        if time.monotonic() >= self._next_write:
            # If this fails, for example because the disk is full, later writes may succeed.
            with contextlib.suppress(OSError):
                self.write()

    def remove(self, name: str) -> None:
        """Remove the row of an input, if there is one."""
        self._unwritten |= self.rows.pop(name, None) is not None

    def write(self) -> None:
        """Write scores.csv; if a row lacks a column, its cell is empty."""
        start = time.monotonic()
        columns: dict[str, None] = {}  # used as an ordered set
        for row in self.rows.values():
            columns |= dict.fromkeys(row)
        complete_rows = [dict.fromkeys(columns, "") | row for row in self.rows.values()]
        try:
            utils.write_csv(self._path, complete_rows)
            self._unwritten = False
        finally:
            # Spend at most a twentieth of the time on writing, which takes longer with more rows.
            seconds = time.monotonic() - start
            self._next_write = time.monotonic() + max(WRITE_INTERVAL, 20 * seconds)

    def finish(self, names: list[str]) -> None:
        """Write scores.csv: first the rows of earlier calls, then those of this call, in order.

        Args:
            names: the output names of this call, in the order of the inputs.

        Raises:
            OSError: if scores.csv cannot be written.
        """
        added = {name: self.rows[name] for name in names if name in self.rows}
        earlier = {name: row for name, row in self.rows.items() if name not in added}
        self.rows = earlier | added
        if self.rows and (added or self._unwritten):
            self.write()
        elif self._unwritten:
            self._path.unlink(missing_ok=True)
        self._unfinished.unlink(missing_ok=True)


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the rows of a table that predict.py wrote; return no rows if the file is absent.

    Raises:
        DataError: if the file is damaged, or was not written by predict.py.
    """
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode("utf-8-sig")  # some spreadsheets add a byte order mark
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise _table_error(path, utils.first_line(error)) from error
    header = rows[0] if rows else []
    if "file" not in header or "path" not in header or len(set(header)) < len(header):
        raise _table_error(path, "its first line lacks the columns file and path")
    if not text.endswith("\n"):
        raise _table_error(path, "its last line is incomplete")
    names = set()
    table = []
    for number, cells in enumerate(rows[1:], start=2):
        if not cells:  # a blank line, which some editors add at the end
            continue
        if len(cells) != len(header):
            raise _table_error(path, f"row {number} has {len(cells)} of {len(header)} cells")
        row = dict(zip(header, cells, strict=True))
        name = row["file"]
        # The name becomes part of paths, so it must not lead out of the folder.
        if Path(name).name != name or not name.isprintable():
            raise _table_error(path, f"row {number} has {printable(name)!r} in the column file")
        if name in names:
            raise _table_error(path, f"{printable(name)!r} occurs twice in the column file")
        names.add(name)
        table.append(row)
    return table


def _table_error(path: Path, reason: str) -> DataError:
    """Return the error for a table that cannot be used."""
    return DataError(
        f"{path} is damaged or was not written by predict.py ({reason}); nothing was written. "
        "Move this file away, or choose another folder with -o"
    )


# ---------------------------------------------------------------- names


def input_path(file: str | Path) -> Path:
    """Return the absolute path that identifies an input.

    Links to folders are resolved. A link to a file is not: with git-annex, the files of two
    subjects may link to the same content.
    """
    file = Path(file)
    return file.parent.resolve() / file.name


def output_stem(file: Path) -> str:
    """Return the preferred output name of a file, before `output_names` shortens or numbers it."""
    stem = files.parse_name(file.name).stem.removesuffix(".npz").removesuffix(".vqc")
    stem = stem.removesuffix("_codes")
    return stem or "unnamed"


def output_names(
    inputs: list[Path],
    owners: dict[str, str] | None = None,
    is_taken: Callable[[str], bool] | None = None,
    max_bytes: int = 255 - RESERVED_BYTES,
) -> list[str]:
    """Return a unique output name for each file; append a number if its own name is taken.

    Names are also unique on file systems that ignore case. The end of a long name is replaced by a
    hash of the name.

    Args:
        inputs: the files.
        owners: printable `input_path` -> the name that this input already owns.
        is_taken: returns whether a name is taken although no input owns it.
        max_bytes: maximum length of a name in bytes, without a number.
    """
    owners = owners or {}
    used = {_name_key(name) for name in owners.values()}
    numbers: dict[str, int] = {}  # name -> its last number, so that the search does not start at 1
    names = []
    for file in inputs:
        path = printable(str(input_path(file)))
        if path in owners:
            names.append(owners[path])
            continue
        stem = _shorten(output_stem(file), max_bytes)
        number = numbers.get(stem, 1)
        name = stem if number == 1 else f"{stem}_{number}"
        while _name_key(name) in used or (is_taken and is_taken(name)):
            number += 1
            name = f"{stem}_{number}"
        numbers[stem] = number
        used.add(_name_key(name))
        names.append(name)
    return names


def _name_key(name: str) -> str:
    """Return a key that is equal for names that differ only in case or Unicode normalisation."""
    return nfc(name).casefold()


def _shorten(name: str, max_bytes: int) -> str:
    """Replace the end of a name that is longer than `max_bytes` by a hash of the name."""
    content = name.encode("utf-8")
    if len(content) <= max_bytes:
        return name
    digest = hashlib.sha256(content).hexdigest()[:8]
    return content[: max_bytes - 9].decode("utf-8", errors="ignore") + "_" + digest


def _max_name_bytes(folder: Path) -> int:
    """Return the maximum length of an output name in bytes on the file system of a folder."""
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows
        longest = 255
    return max(16, min(longest, 255) - RESERVED_BYTES)


# ---------------------------------------------------------------- printed table


def print_scores(rows: list[dict]) -> None:
    """Print the scores of up to MAX_PRINTED files, and a note on files used for training."""
    print(
        f"\n{'file':40}{'slices':>8}{'empty':>7}{'ssim':>9}{'ssim_body':>11}{'psnr (dB)':>11}"
        f"{'bits per pixel':>16}"
    )
    for row in rows[:MAX_PRINTED]:
        line = f"{row['file'][:39]:40}{row['slices']:8}{row['empty_slices']:7}"
        for name, width, digits in (("ssim", 9, 4), ("ssim_body", 11, 4), ("psnr", 11, 2)):
            cell = f"{float(row[name]):.{digits}f}" if row[name] else ""
            line += f"{cell:>{width}}"
        print(f"{line}{row['bits_per_pixel']:>16}")
    if len(rows) > MAX_PRINTED:
        print(f"... and {len(rows) - MAX_PRINTED} more, in scores.csv")
    in_training = sum(row["in_training"] == "yes" for row in rows)
    if in_training:
        print(
            f"note: the model was trained on {in_training} of {len(rows)} files; the scores of "
            "these files say nothing about other files"
        )
