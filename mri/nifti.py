"""NIfTI files: read with care, as slices of any direction, and written as they were, without anybody's fields.

    scan = read_scan("scan.nii.gz", axis="coronal")     # planes (N, rows, columns), whatever way the file is stored
    content = scan.to_bytes(reconstructed_planes)        # the bytes of a .nii.gz: same shape, affine and kind of number

Whatever a header or a stream claims is checked before it is believed; why a file can't be used is a `ValueError` whose
text goes after the file's name.
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

MAX_VOXELS = 1 << 27  # of a file: 512 x 512 x 512; a header may claim any number
MAX_PIXELS = 1 << 24  # of a slice: 4,096 x 4,096
AXES = {
    "sagittal": 0,
    "coronal": 1,
    "axial": 2,
}  # of right, anterior, superior, which one runs through the slices

# nibabel logs every odd but harmless header field: thousands of lines for one data set.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


def read_nifti(path: Path) -> tuple[nib.Nifti1Header, bytes]:
    """A NIfTI file's header and bytes, compressed or not whatever its name says. ValueError: why it can't be.

    Never more bytes than the header says that there are, and those within MAX_VOXELS.
    """
    try:
        if (length := _size(path)) > MAX_VOXELS * 16:
            raise ValueError(f"has {length:,} bytes, expected at most {MAX_VOXELS * 16:,}")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"can't be read ({error.strerror})") from error
    if not data:
        raise ValueError("is empty (zero bytes)")
    stream = gzip.GzipFile(fileobj=BytesIO(data)) if data[:2] == b"\x1f\x8b" else None
    try:
        start = stream.read(1024) if stream else data[:1024]
        header = _header(start)
        offset, size = (
            header.get_data_offset(),
            math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize,
        )
        if (
            stream
        ):  # a small file may hold terabytes; 64 kB more than it should have, to reach the checksum
            data = start + stream.read(offset + size - len(start) + 65536)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"is truncated or damaged gzip ({error})") from error
    if len(data) < offset + size:
        raise ValueError(
            f"is truncated or damaged: its header tells of {offset + size:,} bytes, it has {len(data):,}"
        )
    return header, data


def _size(path: Path) -> int:
    """Of a regular file. ValueError where it is none: reading it may never end."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("is a folder, expected exactly one .nii or .nii.gz in it")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is no regular file, but a pipe, a socket or a device")
    return status.st_size


def _header(start: bytes) -> nib.Nifti1Header:
    """From a file's first bytes. ValueError where it isn't one, or not one of real numbers within MAX_VOXELS."""
    is_2 = 540 in (
        int.from_bytes(start[:4], "little"),
        int.from_bytes(start[:4], "big"),
    )  # the header's size
    kind = nib.Nifti2Header if is_2 else nib.Nifti1Header
    try:
        header = kind(start[: kind.template_dtype.itemsize])  # extensions are never read
        shape, dtype, offset = (
            header.get_data_shape(),
            header.get_data_dtype(),
            header.get_data_offset(),
        )
        header.get_slope_inter()
    except Exception as error:  # nibabel raises many kinds
        raise ValueError(f"is not a NIfTI file ({error})") from error
    if not header["magic"].item().startswith(b"n+"):
        raise ValueError(
            "is the header of a pair of files (.hdr, .img), expected a single .nii or .nii.gz file"
        )
    if dtype.kind not in "iuf":
        raise ValueError(f"holds {dtype} values, expected one real number a pixel")
    if not shape or min(shape) < 1 or math.prod(shape) > MAX_VOXELS:
        raise ValueError(
            f"has shape {' x '.join(map(str, shape))}, expected at most {MAX_VOXELS:,} voxels, and some"
        )
    if not 0 <= offset <= 1 << 24:
        raise ValueError(f"has its pixels at byte {offset:,}, expected them soon after the header")
    return header


def affine_of(header: nib.Nifti1Header) -> np.ndarray:
    """(4, 4). ValueError where it holds no numbers to go by."""
    with np.errstate(all="ignore"):
        affine = header.get_best_affine()  # ValueError of a quaternion that is none
    if not np.abs(affine).max() < 1e9:
        raise ValueError("has an affine without finite numbers")
    return affine


