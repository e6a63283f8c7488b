"""Encode greyscale slices with image codecs, and measure the sizes of the files in bytes.

    results = search(CODECS["jpeg"], 8, rates=(0.5625,), image=image)

The codecs are from the package imagecodecs. rate_distortion.py compares them with runs.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import UserError, first_line

try:
    import imagecodecs
except ImportError:  # versions() explains how to install it
    imagecodecs = None

ACCOUNTINGS = ("file", "payload")  # attributes of `Encoded`
JPEG_STANDARD_TABLES = 0x83CDEA47  # CRC-32 of JPEG's standard Huffman tables for luminance

# ---------------------------------------------------------------- sizes without headers


def segments(file: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker segments of a JPEG or JPEG 2000 file; both formats have the same layout.

    Yields:
        The marker, and the byte positions at which its contents start and end.
    """
    position = 2  # after the marker SOI or SOC
    while True:
        marker, length = struct.unpack_from(">HH", file, position)
        yield marker, position + 4, position + 2 + length
        position += 2 + length


def jpeg_payload(file: bytes) -> int:
    """Return the size of a JPEG file without headers, in bytes.

    This is the size of the scan, plus one byte for the quality, which determines the quantisation
    tables. The size of the Huffman tables is added if they are not the standard ones.
    """
    tables = b""
    for marker, start, end in segments(file):
        if marker == 0xFFC4:  # DHT: Huffman tables
            tables += file[start:end]
        elif marker == 0xFFDA:  # SOS: the scan lasts until EOI, which takes 2 bytes
            scan = len(file) - 2 - end
            break
    has_standard_tables = zlib.crc32(tables) == JPEG_STANDARD_TABLES
    return scan + (0 if has_standard_tables else len(tables)) + 1


def jpeg2000_payload(file: bytes) -> int:
    """Return the size of the packets between the markers SOD and EOC, in bytes."""
    for marker, start, _ in segments(file):
        if marker == 0xFF93:  # SOD has no length field: the packets start 2 bytes before `start`
            return len(file) - 2 - (start - 2)


def jpegxl_payload(file: bytes) -> int:
    """Return the size of the frame of a JPEG XL file, in bytes.

    The other 8 bytes are the signature, the image size and the metadata.
    """
    return len(file) - 8


def webp_payload(file: bytes) -> int:
    """Return the size of the VP8 chunk without its frame header, in bytes.

    The header consists of a frame tag (3 bytes), a start code (3) and the width and height (4).
    """
    return int.from_bytes(file[16:20], "little") - 10


def avif_payload(file: bytes) -> int:
    """Return the size of the coded frame, in bytes.

    This is the total size of the units (OBUs) in the mdat box that contain a frame header, a tile
    group, or both. The headers of the units are not counted.
    """
    position = 0
    while file[position + 4 : position + 8] != b"mdat":
        position += int.from_bytes(file[position : position + 4], "big")
    end = position + int.from_bytes(file[position : position + 4], "big")
    position += 8
    total = 0
    while position < end:
        unit_type = file[position] >> 3 & 15
        # The size follows as LEB128: 7 bits per byte, the lowest first.
        size = shift = 0
        while shift == 0 or file[position] > 127:
            position += 1
            size |= (file[position] & 127) << shift
            shift += 7
        if unit_type in (3, 4, 6):
            total += size
        position += 1 + size
    return total


# ---------------------------------------------------------------- codecs


class Encoded(NamedTuple):
    """A slice that was encoded at one setting of a codec."""

    data: bytes  # the coded file
    file: int  # size of the smallest file that decodes to the same image, in bytes
    payload: int  # smallest size without headers, in bytes


def to_linear(image: np.ndarray) -> np.ndarray:
    """Convert sRGB values in [0, 1] to linear light."""
    return np.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)


