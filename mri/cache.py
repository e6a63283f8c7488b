"""Cache decoded slices: decode every file once, into an int16 memory map on disk.

    cached = load_cached_split(source, "train", preprocessing, cache_root(cache_dir))
    cached.pixels[cached.records["row"][0]]   # (rows, columns) int16, the first slice

Files. Each split has a folder in the cache's root:

    <split>-<data set>-<files>/pixels.npy     (rows of the cache, *size) int16
    <split>-<data set>-<files>/slices.npz     tables of the slices and of the unusable files
    <split>-<data set>-<files>/files          the name, size and modification time of every file

When is a cache stale? <data set> is a hash of the data's folder, the `Preprocessing` and
CACHE_FORMAT. <files> is a hash of the content of `files`. Hence:

- A split is decoded again if its data folder is moved; if a file is added, removed or renamed; if
  the size or modification time of a file changes; if a field of the preprocessing differs; or if
  CACHE_FORMAT was raised. Raise it with every code change that affects the contents of the cache.
- Pixels that change while the file keeps its size and modification time go unnoticed.
- Unusable files are tried again at every start, because a repaired permission or network does not
  change the hashes.
- A cache that is truncated or cannot be opened is replaced. Altered pixels go unnoticed.

mri/stale_caches.py describes which caches are deleted, and when.

Several runs may share a cache: one run builds it while the others wait for its lock. The process
that holds the lock deletes stale caches after it has opened its own cache. A folder gets its final
name when it is complete. If another run has created a folder of this name by then, that folder is
used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mri import nifti
from mri.encoding import decode_file
from mri.files import Source
from mri.messages import bad_files_error
from mri.preprocessing import Preprocessing
from mri.stale_caches import delete_caches, file_states
from utils import DataError, lock

CACHE_FORMAT = 2  # see "When is a cache stale?"
POOL_FROM = 500  # smallest number of slices for which starting processes saves time

# For each slice: its row in pixels.npy, the index of its file in the split, and its SliceRecord.
SLICE_DTYPE = np.dtype([
    ("row", "i8"), ("file", "i8"),
    ("plane", "i8"), ("scale", "f8"), ("low", "f8"), ("mean", "f8"), ("std", "f8"),
    ("constant", "?"), ("height", "i8"), ("width", "i8"),
])  # fmt: skip
# For each unusable file: its index in the split, and the reason (see "Errors" in `mri.nifti_file`).
BAD_DTYPE = np.dtype([("file", "i8"), ("reason", "U200")])


class CachedSplit(NamedTuple):
    """The decoded slices of a split, sorted by file and plane."""

    pixels: np.ndarray  # (cache rows, *size) int16, memory-mapped; some cache rows may be unused
    records: np.ndarray  # (N,) SLICE_DTYPE
    bad: np.ndarray  # (unusable files,) BAD_DTYPE


# ---------------------------------------------------------------- find a cache


def cache_root(cache_dir: str | Path | None) -> Path:
    """Return the folder of all caches: `cache_dir`, else $HIPMRI_CACHE, else the user's default."""
    folder = cache_dir or os.environ.get("HIPMRI_CACHE")
    if folder:
        return Path(os.path.abspath(Path(folder).expanduser()))
    system_folders = {
        "win32": os.environ.get("LOCALAPPDATA", "~/AppData/Local"),
        "darwin": "~/Library/Caches",
    }
    folder = os.environ.get("XDG_CACHE_HOME") or system_folders.get(sys.platform, "~/.cache")
    return Path(os.path.abspath(os.path.expanduser(folder))) / "hipmri-vqvae"


