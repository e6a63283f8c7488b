"""The output folder of predict.py: scores.csv, and the name of each input's outputs.

scores.csv has one row per input. Its columns `file` and `path` state which input owns which output
name, so that a later call with the same input replaces its outputs, and a call with another input
of the same name writes under a numbered name. The names of the inputs of a call are also in
.unfinished.csv until it ends, because a killed process may leave outputs without a row.
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

ENDINGS = ("_reconstruction.nii.gz", "_error.nii.gz", "_codes.npz", ".png")  # of the outputs
SHEET_NAME = re.compile(r"contact_sheet_(\d+)\.png", re.I)  # figures of several inputs
MAX_PRINTED = 20  # number of files in the printed table
WRITE_INTERVAL = 2.0  # seconds between two writes of scores.csv, at least
# Bytes of a file name for the longest ending, a number, and `write_atomically`'s temporary name.
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
        """Return the output name of each input, and record the names until `finish`.

        Raises:
            OSError: if the folder cannot be written.
        """
        owners: dict[str, str] = {}
        for row in [*self.rows.values(), *read_table(self._unfinished)]:
            owners.setdefault(printable(str(input_path(row["path"]))), row["file"])
        present = {_name_key(name) for name in os.listdir(self.out)}

        def has_outputs(name: str) -> bool:
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
        """Write scores.csv, with empty cells in columns that a row does not have."""
        start = time.monotonic()
        columns: dict[str, None] = {}  # used as an ordered set
        for row in self.rows.values():
            columns |= dict.fromkeys(row)
        complete_rows = [dict.fromkeys(columns, "") | row for row in self.rows.values()]
        try:
            utils.write_csv(self._path, complete_rows)
            self._unwritten = False
        finally:
            # Writing takes longer the more rows there are: at most a twentieth of the time.
            seconds = time.monotonic() - start
            self._next_write = time.monotonic() + max(WRITE_INTERVAL, 20 * seconds)

    def finish(self, names: list[str]) -> None:
        """Write scores.csv, with the rows of earlier calls first and this call's in its order.

        Args:
            names: the output names of this call, in order.

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
    """Read the rows of a table that predict.py wrote; an absent file has none.

    Raises:
        DataError: if the file is damaged, or was not written by predict.py.
    """
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode("utf-8-sig")  # some spreadsheets add a mark
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
    return DataError(
        f"{path} is damaged or was not written by predict.py ({reason}); nothing was written. "
        "Move this file away, or choose another folder with -o"
    )


# ---------------------------------------------------------------- names


def input_path(file: str | Path) -> Path:
    """Return the absolute path that identifies an input.

    The folder is resolved, but not the file: if files are links, as in git-annex, two subjects may
    link to the same content.
    """
    file = Path(file)
    return file.parent.resolve() / file.name


def output_stem(file: Path) -> str:
    """Return the output name of a file if the name is neither taken nor too long."""
    stem = files.parse_name(file.name).stem.removesuffix(".npz").removesuffix("_codes")
    return stem or "unnamed"


def output_names(
    inputs: list[Path],
    owners: dict[str, str] | None = None,
    is_taken: Callable[[str], bool] | None = None,
    max_bytes: int = 255 - RESERVED_BYTES,
) -> list[str]:
    """Return a unique output name for each file, which is numbered if the file's name is taken.

    Names are also unique on file systems that ignore case. The end of a long name is replaced by a
    hash of the name.

    Args:
        inputs: the files.
        owners: printable `input_path` -> the name that this input already owns.
        is_taken: whether a name cannot be used although no input owns it.
        max_bytes: largest length of a name in bytes, without a number.
    """
    owners = owners or {}
    used = {_name_key(name) for name in owners.values()}
    numbers: dict[str, int] = {}  # last number of each name, so that many equal names are fast
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
    """Return a key that is equal for names that some file systems cannot tell apart."""
    return nfc(name).casefold()


def _shorten(name: str, max_bytes: int) -> str:
    """Return the name, or its start and a hash of it if it is longer than `max_bytes`."""
    content = name.encode("utf-8")
    if len(content) <= max_bytes:
        return name
    digest = hashlib.sha256(content).hexdigest()[:8]
    return content[: max_bytes - 9].decode("utf-8", errors="ignore") + "_" + digest


def _max_name_bytes(folder: Path) -> int:
    """Return the largest length of an output name that the file system of a folder allows."""
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows
        longest = 255
    return max(16, min(longest, 255) - RESERVED_BYTES)


# ---------------------------------------------------------------- printed table


def print_scores(rows: list[dict]) -> None:
    """Print the scores of the first files, and a note if the model was trained on some files."""
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
