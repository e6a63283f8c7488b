"""Score reconstructions inside each organ, for slices with segmentations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dataset import pin, transfer
from evaluation.metrics import (
    crop_centre,
    decibels,
    mean_by_case,
    positive_std,
    scale_to_range,
    ssim_map,
)
from utils import full_float32

# The index of an organ is its label in HipMRI's segmentations.
ORGANS = ("background", "body", "bone", "bladder", "rectum", "prostate")
MIN_ORGAN_PIXELS = 20  # smaller cross-sections have no score


@full_float32()
def organ_scores(
    originals: Tensor, reconstructions: Tensor, labels: Tensor
) -> dict[str, dict[str, Tensor]]:
    """Score each reconstruction inside each organ (ORGANS without the background).

    Args:
        originals, reconstructions: both (B, 1, H, W), in the same unit.
        labels: (B, H, W), indices of ORGANS.

    Returns:
        {organ: {score: (B,)}}, NaN for slices with fewer than 20 pixels of the organ. `ssim` is the
        mean of the SSIM map over the organ's pixels, and `psnr` is computed from the mean squared
        error over the organ's pixels. For both scores, images are scaled as the table at the top of
        evaluation/metrics.py states. `bias` is the mean of reconstruction minus original over the
        organ's pixels, in standard deviations of the original slice.
    """
    originals = originals.float()
    reconstructions = reconstructions.float()
    labels = labels[:, None]
    bias = (reconstructions - originals) / positive_std(originals)
    originals, reconstructions = scale_to_range(originals, reconstructions)
    squared_error = (reconstructions - originals).square()
    similarity = ssim_map(originals, reconstructions)
    scores = {}
    for label, organ in enumerate(ORGANS[1:], start=1):
        mask = labels == label
        inner_mask = crop_centre(mask, *similarity.shape[-2:])
        too_small = mask.sum((1, 2, 3)) < MIN_ORGAN_PIXELS
        organ_values = {
            "psnr": decibels(_masked_mean(squared_error, mask)),
            "ssim": _masked_mean(similarity, inner_mask),
            "bias": _masked_mean(bias, mask),
        }
        scores[organ] = {
            name: values.masked_fill(too_small, torch.nan) for name, values in organ_values.items()
        }
    return scores


def _masked_mean(images: Tensor, mask: Tensor) -> Tensor:
    """Average each slice over its mask, (B, 1, H, W) -> (B,); NaN if the mask is empty."""
    return (images * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))


@full_float32()
@torch.no_grad()
def evaluate_organs(model: nn.Module, data, batch_size: int) -> dict[str, dict]:
    """Reconstruct a split and score it inside each organ, if its slices have segmentations.

    Args:
        model: a VQVAE in eval mode.
        data: a `dataset.SliceDataset`.
        batch_size: slices per batch.

    Returns:
        {organ: {score: result of `mean_by_case`, "slices": number of scored slices}}, for organs
        with at least one scored slice; {} if there are no segmentations. A mean is None if no slice
        has the score.
    """
    labels = data.labels()
    if labels is None:
        return {}
    device = next(model.parameters()).device
    batches = torch.arange(len(data)).split(batch_size)
    batch_scores = []
    for indices, images in zip(batches, data.batches(batches, device), strict=True):
        reconstruction, _ = model(images)
        batch_labels = transfer(pin(labels[indices], device), device)
        batch_scores.append(organ_scores(images, reconstruction, batch_labels))
    cases = np.array([name.case for name in data.names])
    results = {}
    for organ in ORGANS[1:]:
        values = {}
        for name in ("psnr", "ssim", "bias"):
            values[name] = torch.cat([scores[organ][name] for scores in batch_scores]).cpu().numpy()
        num_slices = int((~np.isnan(values["psnr"])).sum())
        if not num_slices:
            continue
        results[organ] = {}
        for name, organ_values in values.items():
            # An organ at the slice's edge has a PSNR, but no SSIM if no window is centred in it.
            has_score = ~np.isnan(organ_values)
            scored_cases = cases[has_score].tolist()
            results[organ][name] = mean_by_case(organ_values[has_score], scored_cases)
        results[organ]["slices"] = num_slices
    return results
