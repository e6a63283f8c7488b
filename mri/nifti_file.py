"""Read the headers and bytes of NIfTI files safely, and write NIfTI files.

    header = read_header(path)          # checked; thousands of files per second
    header, data = read_nifti(path)     # data: the uncompressed bytes

Safety. A header may claim any size, a gzip stream may unpack to terabytes, and reading a pipe may
never end. Headers are therefore checked before any data is read or unpacked.

Memory. Up to MAX_VOXELS voxels are read into memory. Larger files are memory-mapped, so that their
planes can be read one at a time; this is impossible for compressed files, which are refused.

Errors. ValueError is raised for a file that cannot be used. Its message is a predicate without a
subject, such as "is empty (zero bytes)", so that callers can put the file's name in front and list
the messages of many files in one error.
"""

from __future__ import annotations

import gzip
import logging
import math
import mmap
import os
import shlex
import stat
import zlib
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np

from mri.geometry import format_shape

MAX_VOXELS = 1 << 27  # maximum in memory, and in one plane: 512 x 512 x 512

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_GZIP_RATIO = 1032  # the best compression ratio of deflate
_GZIP_CHUNK = 1 << 16  # compressed bytes that are read at a time
_GZIP_END = 1 << 16  # bytes that are unpacked after the voxels, to verify the checksum
_HEADER_BYTES = 540  # a NIfTI-2 header; a NIfTI-1 header has 348 bytes

_SILENT_LOGGER = logging.Logger("nifti", logging.CRITICAL)  # ignores harmless header defects


def read_nifti(path: str | Path) -> tuple[nib.Nifti1Header, bytes | mmap.mmap]:
    """Read the header and the uncompressed bytes of a NIfTI file.

    Gzip files are recognised by their content, not by their name. At most 64 KiB beyond the size
    that the header specifies are unpacked. Bytes after the gzip stream are ignored.

    Returns:
        The header, and the bytes, which are memory-mapped if there are more than MAX_VOXELS voxels.

    Raises:
        ValueError: if the file is not a complete NIfTI file (see the top of this file), or if it
            is compressed and has more than MAX_VOXELS voxels.
    """
    try:
        size = _file_size(path)
        with Path(path).open("rb") as file:
            header, is_gzip = _read_start(file)
            needed = header.get_data_offset() + _voxel_bytes(header)
            is_large = math.prod(header.get_data_shape()) > MAX_VOXELS
            if is_gzip and is_large:
                raise ValueError(_describe_large_gzip(Path(path), header.get_data_shape()))
            if is_gzip:
                data = _unpack(file, needed, verify=True)
            elif is_large:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            else:
                data = file.read(min(size, needed))
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    if len(data) < needed:
        raise ValueError(
            f"is truncated or damaged: it has {len(data):,} of the {needed:,} bytes that its "
            "header specifies"
        )
    return header, data


def read_header(path: str | Path) -> nib.Nifti1Header:
    """Read the header of a NIfTI file without its data (thousands of files per second).

    Raises:
        ValueError: if the file is not a NIfTI file, or is too small for the data that its header
            specifies, even at gzip's best compression.
    """
    try:
        size = _file_size(path)
        with Path(path).open("rb") as file:
            header, is_gzip = _read_start(file)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    if is_gzip:
        size *= _MAX_GZIP_RATIO
    needed = _voxel_bytes(header)
    if size < header.get_data_offset() + needed:
        raise ValueError(f"is truncated or damaged: it is too small for {needed:,} bytes of voxels")
    return header


def _read_start(file: BinaryIO) -> tuple[nib.Nifti1Header, bool]:
    """Return the header of an open file, and whether it is a gzip file; rewind the file."""
    start = file.read(_HEADER_BYTES)
    if not start:
        raise ValueError("is empty (zero bytes)")
    is_gzip = start[:2] == _GZIP_MAGIC
    file.seek(0)
    if is_gzip:
        start = _unpack(file, _HEADER_BYTES)
        file.seek(0)
    return _parse_header(start), is_gzip


