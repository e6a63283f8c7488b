"""Encode slices as codes and decode them, in memory and as .npz or .vqc files.

    scan = nifti.read_scan("scan.nii.gz")       # scan.planes: (N, rows, columns)
    coded = encode_planes(model, scan.planes)   # codes, and the mean and std of each slice
    planes = decode_planes(model, coded)        # (N, rows, columns)
    content = scan.to_bytes(planes)             # bytes of a .nii.gz with the original's geometry

Slices are not resampled by default. They are padded to a multiple of the stride for encoding, and
cropped to their original size after decoding.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple, Protocol

import nibabel as nib
import numpy as np
import torch

from modules import VQVAE
from mri import nifti
from mri.geometry import affine_header, geometry_record, header_from_record
from mri.preprocessing import floor_std, is_constant, resize
from utils import DataError, first_line, full_float32, write_bytes

BATCH_SIZE = 16  # slices per batch, if they have at most 512 x 512 pixels
CODES_FORMAT = 1  # version of the .npz and .vqc files


class Coded(NamedTuple):
    """The codes of N slices, and the other inputs of `decode_planes`."""

    codes: np.ndarray  # (N, h, w) or (N, h, w, num_codebooks), uint16, or uint32 if K > 65,536
    mean: np.ndarray  # (N,) float32, in the file's intensities
    std: np.ndarray  # (N,) float32; 0 for a constant slice, whose codes are meaningless
    size: tuple[int, int]  # rows and columns of the slices
    resized: bool = False  # whether slices were resized; if so, decoding resizes to `size`


class Coder(Protocol):
    """A lossless coder of codes: `prior.coding.EntropyCoder`, which documents the methods."""

    def encode(self, codes: np.ndarray, path: Path) -> dict[str, object]: ...
    def decode(self, arrays: dict[str, np.ndarray], path: Path) -> np.ndarray: ...


@full_float32()
@torch.no_grad()
def encode_planes(
    model: VQVAE,
    planes: np.ndarray,
    resize_to: tuple[int, int] | None = None,
    one_scan: bool = True,
) -> Coded:
    """Encode slices of any size. Each is z-scored by its own mean and std, as in training.

    Args:
        model: the model, in eval mode.
        planes: slices, (N, rows, columns). They are padded to multiples of the stride by repeating
            the pixels at their edges.
        resize_to: (rows, columns) to resize the slices to before encoding; None: not resized.
        one_scan: whether the slices belong to one scan. If so, `floor_std` uses the median standard
            deviation of the scan. If not, the result is that of separate calls for each slice.
    """
    device = next(model.parameters()).device
    mean = np.array([plane.mean(dtype=np.float64) for plane in planes])
    std = np.array([plane.std(dtype=np.float64) for plane in planes])
    low = planes.min(axis=(1, 2)).astype(np.float64)
    high = planes.max(axis=(1, 2)).astype(np.float64)
    constant = is_constant(low, high)
    mean = mean.astype(np.float32)
    if one_scan:
        std = floor_std(std, constant)
    std = np.where(constant, 0, std).astype(np.float32)
    scale = np.where(std > 0, std, 1)
    large = model.vector_quantization.num_embeddings > 1 << 16
    codes = []
    for indices in split_batches(len(planes), planes.shape[1:]):
        images = torch.from_numpy(planes[indices].astype(np.float64))[:, None]
        images = images - torch.from_numpy(mean[indices]).view(-1, 1, 1, 1)
        images = (images / torch.from_numpy(scale[indices]).view(-1, 1, 1, 1)).float()
        if resize_to:
            images = resize(images, resize_to)
        bottom, right = (-side % model.stride for side in images.shape[-2:])
        images = torch.nn.functional.pad(images, (0, right, 0, bottom), mode="replicate")
        batch_codes = model.encode(images.to(device)).cpu().numpy()
        codes.append(batch_codes.astype(np.uint32 if large else np.uint16))
    return Coded(np.concatenate(codes), mean, std, planes.shape[1:], resize_to is not None)


@full_float32()
@torch.no_grad()
def decode_planes(model: VQVAE, coded: Coded) -> np.ndarray:
    """Decode slices to (N, rows, columns) float32, in the file's intensities."""
    device = next(model.parameters()).device
    rows, columns = coded.size
    planes = []
    for indices in split_batches(len(coded.codes), coded.size):
        codes = torch.from_numpy(coded.codes[indices].astype(np.int64))
        images = model.decode_codes(codes.to(device)).float().cpu()
        if coded.resized:
            images = resize(images, (rows, columns))
        images = images[:, 0, :rows, :columns].numpy()
        planes.append(images * coded.std[indices, None, None] + coded.mean[indices, None, None])
    return np.concatenate(planes)


