"""Decoded slices on disk, as an int16 memory map."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import multiprocessing
import os
import secrets
import shutil
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from mri import nifti
from mri.files import Source, format_listing
from mri.preprocessing import Preprocessing, fit_slice, read_planes
from utils import DataError

POOL_FROM = 500  # slices: starting processes costs more than decoding fewer than this
CACHE_FORMAT = 2  # raise it when what is written to the cache changes

SLICE_DTYPE = np.dtype([
    ("row", "i8"), ("file", "i8"), ("plane", "i8"), ("scale", "f8"), ("low", "f8"), ("mean", "f8"), ("std", "f8"),
    ("constant", "?"), ("height", "i8"), ("width", "i8"),
])  # fmt: skip
BAD_DTYPE = np.dtype([("file", "i8"), ("reason", "U200")])


def quantize(image: np.ndarray, low: float, high: float) -> tuple[np.ndarray, float]:
    """int16 steps and scale: image = (steps + 32768) * scale + low, no pixel off by more than scale / 2.

    low, high: its extremes. Integers spanning at most 65,535 get scale 1 and are exact; others (high - low) / 65,535.
    """
    if high - low <= 65535 and (image == np.rint(image)).all():
        return (image - low - 32768).astype(np.int16), 1.0
    scale = (high - low) / 65535 or 1.0
    return (np.rint((image - low) / scale) - 32768).astype(np.int16), scale


def encode_slice(image: np.ndarray, preprocessing: Preprocessing) -> tuple[np.ndarray, tuple]:
    """Fit and quantise a slice: its int16 pixels, and (scale, low, mean, std, constant, height, width)."""
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError(f"has {np.count_nonzero(~np.isfinite(image)):,} NaN or infinite pixels")
    fitted = fit_slice(image, preprocessing.fit, preprocessing.size)
    low, high = float(fitted.min()), float(fitted.max())
    largest = max(abs(low), abs(high))
    if largest > 1e30:
        raise ValueError(f"has intensities up to {largest:.0e}, too large for single precision")
    constant = high - low <= 1e-30 + 1e-9 * largest  # resizing a constant leaves rounding noise
    steps, scale = quantize(fitted, low, high)
    return steps, (scale, low, float(fitted.mean()), float(fitted.std()), constant, *image.shape)


def decode_file(path: Path, preprocessing: Preprocessing) -> tuple[list[tuple], str]:
    """[(plane, pixels, numbers)] of a file and "", or [] and why the file can't be used."""
    try:
        return [
            (plane, *encode_slice(image, preprocessing))
            for plane, image in read_planes(path, preprocessing)
        ], ""
    except ValueError as error:
        return [], str(error)
    except Exception as error:  # one odd file must not end the reading of the others
        return [], f"can't be decoded ({error!r})"


class Job(NamedTuple):
    """A file to decode, and its rows of the cache; those that empty slices or a bad file don't fill stay unused."""

    file: int
    path: Path
    rows: range


def decode_jobs(
    pixels_path: Path, jobs: list[Job], preprocessing: Preprocessing
) -> tuple[list, list]:
    """Decode files straight into the memory map (what a worker process runs): SLICE_DTYPE records, BAD_DTYPE records."""
    pixels = np.load(pixels_path, mmap_mode="r+")
    good, bad = [], []
    for file, path, rows in jobs:
        slices, reason = decode_file(path, preprocessing)
        if len(slices) > len(rows):
            slices, reason = [], "was changed while it was read; run the command again"
        bad += [(file, reason)] if reason else []
        for row, (plane, steps, numbers) in zip(rows, slices, strict=False):
            pixels[row] = steps
            good.append((row, file, plane, *numbers))
    return good, bad


