"""Read, check, normalise and cache 2D MRI slices: what `train.py` and `predict.py` learn from and measure on.

    source = splits.find_source(path)                      # which files are in train, validate and test
    train = load_split(source, "train")                     # decoded once, memory-mapped from then on
    images = train.batch(torch.randperm(len(train))[:16])   # (16, 1, 256, 128), z-scored
    train.cache_on_device(device)                                   # into a GPU's memory, if they fit
    for images in train.batches(order.split(16), device):   # on the device

What is wrong with the data is a `DataError`: what was found, what was expected, what to do. What is merely worth
knowing stands in `SliceDataset.notes`, for the script to print.

`random_crop` and `random_flip` vary training batches.

Pixels are cached as int16: integers spanning at most 65,535 steps are exact; of any other slice no pixel is
off by more than half a step, (max - min) / 131,070 of that slice.
"""

import contextlib
import functools
import hashlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from mri import nifti
from mri.cache import cache_root, cached, decode_file, unusable_files, with_reasons
from mri.files import SliceName, Source, find_segmentation, format_listing, parse_name
from mri.hipmri import EXPECTED, HIPMRI_CASES, describe_folder
from mri.preprocessing import (
    DIMENSIONS,
    STD_FLOOR,
    Preprocessing,
    crop_box,
    slice_affine,
)
from utils import DataError


def read_slice(path: str | Path, preprocessing: Preprocessing) -> torch.Tensor:
    """One 2D NIfTI file, fitted and z-scored as `SliceDataset` does: (1, rows, columns) float32. Raises DataError."""
    slices, reason = decode_file(Path(path), replace(preprocessing, form="2D", planes=1))
    if reason:
        raise DataError(f"{path} {reason}; give a 2D NIfTI slice.")
    _, steps, (scale, low, mean, std, constant, *_) = slices[0]
    if constant:
        raise DataError(f"{path} is of one value; give a slice that shows something.")
    return torch.from_numpy(((steps + 32768.0) * scale + low - mean) / std).float()[None]


# ------------------------------------------------------------------------------------------ slices


