"""Read NIfTI files as planes, and write planes back as NIfTI files.

    scan = read_scan("scan.nii.gz", axis="coronal")   # scan.planes: (N, rows, columns)
    content = scan.to_bytes(reconstructed_planes)     # a .nii.gz with the same shape and geometry

mri/nifti_file.py reads files. mri/geometry.py interprets affines and units, and cuts volumes into
planes. ValueError is raised for a file that cannot be used. Its message follows the rules in
mri/nifti_file.py.
"""

from __future__ import annotations

import math
import mmap
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from mri.geometry import (
    AXES,
    Cut,
    affine_header,
    affine_of,
    describe_small_planes,
    dimensions_of,
    find_cut,
    format_shape,
    geometry_header,
    planes_affine,
    planes_shape,
    volume_shape,
)
from mri.nifti_file import MAX_VOXELS, pack, read_header, read_nifti

__all__ = [
    "AXES", "MAX_VOXELS", "Cut", "Scan", "affine_of", "nifti_bytes", "planes_affine",
    "planes_shape", "read_header", "read_nifti", "read_scan", "stored_planes",
]  # fmt: skip

MAX_PIXELS = 1 << 24  # per slice of a 2D file: 4,096 x 4,096
MIN_SIDE = 8  # smallest side of a slice, in pixels
MAX_INTENSITY = 1e30  # means and standard deviations are stored as float32

# ---------------------------------------------------------------- planes


