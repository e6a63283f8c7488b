"""Load 2D MRI slices as z-scored tensors, for `train.py` and `predict.py`.

    source = splits.find_source("/data/keras_slices_data")     # the files of each split
    train = load_split(source, "train")                        # decoded once, then memory-mapped
    image = train[0]                                           # (1, 256, 128) float32

    train.cache_on_device(device)                              # optional: copy pixels to the GPU
    order = torch.randperm(len(train))
    for images in train.batches(order.split(16), device):      # (16, 1, 256, 128) on the device
        images = augment(images, crop=96, flip=True)           # (16, 1, 96, 96)

mri/nifti.py reads the files, mri/preprocessing.py cuts and resizes them, and mri/cache.py stores
them as int16. Unusable data raise `DataError`. `SliceDataset.notes` contains lines to print.
"""

import functools
import hashlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mri.cache import CachedSplit, cache_root, load_cached_split
from mri.encoding import decode_file
from mri.files import SPLITS, SliceName, Source, find_segmentation, parse_name
from mri.messages import bad_files_error, describe_split, missing_split_error
from mri.preprocessing import (
    Preprocessing,
    floor_std,
    median_spacing,
    read_segmentation,
    slice_affine,
)
from utils import DataError


class SliceDataset(torch.utils.data.Dataset):
    """One split of a data set: N slices, each z-scored with its own mean and standard deviation.

    Attributes:
        split: "train", "validate" or "test".
        names: N `SliceName` objects, the parsed file name of each slice.
        files: N paths, the file of each slice.
        preprocessing: the settings that turned files into slices.
        size: (rows, columns) of every slice; the shapes in this file assume 256 x 128.
        fit: how slices of a different size are fitted (see `Preprocessing`).
        mean: (N,) float32, mean of each slice, in the scanner's intensities.
        std: (N,) float32, standard deviation of each slice, raised by `floor_std` if too small.
        constant: (N,) bool, true for slices with a single value; all their z-scores are 0.
        notes: lines to print for the user.
    """

    def __init__(
        self,
        split: str,
        names: list[SliceName],
        files: list[Path],
        cached: CachedSplit,
        preprocessing: Preprocessing,
        notes: list[str],
    ):
        self.split = split
        self.names = names
        self.files = files
        self.preprocessing = preprocessing
        self.size = preprocessing.size
        self.fit = preprocessing.fit
        self.notes = notes

        records = cached.records
        self._pixels = cached.pixels  # (cache rows, 256, 128) int16, memory-mapped
        self._rows = records["row"]
        self._planes = records["plane"]
        # Pixels, gain and bias on the device; None until `cache_on_device` copies them.
        self._on_device: tuple[Tensor, Tensor, Tensor] | None = None

        std = floor_std(records["std"], records["constant"])
        varied = ~records["constant"]
        # z = ((pixels + 32768) * scale + low - mean) / std = (pixels + 32768) * gain + bias
        gain = varied * records["scale"] / std
        bias = varied * (records["low"] - records["mean"]) / std
        self._gain = torch.from_numpy(gain).float().view(-1, 1, 1, 1)  # (N, 1, 1, 1)
        self._bias = torch.from_numpy(bias).float().view(-1, 1, 1, 1)  # (N, 1, 1, 1)
        self.mean = torch.from_numpy(records["mean"].copy()).float()
        self.std = torch.from_numpy(std).float()
        self.constant = torch.from_numpy(records["constant"].copy())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        """Return a z-scored slice, (1, 256, 128) float32."""
        return self.batch(torch.tensor([index]))[0]

    def batch(self, indices: Tensor) -> Tensor:
        """Return the z-scored slices at `indices` (B,), in order: (B, 1, 256, 128) on the CPU."""
        return _zscore(*self._read(torch.as_tensor(indices, device="cpu")))

    def batches(self, groups: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """Yield the z-scored slices of each group of indices, on the device.

        If `cache_on_device` has copied the pixels, they are gathered on the device. Otherwise, they
        are read from the cache: on demand for a CPU, ahead of time in a thread for other devices.

        Args:
            groups: indices (B,) of each batch; B may differ between batches.
            device: the device on which the batches are needed.

        Yields:
            (B, 1, 256, 128) float32, in the order of the group's indices.
        """
        if self._on_device and groups:
            yield from self._gather_batches(groups, device)
        elif device.type == "cpu":
            yield from map(self.batch, groups)
        else:
            yield from self._prefetch_batches(groups, device)

    def cache_on_device(self, device: torch.device, max_fraction: float = 0.5) -> str:
        """Copy the pixels to the device's memory if they fit; `batches` then uses this copy.

        Args:
            device: a GPU.
            max_fraction: maximum fraction of the device's free memory to use.

        Returns:
            A line to print that states where the pixels are.
        """
        needed = len(self) * math.prod(self.size) * 2
        pixels_size = f"{self.split}: the pixels ({needed / 1e9:.2f} GB)"
        if needed > max_fraction * free_memory(device):
            return (
                f"{pixels_size} need more than {max_fraction:.0%} of the free memory of {device}, "
                "so they are read from disk for each batch"
            )
        pixels = torch.empty(len(self), *self.size, dtype=torch.int16, device=device)
        for indices in torch.arange(len(self)).split(1024):  # bounds the memory on the host
            pixels[indices[0] : indices[-1] + 1] = self._read(indices)[0].to(device)
        self._on_device = (pixels, self._gain.to(device), self._bias.to(device))
        return f"{pixels_size} are in the memory of {device}"

    def _gather_batches(self, groups: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """Yield batches from the pixels on the device, without waiting for the device."""
        indices = transfer(pin(torch.cat(list(groups)), device), device)  # at once for all groups
        pixels, gain, bias = self._on_device
        for group in indices.split([len(group) for group in groups]):
            yield _zscore(pixels[group], gain[group], bias[group])

    def _prefetch_batches(self, groups: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """Yield batches that a thread reads ahead."""

        def read(indices: Tensor) -> list[Tensor]:
            return [pin(part, device) for part in self._read(indices)]

        for stored in prefetch(read, groups):
            yield _zscore(*[transfer(part, device) for part in stored])

    def _read(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read pixels, (B, 256, 128) int16, with their gain and bias, each (B, 1, 1, 1)."""
        pixels = torch.from_numpy(self._pixels[self._rows[indices.numpy()]])
        return pixels, self._gain[indices], self._bias[indices]

    def denormalise(self, images: Tensor, indices: Tensor) -> Tensor:
        """Convert z-scored images back to the scanner's intensities.

        Args:
            images: (B, 1, 256, 128), originals or reconstructions.
            indices: (B,), each image's index in this split.
        """
        indices = torch.as_tensor(indices, device="cpu")
        mean = self.mean[indices].to(images.device).view(-1, 1, 1, 1)
        std = self.std[indices].to(images.device).view(-1, 1, 1, 1)
        return images * std + mean

    def labels(self) -> Tensor | None:
        """Read the segmentations of the slices; only the evaluation uses them.

        Returns:
            (N, 256, 128) uint8, zeros for slices without a segmentation; None if no slice has one.
        """
        indices_of: dict[Path, list[int]] = {}
        for index, file in enumerate(self.files):
            indices_of.setdefault(file, []).append(index)
        labels = None
        for file, indices in indices_of.items():
            segmentation = find_segmentation(file)
            if segmentation is None:
                continue
            if labels is None:
                labels = torch.zeros(len(self), *self.size, dtype=torch.uint8)
            planes = self._planes[indices].tolist()
            labels[indices] = read_segmentation(segmentation, file, planes, self.preprocessing)
        return labels

    @property
    def positions(self) -> Tensor:
        """Position of each slice in its volume, (N,), from 0 (first) to 1 (last); NaN if unknown.

        A volume is a file with several slices, or the 2D files of one case and week.
        """
        slices_per_file = Counter(self.files)
        volumes = []
        numbers: dict[object, list[int]] = {}
        for file, name in zip(self.files, self.names, strict=True):
            volume = file if slices_per_file[file] > 1 else (name.case, name.week)
            volumes.append(volume)
            numbers.setdefault(volume, []).append(name.slice)
        ends = {volume: (min(slices), max(slices)) for volume, slices in numbers.items()}
        positions = torch.full((len(self),), math.nan)
        for i, (volume, name) in enumerate(zip(volumes, self.names, strict=True)):
            first, last = ends[volume]
            if last > first:
                positions[i] = (name.slice - first) / (last - first)
        return positions

    @functools.cached_property
    def description(self) -> dict:
        """Slice size, spacing of rows and columns in mm, `axis`, and `nan_value` of the split."""
        return {
            "size": list(self.size),
            "spacing": median_spacing(list(dict.fromkeys(self.files)), self.preprocessing),
            "axis": self.preprocessing.axis,
            "nan_value": self.preprocessing.nan_value,
        }

    @property
    def affine(self) -> np.ndarray:
        """Affine (4, 4) of the first slice (see `slice_affine`)."""
        return slice_affine(self.files[0], self.preprocessing)

    @property
    def fingerprint(self) -> str:
        """Hash of all means and standard deviations, in order; it does not depend on paths."""
        statistics = torch.stack([self.mean, self.std])
        return hashlib.sha256(statistics.numpy().tobytes()).hexdigest()[:16]


def _zscore(pixels: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Z-score pixels (B, H, W) with gain and bias (B, 1, 1, 1); return (B, 1, H, W) float32."""
    return pixels[:, None].float().add_(32768).mul_(gain).add_(bias)


def pin(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a CPU tensor in pinned memory if the device is a CUDA GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def transfer(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from `pin` to the device; the host does not wait for a CUDA GPU."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def prefetch(read: Callable, groups: Iterable, depth: int = 3, threads: int = 1) -> Iterator:
    """Yield `read(group)` for each group in order; threads read up to `depth` groups ahead."""
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for group in groups:
            pending.append(pool.submit(read, group))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def free_memory(device: torch.device) -> float:
    """Return the free memory of a GPU, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()


# ---------------------------------------------------------------- loading


def load_split(
    source: Source,
    split: str,
    preprocessing: Preprocessing | None = None,
    *,
    cache_dir: str | Path | None = None,
    skip_bad_files: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> SliceDataset:
    """Load a split of a data set; if it is not cached yet, decode it into the cache.

    Args:
        source: the files of each split.
        split: "train", "validate" or "test".
        preprocessing: settings that turn files into slices (default: `Preprocessing.resolve`).
        cache_dir: folder of all caches (default: $HIPMRI_CACHE, else the user's cache folder).
        skip_bad_files: whether to skip unusable files with a note, instead of raising an error.
        workers: number of decoding processes (default: one per core, or 1 if there are few slices).
        progress: whether to show a progress bar.

    Raises:
        DataError: if the split is missing, files are unusable (the error lists all of them), or the
            cache cannot be written.
    """
    if split not in SPLITS:
        raise DataError(f"split is {split!r}; expected train, validate or test")
    if not source.splits.get(split):
        raise missing_split_error(source, split)
    preprocessing = preprocessing or Preprocessing.resolve(source)
    root = cache_root(cache_dir)
    cached = load_cached_split(source, split, preprocessing, root, workers, progress)
    if len(cached.bad) and not skip_bad_files:
        raise bad_files_error(source, split, cached.bad)
    files = [source.splits[split][index] for index in cached.records["file"].tolist()]
    names = _name_slices(source, files, cached.records)
    stems = [name.stem for name in names]
    notes = describe_split(source, split, preprocessing, stems, cached.records, cached.bad)
    return SliceDataset(split, names, files, cached, preprocessing, notes)


def read_slice(path: str | Path, preprocessing: Preprocessing) -> Tensor:
    """Read a 2D NIfTI file as a slice that is z-scored by its own mean and std (no `floor_std`).

    Returns:
        (1, rows, columns) float32, z-scored.

    Raises:
        DataError: if the file cannot be used, or all of its pixels are equal.
    """
    slices, reason = decode_file(Path(path), replace(preprocessing, form="2D", planes=1))
    if reason:
        raise DataError(f"{path} {reason}; give a 2D NIfTI slice.")
    pixels, record = slices[0]
    if record.constant:
        raise DataError(f"{path} has a single value; give a slice whose pixels differ.")
    image = (pixels + 32768.0) * record.scale + record.low
    return torch.from_numpy((image - record.mean) / record.std).float()[None]


def _name_slices(source: Source, files: list[Path], records: np.ndarray) -> list[SliceName]:
    """Name each slice after its subject and file; for volumes, append the plane number."""
    volumes = set(records["file"][records["plane"] > 0].tolist())
    names = []
    for path, record in zip(files, records, strict=True):
        name = parse_name(path)
        name = replace(name, case=source.subjects.get(path, name.case))
        if record["file"] in volumes:
            plane = int(record["plane"])
            name = replace(name, slice=plane, stem=f"{name.stem}_slice_{plane}")
        names.append(name)
    return names


# ---------------------------------------------------------------- augmentation


def augment(images: Tensor, crop: int, flip: bool) -> Tensor:
    """Crop and flip each slice at random, independently of the others.

    Args:
        images: (B, 1, H, W).
        crop: side of the square crop in pixels, or 0 for whole slices. The maximum is the largest
            multiple of 16 that fits into the slices.
        flip: whether to apply `random_flip` as well.

    Returns:
        (B, 1, side, side), or (B, 1, H, W) for whole slices.
    """
    if crop:
        height, width = images.shape[-2:]
        images = random_crop(images, min(crop, height - height % 16, width - width % 16))
    return random_flip(images) if flip else images


def random_crop(images: Tensor, side: int) -> Tensor:
    """Cut a square crop from each slice at a random position; return (B, 1, side, side)."""
    count, _, height, width = images.shape
    device = images.device
    top = torch.randint(height - side + 1, (count, 1), device=device)
    left = torch.randint(width - side + 1, (count, 1), device=device)
    offsets = torch.arange(side, device=device)
    batch = torch.arange(count, device=device)[:, None, None]  # (B, 1, 1)
    rows = (top + offsets)[:, :, None]  # (B, side, 1)
    columns = (left + offsets)[:, None, :]  # (B, 1, side)
    return images[batch, :, rows, columns].movedim(-1, 1)


def random_flip(images: Tensor) -> Tensor:
    """Flip each slice (B, 1, H, W) vertically and horizontally, each with probability 1/2.

    Square slices are also transposed with probability 1/2.
    """
    changes = [lambda x: x.flip(-2), lambda x: x.flip(-1)]
    if images.shape[-1] == images.shape[-2]:
        changes.append(lambda x: x.mT)
    for change in changes:
        selected = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        images = torch.where(selected, change(images), images)
    return images
