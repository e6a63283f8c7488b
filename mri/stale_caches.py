"""Delete caches of decoded slices that are no longer needed, to bound their number.

When mri/cache.py builds a cache, the other caches of the same split and data set are examined:

- For 2D slices and HipMRI's volumes, each folder has only one way to be split. The new cache
  replaces all others.
- A folder of scans can be split in several ways (--seed, --split, --subjects), so its caches
  coexist. A cache is deleted if one of its files has since changed or disappeared. If more than
  MAX_CACHES are left, the least recently used ones are deleted.

Caches of other data folders, preprocessing settings or formats are not deleted.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

from mri.files import Source

MAX_CACHES = 10  # per split of a folder of scans; enough for ten seeds or folds
SECONDS_PER_DAY = 86400


def file_states(root: Path, files: list[Path]) -> list[bytes]:
    """Return a record of each file: `<path relative to root>\\0<bytes> <modification time>\\n`."""
    root_length = len(str(root)) + 1
    return [_file_state(path, path[root_length:]) for path in map(str, files)]


def _file_state(path: str, name: str) -> bytes:
    """Return the record of a file (see `file_states`)."""
    try:
        status = os.stat(path)  # not Path.stat: a split may have 10,000 files
        state = f"{status.st_size} {status.st_mtime_ns}"
    except OSError:  # reading the file will report it
        state = "unreadable"
    return os.fsencode(f"{name}\0{state}\n")


def delete_caches(
    root: Path, prefix: str, current: Path, source: Source, states: set[bytes]
) -> None:
    """Delete caches that are not needed (see the top of this file), and remains of killed runs.

    The caller must hold the lock of these caches. Only folders whose names start with the prefix
    are deleted. Temporary folders, which killed runs leave behind, are deleted after a day.

    Args:
        root: folder of all caches.
        prefix: start of the names of all caches of this split and data set.
        current: the cache that has just been built.
        source: the files of each split.
        states: the records of the files in `current` (see `file_states`).
    """
    others = []
    for path in root.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another run deleted it
            last_use = path.stat().st_mtime
            if ".tmp-" in path.name:
                if time.time() - last_use > SECONDS_PER_DAY:
                    shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir() and path != current:
                others.append((last_use, path))
    others.sort(reverse=True)
    count = 1  # the current one
    for _, path in others:
        may_be_used = source.form == "scans" and count < MAX_CACHES
        if may_be_used and _is_up_to_date(path, source.root, states):
            count += 1
        else:
            shutil.rmtree(path, ignore_errors=True)  # on Windows, another run may use it


def _is_up_to_date(cache: Path, root: Path, states: set[bytes]) -> bool:
    """Return whether all files of a cache still have their size and modification time.

    A cache of an earlier version has no records of its files and counts as up to date.

    Args:
        cache: folder of the cache.
        root: folder of the data.
        states: up-to-date records; files with these records are not examined again.
    """
    try:
        content = (cache / "files").read_bytes()
    except OSError:
        return True
    for record in re.finditer(rb"([^\0]*)\0[^\n]*\n", content):  # a name may contain line breaks
        name = os.fsdecode(record[1])
        if record[0] not in states and _file_state(os.path.join(root, name), name) != record[0]:
            return False
    return True