def axis_orientation(header: nib.Nifti1Header) -> np.ndarray:
    """(3, 2): which way the axes run, as nibabel has it. ValueError where the affine doesn't tell."""
    try:
        with np.errstate(all="ignore"):
            if not np.isnan(turn := nib.orientations.io_orientation(affine_of(header))).any():
                return turn
    except (ValueError, np.linalg.LinAlgError):
        pass
    raise ValueError("has an affine that does not say which way its axes run")


def dimensions_of(shape: tuple[int, ...]) -> int:
    """2 for a slice, also one whose further dimensions are 1; else 3, of which `planes` will tell if it isn't."""
    return 2 if all(size == 1 for size in shape[2:]) else 3


def read_header(path: Path) -> nib.Nifti1Header:
    """A file's header by its first bytes: thousands a second, whatever the files hold. ValueError: why it can't be.

    Also where the file is too small for what its header tells of, even if gzip did its best.
    """
    try:
        size = _size(path)
        with open(path, "rb") as file:
            start = file.read(1024)
            if start[:2] == b"\x1f\x8b":
                file.seek(0)
                start, size = gzip.GzipFile(fileobj=file).read(1024), size * 1032  # deflate's best
    except OSError as error:
        raise ValueError(f"can't be read ({error.strerror or error})") from error
    except (EOFError, zlib.error) as error:
        raise ValueError(f"is truncated or damaged gzip ({error})") from error
    header = _header(start)
    needed = math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
    if size < header.get_data_offset() + needed:
        raise ValueError(f"is truncated or damaged: its header tells of {needed:,} bytes of pixels")
    return header


def planes_shape(header: nib.Nifti1Header, axis: str | int) -> tuple[int, int, int]:
    """SliceDataset, rows and columns that `planes` gives of a file. ValueError where its affine doesn't tell."""
    shape = header.get_data_shape()
    if len(shape) < 2:
        raise ValueError(f"has shape {shape[0]}, expected a slice or a volume")
    if dimensions_of(shape) == 2:
        return 1, *shape[:2]
    order, through = [0, 1, 2], axis
    if isinstance(axis, str):
        order, through = np.argsort(axis_orientation(header)[:, 0]).tolist(), AXES[axis]
    rows, columns = (shape[order[i]] for i in range(3) if i != through)
    return shape[order[through]], rows, columns