def from_linear(light: np.ndarray) -> np.ndarray:
    """Convert linear light in [0, 1] to sRGB values."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


@dataclass(frozen=True)
class Codec:
    """A codec of imagecodecs, for greyscale images (rows, columns) in [0, 1]."""

    name: str
    prefix: str  # prefix of the codec's functions in imagecodecs
    depths: tuple[int, ...]  # bits per sample
    settings: Sequence[float]  # values of the encoder's argument `level`, coarsest first
    payload: Callable[[bytes], int]  # computes the size of a file without headers, in bytes
    options: dict = field(default_factory=dict)  # other arguments of the encoder
    rgb: bool = False  # whether greyscale images must be given as three equal channels

    def call(self, function: str, *arguments, **options):
        """Call a function of imagecodecs, such as "encode"."""
        return getattr(imagecodecs, f"{self.prefix}_{function}")(*arguments, **options)

    def is_linear(self, depth: int) -> bool:
        """Return whether imagecodecs labels the samples as linear light.

        It labels 8-bit samples of JPEG XL as sRGB, but samples with more bits as linear light.
        """
        return self.prefix == "jpegxl" and depth > 8

    def encode(self, image: np.ndarray, setting: float, depth: int) -> Encoded:
        """Encode a slice; for JPEG, try standard and optimised Huffman tables.

        Args:
            image: the slice, (rows, columns) in [0, 1].
            setting: one of `settings`.
            depth: one of `depths`.

        Returns:
            The coded slice; for JPEG, its sizes are those with the better Huffman tables.
        """
        if self.is_linear(depth):
            image = to_linear(image)
        samples = np.rint(image * (2**depth - 1)).astype(np.uint8 if depth == 8 else np.uint16)
        if self.rgb:
            samples = np.repeat(samples[..., None], 3, 2)
        options = dict(self.options)
        if len(self.depths) > 1:
            options["bitspersample"] = depth
        variants = [{}]
        if self.prefix == "jpeg8":
            variants = [{"optimize": True}, {"optimize": False}]
        files = []
        for variant in variants:
            files.append(self.call("encode", samples, level=setting, **options, **variant))
        return Encoded(files[0], min(map(len, files)), min(map(self.payload, files)))

    def decode(self, data: bytes, depth: int) -> np.ndarray:
        """Decode the `data` of `Encoded` to (rows, columns) in [0, 1]."""
        image = self.call("decode", data) / (2**depth - 1)
        if image.ndim == 3:
            image = image.mean(2)
        return from_linear(image) if self.is_linear(depth) else image


CODECS = {
    "jpeg": Codec("JPEG", "jpeg8", (8, 12), range(1, 101), jpeg_payload),
    "jpeg2000": Codec(
        "JPEG 2000",
        "jpeg2k",
        (8, 16),
        np.arange(1, 90, 1 / 16).tolist(),
        jpeg2000_payload,
        {"codecformat": "j2k", "reversible": False},
    ),
    "jpegxl": Codec(
        "JPEG XL",
        "jpegxl",
        (8, 16),
        np.arange(0, 99, 1 / 4).tolist(),
        jpegxl_payload,
        {"effort": 10, "lossless": False, "usecontainer": False},
    ),
    "webp": Codec(
        "WebP",
        "webp",
        (8,),
        np.arange(0, 100.5, 1 / 2).tolist(),
        webp_payload,
        {"method": 6, "lossless": False},
        rgb=True,
    ),
    "avif": Codec(
        "AVIF",
        "avif",
        (8, 10, 12),
        range(100),
        avif_payload,
        {"speed": 2, "codec": "aom", "pixelformat": "yuv400"},
        rgb=True,  # imagecodecs would code a single channel losslessly
    ),
}


def versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of imagecodecs and of the codecs with these names.

    Raises:
        UserError: if imagecodecs is not installed, or its build lacks one of the codecs.
    """
    if imagecodecs is None:
        raise UserError(
            "imagecodecs, which contains the codecs, is not installed; run pip install -r "
            "benchmarks/requirements.txt"
        )
    result = {"imagecodecs": imagecodecs.__version__}
    for name in names:
        try:
            result[name] = CODECS[name].call("version")
        except ImportError as error:
            raise UserError(
                f"this build of imagecodecs has no {name} ({first_line(error)}); omit it from "
                "--codecs, or install a different build"
            ) from None
    return result


def search(
    codec: Codec, depth: int, rates: Sequence[float], image: np.ndarray
) -> dict[tuple[float, str], Encoded | None]:
    """Encode a slice at the finest setting that fits each rate; find the setting by bisection.

    Args:
        codec: a value of CODECS.
        depth: bits per sample.
        rates: budgets in bits per pixel.
        image: the slice, (rows, columns) in [0, 1].

    Returns:
        {(rate, accounting): the coded slice, or None if the coarsest setting does not fit}.
    """
    encode = functools.cache(lambda index: codec.encode(image, codec.settings[index], depth))
    indices = range(len(codec.settings))
    results = {}
    for rate, accounting in itertools.product(rates, ACCOUNTINGS):

        def size(index: int, accounting: str = accounting) -> int:
            return getattr(encode(index), accounting)

        num_fitting = bisect.bisect_right(indices, rate * image.size / 8, key=size)
        results[rate, accounting] = encode(num_fitting - 1) if num_fitting else None
    return results
