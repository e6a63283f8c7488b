"""Read, check, normalise and cache 2D MRI slices: what `train.py` and `predict.py` learn from and measure on.

    source = sources.find_source(path)                      # which files are in train, validate and test
    train = load_split(source, "train")                     # decoded once, memory-mapped from then on
    images = train.batch(torch.randperm(len(train))[:16])   # (16, 1, 256, 128), z-scored
    train.place(device)                                     # into a GPU's memory, if they fit
    for images in train.batches(order.split(16), device):   # on the device

What is wrong with the data is a `DataError`: what was found, what was expected, what to do. What is merely worth
knowing stands in `Slices.notes`, for the script to print.

`crop_at_random` and `flip_at_random` vary training batches.

Pixels are cached as int16: integers spanning at most 65,535 steps are exact; of any other slice no pixel is
off by more than half a step, (max - min) / 131,070 of that slice.
"""

import contextlib
import errno
import functools
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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from filelock import FileLock, Timeout
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

import nifti
from sources import (
    EXPECTED,
    HIPMRI_CASES,
    DataError,
    SliceName,
    Source,
    describe,
    listing,
    mask_of,
    parse_name,
)  # fmt: skip

SIZE = (256, 128)  # rows (left-right), columns (inferior-superior)
STD_FLOOR = 0.05  # of the split's median deviation: a nearly empty slice must not have its noise blown up
POOL_FROM = 500  # slices: starting processes costs more than decoding fewer than this
CACHE_FORMAT = 2  # raise it when what is written to the cache changes

_SLICE = np.dtype([
    ("row", "i8"), ("file", "i8"), ("plane", "i8"), ("scale", "f8"), ("low", "f8"), ("mean", "f8"), ("std", "f8"),
    ("constant", "?"), ("height", "i8"), ("width", "i8"),
])  # fmt: skip
_BAD = np.dtype([("file", "i8"), ("reason", "U200")])


# ---------------------------------------------------------------------------------------- decoding


_DIMENSIONS = {"2D": 2, "3D": 3, "scans": None}  # of a file, by Source.form; scans are of either


@dataclass(frozen=True)
class _Preprocessing:
    """What is done to a file's pixels; part of the cache's key."""

    form: str  # a key of _DIMENSIONS
    fit: str  # "resize", "crop" or "trim", see `_cut`
    planes: int  # at most, of a volume, its central ones
    axis: str | int = "coronal"  # along which volumes are cut, as nifti.planes has it
    size: tuple[int, int] = SIZE  # rows and columns that slices are brought to


