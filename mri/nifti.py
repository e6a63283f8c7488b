"""Read NIfTI files safely as planes, and write planes back as NIfTI files.

    scan = read_scan("scan.nii.gz", axis="coronal")   # scan.planes: (N, rows, columns)
    content = scan.to_bytes(reconstructed_planes)     # a .nii.gz with the same shape and affine

Safety. A header may claim any size, a gzip stream may unpack to terabytes, and reading a pipe may
never end. Headers are therefore checked before any data is read or unpacked.

Orientation. A volume is cut into "sagittal", "coronal" or "axial" planes, as its affine determines.
Rows and columns then run to the right, anterior or superior. Alternatively, a volume is cut along
its stored axis 0, 1 or 2, and the affine is ignored. Only `Cut` deals with axes and directions: it
maps stored voxels to planes and back, with `nibabel.orientations`.

Errors. ValueError is raised for a file that cannot be used. Its message is a predicate without a
subject, such as "is empty (zero bytes)", so that callers can put the file's name in front and list
the messages of many files in one error.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

MAX_VOXELS = 1 << 27  # per file: 512 x 512 x 512
MAX_PIXELS = 1 << 24  # per slice: 4,096 x 4,096
MIN_SIDE = 8  # smallest side of a slice, in pixels
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # planes' normals: right, anterior, superior
# Directions of the rows, columns and planes for each value of AXES, in nibabel's letters.
_PLANE_CODES = ("ASR", "RSA", "RAS")

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
_MAX_GZIP_RATIO = 1032  # the best that deflate can achieve
_HEADER_BYTES = 1024  # more than a NIfTI-1 header (348) or a NIfTI-2 header (540)

_SILENT_LOGGER = logging.Logger("nifti", logging.CRITICAL)  # for odd but harmless header fields


# ---------------------------------------------------------------- files and headers


def read_nifti(path: Path) -> tuple[nib.Nifti1Header, bytes]:
    """Read the header and the uncompressed bytes of a NIfTI file.

    Gzip files are recognised by their content, not by their name. At most 64 kB more are unpacked
    than the header specifies, and a header that specifies more than MAX_VOXELS voxels is refused.

    Raises:
        ValueError: if the file is not a complete NIfTI file (see the module's docstring).
    """
    data = _read_bytes(path)
    is_gzip = data[:2] == _GZIP_MAGIC
    try:
        stream = gzip.GzipFile(fileobj=BytesIO(data)) if is_gzip else BytesIO(data)
        start = stream.read(_HEADER_BYTES)
        header = _parse_header(start)
        size = header.get_data_offset() + _voxel_bytes(header)
        if is_gzip:
            # 64 kB more than needed, to reach and verify the checksum at the end of the stream.
            data = start + stream.read(size - len(start) + 65536)
    except _GZIP_ERRORS as error:
        raise ValueError(f"is truncated or damaged gzip ({error})") from error
    if len(data) < size:
        raise ValueError(
            f"is truncated or damaged: it has {len(data):,} of the {size:,} bytes that its header "
            "specifies"
        )
    return header, data


def read_header(path: Path) -> nib.Nifti1Header:
    """Read the header of a NIfTI file without its data (thousands of files per second).

    Raises:
        ValueError: if the file is not a NIfTI file, or is too small for the data that its header
            specifies, even at gzip's best compression.
    """
    try:
        size = _file_size(path)
        with open(path, "rb") as file:
            start = file.read(_HEADER_BYTES)
            if start[:2] == _GZIP_MAGIC:
                file.seek(0)
                start = gzip.GzipFile(fileobj=file).read(_HEADER_BYTES)
                size *= _MAX_GZIP_RATIO
    except _GZIP_ERRORS as error:
        raise ValueError(f"is truncated or damaged gzip ({error})") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    header = _parse_header(start)
    needed = _voxel_bytes(header)
    if size < header.get_data_offset() + needed:
        raise ValueError(f"is truncated or damaged: it is too small for {needed:,} bytes of voxels")
    return header


def _read_bytes(path: Path) -> bytes:
    """Read a file; raise ValueError if it is empty or larger than any accepted NIfTI file."""
    try:
        size = _file_size(path)
        if size > MAX_VOXELS * 16:
            raise ValueError(f"has {size:,} bytes, expected at most {MAX_VOXELS * 16:,}")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    if not data:
        raise ValueError("is empty (zero bytes)")
    return data


def _file_size(path: Path) -> int:
    """Return the size of a file in bytes; refuse pipes and devices, which may be endless."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("is a folder, expected exactly one .nii or .nii.gz in it")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file but a pipe, a socket or a device")
    return status.st_size


