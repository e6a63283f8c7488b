"""How the stored pixels of a file become slices of the size that the model takes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torchvision.transforms.v2.functional import resize

from mri import nifti
from mri.files import Source
from utils import DataError

SIZE = (256, 128)  # rows (left-right), columns (inferior-superior)
# Smallest standard deviation used for z-scoring, as a fraction of the split's median: without it,
# the noise of a nearly empty slice would be scaled up to fill the range.
STD_FLOOR = 0.05


DIMENSIONS = {"2D": 2, "3D": 3, "scans": None}  # of a file, by Source.form; None: 2 or 3
CENTRAL_PLANES = 60  # of a HipMRI volume: as many as its 2D form has


@dataclass(frozen=True)
class Preprocessing:
    """How the pixels of a file become slices. Resolved once per run and stored in its config.json.

    It is part of the cache's key: any change makes a new cache.
    """

    form: str  # of the source: "2D", "3D" or "scans", see `mri.files.Source`
    size: tuple[int, int] = SIZE  # (rows, columns) of every slice
    fit: str = "resize"  # for slices of another size: "resize", "crop" or "trim", see `crop_box`
    axis: str | int = "coronal"  # the axis that volumes are cut along, see `nifti.stored_planes`
    planes: int = 1  # largest number of slices taken from a volume, its central ones

    @classmethod
    def resolve(
        cls,
        source: Source,
        size: Sequence[int] | None = None,
        fit: str | None = None,
        axis: str | int | None = None,
        planes: int | None = None,
    ) -> Preprocessing:
        """Fill in what the user left open.

        Args:
            source: the data set; for scans, the most common slice size is read from its files.
            size: (rows, columns) (default: 256 x 128; for scans, the most common size).
            fit: see the class (default: "resize"; for scans, "trim").
            axis: "coronal", "sagittal", "axial", or 0, 1, 2 as stored (default: "coronal").
            planes: at most this many per volume (default: 60 for HipMRI, all for scans).

        Raises:
            DataError: if `fit` or `planes` is not an allowed value.
        """
        if fit not in (None, "resize", "crop", "trim"):
            raise DataError(f"fit is {fit!r}; expected resize, crop or trim")
        if planes is not None and not 1 <= planes <= 256:
            raise DataError(f"planes is {planes}; expected 1 to 256")
        axis = int(axis) if axis in ("0", "1", "2") else axis or "coronal"
        if source.form == "2D":
            planes = 1
        elif source.form == "3D":
            planes = planes or CENTRAL_PLANES
        else:
            files = source.splits.get("train") or next(iter(source.splits.values()))
            size = size or usual_size(files, axis)
            fit = fit or "trim"
            planes = planes or nifti.MAX_VOXELS
        return cls(source.form, tuple(size or SIZE), fit or "resize", axis, planes)


def read_planes(path: Path, preprocessing: Preprocessing) -> Iterator[tuple[int, np.ndarray]]:
    """The slices of a file as (plane, (rows, columns) array), of scans without empty ones. ValueError: why it can't."""
    stored, scaled = nifti.stored_planes(
        *nifti.read_nifti(path), DIMENSIONS[preprocessing.form], preprocessing.axis
    )
    first, level = max(0, (len(stored) - preprocessing.planes) // 2), -np.inf
    if preprocessing.form == "scans":
        level = background_threshold(scaled(stored[:: max(1, len(stored) // 32)]))
    shown = 0
    for plane in range(first, min(first + preprocessing.planes, len(stored))):
        image = scaled(stored[plane])
        if not is_empty(image, level):
            shown += 1
            yield plane, image
    if not shown:
        raise ValueError("has no slice that shows anything")


def floor_std(std: np.ndarray) -> np.ndarray:
    """Raise each standard deviation, (N,), to at least 5 % of the median of those above 0."""
    positive = std[std > 0]
    return np.maximum(std, STD_FLOOR * np.median(positive)) if len(positive) else std


def parse_axis(text: str) -> str | int:
    """Return the axis that `--axis` names: "coronal", "sagittal", "axial", or 0, 1, 2 as stored."""
    return int(text) if text in ("0", "1", "2") else text


def background_threshold(some: np.ndarray) -> float:
    """Of (N, rows, columns) of a scan: a tenth of the way from its 1st percentile to its 99th; of one slice -inf."""
    low, high = np.percentile(some, (1, 99))
    return (
        low + 0.1 * (high - low) if len(some) > 1 and np.isfinite(low + high) else -np.inf
    )  # what isn't is told later


def is_empty(image: np.ndarray, level: float) -> bool:
    """Whether a scan's slice shows next to nothing: under 5 % of its pixels are above `background_threshold`."""
    return bool((image > level).mean() < 0.05)


def crop_box(shape: Sequence[int], fit: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of what is taken of (rows, columns) before it is resized to `size`.

    "crop": the largest centre of size's proportions; "trim": the centre of that size, where at most a tenth of either
    side is cut off; else, and for "resize", all.
    """
    (rows, columns), ratio = shape, size[0] / size[1]
    height, width = rows, columns
    if fit == "crop":
        height, width = min(rows, round(columns * ratio)), min(columns, round(rows / ratio))
    elif (
        fit == "trim"
        and 0 <= rows - size[0] <= rows // 10
        and 0 <= columns - size[1] <= columns // 10
    ):
        height, width = size
    return (rows - height) // 2, (columns - width) // 2, height, width


def fit_slice(image: np.ndarray, fit: str, size: tuple[int, int]) -> np.ndarray:
    """Bring a slice to `size`, float64: what `crop_box` takes of it, resized where that has another size."""
    top, left, height, width = crop_box(image.shape, fit, size)
    image = image[top : top + height, left : left + width].astype(np.float64)
    if image.shape == size:
        return image
    return resize(torch.from_numpy(image)[None], list(size), antialias=True)[0].numpy()


def slice_affine(path: str | Path, preprocessing: Preprocessing) -> np.ndarray:
    """The affine, (4, 4), of a slice of this file, cut and brought to `size` as `load_split` does, its centre at 0 mm.

    Raises DataError where the file can't be read.
    """
    try:
        header = nifti.read_header(Path(path))
        shape, turn = header.get_data_shape(), None
        dimensions = DIMENSIONS[preprocessing.form] or nifti.dimensions_of(shape)
        if dimensions == 3 and isinstance(preprocessing.axis, str):
            turn = nifti.axis_orientation(header)
        affine, order = nifti.affine_of(header), [0, 1, 2]
        if len(shape) < dimensions:
            raise ValueError(
                f"has shape {' x '.join(map(str, shape))}, expected {dimensions} dimensions"
            )
    except ValueError as error:
        raise DataError(f"{path} {error}; expected a NIfTI file.") from error
    if dimensions == 3:
        if turn is not None:  # axes become right, anterior, superior
            affine = affine @ nib.orientations.inv_ornt_aff(turn, shape[:3])
            shape = [shape[int(np.flatnonzero(turn[:, 0] == i)[0])] for i in range(3)]
        through = (
            nifti.AXES[preprocessing.axis]
            if isinstance(preprocessing.axis, str)
            else preprocessing.axis
        )
        order = [*(i for i in range(3) if i != through), through]
        affine, shape = affine[:, [*order, 3]], [shape[i] for i in order]
    size = preprocessing.size
    rows, columns = crop_box(shape[:2], preprocessing.fit, size)[2:]
    affine = affine @ np.diag([rows / size[0], columns / size[1], 1, 1])
    affine[:3, 3] = -affine[:3, :2] @ (np.array(size) - 1) / 2
    return affine


def usual_size(files: list[Path], axis: str | int) -> tuple[int, int]:
    """Most slices' size, of some 50 files, in multiples of 16: below, where `crop_box` trims that little, or nearest."""
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