class SliceDataset(torch.utils.data.Dataset):
    """One split, memory-mapped: N slices of 256 x 128, each z-scored by its own mean and deviation.

    names: N SliceName. mean, std: (N,) float32 in the scanner's intensities, std not below 5 % of the split's
    median. constant: (N,) bool, slices of one single value; they come out as zeros. notes: lines to print. files: N, in
    which each slice is. size: rows and columns, 256 x 128 unless another was asked for.
    """

    def __init__(
        self, split: str, names: list[SliceName], pixels: np.ndarray, records: np.ndarray, notes: list[str],
        files: list[Path], preprocessing: Preprocessing,
    ):  # fmt: skip
        self.split, self.names, self.notes, self.files, self.preprocessing = (
            split,
            names,
            notes,
            files,
            preprocessing,
        )
        self.fit, self.size, self._planes = preprocessing.fit, preprocessing.size, records["plane"]
        self._pixels, self._rows = pixels, records["row"]
        self._placed: tuple[torch.Tensor, ...] | None = (
            None  # pixels, gain and bias in a GPU's memory
        )
        varied = ~records["constant"]
        floor = STD_FLOOR * float(np.median(records["std"][varied])) if varied.any() else 1.0
        std = np.maximum(records["std"], floor)
        # z = ((steps + 32768) * scale + low - mean) / std = (steps + 32768) * gain + bias
        gain = varied * records["scale"] / std
        bias = varied * (records["low"] - records["mean"]) / std
        self._gain, self._bias = (
            torch.from_numpy(a).float().view(-1, 1, 1, 1) for a in (gain, bias)
        )
        self.mean, self.std = (
            torch.from_numpy(records["mean"].copy()).float(),
            torch.from_numpy(std).float(),
        )
        self.constant = torch.from_numpy(~varied)

    @property
    def fingerprint(self) -> str:
        """Changes with the slices' number, order and contents, not with the folder that they lie in."""
        return hashlib.sha256(torch.stack([self.mean, self.std]).numpy().tobytes()).hexdigest()[:16]

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), the first slice's, see `slice_affine`."""
        preprocessing = self.preprocessing
        return slice_affine(self.files[0], preprocessing)

    @functools.cached_property
    def description(self) -> dict:
        """Size, mm between rows and between columns (median of some 50 files), and the axis volumes were cut along."""
        preprocessing, files, sizes = self.preprocessing, list(dict.fromkeys(self.files)), []
        for file in files[:: -(-len(files) // 50)]:
            with contextlib.suppress(
                DataError
            ):  # an affine that tells nothing is no matter in training
                affine = slice_affine(file, preprocessing)
                sizes.append(nib.affines.voxel_sizes(affine)[:2])
        sizes = [size for size in sizes if size.min() > 0]
        spacing = np.median(sizes, 0).tolist() if sizes else None
        return {"size": list(self.size), "spacing": spacing, "axis": preprocessing.axis}

    def labels(self) -> torch.Tensor | None:
        """Segmentations, (N, 256, 128) uint8, 0 where a slice has none beside it; None where no slice has one.

        For measuring alone: nothing in training reads them.
        """
        masks = [find_segmentation(file) for file in self.files]
        if not any(masks):
            return None
        labels, preprocessing = torch.zeros(len(self), *self.size, dtype=torch.uint8), self.preprocessing
        last, stored = None, np.zeros(0)
        for i, (mask, plane) in enumerate(zip(masks, self._planes.tolist(), strict=True)):
            if not mask:
                continue
            try:
                if mask != last:
                    stored, scaled = nifti.stored_planes(
                        *nifti.read_nifti(mask), DIMENSIONS[preprocessing.form], preprocessing.axis
                    )
                    last = mask
                image = scaled(stored[plane]).astype(np.uint8)
            except (ValueError, IndexError) as error:
                raise DataError(
                    f"{mask} {error}; expected a segmentation like its image, or none."
                ) from error
            top, left, height, width = crop_box(image.shape, self.fit, self.size)
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
        return zscored(*self._stored(torch.as_tensor(indices, device="cpu")))

    def cache_on_device(self, device: torch.device, share: float = 0.5) -> str:
        """Copy the pixels into the device's memory, for `batches`, if they take at most `share` of what is free there.

        Returns a line that says where they are.
        """
        needed, free = len(self) * math.prod(self.size) * 2, free_memory(device)
        if needed > share * free:
            return f"{self.split}: {needed / 1e9:.2f} GB, over {share:.0%} of {device}'s free memory: read as it goes"
        pixels = torch.empty(len(self), *self.size, dtype=torch.int16, device=device)
        for part in torch.arange(len(self)).split(
            1024
        ):  # bounds what lies in the computer's own memory meanwhile
            pixels[part[0] : part[-1] + 1] = self._stored(part)[0].to(device)
        self._placed = (pixels, self._gain.to(device), self._bias.to(device))
        return f"{self.split}: {needed / 1e9:.2f} GB in the memory of {device}"

    def batches(
        self, groups: Sequence[torch.Tensor], device: torch.device
    ) -> Iterator[torch.Tensor]:
        """The slices of each group of indices (B,), in that order: (B, 1, 256, 128) float32, z-scored, on the device.

        Gathered there, without waiting for it, if `cache_on_device` put the pixels there; else a thread reads ahead of need,
        for a GPU through pinned memory. On the CPU they are read when they are needed.
        """
        pin = device.type == "cuda"
        if self._placed and groups:
            indices = torch.cat(groups)  # one transfer for all
            indices = (indices.pin_memory() if pin else indices).to(device, non_blocking=pin)
            for group in indices.split([len(group) for group in groups]):
                yield zscored(*(part[group] for part in self._placed))
        elif device.type == "cpu":
            yield from map(self.batch, groups)
        else:
            for parts in prefetch(
                lambda group: [x.pin_memory() if pin else x for x in self._stored(group)], groups
            ):
                yield zscored(*(part.to(device, non_blocking=pin) for part in parts))

    def _stored(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels (B, 256, 128) int16 as they are in the cache, gain and bias (B, 1, 1, 1) float32."""
        pixels = torch.from_numpy(self._pixels[self._rows[indices.numpy()]])
        return pixels, self._gain[indices], self._bias[indices]

    def denormalise(self, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Z-scored images (B, 1, 256, 128) of the slices at `indices`, in the scanner's intensities."""
        indices = torch.as_tensor(indices, device="cpu")
        mean, std = (t[indices].to(images.device).view(-1, 1, 1, 1) for t in (self.mean, self.std))
        return images * std + mean


def zscored(pixels: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(B, H, W) int16, and (B, 1, 1, 1) float32 twice -> (B, 1, H, W) float32."""
    return pixels[:, None].float().add_(32768).mul_(gain).add_(bias)


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()


def prefetch(read: Callable, groups: Iterable, depth: int = 3) -> Iterator:
    """`read` of each group, in order, by a thread that is up to `depth` groups ahead."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque()
        for group in groups:
            waiting.append(thread.submit(read, group))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def missing_split(source: Source, split: str) -> DataError:
    """Return the error for a split without files, with what was found and what to do."""
    if source.form == "scans":
        counts = ", ".join(f"{part} {len(files):,}" for part, files in source.splits.items())
        return DataError(
            f"no scan of {source.root} is in the {split} split ({counts}): its share was 0, or no "
            "row of the table, folder or earlier run put one there. Give --split other shares or a "
            "table, or name a folder after the split."
        )
    advice = f"Name or fill the folder of {split} so"
    if source.form == "3D":
        cases = HIPMRI_CASES[split]
        advice = f"Add volumes of the cases {cases[0]:03d} to {cases[-1]:03d}, which are {split}"
    return DataError(
        f"the {split} split of {source.root} is missing or empty. Found:\n"
        + "\n".join(describe_folder(source.root))
        + f"\n{EXPECTED}\n{advice}, or point --data elsewhere."
    )


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
    """Load a split of a source, decoding it into the cache if it is not there yet.

    Args:
        source: the files of each split.
        split: "train", "validate" or "test".
        preprocessing: how files become slices (default: `Preprocessing.resolve(source)`).
        cache_dir: folder of the cache (default: $HIPMRI_CACHE, else the user's cache folder).
        skip_bad_files: leave out files that cannot be used, with a note, instead of raising.
        workers: decoding processes (default: one per core, or none if there is little to do).
        progress: show a progress bar.

    Raises:
        DataError: if the split is missing, files are bad (all are listed), or the cache cannot be
            written.
    """
    if split not in HIPMRI_CASES:
        raise DataError(f"split is {split!r}; expected train, validate or test")
    if not source.splits.get(split):
        raise missing_split(source, split)
    preprocessing = preprocessing or Preprocessing.resolve(source)
    pixels, records, bad = cached(
        source, split, preprocessing, cache_root(cache_dir), workers, progress
    )
    if len(bad) and not skip_bad_files:
        raise unusable_files(source, split, bad)
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
    notes = _notes(source, split, preprocessing, names, records, bad)
    return SliceDataset(split, names, pixels, records, notes, files, preprocessing)


def _notes(
    source: Source,
    split: str,
    preprocessing: Preprocessing,
    names: list[SliceName],
    records: np.ndarray,
    bad: np.ndarray,
) -> list[str]:
    """What is worth knowing about a split: skipped files, planes taken, changed proportions, constants."""
    notes = []
    if len(bad):
        reasons = with_reasons(source, split, bad)
        notes.append(f"warning: {split}: {len(bad):,} bad file(s) skipped:\n{reasons}")
    if source.form != "2D":
        first, last, volumes = (
            records["plane"].min(),
            records["plane"].max(),
            len(np.unique(records["file"])),
        )
        which = (
            "the central coronal planes"
            if source.form == "3D"
            else f"cut along {preprocessing.axis}, empty ones left out"
        )
        notes.append(
            f"{split}: {len(records):,} slices, {which} (of {first}-{last}) of {volumes:,} volume(s)"
        )
    rows, columns = preprocessing.size
    shapes, counts = np.unique(
        np.stack([records["height"], records["width"]], 1), axis=0, return_counts=True
    )
    for (height, width), count in zip(shapes.tolist(), counts.tolist(), strict=True):
        tall, wide = height, width
        if preprocessing.fit == "trim":
            tall, wide = crop_box((height, width), preprocessing.fit, preprocessing.size)[2:]
        stretch = (tall / rows) / (wide / columns)
        change, shrunk = max(stretch, 1 / stretch) - 1, (tall * wide / (rows * columns)) ** 0.5
        if (tall, wide) != (height, width):
            notes.append(
                f"{split}: {count:,} slice(s) of {height} x {width} are cut to {tall} x {wide}"
            )
        if change > 0.05 and preprocessing.fit == "crop":
            notes.append(
                f"{split}: {count:,} slice(s) of {height} x {width} lose their edges to --fit crop"
            )
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
        notes.append(
            f"warning: {split}: {len(stems):,} slice(s) of one value:\n{format_listing(stems, most=5)}"
        )
    return notes


# ------------------------------------------------------------------------------------ augmentation


def random_crop(images: torch.Tensor, side: int) -> torch.Tensor:
    """A square of each slice, each at its own place: (B, 1, H, W) -> (B, 1, side, side)."""
    count, _, *sizes = images.shape
    rows, columns = (
        torch.randint(size - side + 1, (count, 1), device=images.device) for size in sizes
    )
    places = torch.arange(side, device=images.device)
    each = torch.arange(count, device=images.device)[:, None, None]
    return images[each, :, (rows + places)[:, :, None], (columns + places)[:, None, :]].movedim(
        -1, 1
    )


def random_flip(images: torch.Tensor) -> torch.Tensor:
    """Each slice (B, 1, H, W) left-right, up-down, both or neither; squares are also transposed or not."""
    ways = [lambda x: x.flip(-2), lambda x: x.flip(-1)]
    if images.shape[-1] == images.shape[-2]:
        ways.append(lambda x: x.mT)
    for turned in ways:
        chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        images = torch.where(chosen, turned(images), images)
    return images