def _parse_header(start: bytes) -> nib.Nifti1Header:
    """Parse a header from the first bytes of a file, without its extensions, and check its fields.

    Raises:
        ValueError: if this is not the header of a NIfTI file with 1 to MAX_VOXELS real voxels.
    """
    header_sizes = [int.from_bytes(start[:4], byteorder) for byteorder in ("little", "big")]
    header_class = nib.Nifti2Header if 540 in header_sizes else nib.Nifti1Header
    try:
        header = header_class(start[: header_class.template_dtype.itemsize], check=False)
        header.check_fix(_SILENT_LOGGER, error_level=logging.ERROR)
        shape = header.get_data_shape()
        dtype = header.get_data_dtype()
        offset = header.get_data_offset()
        header.get_slope_inter()
    except Exception as error:  # nibabel raises many types of exceptions
        raise ValueError(f"is not a NIfTI file ({error})") from error
    if not header["magic"].item().startswith(b"n+"):
        raise ValueError(
            "is the header of a pair of files (.hdr, .img), expected a single .nii or .nii.gz file"
        )
    if dtype.kind not in "iuf":
        raise ValueError(f"holds {dtype} values, expected one real number per voxel")
    if not shape or min(shape) < 1 or math.prod(shape) > MAX_VOXELS:
        raise ValueError(f"has shape {_format_shape(shape)}, expected 1 to {MAX_VOXELS:,} voxels")
    if not 0 <= offset <= 1 << 24:
        raise ValueError(f"has its voxels at byte {offset:,}, expected them soon after the header")
    return header


def _voxel_bytes(header: nib.Nifti1Header) -> int:
    return math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize


def _format_shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


# ---------------------------------------------------------------- orientation


def affine_of(header: nib.Nifti1Header) -> np.ndarray:
    """Return the affine (4, 4), from voxel indices to mm; raise ValueError if it is unusable."""
    with np.errstate(all="ignore"):
        affine = header.get_best_affine()  # ValueError for an impossible quaternion
    if not np.abs(affine).max() < 1e9:
        raise ValueError("has an affine with NaN, infinite or too large numbers")
    return affine


def axis_orientation(header: nib.Nifti1Header) -> np.ndarray:
    """Return the orientation of the stored axes, (3, 2), in nibabel's notation.

    Row i describes stored axis i: first the index of the closest of (right, anterior, superior),
    then 1, or -1 if the axis runs the other way. Raises ValueError if the affine does not determine
    the directions.
    """
    try:
        with np.errstate(all="ignore"):
            orientation = nib.orientations.io_orientation(affine_of(header))
        if not np.isnan(orientation).any():
            return orientation
    except (ValueError, np.linalg.LinAlgError):
        pass
    raise ValueError("has an affine that does not determine the directions of its axes")