def cache_root(cache_dir: str | Path | None) -> Path:
    """`cache_dir`, else $HIPMRI_CACHE, else a folder of ours in the user's cache folder."""
    if given := cache_dir or os.environ.get("HIPMRI_CACHE"):
        return Path(os.path.abspath(Path(given).expanduser()))
    users = {
        "win32": os.environ.get("LOCALAPPDATA", "~/AppData/Local"),
        "darwin": "~/Library/Caches",
    }
    user = os.environ.get("XDG_CACHE_HOME") or users.get(sys.platform, "~/.cache")
    return Path(os.path.abspath(os.path.expanduser(user))) / "hipmri-vqvae"


def cache_name(source: Source, split: str, preprocessing: Preprocessing) -> tuple[str, str]:
    """The cache folder's name, and its beginning, which stays the same when files change."""
    place = hashlib.sha256(
        os.fsencode(f"{source.root} {preprocessing} {CACHE_FORMAT}")
    ).hexdigest()[:10]
    key, skip = hashlib.sha256(), len(str(source.root)) + 1
    for path in map(str, source.splits[split]):
        try:
            status = os.stat(path)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:  # reading the file will say why
            state = "unreadable"
        key.update(os.fsencode(f"{path[skip:]}\0{state}\n"))
    return f"{split}-{place}-{key.hexdigest()[:20]}", f"{split}-{place}-"


