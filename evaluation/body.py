"""Find the body in a slice, for the score `ssim_body`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Body(NamedTuple):
    """Percentiles and body masks of B original slices, which `ssim_body` needs."""

    low: Tensor  # (B,), 0.5 percentile of each slice
    high: Tensor  # (B,), 99.5 percentile of each slice
    mask: Tensor  # (B, 1, H, W) bool


def find_body(originals: Tensor) -> Body:
    """Compute percentiles and body masks on the CPU; originals: (B, 1, H, W) in any unit."""
    originals = originals.float().cpu()
    quantiles = np.quantile(originals.flatten(1).numpy(), (0.005, 0.995), axis=1)  # (2, B)
    low, high = torch.from_numpy(quantiles).float()
    return Body(low, high, body_mask(rescale(originals, low, high)))


def rescale(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map the range [low, high] of images (B, 1, H, W) to [0, 1], and clip; low, high: (B,)."""
    low = low.view(-1, 1, 1, 1)
    span = high.view(-1, 1, 1, 1) - low
    return ((images - low) / span.masked_fill(~(span > 0), 1)).clamp(0, 1)


def body_mask(images: Tensor) -> Tensor:
    """Return a mask of the body in each slice: the largest bright component, with holes filled.

    A pixel x is bright if log(1 + 50 x) is above Otsu's threshold. Because of the logarithm, the
    threshold separates the body from air. Without the logarithm, the threshold would separate fat
    from muscle, and the largest component would be a strip of fat.

    Args:
        images: (B, 1, H, W) in [0, 1].

    Returns:
        (B, 1, H, W) bool.
    """
    images = torch.log1p(50 * images) / math.log(51)
    bright = images > _otsu_threshold(images).view(-1, 1, 1, 1)
    bodies = [_fill_holes(_largest_component(mask)) for mask in bright[:, 0].numpy()]
    return torch.from_numpy(np.stack(bodies))[:, None]


def _otsu_threshold(images: Tensor) -> Tensor:
    """Compute Otsu's threshold from 256 bins: slices (B, 1, H, W) in [0, 1] -> (B,)."""
    bins = (images.flatten(1) * 255).round().long()
    ones = torch.ones_like(bins).float()
    histogram = torch.zeros(len(bins), 256, device=bins.device).scatter_add_(1, bins, ones)
    histogram /= bins.shape[1]
    levels = torch.arange(256, device=bins.device) / 255
    weight = histogram.cumsum(1)  # fraction of pixels up to each level
    moment = (histogram * levels).cumsum(1)
    mean = moment[:, -1:]
    variance = (mean * weight - moment).square() / (weight * (1 - weight)).clamp_min(1e-9)
    return levels[variance[:, :-1].argmax(1)]  # largest variance between the two classes


def _largest_component(mask: np.ndarray) -> np.ndarray:
    """Keep the largest 4-connected component of a mask, (H, W) bool."""
    labels = label_components(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0  # outside the mask
    return mask & (labels == sizes.argmax())


def _fill_holes(mask: np.ndarray) -> np.ndarray:
    """Fill the holes of a mask, (H, W) bool: background that is not connected to the border."""
    labels = label_components(~np.pad(mask, 1))  # the padding connects all regions at the border
    return labels[1:-1, 1:-1] != labels[0, 0]


def label_components(mask: np.ndarray) -> np.ndarray:
    """Label the 4-connected components of a mask.

    A run is a maximal row of adjacent pixels of the mask. Runs of neighbouring rows that share a
    column are connected, and all runs of a component get the smallest index of its runs.

    Args:
        mask: (H, W) bool.

    Returns:
        (H, W) int64: 0 outside the mask, and a positive number for each component.
    """
    # Positions in a row-major array whose rows end in a pixel outside the mask, so that runs do not
    # continue in the next row.
    separated = np.pad(mask, ((0, 0), (0, 1)))
    stride = separated.shape[1]
    changes = np.diff(separated.ravel().astype(np.int8), prepend=0)
    starts = np.flatnonzero(changes == 1)
    ends = np.flatnonzero(changes == -1)  # exclusive
    # Run i shares a column with the runs first[i], ..., last[i] - 1 of the next row.
    first = np.searchsorted(ends, starts + stride, side="right")
    last = np.searchsorted(starts, ends + stride, side="left")
    counts = last - first
    upper = np.repeat(np.arange(len(starts)), counts)
    lower = np.arange(counts.sum()) + np.repeat(first - (counts.cumsum() - counts), counts)

    roots = np.arange(len(starts))  # for each run, a run of the same component with a lower index
    while True:
        smallest = np.minimum(roots[upper], roots[lower])
        merged = roots.copy()
        np.minimum.at(merged, roots[upper], smallest)
        np.minimum.at(merged, roots[lower], smallest)
        merged = merged[merged]
        if np.array_equal(merged, roots):
            break
        roots = merged
    labels = np.zeros(mask.shape, np.int64)
    labels[mask] = np.repeat(roots + 1, ends - starts)
    return labels