@dataclass(frozen=True)
class Cut:
    """The mapping between the stored axes of a volume and (row, column, plane)."""

    axis: int  # cut along it: a value of AXES, or a stored axis if orientation is None
    orientation: np.ndarray | None  # from `axis_orientation`; None: axes as stored

    @property
    def _to_planes(self) -> np.ndarray:
        """Orientation from stored axes to (row, column, plane), (3, 2), in nibabel's notation."""
        stored = axcodes2ornt("RAS") if self.orientation is None else self.orientation
        return ornt_transform(stored, axcodes2ornt(_PLANE_CODES[self.axis]))

    def planes(self, voxels: np.ndarray) -> np.ndarray:
        """Cut stored voxels (3 axes) into planes (N, rows, columns), as a view."""
        return np.moveaxis(apply_orientation(voxels, self._to_planes), -1, 0)

    def voxels(self, planes: np.ndarray) -> np.ndarray:
        """Join planes (N, rows, columns) into stored voxels; this is the inverse of `planes`."""
        to_stored = ornt_transform(axcodes2ornt("RAS"), self._to_planes)
        return apply_orientation(np.moveaxis(planes, 0, -1), to_stored)

    def affine(self, affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
        """Return the affine (4, 4) from (row, column, plane) to mm.

        Args:
            affine: (4, 4), from stored voxel indices to mm.
            shape: shape of the stored voxels.
        """
        return affine @ inv_ornt_aff(self._to_planes, shape)


def find_cut(header: nib.Nifti1Header, axis: str | int, dimensions: int | None) -> Cut:
    """Return the `Cut` of a file; arguments and errors are those of `stored_planes`."""
    if (dimensions or _dimensions_of(header.get_data_shape())) == 2:
        return Cut(2, None)
    if isinstance(axis, str):
        return Cut(AXES[axis], axis_orientation(header))
    return Cut(axis, None)


def _dimensions_of(shape: tuple[int, ...]) -> int:
    """Return 2 if all dimensions after the second have size 1, otherwise 3."""
    return 2 if all(size == 1 for size in shape[2:]) else 3


def _volume_shape(shape: tuple[int, ...], dimensions: int | None) -> tuple[int, ...]:
    """Return a file's shape as three numbers; a slice counts as a volume with one plane."""
    dimensions = dimensions or _dimensions_of(shape)
    if len(shape) < dimensions:
        raise ValueError(f"has shape {_format_shape(shape)}, expected {dimensions} dimensions")
    return (*shape[:2], 1) if dimensions == 2 else shape[:3]


def planes_shape(
    header: nib.Nifti1Header, axis: str | int, dimensions: int | None = None
) -> tuple[int, int, int]:
    """Return (N, rows, columns) of the planes of a file; arguments as in `stored_planes`."""
    shape = _volume_shape(header.get_data_shape(), dimensions)
    return find_cut(header, axis, dimensions).planes(np.broadcast_to(0, shape)).shape


def planes_affine(
    header: nib.Nifti1Header, axis: str | int, dimensions: int | None = None
) -> np.ndarray:
    """Return the affine (4, 4) from (row, column, plane) to mm; arguments as in `stored_planes`."""
    shape = _volume_shape(header.get_data_shape(), dimensions)
    return find_cut(header, axis, dimensions).affine(affine_of(header), shape)


def stored_planes(
    header: nib.Nifti1Header, data: bytes, dimensions: int | None, axis: str | int
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Return the unscaled planes of a file, and a function that scales planes.

    Args:
        header: the file's header.
        data: its uncompressed bytes.
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
    dimensions = dimensions or _dimensions_of(shape)
    while len(shape) > dimensions and shape[-1] == 1:
        shape = shape[:-1]
    form, max_voxels = ("2D slice", MAX_PIXELS) if dimensions == 2 else ("3D volume", MAX_VOXELS)
    mismatch = (
        f"has shape {_format_shape(stored_shape)}, expected a {form} of at least {MIN_SIDE} pixels "
        f"per side and at most {max_voxels:,} in all"
    )
    if len(shape) != dimensions or math.prod(shape) > max_voxels:
        raise ValueError(mismatch)
    voxels = np.frombuffer(
        data, header.get_data_dtype(), math.prod(shape), header.get_data_offset()
    )
    voxels = voxels.reshape(_volume_shape(shape, dimensions), order="F")
    planes = find_cut(header, axis, dimensions).planes(voxels)
    if min(planes.shape[1:]) < MIN_SIDE:
        raise ValueError(mismatch)
    slope, intercept = header.get_slope_inter()

    def scale(stored: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # infinite results are reported by the callers
            return nib.volumeutils.apply_read_scaling(stored, slope, intercept)

    return planes, scale


# ---------------------------------------------------------------- whole scans


@dataclass(frozen=True)
class Scan:
    """The planes of a file, and what is needed to write other planes with its geometry."""

    planes: np.ndarray  # (N, rows, columns), in the scanner's intensities; N is 1 for a 2D file
    affine: np.ndarray  # (4, 4), of the file
    shape: tuple[int, ...]  # of the file
    dtype: np.dtype  # for `to_bytes`: the file's if its voxels are unscaled integers, else float32
    cut: Cut

    @property
    def axis(self) -> str | int:
        """The `axis` that was passed to `read_scan`; 2 for a 2D file."""
        return self.cut.axis if self.cut.orientation is None else list(AXES)[self.cut.axis]

    @property
    def spacing(self) -> tuple[float, float]:
        """Spacing of the rows and of the columns in mm."""
        affine = self.cut.affine(self.affine, _volume_shape(self.shape, None))
        rows, columns, _ = nib.affines.voxel_sizes(affine).tolist()
        return rows, columns

    def to_bytes(self, planes: np.ndarray, dtype: np.dtype | None = None) -> bytes:
        """Return the content of a `.nii.gz` file with other planes in the geometry of this scan.

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
        return nifti_bytes(voxels, self.affine)


def read_scan(path: str | Path, axis: str | int | None = None) -> Scan:
    """Read a 2D or 3D file as planes.

    Args:
        path: a .nii or .nii.gz file.
        axis: axis along which volumes are cut (see `stored_planes`; default: "coronal").

    Raises:
        ValueError: if the file cannot be used (see the module's docstring).
    """
    axis = "coronal" if axis is None else axis
    header, data = read_nifti(Path(path))
    stored, scale = stored_planes(header, data, None, axis)
    planes = scale(stored)
    if planes.dtype.kind == "f" and not np.isfinite(planes).all():
        raise ValueError(f"has {np.count_nonzero(~np.isfinite(planes)):,} NaN or infinite voxels")
    dtype = header.get_data_dtype().newbyteorder("=")
    is_scaled = planes.dtype.newbyteorder("=") != dtype
    if is_scaled or dtype.kind == "f":
        dtype = np.dtype(np.float32)
    cut = find_cut(header, axis, None)
    return Scan(planes, affine_of(header), header.get_data_shape(), dtype, cut)


def nifti_bytes(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """Return the content of a `.nii.gz` file in mm. The header is new and has no patient data.

    Args:
        voxels: array of any shape and real data type.
        affine: (4, 4), from voxel indices to mm.
    """
    try:
        with np.errstate(all="ignore"):
            image = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    except (nib.spatialimages.HeaderDataError, np.linalg.LinAlgError):
        # The affine is not a rotation with voxel sizes; only the sform can represent it.
        image = nib.Nifti1Image(voxels, None, dtype=voxels.dtype)
        image.set_sform(affine, code=2)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), 6, mtime=0)
