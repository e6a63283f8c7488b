"""Damage files at random: NIfTI headers, gzip streams, shapes, and the values of dictionaries."""

from __future__ import annotations

import copy
import gzip
import os
import random
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

# fmt: off
INTEGERS = (
    0, 1, -1, 2, 7, 8, 255, 1 << 15, -(1 << 15), 1 << 31, 1 << 40, 10**12, 1 << 62, -(1 << 63),
)
FLOATS = (np.nan, np.inf, -np.inf, 0, -1, 1e-45, 1e38, 3.4e38, 348)
ODD_VALUES = (
    None, True, "", "x" * 999, [], {}, [[1]], -1, 0, 10**9, 10**30, 1e308, float("nan"),
    float("inf"), {"a": 1},
)
HEADER_FIELDS = (
    "dim", "dim", "datatype", "bitpix", "vox_offset", "scl_slope", "scl_inter", "pixdim",
    "qform_code", "sform_code", "quatern_b", "srow_x", "srow_y", "magic", "sizeof_hdr", "descrip",
    "intent_code",
)  # "dim" is listed twice because it matters most
DATA_TYPES = (2, 4, 8, 16, 64, 128, 32, 1792, 2304, 1, 0, 768)  # NIfTI codes, some of them invalid
# fmt: on

# Decompresses to a gzip stream, which decompresses to 64 MiB, followed by 256 MiB of zeros
BOMB = gzip.compress(gzip.compress(b"\0" * (1 << 26), 9), 9) + gzip.compress(b"\0" * (1 << 28), 9)


def intact_files() -> list[bytes]:
    """Return uncompressed NIfTI files: slices and volumes of several data types.

    They include both versions of the format and both byte orders. If $HIPMRI_REAL_DATA is set,
    slices of it are added.
    """
    rng = np.random.default_rng(0)
    files = []
    for shape in ((24, 16), (16, 24, 12), (300, 20, 1)):
        for dtype in ("u1", "<i2", ">i2", "<f4", ">f8", "<i4"):
            for image_class in (nib.Nifti1Image, nib.Nifti2Image):
                array = rng.integers(0, 200, shape).astype(dtype)
                endianness = ">" if dtype.startswith(">") else "<"
                header = image_class.header_class(endianness=endianness)
                image = image_class(array, np.diag([2.0, 1.5, 3.0, 1.0]), header)
                files.append(image.to_bytes())
    real = Path(os.environ.get("HIPMRI_REAL_DATA", "")) / "prostatex"
    for path in sorted(real.glob("*/*.nii.gz"))[:40:4]:
        files.append(gzip.decompress(path.read_bytes()))
    return files


# ---------------------------------------------------------------- NIfTI files


