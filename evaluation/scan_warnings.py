"""Warn if a file's slices are too small to be scored, or if its pixel spacing is unusual."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mri.files import printable
from mri.geometry import describe_small_planes, dimensions_of
from mri.nifti import Scan


def warn_of_size(file: Path, scan: Scan, min_side: int) -> None:
    """Warn that slices get no scores if one of their sides is below `min_side` pixels."""
    size = scan.planes.shape[1:]
    if min(size) < min_side:
        axis = None if dimensions_of(scan.shape) == 2 else scan.axis
        problem = describe_small_planes(axis, size, min_side)
        tqdm.write(f"warning: {printable(str(file))} gets no scores: {problem}")


def warn_of_spacing(file: Path, scan: Scan, model_spacing: Sequence[float] | None) -> None:
    """Warn if the pixel spacing differs from that of the training slices by a factor above 1.5.

    Args:
        file: the file.
        scan: its content, with the spacing of rows and columns in mm.
        model_spacing: spacing of the training slices in mm; None if it is unknown.
    """
    if not model_spacing or min(*model_spacing, *scan.spacing) <= 0:
        return
    ratios = np.array(scan.spacing) / np.array(model_spacing)
    if max(*ratios, *(1 / np.maximum(ratios, 1e-9))) > 1.5:
        rows, columns = scan.spacing
        model_rows, model_columns = model_spacing
        tqdm.write(
            f"warning: {printable(str(file))}: its pixels are {rows:.2f} x {columns:.2f} mm, but "
            f"those of the training slices are about {model_rows:.2f} x {model_columns:.2f} mm; "
            "expect a worse reconstruction"
        )
