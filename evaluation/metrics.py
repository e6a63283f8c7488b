"""Scores of reconstructions: SSIM in four conventions, PSNR, scores per organ, and code usage.

Published SSIM values differ more by convention than by model. Each name here is one convention:

    name          how the two images are scaled                       SSIM window
    ------------  --------------------------------------------------  ----------------------------
    ssim          to [0, 1] by the original's minimum and maximum,    Gaussian 11 x 11, sigma 1.5
                  and clipped
    ssim_zscore   z-scored by the original's mean and standard        Gaussian 11 x 11, sigma 1.5
                  deviation, not clipped
    ssim_uniform  as ssim                                             uniform 7 x 7
    ssim_body     to [0, 1] by the original's 0.5 and 99.5            Gaussian 11 x 11, sigma 1.5
                  percentiles, and clipped
    psnr          as ssim                                             none; in dB, at most 100

- The reconstruction is scaled by the original's numbers, never by its own.
- SSIM is that of Wang et al. 2004 with K1 = 0.01, K2 = 0.03 and data range 1, for all four names.
- A slice's SSIM is the mean over the windows that are wholly inside the slice; for `ssim_body`,
  over those centred in the body (`body_mask`).
- A split's score is the mean over its slices, reported with the mean of each case. Constant slices
  have no score. `ssim` selects the best checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from evaluation.body import body_mask
from training.distributed import all_reduce_sum, get_rank, get_world_size

SSIM_NAMES = ("ssim", "ssim_zscore", "ssim_uniform", "ssim_body")
SCORE_NAMES = (*SSIM_NAMES, "psnr")
# Index: the label in HipMRI's segmentations.
ORGANS = ("background", "body", "bone", "bladder", "rectum", "prostate")
MIN_ORGAN_PIXELS = 20  # smaller cross-sections have no score

# ---------------------------------------------------------------- scores per slice


def slice_scores(
    originals: Tensor, reconstructions: Tensor, names: tuple[str, ...] = SCORE_NAMES
) -> dict[str, Tensor]:
    """Score each reconstruction; the table at the top of this file defines the scores.

    Args:
        originals: (B, 1, H, W), in any unit, H and W at least 11.
        reconstructions: the same shape and unit.
        names: scores to compute, of SCORE_NAMES.

    Returns:
        {name: (B,)}.
    """
    unknown = set(names) - set(SCORE_NAMES)
    if unknown:
        raise ValueError(f"unknown scores {sorted(unknown)}; expected names of {SCORE_NAMES}")
    originals = originals.float()
    reconstructions = reconstructions.float()
    functions = {
        "ssim": ssim,
        "ssim_zscore": ssim_zscore,
        "ssim_uniform": ssim_uniform,
        "ssim_body": ssim_body,
        "psnr": psnr,
    }
    return {
        name: function(originals, reconstructions)
        for name, function in functions.items()
        if name in names
    }


def ssim(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Compute `ssim`: (B, 1, H, W) twice -> (B,)."""
    originals, reconstructions = _scale_to_range(originals, reconstructions)
    return ssim_map(reconstructions, originals).mean((1, 2, 3))