def stored_planes(
    header: nib.Nifti1Header, data: bytes | mmap.mmap, dimensions: int | None, axis: str | int
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Return the unscaled planes of a file, and the function that scales them.

    Args:
        header: the file's header.
        data: its uncompressed bytes, as `read_nifti` returns them.
        dimensions: 2 for a slice, 3 for a volume, None for either.
        axis: axis along which volumes are cut: a key of AXES, or 0, 1 or 2 for a stored axis.

    Returns:
        The planes (N, rows, columns), a view of `data`; and a function that applies the header's
        scale factor and intercept to one or more planes.

    Raises:
        ValueError: if the number of dimensions is wrong, if the file is too small or too large, or
            if its affine does not determine the directions of its axes.
    """
    shape = stored_shape = header.get_data_shape()
    dimensions = dimensions or dimensions_of(shape)
    while len(shape) > dimensions and shape[-1] == 1:
        shape = shape[:-1]
    form = "2D slice" if dimensions == 2 else "3D volume"
    mismatch = (
        f"has shape {format_shape(stored_shape)}, expected a {form} of at least {MIN_SIDE} pixels "
        f"per side"
    )
    if len(shape) > 3:
        raise ValueError(f"{mismatch}; save each of its volumes or channels as a file of its own")
    if len(shape) != dimensions:
        raise ValueError(mismatch)
    voxels = np.frombuffer(
        data, header.get_data_dtype(), math.prod(shape), header.get_data_offset()
    )
    voxels = voxels.reshape(volume_shape(shape, dimensions), order="F")
    planes = find_cut(header, axis, dimensions).planes(voxels)
    size = planes.shape[1:]
    if min(size) < MIN_SIDE and dimensions == 2:
        raise ValueError(mismatch)
    if min(size) < MIN_SIDE:
        small_planes = describe_small_planes(axis, size, MIN_SIDE)
        raise ValueError(f"has shape {format_shape(stored_shape)}; {small_planes}")
    max_pixels = MAX_PIXELS if dimensions == 2 else MAX_VOXELS
    if math.prod(size) > max_pixels:
        raise ValueError(
            f"has slices of {format_shape(size)} pixels, expected at most {max_pixels:,} pixels"
        )
    slope, intercept = header.get_slope_inter()

    def scale(stored: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # infinite results are reported by the callers
            return nib.volumeutils.apply_read_scaling(stored, slope, intercept)

    return planes, scale


# ---------------------------------------------------------------- intensities


def fill_nan(image: np.ndarray, nan_value: float | None) -> np.ndarray:
    """Replace NaN by `nan_value` in an array of any shape; if it is None, change nothing."""
    if nan_value is None or image.dtype.kind != "f":
        return image
    return np.where(np.isnan(image), image.dtype.type(nan_value), image)


def check_intensities(image: np.ndarray, unit: str) -> None:
    """Check that all values of an array are finite and at most MAX_INTENSITY.

    Args:
        image: array of any shape and real data type.
        unit: name of its elements in the error, "pixels" or "voxels".

    Raises:
        ValueError: if values are NaN, infinite or too large.
    """
    if image.dtype.kind != "f":
        return
    num_nan = np.count_nonzero(np.isnan(image))
    num_invalid = np.count_nonzero(~np.isfinite(image))
    if num_invalid:
        advice = "; --nan-value X replaces NaN by X" if num_nan else ""
        raise ValueError(f"has {num_invalid:,} NaN or infinite {unit}{advice}")
    largest = max(abs(float(image.min())), abs(float(image.max())))
    if largest > MAX_INTENSITY:
        raise ValueError(f"has intensities up to {largest:.0e}; expected at most 1e30")


# ---------------------------------------------------------------- whole scans


@dataclass(frozen=True)
class Scan:
    """The planes of a file, and the geometry with which other planes can be written."""

    planes: np.ndarray  # (N, rows, columns), in the scanner's intensities; N is 1 for a 2D file
    header: nib.Nifti1Header  # shape and geometry of the file (see `geometry_header`)
    dtype: np.dtype  # for `to_bytes`: the file's if its voxels are unscaled integers, else float32
    cut: Cut  # mapping from the stored axes to planes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the file."""
        return self.header.get_data_shape()

    @property
    def affine(self) -> np.ndarray:
        """Affine of the file (4, 4), from voxel indices to mm."""
        return affine_of(self.header)

    @property
    def axis(self) -> str | int:
        """The `axis` that was passed to `read_scan`; 2 for a 2D file."""
        return self.cut.axis if self.cut.orientation is None else list(AXES)[self.cut.axis]

    @property
    def spacing(self) -> tuple[float, float]:
        """Spacing of the rows and of the columns in mm."""
        affine = self.cut.affine(self.affine, volume_shape(self.shape, None))
        rows, columns, _ = nib.affines.voxel_sizes(affine).tolist()
        return rows, columns

    def to_bytes(self, planes: np.ndarray, dtype: np.dtype | None = None) -> bytes:
        """Encode other planes as the content of a `.nii.gz` file with the geometry of this scan.

        Args:
            planes: (N, rows, columns), the shape of this scan's planes.
            dtype: data type of the file (default: this scan's). For integers, values are rounded
                and clipped to the type's range.
        """
        dtype = dtype or self.dtype
        voxels = self.cut.voxels(planes)
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            high = limits.max
            if dtype.itemsize == 8:
                high = np.nextafter(float(high), 0)  # as a float, 2^63 - 1 would become 2^63
            voxels = np.clip(np.rint(voxels.astype(np.float64)), limits.min, high)
        voxels = np.ascontiguousarray(voxels.reshape(self.shape)).astype(dtype)
        return pack(voxels, self.header)


def read_scan(
    path: str | Path, axis: str | int | None = None, nan_value: float | None = None
) -> Scan:
    """Read a 2D or 3D file as planes.

    Args:
        path: a .nii or .nii.gz file.
        axis: axis along which volumes are cut (see `stored_planes`; default: "coronal").
        nan_value: the value that replaces NaN (default: NaN is an error).

    Raises:
        ValueError: if the file cannot be used (see the top of this file).
    """
    axis = "coronal" if axis is None else axis
    path = Path(path)
    shape = read_header(path).get_data_shape()
    if math.prod(shape) > MAX_VOXELS:
        raise ValueError(_describe_large_scan(path, shape))
    header, data = read_nifti(path)
    stored, scale = stored_planes(header, data, None, axis)
    planes = scale(stored)
    dtype = header.get_data_dtype().newbyteorder("=")
    is_scaled = planes.dtype.newbyteorder("=") != dtype
    if is_scaled or dtype.kind == "f":
        dtype = np.dtype(np.float32)
    planes = fill_nan(planes, nan_value)
    check_intensities(planes, "voxels")
    affine_of(header)  # raises ValueError if it is unusable
    return Scan(planes, geometry_header(header), dtype, find_cut(header, axis, None))


def _describe_large_scan(path: Path, shape: tuple[int, ...]) -> str:
    """Return the error for a scan that has too many voxels, with a command that splits the scan."""
    last = max(1, MAX_VOXELS // math.prod(shape[:2]))
    code = (
        f"import nibabel as nib; nib.load({str(path)!r}).slicer[:, :, :{last}]"
        ".to_filename('part_1.nii')"
    )
    return (
        f"has shape {format_shape(shape)}, expected at most {MAX_VOXELS:,} voxels; split it into "
        f"parts first, for example: python -c {shlex.quote(code)}"
    )


def nifti_bytes(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """Encode voxels as the content of a `.nii.gz` file, with a new header without patient data.

    Args:
        voxels: array of any shape and real data type.
        affine: (4, 4), from voxel indices to mm.
    """
    return pack(voxels, affine_header(affine, voxels.shape))