def split_batches(count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Split slice indices into batches of up to 16; fewer for slices over 512 x 512 pixels."""
    batch_size = max(1, BATCH_SIZE * 512**2 // max(512**2, size[0] * size[1]))
    return np.array_split(np.arange(count), -(-count // batch_size))


# ---------------------------------------------------------------- codes as files


def fingerprint(model: VQVAE) -> str:
    """Return a hash of all weights, to check that codes are decoded by the model that made them."""
    content = hashlib.sha256()
    for tensor in model.state_dict().values():
        content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def is_entropy_coded(path: Path) -> bool:
    """Return whether a file of codes is a .vqc file, by its name."""
    return path.suffix.lower() == ".vqc"


def write_codes(
    path: Path, model: VQVAE, coded: Coded, scan: nifti.Scan, coder: Coder | None = None
) -> int:
    """Write codes as an .npz file or, with a coder, as a .vqc file; return its size in bytes.

    Besides codes, means and stds, the file contains the scan's geometry and data type, and the
    model's fingerprint. Nothing else from the original's header is written. `affine`, in mm,
    repeats information in `geometry`, because files of earlier versions have only `affine`.

    A .vqc file contains the coder's arrays instead of the codes. It is an .npz file whose arrays
    are compressed together, because their headers would be larger than the codes of a slice.
    """
    orientation = scan.cut.orientation
    content = io.BytesIO()
    save = np.savez if coder else np.savez_compressed
    save(
        content,
        format=CODES_FORMAT,
        model=fingerprint(model),
        **(coder.encode(coded.codes, path) if coder else {"codes": coded.codes}),
        mean=coded.mean,
        std=coded.std,
        size=coded.size,
        resized=coded.resized,
        affine=scan.affine,
        shape=scan.shape,
        kind=scan.dtype.str,
        axis=scan.cut.axis,
        turn=np.zeros((0, 2)) if orientation is None else orientation,
        geometry=geometry_record(scan.header),
    )
    data = zlib.compress(content.getvalue(), 9) if coder else content.getvalue()
    write_bytes(path, data)
    return len(data)


def read_codes(path: Path, model: VQVAE, coder: Coder | None = None) -> tuple[Coded, nifti.Scan]:
    """Read a file that `write_codes` wrote; a .vqc file is decoded by the coder.

    Returns:
        The codes, and a scan that has the original's geometry but no slices.

    Raises:
        DataError: if the file is damaged, has another format, or was made by another model.
    """
    not_codes = f"{path} is not an .npz or .vqc file from --export-codes"
    damaged = f"{path} is damaged: its arrays are inconsistent; export it again"
    content = _load_arrays(path, not_codes)
    if content.get("format") is None:
        raise DataError(not_codes)
    number = content["format"].tolist()
    if number != CODES_FORMAT:
        raise DataError(
            f"{path} has format {number}; expected {CODES_FORMAT}. Export the codes again"
        )
    try:
        if str(content["model"]) != fingerprint(model):
            raise DataError(
                f"{path} was made by model {content['model']}; this model is "
                f"{fingerprint(model)}. Use --run to name the run that made the file"
            )
        rows, columns = map(int, content["size"])
        coded = Coded(
            codes=coder.decode(content, path) if coder else content["codes"],
            mean=content["mean"],
            std=content["std"],
            size=(rows, columns),
            resized=bool(content["resized"]),
        )
        scan = nifti.Scan(
            planes=np.zeros((0, rows, columns)),
            header=_read_geometry(content, damaged),
            dtype=np.dtype(str(content["kind"])),
            cut=nifti.Cut(
                axis=int(content["axis"]),
                orientation=content["turn"] if len(content["turn"]) else None,
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{not_codes} ({error})") from error
    if not (_has_valid_codes(coded, model) and _has_valid_geometry(scan, coded)):
        raise DataError(damaged)
    return coded, scan


def _load_arrays(path: Path, message: str) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz or .vqc file.

    Raises:
        DataError: if the file cannot be read (the error is then `message`), or if it is too large.
    """
    try:
        file = io.BytesIO(_unpack(path)) if is_entropy_coded(path) else path
        with zipfile.ZipFile(file) as archive:
            size = sum(record.file_size for record in archive.infolist())
        if size <= nifti.MAX_VOXELS:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: np.asarray(arrays[name]) for name in arrays.files}
    except Exception as error:  # damaged files raise many types of exceptions
        raise DataError(f"{message} ({first_line(error)})") from error
    raise DataError(
        f"{path} unpacks to {size:,} bytes, more than any file from --export-codes; name such a "
        "file"
    )