def damage_header(rng: random.Random, file: bytes) -> bytes:
    """Change one to four fields or bytes of the header; compress half of the files."""
    sizes = (*struct.unpack("<i", file[:4]), *struct.unpack(">i", file[:4]))
    header_class = nib.Nifti2Header if 540 in sizes else nib.Nifti1Header
    content = bytearray(file)
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.3:
            value = rng.randrange(256)
            content[rng.randrange(header_class.template_dtype.itemsize)] = value
            continue
        field = rng.choice(HEADER_FIELDS)
        dtype, offset = header_class.template_dtype.fields[field][:2]
        item = dtype.base.newbyteorder(rng.choice("<>"))
        offset += rng.randrange(dtype.itemsize // item.itemsize) * item.itemsize
        content[offset : offset + item.itemsize] = odd_item(rng, item)
    return compress_half(rng, bytes(content))


def odd_item(rng: random.Random, dtype: np.dtype) -> bytes:
    """Return the bytes of an unusual value of a data type."""
    if dtype.kind == "f":
        value = rng.choice([*FLOATS, rng.uniform(-1e3, 1e3)])
    elif dtype.kind == "i":
        limits = np.iinfo(dtype)
        value = rng.choice([*INTEGERS, rng.randint(-70, 3000)])
        value = max(limits.min, min(limits.max, value))
    else:
        value = bytes(rng.randrange(256) for _ in range(dtype.itemsize))
    with np.errstate(all="ignore"):
        return np.array(value).astype(dtype).tobytes()


def compress_half(rng: random.Random, content: bytes) -> bytes:
    return gzip.compress(content, 1) if rng.random() < 0.5 else content


def damage_stream(rng: random.Random, file: bytes) -> bytes:
    """Compress a file and damage the gzip stream, which may then expand to hundreds of MiB."""
    content = bytearray(gzip.compress(file, 1))
    for _ in range(rng.randint(1, 3)):
        offset = rng.randrange(len(content) + 1)
        change = rng.randrange(6)
        if change == 0:
            del content[offset:]
        elif change == 1:
            del content[offset : offset + rng.randint(1, 99)]
        elif change == 2:
            content[offset:offset] = rng.randbytes(rng.randint(1, 99))
        elif change == 3:
            tails = [rng.randbytes(50), b"\0" * 999, gzip.compress(file[:400]), BOMB]
            content += rng.choice(tails)
        elif change == 4:
            content = bytearray(gzip.compress(bytes(content), 1))
        elif content:
            content[offset % len(content)] ^= 1 << rng.randrange(8)
        content = content or bytearray(b"\x1f\x8b")
    return bytes(content)


def damage_shape(rng: random.Random, file: bytes) -> bytes:
    """Replace the header by one with a random number of dimensions of random sizes.

    The pixels do not fit the new header. They are those of the file, random, zeros, or missing.
    """
    is_nifti2 = rng.random() < 0.5
    order = rng.choice("<>")
    header = (nib.Nifti2Header if is_nifti2 else nib.Nifti1Header)(endianness=order)
    content = bytearray(header.binaryblock)

    integers = INTEGERS if is_nifti2 else INTEGERS[:9]
    dims = [rng.choice([*integers, rng.randint(1, 300), rng.randint(8, 40)]) for _ in range(8)]
    dims[0] = rng.choice([2, 2, 3, 3, 4, 5, 7, 0, rng.randint(-9, 99)])
    limits = np.iinfo(header.template_dtype["dim"].base)
    dims = np.clip(np.array(dims, object), limits.min, limits.max)
    for field, value in (("dim", dims), ("datatype", rng.choice(DATA_TYPES)), ("bitpix", 16)):
        dtype, offset = header.template_dtype.fields[field][:2]
        item = dtype.base.newbyteorder(order)
        content[offset : offset + dtype.itemsize] = np.array(value).astype(item).tobytes()

    pixels = rng.choice([file[352:], rng.randbytes(5000), b"\0" * 500_000, b""])
    return compress_half(rng, bytes(content) + b"\0" * 4 + pixels)


# ---------------------------------------------------------------- other files


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Change, delete or insert bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        offset = rng.randrange(len(content) + 1)
        change = rng.randrange(4)
        if change == 0 and rng.random() < 0.3:
            del content[offset:]
        elif change == 1:
            del content[offset : offset + rng.randint(1, 9)]
        elif change == 2:
            content[offset:offset] = rng.randbytes(rng.randint(1, 9))
        elif content:
            content[offset % len(content)] = rng.randrange(256)
        content = content or bytearray(b" ")
    return bytes(content)


def damage_values(rng: random.Random, content: dict) -> dict:
    """Return a copy of a dictionary with one to three values replaced or deleted, at any depth."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        parent = content
        key = rng.choice(list(content) or [None])
        while isinstance(parent.get(key), dict) and parent[key] and rng.random() < 0.8:
            parent = parent[key]
            key = rng.choice(list(parent))
        value = parent.get(key)
        if rng.random() < 0.15:
            parent.pop(key, None)
        elif isinstance(value, torch.Tensor) and rng.random() < 0.7:
            parent[key] = rng.choice(odd_tensors(value))
        else:
            parent[key] = copy.deepcopy(rng.choice([*ODD_VALUES, *INTEGERS]))
    return content


def odd_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [
        tensor[..., :1],
        tensor.double(),
        tensor.flatten(),
        tensor * torch.nan,
        tensor.bool(),
    ]
