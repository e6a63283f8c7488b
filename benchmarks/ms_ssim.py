"""Compute the multi-scale SSIM of slices of 256 x 128 pixels."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluation import metrics

# The first four of the usual five weights (Wang, Simoncelli and Bovik 2003), rescaled to sum to
# 1. The fifth scale would need more than 128 columns.
MS_SSIM_WEIGHTS = tuple(weight / 0.8668 for weight in (0.0448, 0.2856, 0.3001, 0.2363))


def ms_ssim(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Compute the multi-scale SSIM of each slice, (B,), from two batches (B, 1, H, W).

    The images are scaled and clipped as for `ssim` of evaluation/metrics.py.
    """
    pixels = originals.flatten(1)
    low, high = pixels.amin(1), pixels.amax(1)
    scores = multiscale_structural_similarity_index_measure(
        metrics.rescale(reconstructions, low, high),
        metrics.rescale(originals, low, high),
        reduction="none",
        data_range=1.0,
        betas=MS_SSIM_WEIGHTS,
    )
    return scores.flatten()