def _unpack(path: Path) -> bytes:
    """Return the content of a .vqc file; raise ValueError if it is too large or has no end."""
    unpacker = zlib.decompressobj()
    with open(path, "rb") as file:
        content = unpacker.decompress(file.read(nifti.MAX_VOXELS), nifti.MAX_VOXELS)
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("it is truncated or too large")
    return content


def _read_geometry(content: dict[str, np.ndarray], message: str) -> nib.Nifti1Header:
    """Return a header with the shape and geometry of the original.

    Raises:
        DataError: if the geometry is invalid; the error is then `message`.
    """
    shape = tuple(map(int, content["shape"]))
    affine = content["affine"]
    if affine.shape != (4, 4) or affine.dtype.kind != "f":
        raise DataError(message)
    try:
        if "geometry" in content:
            return header_from_record(content["geometry"], shape)
        return affine_header(affine, shape)
    except ValueError as error:
        raise DataError(f"{message} ({error})") from error


def _has_valid_codes(coded: Coded, model: VQVAE) -> bool:
    """Return whether the codes, means, stds and size fit each other and the model."""
    codes = coded.codes
    quantizer = model.vector_quantization
    if codes.dtype not in (np.uint16, np.uint32) or codes.ndim < 3 or codes.size == 0:
        return False
    codebooks = (quantizer.num_codebooks,) if quantizer.num_codebooks > 1 else ()
    if codes.shape[3:] != codebooks:
        return False
    for statistic in (coded.mean, coded.std):
        if statistic.shape != (len(codes),) or statistic.dtype.kind != "f":
            return False
    grid = tuple(math.ceil(side / model.stride) for side in coded.size)
    if codes.shape[1:3] != grid and not coded.resized:
        return False
    return bool(codes.max() < quantizer.num_embeddings)


def _has_valid_geometry(scan: nifti.Scan, coded: Coded) -> bool:
    """Return whether the geometry is valid and fits the slices, as `scan.to_bytes` requires."""
    num_pixels = len(coded.codes) * math.prod(coded.size)
    if num_pixels != math.prod(scan.shape) or not 0 < num_pixels <= nifti.MAX_VOXELS:
        return False
    if scan.dtype.kind not in "iuf" or scan.cut.axis not in (0, 1, 2):
        return False
    orientation = scan.cut.orientation
    if orientation is None:
        return True
    if orientation.shape != (3, 2) or orientation.dtype.kind != "f":
        return False
    axes, directions = orientation.T
    return sorted(axes) == [0, 1, 2] and bool((np.abs(directions) == 1).all())