def open_cache(
    folder: Path, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(pixels memory map, SLICE_DTYPE records, BAD_DTYPE records); None where there is no cache or it is damaged."""
    try:
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        with np.load(folder / "slices.npz") as tables:
            slices, bad = tables["slices"], tables["bad"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
    types = (pixels.dtype, pixels.shape[1:], slices.dtype, bad.dtype)
    whole = types == (np.int16, size, SLICE_DTYPE, BAD_DTYPE) and slices["row"].max() < len(pixels)
    return (pixels, slices, bad) if whole else None


def cached(
    source: Source,
    split: str,
    preprocessing: Preprocessing,
    root: Path,
    workers: int | None,
    progress: bool,
):
    """`open_cache` of a split, built first where it is missing, out of date or damaged."""
    files = source.splits[split]
    name, place = cache_name(source, split, preprocessing)
    if cache := current_cache(root / name, files, preprocessing):
        return cache
    temporary = root / f"{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with building(root / f"{place}lock", split):
            if cache := current_cache(
                root / name, files, preprocessing
            ):  # another run has just built it
                return cache
            temporary.mkdir()
            build(temporary, source, split, preprocessing, workers, progress)
            publish(temporary, root / name, preprocessing.size)
    except OSError as error:
        raise DataError(
            f"can't write the cache of decoded slices in {root}: {error.strerror or error}.\n"
            "Expected a folder that can be written and has room: name one with --cache-dir or "
            "$HIPMRI_CACHE."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    tidy(root, place, name)
    return open_cache(root / name, preprocessing.size)


def current_cache(folder: Path, files: list[Path], preprocessing: Preprocessing):
    """`open_cache`, or None also where a file that was bad can be read by now; it is then deleted."""
    cache = open_cache(folder, preprocessing.size)
    # Bad files are looked at again each time: permissions and networks recover without changing the key.
    if cache and not all(decode_file(files[i], preprocessing)[1] for i in cache[2]["file"]):
        del cache
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return cache


@contextlib.contextmanager
def building(path: Path, split: str) -> Iterator[None]:
    """Alone among the processes that would build this cache, as far as the file system knows locks."""
    lock = FileLock(path)  # let go when the process ends, however it does
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another run, which is preparing the {split} slices", flush=True)
            lock.acquire()
    except (OSError, NotImplementedError):
        pass  # no locks here: the work may be done twice, and the first result stands
    try:
        yield
    finally:
        lock.release()


def build(
    folder: Path,
    source: Source,
    split: str,
    preprocessing: Preprocessing,
    workers: int | None,
    progress: bool,
):
    """Decode a split into pixels.npy and slices.npz. Raises DataError where not one file is good."""
    jobs, total, pixels = [], 0, folder / "pixels.npy"
    for file, path in enumerate(source.splits[split]):
        count = 1
        if preprocessing.form != "2D":
            with contextlib.suppress(ValueError):  # decoding it will say why
                count = min(
                    preprocessing.planes,
                    nifti.planes_shape(nifti.read_header(path), preprocessing.axis)[0],
                )
        jobs.append(Job(file, path, range(total, total + count)))
        total += count
    reserve(pixels, total, preprocessing.size)
    chunk = 64 if preprocessing.form == "2D" else 1
    tasks = [(pixels, jobs[i : i + chunk], preprocessing) for i in range(0, len(jobs), chunk)]
    slices, bad = [], []
    with tqdm(
        total=total, desc=f"reading {split}", unit=" slices", disable=not progress, leave=False
    ) as bar:
        for done, (some_slices, some_bad) in run_jobs(
            tasks, workers or (1 if total < POOL_FROM else cores())
        ):
            slices += some_slices
            bad += some_bad
            bar.update(sum(len(job.rows) for job in done))
    if not slices:
        raise unusable_files(source, split, np.array(sorted(bad), BAD_DTYPE))
    np.savez(
        folder / "slices.npz",
        slices=np.array(sorted(slices), SLICE_DTYPE),
        bad=np.array(sorted(bad), BAD_DTYPE),
    )


def cores() -> int:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(cores, 61)  # Windows waits for no more processes


def run_jobs(tasks: list[tuple], workers: int) -> Iterator[tuple]:
    """Yield (jobs, result of `decode_jobs`) of each task when done: by a pool of processes or, for 1, here."""
    if workers == 1:
        yield from ((task[1], decode_jobs(*task)) for task in tasks)
        return
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    try:
        futures = {pool.submit(decode_jobs, *task): task[1] for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that decoded slices was killed, most likely for want of memory: free "
            "some, and run the command again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """One thread: OpenMP's don't survive a fork, and every core has its process. It ends when its parent was killed."""
    torch.set_num_threads(1)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)  # waiting for work would go on forever

    threading.Thread(target=watch, daemon=True).start()


def reserve(path: Path, rows: int, size: tuple[int, int]) -> None:
    """Create the memory map with its disk space: a full disk or quota is an error now, not a crash later."""
    needed, free = rows * math.prod(size) * 2, shutil.disk_usage(path.parent).free
    if free < needed * 1.02:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
    np.lib.format.open_memmap(path, "w+", np.int16, (rows, *size)).flush()
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise  # any other: a file system that can't reserve


def publish(temporary: Path, final: Path, size: tuple[int, int]) -> None:
    """Name a finished cache. If another run was first, its result stands; a damaged one is replaced."""
    try:
        temporary.rename(final)
    except OSError:
        if open_cache(final, size) is None:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)


def tidy(root: Path, place: str, keep: str) -> None:
    """Delete caches of the same files before they changed, and what runs killed over a day ago left."""
    for old in root.glob(f"{place}*"):
        try:
            used = ".tmp-" in old.name and time.time() - old.stat().st_mtime < 86400
            if old.is_dir() and old.name != keep and not used:
                shutil.rmtree(old)
        except OSError:
            pass  # another run was first, or is using it (Windows)


def with_reasons(source: Source, split: str, bad: np.ndarray) -> str:
    files = source.splits[split]
    return format_listing(
        [f"{files[i].relative_to(source.root)} {reason}" for i, reason in bad.tolist()], most=1000
    )


def unusable_files(source: Source, split: str, bad: np.ndarray) -> DataError:
    """The error that names every bad file of a split, with its reason."""
    total = len(source.splits[split])
    advice = (
        "Repair them, or go on without them: --skip-bad-files."
        if len(bad) < total
        else "No file of this split is left: point --data at other data."
    )
    return DataError(
        f"{len(bad):,} of the {total:,} files of the {split} split can't be used:\n"
        f"{with_reasons(source, split, bad)}\n"
        f"expected whole NIfTI files of finite numbers. {advice}"
    )