def _planes(path: Path, recipe: _Preprocessing) -> Iterator[tuple[int, np.ndarray]]:
    """The slices of a file as (plane, (rows, columns) array), of scans without empty ones. ValueError: why it can't."""
    stored, scaled = nifti.planes(*nifti.open_nifti(path), _DIMENSIONS[recipe.form], recipe.axis)
    first, level = max(0, (len(stored) - recipe.planes) // 2), -np.inf
    if recipe.form == "scans":
        level = empty_level(scaled(stored[:: max(1, len(stored) // 32)]))
    shown = 0
    for plane in range(first, min(first + recipe.planes, len(stored))):
        image = scaled(stored[plane])
        if not is_empty(image, level):
            shown += 1
            yield plane, image
    if not shown:
        raise ValueError("has no slice that shows anything")


def empty_level(some: np.ndarray) -> float:
    """Of (N, rows, columns) of a scan: a tenth of the way from its 1st percentile to its 99th; of one slice -inf."""
    low, high = np.percentile(some, (1, 99))
    return (
        low + 0.1 * (high - low) if len(some) > 1 and np.isfinite(low + high) else -np.inf
    )  # what isn't is told later


def is_empty(image: np.ndarray, level: float) -> bool:
    """Whether a scan's slice shows next to nothing: under 5 % of its pixels are above `empty_level`."""
    return bool((image > level).mean() < 0.05)


def _cut(shape: Sequence[int], fit: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of what is taken of (rows, columns) before it is resized to `size`.

    "crop": the largest centre of size's proportions; "trim": the centre of that size, where at most a tenth of either
    side is cut off; else, and for "resize", all.
    """
    (rows, columns), ratio = shape, size[0] / size[1]
    height, width = rows, columns
    if fit == "crop":
        height, width = min(rows, round(columns * ratio)), min(columns, round(rows / ratio))
    elif fit == "trim" and 0 <= rows - size[0] <= rows // 10 and 0 <= columns - size[1] <= columns // 10:
        height, width = size
    return (rows - height) // 2, (columns - width) // 2, height, width


def _fit(image: np.ndarray, fit: str, size: tuple[int, int]) -> np.ndarray:
    """Bring a slice to `size`, float64: what `_cut` takes of it, resized where that has another size."""
    top, left, height, width = _cut(image.shape, fit, size)
    image = image[top : top + height, left : left + width].astype(np.float64)
    if image.shape == size:
        return image
    return resize(torch.from_numpy(image)[None], list(size), antialias=True)[0].numpy()


def _quantise(image: np.ndarray, low: float, high: float) -> tuple[np.ndarray, float]:
    """int16 steps and scale: image = (steps + 32768) * scale + low, no pixel off by more than scale / 2.

    low, high: its extremes. Integers spanning at most 65,535 get scale 1 and are exact; others (high - low) / 65,535.
    """
    if high - low <= 65535 and (image == np.rint(image)).all():
        return (image - low - 32768).astype(np.int16), 1.0
    scale = (high - low) / 65535 or 1.0
    return (np.rint((image - low) / scale) - 32768).astype(np.int16), scale


def _encode(image: np.ndarray, recipe: _Preprocessing) -> tuple[np.ndarray, tuple]:
    """Fit and quantise a slice: its int16 pixels, and (scale, low, mean, std, constant, height, width)."""
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError(f"has {np.count_nonzero(~np.isfinite(image)):,} NaN or infinite pixels")
    fitted = _fit(image, recipe.fit, recipe.size)
    low, high = float(fitted.min()), float(fitted.max())
    largest = max(abs(low), abs(high))
    if largest > 1e30:
        raise ValueError(f"has intensities up to {largest:.0e}, too large for single precision")
    constant = high - low <= 1e-30 + 1e-9 * largest  # resizing a constant leaves rounding noise
    steps, scale = _quantise(fitted, low, high)
    return steps, (scale, low, float(fitted.mean()), float(fitted.std()), constant, *image.shape)


def _decode(path: Path, recipe: _Preprocessing) -> tuple[list[tuple], str]:
    """[(plane, pixels, numbers)] of a file and "", or [] and why the file can't be used."""
    try:
        return [(plane, *_encode(image, recipe)) for plane, image in _planes(path, recipe)], ""
    except ValueError as error:
        return [], str(error)
    except Exception as error:  # one odd file must not end the reading of the others
        return [], f"can't be decoded ({error!r})"


class _Job(NamedTuple):
    """A file to decode, and its rows of the cache; those that empty slices or a bad file don't fill stay unused."""

    file: int
    path: Path
    rows: range


def _convert(pixels_path: Path, jobs: list[_Job], recipe: _Preprocessing) -> tuple[list, list]:
    """Decode files straight into the memory map (what a worker process runs): _SLICE records, _BAD records."""
    pixels = np.load(pixels_path, mmap_mode="r+")
    good, bad = [], []
    for file, path, rows in jobs:
        slices, reason = _decode(path, recipe)
        if len(slices) > len(rows):
            slices, reason = [], "was changed while it was read; run the command again"
        bad += [(file, reason)] if reason else []
        for row, (plane, steps, numbers) in zip(rows, slices, strict=False):
            pixels[row] = steps
            good.append((row, file, plane, *numbers))
    return good, bad


def slice_affine(
    path: str | Path, form: str = "2D", fit: str = "resize", axis: str | int = "coronal", size: tuple[int, int] = SIZE
) -> np.ndarray:
    """The affine, (4, 4), of a slice of this file, cut and brought to `size` as `load_split` does, its centre at 0 mm.

    Raises DataError where the file can't be read.
    """
    try:
        header = nifti.read_header(Path(path))
        shape, turn = header.get_data_shape(), None
        dimensions = _DIMENSIONS[form] or nifti.dimensions_of(shape)
        if dimensions == 3 and isinstance(axis, str):
            turn = nifti.orientation(header)
        affine, order = nifti.affine_of(header), [0, 1, 2]
        if len(shape) < dimensions:
            raise ValueError(f"has shape {' x '.join(map(str, shape))}, expected {dimensions} dimensions")
    except ValueError as error:
        raise DataError(f"{path} {error}; expected a NIfTI file.") from error
    if dimensions == 3:
        if turn is not None:  # axes become right, anterior, superior
            affine = affine @ nib.orientations.inv_ornt_aff(turn, shape[:3])
            shape = [shape[int(np.flatnonzero(turn[:, 0] == i)[0])] for i in range(3)]
        through = nifti.AXES[axis] if isinstance(axis, str) else axis
        order = [*(i for i in range(3) if i != through), through]
        affine, shape = affine[:, [*order, 3]], [shape[i] for i in order]
    rows, columns = _cut(shape[:2], fit, size)[2:]
    affine = affine @ np.diag([rows / size[0], columns / size[1], 1, 1])
    affine[:3, 3] = -affine[:3, :2] @ (np.array(size) - 1) / 2
    return affine


def read_slice(path: str | Path, fit: str = "resize", size: tuple[int, int] = SIZE) -> torch.Tensor:
    """One 2D NIfTI file, fitted and z-scored as `Slices` does: (1, *size) float32. Raises DataError."""
    slices, reason = _decode(Path(path), _Preprocessing("2D", fit, 1, size=size))
    if reason:
        raise DataError(f"{path} {reason}; give a 2D NIfTI slice.")
    _, steps, (scale, low, mean, std, constant, *_) = slices[0]
    if constant:
        raise DataError(f"{path} is of one value; give a slice that shows something.")
    return torch.from_numpy(((steps + 32768.0) * scale + low - mean) / std).float()[None]


# ------------------------------------------------------------------------------------------- cache


def _cache_root(cache_dir: str | Path | None) -> Path:
    """`cache_dir`, else $HIPMRI_CACHE, else a folder of ours in the user's cache folder."""
    if given := cache_dir or os.environ.get("HIPMRI_CACHE"):
        return Path(os.path.abspath(Path(given).expanduser()))
    users = {"win32": os.environ.get("LOCALAPPDATA", "~/AppData/Local"), "darwin": "~/Library/Caches"}
    user = os.environ.get("XDG_CACHE_HOME") or users.get(sys.platform, "~/.cache")
    return Path(os.path.abspath(os.path.expanduser(user))) / "hipmri-vqvae"


def _cache_name(source: Source, split: str, recipe: _Preprocessing) -> tuple[str, str]:
    """The cache folder's name, and its beginning, which stays the same when files change."""
    place = hashlib.sha256(os.fsencode(f"{source.root} {recipe} {CACHE_FORMAT}")).hexdigest()[:10]
    key, skip = hashlib.sha256(), len(str(source.root)) + 1
    for path in map(str, source.splits[split]):
        try:
            status = os.stat(path)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:  # reading the file will say why
            state = "unreadable"
        key.update(os.fsencode(f"{path[skip:]}\0{state}\n"))
    return f"{split}-{place}-{key.hexdigest()[:20]}", f"{split}-{place}-"


def _open_cache(folder: Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(pixels memory map, _SLICE records, _BAD records); None where there is no cache or it is damaged."""
    try:
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        with np.load(folder / "slices.npz") as tables:
            slices, bad = tables["slices"], tables["bad"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
    types = (pixels.dtype, pixels.shape[1:], slices.dtype, bad.dtype)
    whole = types == (np.int16, size, _SLICE, _BAD) and slices["row"].max() < len(pixels)
    return (pixels, slices, bad) if whole else None


def _cached(source: Source, split: str, recipe: _Preprocessing, root: Path, workers: int | None, progress: bool):
    """`_open_cache` of a split, built first where it is missing, out of date or damaged."""
    files = source.splits[split]
    name, place = _cache_name(source, split, recipe)
    if cache := _current_cache(root / name, files, recipe):
        return cache
    temporary = root / f"{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _building(root / f"{place}lock", split):
            if cache := _current_cache(root / name, files, recipe):  # another run has just built it
                return cache
            temporary.mkdir()
            _build(temporary, source, split, recipe, workers, progress)
            _publish(temporary, root / name, recipe.size)
    except OSError as error:
        raise DataError(
            f"can't write the cache of decoded slices in {root}: {error.strerror or error}.\n"
            "Expected a folder that can be written and has room: name one with --cache-dir or "
            "$HIPMRI_CACHE."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _tidy(root, place, name)
    return _open_cache(root / name, recipe.size)


def _current_cache(folder: Path, files: list[Path], recipe: _Preprocessing):
    """`_open_cache`, or None also where a file that was bad can be read by now; it is then deleted."""
    cache = _open_cache(folder, recipe.size)
    # Bad files are looked at again each time: permissions and networks recover without changing the key.
    if cache and not all(_decode(files[i], recipe)[1] for i in cache[2]["file"]):
        del cache
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return cache


@contextlib.contextmanager
def _building(path: Path, split: str) -> Iterator[None]:
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


def _build(folder: Path, source: Source, split: str, recipe: _Preprocessing, workers: int | None, progress: bool):
    """Decode a split into pixels.npy and slices.npz. Raises DataError where not one file is good."""
    jobs, total, pixels = [], 0, folder / "pixels.npy"
    for file, path in enumerate(source.splits[split]):
        count = 1
        if recipe.form != "2D":
            with contextlib.suppress(ValueError):  # decoding it will say why
                count = min(recipe.planes, nifti.planes_shape(nifti.read_header(path), recipe.axis)[0])
        jobs.append(_Job(file, path, range(total, total + count)))
        total += count
    _reserve(pixels, total, recipe.size)
    chunk = 64 if recipe.form == "2D" else 1
    tasks = [(pixels, jobs[i : i + chunk], recipe) for i in range(0, len(jobs), chunk)]
    slices, bad = [], []
    with tqdm(total=total, desc=f"reading {split}", unit=" slices", disable=not progress, leave=False) as bar:
        for done, (some_slices, some_bad) in _run(tasks, workers or (1 if total < POOL_FROM else _cores())):
            slices += some_slices
            bad += some_bad
            bar.update(sum(len(job.rows) for job in done))
    if not slices:
        raise _unusable(source, split, np.array(sorted(bad), _BAD))
    np.savez(folder / "slices.npz", slices=np.array(sorted(slices), _SLICE), bad=np.array(sorted(bad), _BAD))


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 61)  # Windows waits for no more processes


def _run(tasks: list[tuple], workers: int) -> Iterator[tuple]:
    """Yield (jobs, result of `_convert`) of each task when done: by a pool of processes or, for 1, here."""
    if workers == 1:
        yield from ((task[1], _convert(*task)) for task in tasks)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    try:
        futures = {pool.submit(_convert, *task): task[1] for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that decoded slices was killed, most likely for want of memory: free "
            "some, and run the command again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """One thread: OpenMP's don't survive a fork, and every core has its process. It ends when its parent was killed."""
    torch.set_num_threads(1)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)  # waiting for work would go on forever

    threading.Thread(target=watch, daemon=True).start()


def _reserve(path: Path, rows: int, size: tuple[int, int]) -> None:
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


def _publish(temporary: Path, final: Path, size: tuple[int, int]) -> None:
    """Name a finished cache. If another run was first, its result stands; a damaged one is replaced."""
    try:
        temporary.rename(final)
    except OSError:
        if _open_cache(final, size) is None:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)


def _tidy(root: Path, place: str, keep: str) -> None:
    """Delete caches of the same files before they changed, and what runs killed over a day ago left."""
    for old in root.glob(f"{place}*"):
        try:
            used = ".tmp-" in old.name and time.time() - old.stat().st_mtime < 86400
            if old.is_dir() and old.name != keep and not used:
                shutil.rmtree(old)
        except OSError:
            pass  # another run was first, or is using it (Windows)


# ------------------------------------------------------------------------------------------ slices


class Slices(torch.utils.data.Dataset):
    """One split, memory-mapped: N slices of 256 x 128, each z-scored by its own mean and deviation.

    names: N SliceName. mean, std: (N,) float32 in the scanner's intensities, std not below 5 % of the split's
    median. constant: (N,) bool, slices of one single value; they come out as zeros. notes: lines to print. files: N, in
    which each slice is. size: rows and columns, 256 x 128 unless another was asked for.
    """

    def __init__(
        self, split: str, names: list[SliceName], pixels: np.ndarray, records: np.ndarray, notes: list[str],
        files: list[Path], recipe: _Preprocessing,
    ):  # fmt: skip
        self.split, self.names, self.notes, self.files, self._recipe = split, names, notes, files, recipe
        self.fit, self.size, self._planes = recipe.fit, recipe.size, records["plane"]
        self._pixels, self._rows = pixels, records["row"]
        self._placed: tuple[torch.Tensor, ...] | None = None  # pixels, gain and bias in a GPU's memory
        varied = ~records["constant"]
        floor = STD_FLOOR * float(np.median(records["std"][varied])) if varied.any() else 1.0
        std = np.maximum(records["std"], floor)
        # z = ((steps + 32768) * scale + low - mean) / std = (steps + 32768) * gain + bias
        gain = varied * records["scale"] / std
        bias = varied * (records["low"] - records["mean"]) / std
        self._gain, self._bias = (torch.from_numpy(a).float().view(-1, 1, 1, 1) for a in (gain, bias))
        self.mean, self.std = torch.from_numpy(records["mean"].copy()).float(), torch.from_numpy(std).float()
        self.constant = torch.from_numpy(~varied)

    @property
    def fingerprint(self) -> str:
        """Changes with the slices' number, order and contents, not with the folder that they lie in."""
        return hashlib.sha256(torch.stack([self.mean, self.std]).numpy().tobytes()).hexdigest()[:16]

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), the first slice's, see `slice_affine`."""
        recipe = self._recipe
        return slice_affine(self.files[0], recipe.form, recipe.fit, recipe.axis, recipe.size)

    @functools.cached_property
    def description(self) -> dict:
        """Size, mm between rows and between columns (median of some 50 files), and the axis volumes were cut along."""
        recipe, files, sizes = self._recipe, list(dict.fromkeys(self.files)), []
        for file in files[:: -(-len(files) // 50)]:
            with contextlib.suppress(DataError):  # an affine that tells nothing is no matter in training
                affine = slice_affine(file, recipe.form, recipe.fit, recipe.axis, recipe.size)
                sizes.append(nib.affines.voxel_sizes(affine)[:2])
        sizes = [size for size in sizes if size.min() > 0]
        spacing = np.median(sizes, 0).tolist() if sizes else None
        return {"size": list(self.size), "spacing": spacing, "axis": recipe.axis}

    def labels(self) -> torch.Tensor | None:
        """Segmentations, (N, 256, 128) uint8, 0 where a slice has none beside it; None where no slice has one.

        For measuring alone: nothing in training reads them.
        """
        masks = [mask_of(file) for file in self.files]
        if not any(masks):
            return None
        labels, recipe = torch.zeros(len(self), *self.size, dtype=torch.uint8), self._recipe
        last, stored = None, np.zeros(0)
        for i, (mask, plane) in enumerate(zip(masks, self._planes.tolist(), strict=True)):
            if not mask:
                continue
            try:
                if mask != last:
                    stored, scaled = nifti.planes(*nifti.open_nifti(mask), _DIMENSIONS[recipe.form], recipe.axis)
                    last = mask
                image = scaled(stored[plane]).astype(np.uint8)
            except (ValueError, IndexError) as error:
                raise DataError(f"{mask} {error}; expected a segmentation like its image, or none.") from error
            top, left, height, width = _cut(image.shape, self.fit, self.size)
            image = image[top : top + height, left : left + width]
            image = torch.from_numpy(np.ascontiguousarray(image))[None]
            labels[i] = resize(image, list(self.size), InterpolationMode.NEAREST_EXACT)[0]
        return labels

    @property
    def positions(self) -> torch.Tensor:
        """Where each slice lies between the first and the last of its volume, (N,) 0 to 1; NaN: names don't tell."""
        slices_of = Counter(self.files)
        volumes = [file if slices_of[file] > 1 else (name.case, name.week)  # a volume's file, or slices' common name
                   for file, name in zip(self.files, self.names, strict=True)]  # fmt: skip
        inside: dict[object, list[int]] = {}
        for volume, name in zip(volumes, self.names, strict=True):
            inside.setdefault(volume, []).append(name.slice)
        ends = [(min(inside[volume]), max(inside[volume])) for volume in volumes]
        return torch.tensor(
            [
                (name.slice - low) / (high - low) if high > low else math.nan
                for name, (low, high) in zip(self.names, ends, strict=True)
            ]
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> torch.Tensor:
        """(1, 256, 128) float32, z-scored."""
        return self.batch(torch.tensor([index]))[0]

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """The slices at `indices` (B,), in that order: (B, 1, 256, 128) float32, z-scored, on the CPU."""
        return _zscored(*self._stored(torch.as_tensor(indices, device="cpu")))

    def place(self, device: torch.device, share: float = 0.5) -> str:
        """Copy the pixels into the device's memory, for `batches`, if they take at most `share` of what is free there.

        Returns a line that says where they are.
        """
        needed, free = len(self) * math.prod(self.size) * 2, _free_memory(device)
        if needed > share * free:
            return f"{self.split}: {needed / 1e9:.2f} GB, over {share:.0%} of {device}'s free memory: read as it goes"
        pixels = torch.empty(len(self), *self.size, dtype=torch.int16, device=device)
        for part in torch.arange(len(self)).split(1024):  # bounds what lies in the computer's own memory meanwhile
            pixels[part[0] : part[-1] + 1] = self._stored(part)[0].to(device)
        self._placed = (pixels, self._gain.to(device), self._bias.to(device))
        return f"{self.split}: {needed / 1e9:.2f} GB in the memory of {device}"

    def batches(self, groups: Sequence[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
        """The slices of each group of indices (B,), in that order: (B, 1, 256, 128) float32, z-scored, on the device.

        Gathered there, without waiting for it, if `place` put the pixels there; else a thread reads ahead of need,
        for a GPU through pinned memory. On the CPU they are read when they are needed.
        """
        pin = device.type == "cuda"
        if self._placed and groups:
            indices = torch.cat(groups)  # one transfer for all
            indices = (indices.pin_memory() if pin else indices).to(device, non_blocking=pin)
            for group in indices.split([len(group) for group in groups]):
                yield _zscored(*(part[group] for part in self._placed))
        elif device.type == "cpu":
            yield from map(self.batch, groups)
        else:
            for parts in _ahead(lambda group: [x.pin_memory() if pin else x for x in self._stored(group)], groups):
                yield _zscored(*(part.to(device, non_blocking=pin) for part in parts))

    def _stored(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels (B, 256, 128) int16 as they are in the cache, gain and bias (B, 1, 1, 1) float32."""
        pixels = torch.from_numpy(self._pixels[self._rows[indices.numpy()]])
        return pixels, self._gain[indices], self._bias[indices]

    def denormalise(self, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Z-scored images (B, 1, 256, 128) of the slices at `indices`, in the scanner's intensities."""
        indices = torch.as_tensor(indices, device="cpu")
        mean, std = (t[indices].to(images.device).view(-1, 1, 1, 1) for t in (self.mean, self.std))
        return images * std + mean


def _zscored(pixels: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(B, H, W) int16, and (B, 1, 1, 1) float32 twice -> (B, 1, H, W) float32."""
    return pixels[:, None].float().add_(32768).mul_(gain).add_(bias)


def _free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()


def _ahead(read: Callable, groups: Iterable, depth: int = 3) -> Iterator:
    """`read` of each group, in order, by a thread that is up to `depth` groups ahead."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque()
        for group in groups:
            waiting.append(thread.submit(read, group))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def load_split(
    source: Source,
    split: str,
    *,
    cache_dir: str | Path | None = None,
    fit: str | None = None,
    planes: int | None = None,
    axis: str | int | None = None,
    size: Sequence[int] | None = None,
    skip_bad_files: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Slices:
    """Load "train", "validate" or "test" of a `Source`, decoding it into the cache if it isn't there yet.

    fit: "resize" squeezes slices of another size; "crop" first cuts out their centre in proportion; "trim", which scans
    get by default, cuts off a few pixels and squeezes only what is of quite another size. planes: how many
    central planes of a volume are taken, 1 to 256 (60 of HipMRI's, all of others). axis: along which scans are cut,
    see `nifti.planes`. size: rows and columns, (256, 128) or, of scans, most slices' own, in multiples of 16. workers:
    processes that decode; by default one a core, or none where there is little to do. Raises DataError where the split
    is missing, where files are bad (all are listed; `skip_bad_files` goes on without them) and where the cache can't
    be written.
    """
    if (
        split not in HIPMRI_CASES
        or fit not in (None, "resize", "crop", "trim")
        or not 1 <= (60 if planes is None else planes) <= 256
    ):
        raise DataError(
            f"split is {split!r}, fit {fit!r} and planes {planes}; expected a split of "
            "train, validate, test, a fit of resize, crop, trim, and 1 to 256 planes."
        )
    if not source.splits.get(split) and source.form == "scans":
        have = ", ".join(f"{part} {len(files):,}" for part, files in source.splits.items())
        raise DataError(
            f"no scan of {source.root} is in the {split} split ({have}): its share was 0, or no row of the table, no "
            "folder and no run has put one there. Give --split other shares or a table, or a folder that is named so."
        )
    if not source.splits.get(split):
        found, cases = "\n".join(describe(source.root)), HIPMRI_CASES[split]
        advice = f"Name or fill the folder of {split} so"
        if source.form == "3D":
            advice = f"Add volumes of the cases {cases[0]:03d} to {cases[-1]:03d}, which are {split}"
        raise DataError(
            f"the {split} split of {source.root} is missing or empty. Found:\n{found}\n{EXPECTED}\n"
            f"{advice}, or point --data elsewhere."
        )
    axis = int(axis) if axis in ("0", "1", "2") else axis or "coronal"
    planes = 1 if source.form == "2D" else planes or {"3D": 60, "scans": nifti.MAX_VOXELS}[source.form]
    if source.form == "scans":
        size, fit = size or _usual_size(source.splits.get("train") or source.splits[split], axis), fit or "trim"
    recipe = _Preprocessing(source.form, fit or "resize", planes, axis, tuple(size or SIZE))
    pixels, records, bad = _cached(source, split, recipe, _cache_root(cache_dir), workers, progress)
    if len(bad) and not skip_bad_files:
        raise _unusable(source, split, bad)
    names = [parse_name(source.splits[split][i]) for i in records["file"].tolist()]
    if source.form == "scans":
        owners = [source.subjects[source.splits[split][i]] for i in records["file"].tolist()]
        names = [replace(name, case=owner) for name, owner in zip(names, owners, strict=True)]
    if source.form != "2D":
        of_volumes = np.isin(records["file"], records["file"][records["plane"] > 0])
        taken = zip(names, records["plane"].tolist(), of_volumes.tolist(), strict=True)
        names = [replace(name, slice=plane, stem=f"{name.stem}_slice_{plane}") if of_volume else name
                 for name, plane, of_volume in taken]  # fmt: skip
    files = [source.splits[split][i] for i in records["file"].tolist()]
    notes = _notes(source, split, recipe, names, records, bad)
    return Slices(split, names, pixels, records, notes, files, recipe)


def _usual_size(files: list[Path], axis: str | int) -> tuple[int, int]:
    """Most slices' size, of some 50 files, in multiples of 16: below, where `_cut` trims that little, or nearest."""
    found = Counter()
    for file in files[:: -(-len(files) // 50)]:
        with contextlib.suppress(ValueError):  # reading it will say why
            count, *shape = nifti.planes_shape(nifti.read_header(file), axis)
            found[tuple(shape)] += count
    (rows, columns), _ = found.most_common(1)[0] if found else (SIZE, 1)
    below = [(side // 16 * 16, max(16, round(side / 16) * 16)) for side in (rows, columns)]
    rows, columns = (low if side - low <= side // 10 else nearest
                     for side, (low, nearest) in zip((rows, columns), below, strict=True))  # fmt: skip
    return rows, columns


def _with_reasons(source: Source, split: str, bad: np.ndarray) -> str:
    files = source.splits[split]
    return listing([f"{files[i].relative_to(source.root)} {reason}" for i, reason in bad.tolist()], most=1000)


def _unusable(source: Source, split: str, bad: np.ndarray) -> DataError:
    """The error that names every bad file of a split, with its reason."""
    total = len(source.splits[split])
    advice = (
        "Repair them, or go on without them: --skip-bad-files."
        if len(bad) < total
        else "No file of this split is left: point --data at other data."
    )
    return DataError(
        f"{len(bad):,} of the {total:,} files of the {split} split can't be used:\n"
        f"{_with_reasons(source, split, bad)}\n"
        f"expected whole NIfTI files of finite numbers. {advice}"
    )


def _notes(
    source: Source, split: str, recipe: _Preprocessing, names: list[SliceName], records: np.ndarray, bad: np.ndarray
) -> list[str]:
    """What is worth knowing about a split: skipped files, planes taken, changed proportions, constants."""
    notes = []
    if len(bad):
        reasons = _with_reasons(source, split, bad)
        notes.append(f"warning: {split}: {len(bad):,} bad file(s) skipped:\n{reasons}")
    if source.form != "2D":
        first, last, volumes = records["plane"].min(), records["plane"].max(), len(np.unique(records["file"]))
        which = "the central coronal planes" if source.form == "3D" else f"cut along {recipe.axis}, empty ones left out"
        notes.append(f"{split}: {len(records):,} slices, {which} (of {first}-{last}) of {volumes:,} volume(s)")
    rows, columns = recipe.size
    shapes, counts = np.unique(np.stack([records["height"], records["width"]], 1), axis=0, return_counts=True)
    for (height, width), count in zip(shapes.tolist(), counts.tolist(), strict=True):
        tall, wide = height, width
        if recipe.fit == "trim":
            tall, wide = _cut((height, width), recipe.fit, recipe.size)[2:]
        stretch = (tall / rows) / (wide / columns)
        change, shrunk = max(stretch, 1 / stretch) - 1, (tall * wide / (rows * columns)) ** 0.5
        if (tall, wide) != (height, width):
            notes.append(f"{split}: {count:,} slice(s) of {height} x {width} are cut to {tall} x {wide}")
        if change > 0.05 and recipe.fit == "crop":
            notes.append(f"{split}: {count:,} slice(s) of {height} x {width} lose their edges to --fit crop")
        elif change > 0.05:
            notes.append(
                f"{split}: {count:,} slice(s) of {height} x {width} are resized to {rows} x {columns}, which changes "
                f"their proportions by {change:.1%}; --fit crop cuts their edges off instead"
                f"{', --size H W brings slices to another size' * (source.form == 'scans')}"
            )
        elif max(shrunk, 1 / shrunk) > 1.5 and source.form == "scans":
            notes.append(
                f"{split}: {count:,} slice(s) of {height} x {width} are resized to {rows} x {columns}; --size H W "
                "brings slices to another size"
            )
    if records["constant"].any():
        stems = [names[i].stem for i in np.flatnonzero(records["constant"])]
        notes.append(f"warning: {split}: {len(stems):,} slice(s) of one value:\n{listing(stems, most=5)}")
    return notes


# ------------------------------------------------------------------------------------ augmentation


def crop_at_random(images: torch.Tensor, side: int) -> torch.Tensor:
    """A square of each slice, each at its own place: (B, 1, H, W) -> (B, 1, side, side)."""
    count, _, *sizes = images.shape
    rows, columns = (torch.randint(size - side + 1, (count, 1), device=images.device) for size in sizes)
    places = torch.arange(side, device=images.device)
    each = torch.arange(count, device=images.device)[:, None, None]
    return images[each, :, (rows + places)[:, :, None], (columns + places)[:, None, :]].movedim(-1, 1)


def flip_at_random(images: torch.Tensor) -> torch.Tensor:
    """Each slice (B, 1, H, W) left-right, up-down, both or neither; squares are also transposed or not."""
    ways = [lambda x: x.flip(-2), lambda x: x.flip(-1)]
    if images.shape[-1] == images.shape[-2]:
        ways.append(lambda x: x.mT)
    for turned in ways:
        chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        images = torch.where(chosen, turned(images), images)
    return images
