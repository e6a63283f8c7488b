"""Turn the planes of a file into slices of one size, and slices into z-scores.

    preprocessing = Preprocessing.resolve(source, size=None, axis="axial")   # once per run
    for plane, image in read_planes(path, preprocessing):                    # (rows, columns) each
        image = fit_slice(image, preprocessing.fit, preprocessing.size)      # (*size) float64

The z-score of a slice is (image - image.mean()) / std, with `std` from `floor_std`.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from mri import nifti
from mri.files import Source
from mri.segmentations import read_labels
from utils import DataError

SIZE = (256, 128)  # rows (left-right), columns (inferior-superior) of HipMRI's 2D version
CENTRAL_PLANES = 60  # slices per HipMRI volume, as many as in the 2D version
STD_FLOOR = 0.05  # fraction of the median (see `floor_std`)


@dataclass(frozen=True)
class Preprocessing:
    """Settings that turn files into slices; resolved once per run and stored in its config.json.

    The settings are part of the cache's name, so changing any of them creates a new cache.
    """

    form: str  # type of data: "2D", "3D" or "scans" (see `mri.files.Source`)
    size: tuple[int, int] = SIZE  # (rows, columns) of every slice
    fit: str = "resize"  # how slices get this size: "resize", "crop" or "trim" (see `crop_box`)
    axis: str | int = "coronal"  # axis along which volumes are cut (see `nifti.stored_planes`)
    planes: int = 1  # maximum number of slices per volume, taken from its centre
    nan_value: float | None = None  # the value that replaces NaN in images; None: NaN is an error

    @property
    def dimensions(self) -> int | None:
        """Number of dimensions that files must have; None allows slices and volumes."""
        return {"2D": 2, "3D": 3, "scans": None}[self.form]

    @classmethod
    def resolve(
        cls,
        source: Source,
        size: Sequence[int] | None = None,
        fit: str | None = None,
        axis: str | int | None = None,
        planes: int | None = None,
        nan_value: float | None = None,
    ) -> Preprocessing:
        """Create the settings; arguments that are None get their defaults.

        Args:
            source: the data set; for scans, the most common slice size is read from its files.
            size: (rows, columns) (default: 256 x 128; for scans, the most common size).
            fit: "resize", "crop" or "trim" (default: "resize"; for scans, "trim").
            axis: "coronal", "sagittal", "axial", or a stored axis 0, 1, 2 (default: "coronal").
            planes: maximum number of slices per volume (default: 60 for HipMRI, all for scans).
            nan_value: the value that replaces NaN (default: NaN is an error).

        Raises:
            DataError: if `fit` or `planes` is not an allowed value.
        """
        if fit not in (None, "resize", "crop", "trim"):
            raise DataError(f"fit is {fit!r}; expected resize, crop or trim")
        if planes is not None and not 1 <= planes <= 256:
            raise DataError(f"planes is {planes}; expected 1 to 256")
        axis = "coronal" if axis is None else parse_axis(axis)
        if source.form == "2D":
            planes = 1
        elif source.form == "3D":
            planes = planes or CENTRAL_PLANES
        else:
            files = source.splits.get("train") or next(iter(source.splits.values()))
            size = size or usual_size(files, axis)
            fit = fit or "trim"
            planes = planes or nifti.MAX_VOXELS
        return cls(source.form, tuple(size or SIZE), fit or "resize", axis, planes, nan_value)


def parse_axis(axis: str | int) -> str | int:
    """Convert "0", "1" and "2" to integers, as `nifti.stored_planes` expects them; keep names."""
    return int(axis) if axis in ("0", "1", "2") else axis


# ---------------------------------------------------------------- from a file to its slices


def read_planes(path: Path, preprocessing: Preprocessing) -> Iterator[tuple[int, np.ndarray]]:
    """Yield `(plane, image)` for the central slices of a file; skip the empty slices of scans.

    Yields:
        The index of the slice in its volume, and its intensities, (rows, columns) before fitting.

    Raises:
        ValueError: if the file cannot be used (`mri.nifti_file` describes the message).
    """
    stored, scale = _stored_planes(path, preprocessing)

    def intensities(planes: np.ndarray) -> np.ndarray:
        return nifti.fill_nan(scale(planes), preprocessing.nan_value)

    threshold = -np.inf
    if preprocessing.form == "scans":
        threshold = background_threshold(intensities(_sample_planes(stored)))
    count = min(preprocessing.planes, len(stored))
    first = (len(stored) - count) // 2
    is_blank = True
    for plane in range(first, first + count):
        image = intensities(stored[plane])
        if not is_empty(image, threshold):
            is_blank = False
            yield plane, image
    if is_blank:
        raise ValueError("has only empty slices")


def _stored_planes(path: Path, preprocessing: Preprocessing):
    """Return all planes of a file and the function that scales them (see `nifti.stored_planes`)."""
    header, data = nifti.read_nifti(path)
    return nifti.stored_planes(header, data, preprocessing.dimensions, preprocessing.axis)


def _sample_planes(planes: np.ndarray) -> np.ndarray:
    """Return 32 to 63 evenly spaced planes, or all if fewer; subsample pixels of large planes."""
    planes = planes[:: max(1, len(planes) // 32)]
    step = math.ceil(math.sqrt(planes.size / nifti.MAX_VOXELS))
    return planes[:, ::step, ::step]


def background_threshold(planes: np.ndarray) -> float:
    """Return the threshold below which a scan's pixels count as background.

    Args:
        planes: (N, rows, columns), the scan or a sample of its planes.

    Returns:
        p1 + 0.1 (p99 - p1), where p1 and p99 are the 1st and 99th percentiles of all pixels; -inf
        if there is a single plane, or if pixels are not finite. `encoding.encode_slice` reports
        such pixels.
    """
    low, high = np.percentile(planes, (1, 99))
    if len(planes) == 1 or not np.isfinite(low + high):
        return -np.inf
    return low + 0.1 * (high - low)


def is_empty(image: np.ndarray, threshold: float) -> bool:
    """Return whether fewer than 5 % of a slice's pixels exceed the `background_threshold`."""
    return bool((image > threshold).mean() < 0.05)