def stored_planes(
    header: nib.Nifti1Header, data: bytes, dimensions: int | None, axis: str | int
) -> tuple[np.ndarray, Callable]:
    """The stored numbers of a slice or volume as (N, rows, columns), and a function that scales some of them.

    axis: of AXES, by the affine: the planes' rows and columns then run to right, anterior or superior, in that order;
    or 0, 1, 2, as the file is stored. dimensions: 2, 3, or None for either; ValueError where it has others. No number
    is copied before it is scaled.
    """
    found = shape = header.get_data_shape()
    dimensions = dimensions or dimensions_of(shape)
    while len(shape) > dimensions and shape[-1] == 1:
        shape = shape[:-1]
    what, most = ("2D slice", MAX_PIXELS) if dimensions == 2 else ("3D volume", MAX_VOXELS)
    wanted = f"has shape {' x '.join(map(str, found))}, expected a {what} of at least 8 pixels a side, at most {most:,}"
    if len(shape) != dimensions or math.prod(shape) > most:
        raise ValueError(wanted)
    dtype, count = header.get_data_dtype(), math.prod(shape)
    voxels = np.frombuffer(data, dtype, count, header.get_data_offset()).reshape(shape, order="F")
    if dimensions == 2:
        voxels = voxels[..., None].transpose(2, 0, 1)
    elif isinstance(axis, int):
        voxels = np.moveaxis(voxels, axis, 0)
    else:
        voxels = np.moveaxis(
            nib.orientations.apply_orientation(voxels, axis_orientation(header)), AXES[axis], 0
        )
    if min(voxels.shape[1:]) < 8:
        raise ValueError(wanted)
    slope, inter = header.get_slope_inter()

    def scaled(some: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # what a scale factor makes infinite is told later
            return nib.volumeutils.apply_read_scaling(some, slope, inter)

    return voxels, scaled


@dataclass(frozen=True)
class Scan:
    """A file as slices, and what it takes to write an array like them as the file was."""

    planes: np.ndarray  # (N, rows, columns); of a 2D file one
    affine: np.ndarray  # (4, 4), the file's
    shape: tuple[int, ...]  # the file's
    dtype: np.dtype  # of number that a file of it has: the stored one, or float32 where a scale factor was applied
    axis: int  # of the turned volume, which one runs through the slices; of a 2D file 2
    orientation: (
        np.ndarray | None
    )  # (3, 2), from the stored axes to right, anterior, superior; None: not turned

    @property
    def cut_axis(self) -> str | int:
        """The `axis` that `read_scan` was asked for."""
        return self.axis if self.orientation is None else list(AXES)[self.axis]

    @property
    def spacing(self) -> tuple[float, float]:
        """mm between rows and between columns."""
        sizes = nib.affines.voxel_sizes(self.affine)
        if self.orientation is not None:
            sizes = sizes[np.argsort(self.orientation[:, 0])]
        rows, columns = (float(size) for i, size in enumerate(sizes[:3]) if i != self.axis)
        return rows, columns

    def to_bytes(self, planes: np.ndarray, kind: np.dtype | None = None) -> bytes:
        """Bytes of a `.nii.gz` of an array like `planes`; integers are rounded, and kept to what their kind holds."""
        voxels, kind = np.moveaxis(planes, 0, self.axis), kind or self.dtype
        if self.orientation is not None:
            straight = np.stack([np.arange(3), np.ones(3)], 1)
            voxels = nib.orientations.apply_orientation(
                voxels, nib.orientations.ornt_transform(straight, self.orientation)
            )
        if kind.kind in "iu":
            limits = np.iinfo(kind)
            high = (
                np.nextafter(float(limits.max), 0) if kind.itemsize == 8 else limits.max
            )  # 2^63 - 1 is no float
            voxels = np.clip(np.rint(voxels.astype(np.float64)), limits.min, high)
        return nifti_bytes(
            np.ascontiguousarray(voxels.reshape(self.shape)).astype(kind), self.affine
        )


def read_scan(path: str | Path, axis: str | int | None = None) -> Scan:
    """A 2D or 3D file as slices, cut along `axis` as `planes` does; None: coronal. Raises ValueError."""
    header, data = read_nifti(Path(path))
    found = header.get_data_shape()
    dimensions = dimensions_of(found)
    axis = "coronal" if axis is None else axis
    stored, scaled = stored_planes(header, data, dimensions, axis)
    voxels, kind = scaled(stored), header.get_data_dtype().newbyteorder("=")
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ValueError(f"has {np.count_nonzero(~np.isfinite(voxels)):,} NaN or infinite voxels")
    turned = dimensions == 3 and isinstance(axis, str)
    through = 2 if dimensions == 2 else AXES[axis] if turned else axis
    kind = (
        np.dtype(np.float32) if voxels.dtype.newbyteorder("=") != kind or kind.kind == "f" else kind
    )
    return Scan(
        voxels,
        affine_of(header),
        found,
        kind,
        through,
        axis_orientation(header) if turned else None,
    )


def nifti_bytes(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """A `.nii.gz` file's content, lengths in mm. The header is new: no field of any file that was read is in it."""
    try:
        with np.errstate(all="ignore"):
            nifti = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    except (nib.spatialimages.HeaderDataError, np.linalg.LinAlgError):
        # No rotation and sizes: kept as it is, in the other of the two forms.
        nifti = nib.Nifti1Image(voxels, None, dtype=voxels.dtype)
        nifti.set_sform(affine, code=2)
    nifti.header.set_xyzt_units("mm")
    return gzip.compress(nifti.to_bytes(), 6, mtime=0)
