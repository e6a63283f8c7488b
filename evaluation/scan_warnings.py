"""Warnings about the user's own files: slices that are too small, and unusual voxel sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mri.files import printable
from mri.geometry import describe_small_planes, dimensions_of
from mri.nifti import Scan


def warn_of_size(file: Path, scan: Scan, min_side: int) -> None:
    """Warn if a side of the slices is below `min_side`, in pixels, so that they get no scores."""
    size = scan.planes.shape[1:]
    if min(size) < min_side:
        axis = None if dimensions_of(scan.shape) == 2 else scan.axis
        problem = describe_small_planes(axis, size, min_side)
        tqdm.write(f"warning: {printable(str(file))} gets no scores: {problem}")


def warn_of_spacing(file: Path, scan: Scan, model_spacing: Sequence[float] | None) -> None:
    """Warn if pixels are more than 1.5 times larger or smaller than in the training slices."""
    if not model_spacing or min(*model_spacing, *scan.spacing) <= 0:
        return
    ratios = np.array(scan.spacing) / np.array(model_spacing)
    if max(*ratios, *(1 / np.maximum(ratios, 1e-9))) > 1.5:
        rows, columns = scan.spacing
        model_rows, model_columns = model_spacing
        tqdm.write(
            f"warning: {printable(str(file))}: its voxels are {rows:.2f} x {columns:.2f} mm in the "
            "slice, but those of the training slices are about "
            f"{model_rows:.2f} x {model_columns:.2f} mm; expect a worse reconstruction"
        )