# ---------------------------------------------------------------- from any size to one size


def crop_box(shape: Sequence[int], fit: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the crop box of a slice; the caller resizes the crop to `size`.

    Args:
        shape: (rows, columns) of the slice.
        fit: "resize" keeps the whole slice. "crop" keeps the largest central part with the
            proportions of `size`. "trim" keeps the central part of exactly `size` if that removes
            at most a tenth of each side; otherwise, it keeps the whole slice.
        size: (rows, columns) of the result.

    Returns:
        (top, left, height, width) in pixels.
    """
    rows, columns = shape
    height, width = rows, columns
    if fit == "crop":
        ratio = size[0] / size[1]
        height = min(rows, round(columns * ratio))
        width = min(columns, round(rows / ratio))
    elif fit == "trim":
        excess_rows, excess_columns = rows - size[0], columns - size[1]
        if 0 <= excess_rows <= rows // 10 and 0 <= excess_columns <= columns // 10:
            height, width = size
    return (rows - height) // 2, (columns - width) // 2, height, width


def fit_slice(image: np.ndarray, fit: str, size: tuple[int, int]) -> np.ndarray:
    """Crop a slice to its `crop_box`, and resize the crop if it has another size.

    Args:
        image: (rows, columns) of any real data type.
        fit: "resize", "crop" or "trim" (see `crop_box`).
        size: (rows, columns) of the result.

    Returns:
        (*size) float64.
    """
    image = _crop(image, fit, size).astype(np.float64)
    if image.shape == size:
        return image
    return resize(torch.from_numpy(image)[None], size)[0].numpy()


def resize(
    images: torch.Tensor, size: tuple[int, int], interpolation: str = "bilinear"
) -> torch.Tensor:
    """Resize images (..., rows, columns) by antialiased interpolation.

    Args:
        images: slices or segmentations.
        size: (rows, columns) of the result.
        interpolation: "bilinear", or "nearest-exact" for segmentations.
    """
    # This import takes seconds. Runs on slices of the right size do not need it.
    from torchvision.transforms import InterpolationMode, v2

    mode = InterpolationMode(interpolation)
    return v2.functional.resize(images, list(size), mode, antialias=True)


def _crop(image: np.ndarray, fit: str, size: tuple[int, int]) -> np.ndarray:
    """Crop an image (rows, columns) to its `crop_box`."""
    top, left, height, width = crop_box(image.shape, fit, size)
    return image[top : top + height, left : left + width]


def usual_size(files: list[Path], axis: str | int) -> tuple[int, int]:
    """Return the most common slice size in a sample of the files, rounded to multiples of 16.

    A side is rounded down if that removes at most a tenth of it; "trim" then crops the slices.
    Otherwise, it is rounded to the nearest multiple.

    Args:
        files: slices or volumes.
        axis: the axis along which volumes are cut (see `nifti.stored_planes`).

    Returns:
        (rows, columns); SIZE if no file can be read.
    """
    counts = Counter()
    for file in _sample(files):
        with contextlib.suppress(ValueError):  # decoding the file will report it
            count, rows, columns = nifti.planes_shape(nifti.read_header(file), axis)
            counts[rows, columns] += count
    if not counts:
        return SIZE
    (rows, columns), _ = counts.most_common(1)[0]
    return _round_side(rows), _round_side(columns)


def _round_side(side: int) -> int:
    """Round a side in pixels to a multiple of 16 (see `usual_size`)."""
    below = side // 16 * 16
    if side - below <= side // 10:
        return below
    return max(16, round(side / 16) * 16)


def _sample(files: list[Path]) -> list[Path]:
    """Return at most 50 evenly spaced files."""
    return files[:: math.ceil(len(files) / 50)]


# ---------------------------------------------------------------- intensities


def is_constant(low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """Return whether slices have a single value, apart from the rounding errors of resizing.

    The tolerance is relative, so the result does not depend on the unit of intensity. A range below
    the smallest normal float32 also counts as a single value, because standard deviations are
    stored as float32.

    Args:
        low, high: smallest and largest value of each slice, in float64.
    """
    largest = np.maximum(np.abs(low), np.abs(high))
    return high - low <= np.maximum(1e-9 * largest, np.finfo(np.float32).tiny)


def floor_std(std: np.ndarray, constant: np.ndarray) -> np.ndarray:
    """Raise each standard deviation to at least 5 % of the median of all non-constant slices.

    Without this floor, the noise of a nearly empty slice would be amplified to unit variance.

    Args:
        std: (N,) float64, one per slice.
        constant: (N,) bool, true for slices to leave out of the median (see `is_constant`).

    Returns:
        (N,) float64. If all slices are constant, the floor is 1.
    """
    floor = 1.0 if constant.all() else STD_FLOOR * np.median(std[~constant])
    return np.maximum(std, floor)


# ---------------------------------------------------------------- segmentations and geometry


def read_segmentation(
    path: Path, image: Path, planes: Sequence[int], preprocessing: Preprocessing
) -> torch.Tensor:
    """Read slices of a segmentation, and fit them like those of the image, by nearest neighbour.

    Args:
        path: the segmentation.
        image: the segmented image, which has the same shape.
        planes: indices of the N slices to read.
        preprocessing: the settings with which the image was read.

    Returns:
        (N, *size) uint8.

    Raises:
        DataError: if the file cannot be used (see `read_labels`).
    """
    axis, dimensions = preprocessing.axis, preprocessing.dimensions
    try:
        shape = nifti.planes_shape(nifti.read_header(image), axis, dimensions)
        labels = read_labels(path, shape, axis, dimensions, planes)
    except ValueError as error:
        raise DataError(
            f"{path} {error}; expected a segmentation with the shape of its image, {image.name}. "
            "Correct or remove the file."
        ) from error
    cropped = [_crop(plane, preprocessing.fit, preprocessing.size) for plane in labels]
    batch = torch.from_numpy(np.stack(cropped))
    return resize(batch, preprocessing.size, "nearest-exact")


def slice_affine(path: str | Path, preprocessing: Preprocessing) -> np.ndarray:
    """Return the affine of the slices of a file after cutting and fitting.

    Returns:
        (4, 4), from (row, column, 0) to mm. The centre of the slice is at 0 mm.

    Raises:
        DataError: if the file's header cannot be used.
    """
    try:
        header = nifti.read_header(Path(path))
        affine = nifti.planes_affine(header, preprocessing.axis, preprocessing.dimensions)
        shape = nifti.planes_shape(header, preprocessing.axis, preprocessing.dimensions)
    except ValueError as error:
        raise DataError(f"{path} {error}; expected a NIfTI file.") from error
    size = preprocessing.size
    *_, height, width = crop_box(shape[1:], preprocessing.fit, size)
    affine = affine @ np.diag([height / size[0], width / size[1], 1, 1])
    affine[:3, 3] = -affine[:3, :2] @ (np.array(size) - 1) / 2
    return affine


def median_spacing(files: list[Path], preprocessing: Preprocessing) -> list[float] | None:
    """Return the median spacing of rows and of columns, in mm, over a sample of the files.

    Files with an unusable affine are skipped, although their pixels may be usable.

    Returns:
        [mm between rows, mm between columns] of fitted slices; None if no file has a spacing.
    """
    spacings = []
    for file in _sample(files):
        with contextlib.suppress(DataError):
            spacing = nib.affines.voxel_sizes(slice_affine(file, preprocessing))[:2]
            if spacing.min() > 0:
                spacings.append(spacing)
    return np.median(spacings, 0).tolist() if spacings else None