def _unpack(file: BinaryIO, size: int, verify: bool = False) -> bytes:
    """Unpack the first bytes of a gzip file, which may consist of several gzip streams.

    Everything after the last intact stream, such as padding, is ignored.

    Args:
        file: the open file.
        size: number of bytes to unpack; fewer are returned if the intact streams are shorter.
        verify: whether to unpack up to _GZIP_END further bytes, so that the checksum at the end of
            the stream is verified.

    Raises:
        ValueError: if the first stream is incomplete or damaged.
    """
    parts = []
    num_bytes = 0
    limit = size + _GZIP_END if verify else size
    packed = file.read(_GZIP_CHUNK)
    while packed[:2] == _GZIP_MAGIC and num_bytes < size:
        try:
            part, packed = _unpack_stream(file, packed, limit - num_bytes)
        except (EOFError, zlib.error) as error:
            if parts:
                break  # padding that looks like another stream; or the content is incomplete
            raise ValueError(f"is truncated or damaged gzip ({error})") from error
        parts.append(part)
        num_bytes += len(part)
        if len(packed) < len(_GZIP_MAGIC):
            packed += file.read(_GZIP_CHUNK)
    return b"".join(parts)


def _unpack_stream(file: BinaryIO, packed: bytes, limit: int) -> tuple[bytes, bytes]:
    """Unpack one gzip stream, or its first `limit` bytes.

    Args:
        file: the open file.
        packed: the start of the stream, which was already read from the file.
        limit: maximum number of bytes to unpack.

    Returns:
        The unpacked bytes, and the bytes that were read after the end of the stream.

    Raises:
        EOFError or zlib.error: if the stream is incomplete or damaged.
    """
    stream = zlib.decompressobj(zlib.MAX_WBITS | 16)  # 16: gzip format, with checksum verification
    parts = []
    num_bytes = 0
    while not stream.eof and num_bytes < limit:
        if not packed:
            raise EOFError("it ends too early")
        parts.append(stream.decompress(packed, limit - num_bytes))
        num_bytes += len(parts[-1])
        packed = stream.unconsumed_tail
        if not (packed or stream.eof):
            packed = file.read(_GZIP_CHUNK)
    return b"".join(parts), stream.unused_data


def _describe_large_gzip(path: Path, shape: tuple[int, ...]) -> str:
    """Return the error for a gzip file with too many voxels, with the command to unpack it."""
    name = shlex.quote(str(path))
    command = f"gunzip {name}"
    if path.suffix != ".gz":
        command = f"mv {name} {name}.gz; gunzip {name}.gz"
    return f"has shape {format_shape(shape)}; it is too large to be read compressed, run: {command}"


def _file_size(path: str | Path) -> int:
    """Return the size of a file in bytes; refuse pipes and devices, which may be endless."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("is a folder, expected exactly one .nii or .nii.gz in it")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file but a pipe, a socket or a device")
    return status.st_size


def _parse_header(start: bytes) -> nib.Nifti1Header:
    """Parse the header in the first bytes of a file, without its extensions, and check its fields.

    Raises:
        ValueError: if this is not a NIfTI header, or it does not specify one real number per voxel.
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
    if not shape or min(shape) < 1:
        raise ValueError(f"has shape {format_shape(shape)}, expected at least one voxel")
    if not 0 <= offset <= 1 << 24:
        raise ValueError(f"has its voxels at byte {offset:,}, expected them soon after the header")
    if offset == 0:  # some programs leave the field empty; the voxels never overlap the header
        header["vox_offset"] = header.single_vox_offset
    return header


def _voxel_bytes(header: nib.Nifti1Header) -> int:
    """Return the size of all voxels in bytes."""
    return math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize


def pack(voxels: np.ndarray, header: nib.Nifti1Header) -> bytes:
    """Encode voxels as the content of a `.nii.gz` file with the geometry of a header."""
    header = header.copy()
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1, 0)
    header["vox_offset"] = header.single_vox_offset
    content = header.binaryblock.ljust(header.single_vox_offset, b"\0")
    return gzip.compress(content + voxels.tobytes(order="F"), 6, mtime=0)