def ssim_zscore(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Compute `ssim_zscore`: (B, 1, H, W) twice -> (B,)."""
    pixels = originals.flatten(1)
    mean = pixels.mean(1).view(-1, 1, 1, 1)
    std = pixels.std(1, correction=0).view(-1, 1, 1, 1).clamp_min(1e-12)
    return ssim_map((reconstructions - mean) / std, (originals - mean) / std).mean((1, 2, 3))


def ssim_uniform(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Compute `ssim_uniform`: (B, 1, H, W) twice -> (B,)."""
    originals, reconstructions = _scale_to_range(originals, reconstructions)
    return ssim_map(reconstructions, originals, kernel_size=7, gaussian=False).mean((1, 2, 3))


def ssim_body(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Compute `ssim_body`: (B, 1, H, W) twice -> (B,).

    Unlike `ssim`, it does not depend on single very bright voxels, which darken all other pixels
    of both images and so make them more similar, or on the air around the body.
    """
    percentiles = torch.tensor([0.005, 0.995], device=originals.device)
    low, high = torch.quantile(originals.flatten(1), percentiles, dim=1)  # (B,) each
    originals = rescale(originals, low, high)
    similarity = ssim_map(rescale(reconstructions, low, high), originals)
    mask = body_mask(originals.cpu()).to(similarity.device)
    mask = _crop_centre(mask, *similarity.shape[-2:])
    return (similarity * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp_min(1)


def psnr(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Compute `psnr` in dB: (B, 1, H, W) twice -> (B,)."""
    originals, reconstructions = _scale_to_range(originals, reconstructions)
    return _decibels((reconstructions - originals).square().mean((1, 2, 3)))


def ssim_map(
    reconstructions: Tensor, originals: Tensor, kernel_size: int = 11, gaussian: bool = True
) -> Tensor:
    """Compute SSIM (Wang et al. 2004) for each window that is wholly inside the slice.

    The mean that torchmetrics returns includes windows over a reflected border, in some versions;
    scikit-image's does not.

    Args:
        reconstructions, originals: (B, 1, H, W), of data range 1.
        kernel_size: side of the window in pixels.
        gaussian: Gaussian window of sigma 1.5, else a uniform one.

    Returns:
        (B, 1, H - kernel_size + 1, W - kernel_size + 1).
    """
    _, similarity = structural_similarity_index_measure(
        reconstructions,
        originals,
        gaussian_kernel=gaussian,
        sigma=1.5,
        kernel_size=kernel_size,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    height, width = originals.shape[-2:]
    return _crop_centre(similarity, height - kernel_size + 1, width - kernel_size + 1)


def power_ratio(originals: Tensor, reconstructions: Tensor, octave: int = 0) -> Tensor:
    """Compute the power of each reconstruction relative to its original, in an octave of frequency.

    A ratio of 1 means as sharp as the original. A Hann window suppresses the slice's edges.

    Args:
        originals, reconstructions: (B, 1, H, W), z-scored.
        octave: 0 for radial frequencies from half the Nyquist frequency up to it, 1 for the octave
            below, and so on.

    Returns:
        (B,).
    """
    height, width = originals.shape[-2:]
    device = originals.device
    window = torch.hann_window(height, False)[:, None] * torch.hann_window(width, False)
    rows = torch.fft.fftfreq(height)[:, None]
    columns = torch.fft.rfftfreq(width)
    radius = torch.hypot(rows, columns)  # cycles per pixel; the Nyquist frequency is 0.5
    band = (radius >= 0.25 / 2**octave) & (radius < 0.5 / 2**octave)
    images = torch.stack([reconstructions, originals]).float() * window.to(device)
    spectrum = torch.fft.rfft2(images).abs().square()
    power = (spectrum * band.to(device)).sum((2, 3, 4))  # (2, B)
    return power[0] / power[1].clamp_min(1e-12)


# ---------------------------------------------------------------- scaling


def rescale(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Scale (B, 1, H, W) so that low (B,) becomes 0 and high (B,) becomes 1, and clip to [0, 1]."""
    low = low.view(-1, 1, 1, 1)
    high = high.view(-1, 1, 1, 1)
    return ((images - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def _scale_to_range(originals: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
    """Return both, scaled to [0, 1] by the originals' minimum and maximum, and clipped."""
    pixels = originals.flatten(1)
    low, high = pixels.amin(1), pixels.amax(1)
    return rescale(originals, low, high), rescale(reconstructions, low, high)


def _crop_centre(images: Tensor, height: int, width: int) -> Tensor:
    """Return the central (B, 1, height, width) part of images (B, 1, H, W)."""
    top = (images.shape[-2] - height) // 2
    left = (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def _decibels(squared_error: Tensor) -> Tensor:
    """Convert mean squared errors of images with range 1 to PSNR in dB, at most 100."""
    return -10 * squared_error.clamp_min(1e-10).log10()


# ---------------------------------------------------------------- organs


def organ_scores(
    originals: Tensor, reconstructions: Tensor, labels: Tensor
) -> dict[str, dict[str, Tensor]]:
    """Score each reconstruction inside each organ of ORGANS, without the background.

    Args:
        originals, reconstructions: (B, 1, H, W), in the same unit.
        labels: (B, H, W), indices of ORGANS.

    Returns:
        {organ: {score: (B,)}}, NaN for slices with fewer than 20 pixels of the organ. `psnr` and
        `ssim` are means over the organ's pixels of the squared error and the SSIM map of the scores
        with the same names. `bias` is the mean of reconstruction minus original, in standard
        deviations of the original slice.
    """
    originals = originals.float()
    reconstructions = reconstructions.float()
    labels = labels[:, None]
    std = originals.flatten(1).std(1, correction=0).clamp_min(1e-12).view(-1, 1, 1, 1)
    bias = (reconstructions - originals) / std
    originals, reconstructions = _scale_to_range(originals, reconstructions)
    squared_error = (reconstructions - originals).square()
    similarity = ssim_map(reconstructions, originals)
    scores = {}
    for label, organ in enumerate(ORGANS[1:], start=1):
        mask = labels == label
        inner_mask = _crop_centre(mask, *similarity.shape[-2:])
        too_small = mask.sum((1, 2, 3)) < MIN_ORGAN_PIXELS
        organ_values = {
            "psnr": _decibels(_masked_mean(squared_error, mask)),
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


# ---------------------------------------------------------------- a split


class Evaluation(NamedTuple):
    """Results of a model on a split of N slices."""

    scores: dict[str, Tensor]  # {name: (N,)}, NaN for constant slices
    counts: Tensor  # (num_codebooks K,) int64, how often each code is used
    loss: float  # mean of the training loss over the slices


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data,
    batch_size: int,
    device: torch.device,
    names: tuple[str, ...] = ("ssim", "psnr"),
    progress: Callable[[Iterable], Iterable] = iter,
) -> Evaluation:
    """Reconstruct and score a whole split.

    Several processes share the slices, and each returns the results of all. The results depend
    neither on the batch size nor on the number of processes.

    Args:
        model: a VQVAE, on the device; put into eval mode for the duration of the call.
        data: a `dataset.SliceDataset`, or any object with its length, `batches` and `constant`.
        batch_size: slices per batch.
        device: where to compute.
        names: scores to compute, of SCORE_NAMES.
        progress: wraps the batches, for instance in a progress bar.
    """
    was_training = model.training
    model.eval()
    quantizer = model.vector_quantization
    num_codes = quantizer.num_codebooks * quantizer.num_embeddings
    counts = torch.zeros(num_codes, dtype=torch.long, device=device)
    loss = torch.zeros((), device=device)
    scores = {name: torch.zeros(len(data)) for name in names}
    batches = torch.arange(len(data)).split(batch_size)[get_rank() :: get_world_size()]
    for indices, images in zip(progress(batches), data.batches(batches, device), strict=True):
        reconstruction, quantized = model(images)
        counts += quantized.counts.long()
        loss += sum(model.loss(images, reconstruction, quantized)) * len(images)
        for name, values in slice_scores(images, reconstruction, names).items():
            scores[name][indices] = values.cpu()
    model.train(was_training)
    for name, values in scores.items():  # slices of other processes are 0 so far
        scores[name] = all_reduce_sum(values).masked_fill(data.constant, torch.nan)
    return Evaluation(scores, all_reduce_sum(counts), float(all_reduce_sum(loss)) / len(data))


@torch.no_grad()
def evaluate_organs(model: nn.Module, data, batch_size: int) -> dict[str, dict]:
    """Score a split inside each organ, if there are segmentations next to its slices.

    Args:
        model: a VQVAE in eval mode.
        data: a `dataset.SliceDataset`.
        batch_size: slices per batch.

    Returns:
        {organ: {score: result of `mean_by_case`, "slices": their number}} for each organ that at
        least one slice shows; {} without segmentations. A score's mean is None if no slice has it.
    """
    labels = data.labels()
    if labels is None:
        return {}
    device = next(model.parameters()).device
    batches = torch.arange(len(data)).split(batch_size)
    batch_scores = []
    for indices, images in zip(batches, data.batches(batches, device), strict=True):
        reconstruction, _ = model(images)
        batch_scores.append(organ_scores(images, reconstruction, labels[indices].to(device)))
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
            # At the slice's edge, an organ has a PSNR but may have no window of SSIM.
            has_score = ~np.isnan(organ_values)
            scored_cases = cases[has_score].tolist()
            results[organ][name] = mean_by_case(organ_values[has_score], scored_cases)
        results[organ]["slices"] = num_slices
    return results


def mean_by_case(values: np.ndarray, cases: list[str]) -> dict:
    """Average a score over all slices, and over the slices of each case.

    Args:
        values: (N,), a score per slice.
        cases: the case of each slice.

    Returns:
        {"mean": float, "by_case": {case: float}}; the mean is None if there are no slices.
    """
    if not len(values):
        return {"mean": None, "by_case": {}}
    case_of_slice = np.array(cases)
    by_case = {case: float(values[case_of_slice == case].mean()) for case in dict.fromkeys(cases)}
    return {"mean": float(values.mean()), "by_case": by_case}


def bootstrap_interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean over cases.

    Cases are resampled, not slices: slices of one patient are not independent.
    """
    generator = np.random.default_rng(0)
    means = generator.choice(values, size=(10_000, len(values))).mean(1)
    return tuple(np.percentile(means, [2.5, 97.5]))


def code_usage(counts: Tensor) -> tuple[int, float]:
    """Return the number of codes used, and their perplexity exp(entropy).

    Args:
        counts: (K,), how often each code is used in a whole split.
    """
    frequencies = counts.double() / counts.sum()
    perplexity = torch.special.entr(frequencies).sum().exp()
    return int((counts > 0).sum()), float(perplexity)
