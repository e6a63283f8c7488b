"""Find the body in a slice, for the score `ssim_body`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


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
    return _fill_holes(_largest_component(bright))


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


def _largest_component(mask: Tensor) -> Tensor:
    """Keep the largest 4-connected component of each mask: (B, 1, H, W) bool in and out."""
    components = _connected_components(mask)
    sizes = torch.zeros(len(mask), mask[0].numel() + 1, device=mask.device)
    sizes.scatter_add_(1, components.flatten(1), mask.flatten(1).float())
    return (components == sizes.argmax(1).view(-1, 1, 1, 1)) & mask


def _connected_components(mask: Tensor) -> Tensor:
    """Label the 4-connected components of each mask: (B, 1, H, W) int64, 0 outside the mask."""
    labels = torch.arange(1, mask[0].numel() + 1, device=mask.device).view_as(mask[:1])
    return _flood(labels * mask, mask)


def _fill_holes(mask: Tensor) -> Tensor:
    """Fill the holes of each mask, (B, 1, H, W) bool: background not connected to the border."""
    border = torch.ones_like(mask)
    border[..., 1:-1, 1:-1] = False
    outside = _flood((border & ~mask).long(), ~mask)
    return outside == 0


def _flood(labels: Tensor, mask: Tensor) -> Tensor:
    """Assign to each 4-connected region of the mask the largest label inside it.

    Sweeps along rows and columns, in both directions, propagate labels inside the mask until
    nothing changes. A sweep is a cumulative maximum. To stop a label at gaps in the mask, each
    pixel is first raised by 2^20 times the number of gap pixels that the sweep has passed. Every
    pixel after a gap then exceeds every pixel before the gap.

    Args:
        labels: (B, 1, H, W) int64, below 2^20, 0 outside the mask.
        mask: (B, 1, H, W) bool.
    """
    results = torch.empty_like(labels)
    # numpy's cumulative maximum is several times faster than torch's, which also returns indices.
    # Slices are processed one by one, because the number of sweeps differs between slices.
    dtype = np.int32 if max(mask.shape[-2:]) < 2**11 else np.int64
    for i in range(len(mask)):
        inside = mask[i, 0].numpy()
        flooded = _flood_slice(labels[i, 0].numpy().astype(dtype), inside)
        results[i, 0] = torch.from_numpy(flooded.astype(np.int64))
    return results


def _flood_slice(labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Flood one slice (H, W); the result has the integer type of the labels."""
    gaps = [np.cumsum(~mask, axis=axis, dtype=labels.dtype) << 20 for axis in (0, 1)]
    gaps_back = [
        np.flip(np.cumsum(np.flip(~mask, axis), axis=axis, dtype=labels.dtype) << 20, axis)
        for axis in (0, 1)
    ]
    while True:
        previous = labels
        for axis in (1, 0):
            labels = np.maximum.accumulate(labels + gaps[axis], axis=axis) - gaps[axis]
            labels *= mask
            raised = np.flip(labels + gaps_back[axis], axis)
            labels = np.flip(np.maximum.accumulate(raised, axis=axis), axis) - gaps_back[axis]
            labels *= mask
        if np.array_equal(labels, previous):
            return labels
