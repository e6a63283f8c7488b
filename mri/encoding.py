"""Encode slices as int16 pixels, which the cache stores.

    slices, reason = decode_file(path, preprocessing)
    pixels, record = slices[0]
    image = (pixels + 32768.0) * record.scale + record.low   # (*size), in the scanner's intensities

The encoding is exact for integers whose range (max - min) is at most 65,535. In other slices, the
error of a pixel is at most half a quantisation step, (max - min) / 131,070.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mri.nifti import check_intensities
from mri.preprocessing import Preprocessing, fit_slice, is_constant, read_planes


class SliceRecord(NamedTuple):
    """The numbers that are stored with the pixels of a slice."""

    plane: int  # index of the slice in its file; 0 for a 2D file
    scale: float  # image = (pixels + 32768) * scale + low
    low: float  # smallest value of the fitted slice, in the scanner's intensities
    mean: float  # mean of the fitted slice, in the scanner's intensities
    std: float  # standard deviation of the fitted slice, in the scanner's intensities
    constant: bool  # whether the slice has a single value (see `preprocessing.is_constant`)
    height: int  # rows of the slice before fitting
    width: int  # columns before fitting


class EncodedSlice(NamedTuple):
    """A fitted and quantised slice."""

    pixels: np.ndarray  # (*size) int16
    record: SliceRecord


def quantize(image: np.ndarray, low: float, high: float) -> tuple[np.ndarray, float]:
    """Round a slice to 65,536 levels between its smallest and largest value.

    Args:
        image: (rows, columns) float64.
        low, high: its smallest and largest value.

    Returns:
        The int16 pixels (rows, columns), and `scale`: image = (pixels + 32768) * scale + low.
        For integers whose range is at most 65,535, the scale is 1 and the encoding is exact.
    """
    if high - low <= 65535 and (image == np.rint(image)).all():
        return (image - low - 32768).astype(np.int16), 1.0
    scale = (high - low) / 65535 or 1.0
    return (np.rint((image - low) / scale) - 32768).astype(np.int16), scale


def encode_slice(image: np.ndarray, plane: int, preprocessing: Preprocessing) -> EncodedSlice:
    """Crop or resize a slice to the target size, and encode it as int16.

    Args:
        image: (rows, columns), from `preprocessing.read_planes`.
        plane: index of the slice in its file.
        preprocessing: the size of the result, and how slices are fitted to it.

    Raises:
        ValueError: if a value is not finite or too large (see `check_intensities`).
    """
    check_intensities(image, "pixels")
    fitted = fit_slice(image, preprocessing.fit, preprocessing.size)
    low = float(fitted.min())
    high = float(fitted.max())
    pixels, scale = quantize(fitted, low, high)
    record = SliceRecord(
        plane=plane,
        scale=scale,
        low=low,
        mean=float(fitted.mean()),
        std=float(fitted.std()),
        constant=bool(is_constant(low, high)),
        height=image.shape[0],
        width=image.shape[1],
    )
    return EncodedSlice(pixels, record)


def decode_file(path: Path, preprocessing: Preprocessing) -> tuple[list[EncodedSlice], str]:
    """Decode the slices of a file.

    Returns:
        The slices and ""; or, if the file cannot be used, [] and the reason (see `mri.nifti_file`).
    """
    slices = []
    try:
        for plane, image in read_planes(path, preprocessing):
            slices.append(encode_slice(image, plane, preprocessing))
    except ValueError as error:
        return [], str(error)
    except Exception as error:  # one unusual file must not prevent the decoding of other files
        return [], f"cannot be decoded ({error!r})"
    return slices, ""