def load_cached_split(
    source: Source,
    split: str,
    preprocessing: Preprocessing,
    root: Path,
    workers: int | None = None,
    progress: bool = True,
) -> CachedSplit:
    """Return the decoded slices of a split; decode them first if there is no valid cache.

    Args:
        source: the files of each split.
        split: "train", "validate" or "test".
        preprocessing: the settings that turn files into slices.
        root: folder of all caches (see `cache_root`).
        workers: number of decoding processes (default: one per core, or 1 below POOL_FROM slices).
        progress: whether to show a progress bar.

    Raises:
        DataError: if no file of the split can be used, or the cache cannot be written.
    """
    files = source.splits[split]
    prefix = _data_set_prefix(source, split, preprocessing)
    states = file_states(source.root, files)
    key = hashlib.sha256(b"".join(states)).hexdigest()[:20]
    folder = root / f"{prefix}{key}"
    cached = _open_valid_cache(folder, files, preprocessing)
    if cached is not None:
        return cached
    temporary = root / f"{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        wait_message = f"waiting for another run, which is preparing the {split} slices"
        with lock(root / f"{prefix}lock", wait_message):
            cached = _open_valid_cache(folder, files, preprocessing)
            if cached is not None:  # another run built it while this one waited
                return cached
            shutil.rmtree(folder, ignore_errors=True)  # damaged, or a file can be read again
            temporary.mkdir()
            build(temporary, source, split, preprocessing, workers, progress)
            (temporary / "files").write_bytes(b"".join(states))
            _publish(temporary, folder, preprocessing.size)
            cached = _open_cache(folder, preprocessing.size)
            delete_caches(root, prefix, folder, source, set(states))
    except OSError as error:
        raise DataError(
            f"cannot write the cache of decoded slices in {root}: {error.strerror or error}.\n"
            "Expected a writable folder with enough free space: choose one with --cache-dir or "
            "$HIPMRI_CACHE."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if cached is None:
        raise DataError(
            f"the cache {folder} was deleted or changed by another program just after it was "
            "written; run the command again, or choose another folder with --cache-dir."
        )
    return cached


def _data_set_prefix(source: Source, split: str, preprocessing: Preprocessing) -> str:
    """Return `<split>-<data set>-`, the part of a cache's name that ignores individual files."""
    key = os.fsencode(f"{source.root} {preprocessing} {CACHE_FORMAT}")
    return f"{split}-{hashlib.sha256(key).hexdigest()[:10]}-"


def _open_cache(folder: Path, size: tuple[int, int]) -> CachedSplit | None:
    """Open a cache; return None if it is missing or damaged."""
    try:
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        with np.load(folder / "slices.npz") as tables:
            records = tables["slices"]
            bad = tables["bad"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
    if pixels.dtype != np.int16 or pixels.shape[1:] != size:
        return None
    if records.dtype != SLICE_DTYPE or bad.dtype != BAD_DTYPE:
        return None
    if len(records) == 0 or records["row"].max() >= len(pixels):
        return None
    return CachedSplit(pixels, records, bad)


def _open_valid_cache(
    folder: Path, files: list[Path], preprocessing: Preprocessing
) -> CachedSplit | None:
    """Open a cache; return None if it is missing, damaged, or marks a readable file as unusable."""
    cached = _open_cache(folder, preprocessing.size)
    if cached is None:
        return None
    for index in cached.bad["file"]:
        _, reason = decode_file(files[index], preprocessing)
        if not reason:
            return None
    with contextlib.suppress(OSError):  # a cache of another user
        os.utime(folder)  # records the last use for `delete_caches`
    return cached


# ---------------------------------------------------------------- build a cache


class _Job(NamedTuple):
    """A file, and the rows of pixels.npy to decode it into; empty slices leave some rows unused."""

    file: int  # index among the split's files
    path: Path
    rows: range


def build(
    folder: Path,
    source: Source,
    split: str,
    preprocessing: Preprocessing,
    workers: int | None,
    progress: bool,
) -> None:
    """Decode a split into pixels.npy and slices.npz; arguments as in `load_cached_split`."""
    jobs = _plan_jobs(source.splits[split], preprocessing)
    num_rows = jobs[-1].rows.stop
    pixels_path = folder / "pixels.npy"
    _reserve(pixels_path, (num_rows, *preprocessing.size))
    if not workers:
        workers = 1 if num_rows < POOL_FROM else cores()
    records = []
    bad = []
    with tqdm(
        total=num_rows, desc=f"reading {split}", unit=" slices", disable=not progress, leave=False
    ) as bar:
        for chunk, chunk_records, chunk_bad in _decode(jobs, pixels_path, preprocessing, workers):
            records += chunk_records
            bad += chunk_bad
            bar.update(sum(len(job.rows) for job in chunk))
    records.sort()
    bad_table = np.array(sorted(bad), BAD_DTYPE)
    if not records:
        raise bad_files_error(source, split, bad_table)
    np.savez(folder / "slices.npz", slices=np.array(records, SLICE_DTYPE), bad=bad_table)


def _plan_jobs(files: list[Path], preprocessing: Preprocessing) -> list[_Job]:
    """Return one job per file, which reserves a row of pixels.npy for each possible slice."""
    jobs = []
    start = 0
    for index, path in enumerate(files):
        count = 1
        if preprocessing.form != "2D":
            with contextlib.suppress(ValueError):  # decoding the file will report it
                header = nifti.read_header(path)
                shape = nifti.planes_shape(header, preprocessing.axis, preprocessing.dimensions)
                count = min(preprocessing.planes, shape[0])
        jobs.append(_Job(index, path, range(start, start + count)))
        start += count
    return jobs


def _reserve(path: Path, shape: tuple[int, ...]) -> None:
    """Create an int16 memory map and allocate its disk space.

    Without allocated space, a full disk or quota would kill the process that writes to the map.

    Raises:
        OSError: if there is not enough space.
    """
    needed = math.prod(shape) * 2
    free = shutil.disk_usage(path.parent).free
    if free < needed * 1.02:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
    np.lib.format.open_memmap(path, "w+", np.int16, shape).flush()
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            # Any other error means that the file system does not support allocation.


def _decode(
    jobs: list[_Job], pixels_path: Path, preprocessing: Preprocessing, workers: int
) -> Iterator[tuple[list[_Job], list[tuple], list[tuple]]]:
    """Decode files in chunks; yield each finished chunk with the results of `_decode_chunk`."""
    chunk_size = 64 if preprocessing.form == "2D" else 1
    chunks = [jobs[i : i + chunk_size] for i in range(0, len(jobs), chunk_size)]
    if workers == 1:
        for chunk in chunks:
            yield chunk, *_decode_chunk(chunk, pixels_path, preprocessing)
        return
    pool = worker_pool(workers)
    try:
        futures = {}
        for chunk in chunks:
            futures[pool.submit(_decode_chunk, chunk, pixels_path, preprocessing)] = chunk
        for future in as_completed(futures):
            yield futures[future], *future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that decoded slices was killed, most likely because memory ran out; free "
            "some memory and run the command again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_chunk(
    chunk: list[_Job], pixels_path: Path, preprocessing: Preprocessing
) -> tuple[list[tuple], list[tuple]]:
    """Decode files directly into the memory map; each worker process runs this on its own chunks.

    Returns:
        The records of the slices (rows of SLICE_DTYPE) and of the unusable files (BAD_DTYPE).
    """
    pixels = np.load(pixels_path, mmap_mode="r+")
    records = []
    bad = []
    for job in chunk:
        slices, reason = decode_file(job.path, preprocessing)
        if len(slices) > len(job.rows):
            slices = []
            reason = "was changed while it was read; run the command again"
        if reason:
            bad.append((job.file, reason))
        for row, encoded in zip(job.rows, slices, strict=False):
            pixels[row] = encoded.pixels
            records.append((row, job.file, *encoded.record))
    return records, bad


def worker_pool(workers: int, context=None) -> ProcessPoolExecutor:
    """Return a pool of processes that decode files.

    Args:
        workers: number of processes.
        context: multiprocessing context (default: the default start method of the system).
    """
    return ProcessPoolExecutor(workers, context, initializer=_start_worker)


def _start_worker() -> None:
    """Prepare a worker process: use one thread, and exit when the parent process is killed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # do not inherit the parent's handler
    torch.set_num_threads(1)  # OpenMP threads do not survive a fork; each core has a worker

    def exit_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # otherwise this process would wait for work forever

    threading.Thread(target=exit_with_parent, daemon=True).start()


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return min(count, 61)  # Windows cannot wait for more than 61 processes


def _publish(temporary: Path, folder: Path, size: tuple[int, int]) -> None:
    """Rename a finished cache to `folder`, unless another run has put a valid cache there."""
    try:
        temporary.rename(folder)
    except OSError:
        if _open_cache(folder, size) is None:
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
