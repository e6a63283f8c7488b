"""Score reconstructions: four SSIM variants, PSNR, scores per organ, and codebook usage.

Published SSIM values differ more by convention than by model. Each name here is one convention:

    name          how the two images are scaled                       SSIM window
    ------------  --------------------------------------------------  ----------------------------
    ssim          to [0, 1] by the original's minimum and maximum,    Gaussian 11 x 11, sigma 1.5
                  and clipped
    ssim_zscore   z-scored by the original's mean and standard        Gaussian 11 x 11, sigma 1.5
                  deviation, not clipped
    ssim_uniform  same as ssim                                        uniform 7 x 7
    ssim_body     to [0, 1] by the original's 0.5 and 99.5            Gaussian 11 x 11, sigma 1.5
                  percentiles, and clipped
    psnr          same as ssim                                        none; in dB, at most 100

- The reconstruction is scaled by statistics of the original, never by its own.
- All four variants use SSIM by Wang et al. 2004 with K1 = 0.01, K2 = 0.03, data range 1 and
  population variances (in scikit-image: `use_sample_covariance=False`).
- A slice's SSIM is the mean over the windows that are completely inside the slice. `ssim_body`
  averages only the windows that are centred in the body (`body_mask`).
- A split's score is the mean over its slices. The mean over the slices of each case is also
  reported. Constant slices have no score. During training, `ssim` selects the best checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.body import body_mask
from training.distributed import all_reduce_sum, get_rank, get_world_size

SSIM_NAMES = ("ssim", "ssim_zscore", "ssim_uniform", "ssim_body")
SCORE_NAMES = (*SSIM_NAMES, "psnr")
# The index of an organ is its label in HipMRI's segmentations.
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
        names: the scores to compute, from SCORE_NAMES.

    Returns:
        {name: (B,)}.
    """
    unknown = set(names) - set(SCORE_NAMES)
    if unknown:
        raise ValueError(f"unknown scores {sorted(unknown)}; expected some of {SCORE_NAMES}")
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
    """Compute `ssim` of each slice, (B,), from two batches (B, 1, H, W).

    `modules.ssim_loss` is the differentiable version, which does not clip the reconstructions.
    """
    originals, reconstructions = _scale_to_range(originals, reconstructions)
    return ssim_map(originals, reconstructions).mean((1, 2, 3))


def ssim_zscore(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Compute `ssim_zscore` of each slice, (B,), from two batches (B, 1, H, W)."""
    mean = originals.mean((1, 2, 3), keepdim=True)
    std = _positive_std(originals)
    return ssim_map((originals - mean) / std, (reconstructions - mean) / std).mean((1, 2, 3))


def ssim_uniform(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Compute `ssim_uniform` of each slice, (B,), from two batches (B, 1, H, W)."""
    originals, reconstructions = _scale_to_range(originals, reconstructions)
    return ssim_map(originals, reconstructions, kernel_size=7, gaussian=False).mean((1, 2, 3))


def ssim_body(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Compute `ssim_body` of each slice, (B,), from two batches (B, 1, H, W).

    Unlike `ssim`, it depends neither on the air around the body nor on a few very bright pixels.
    In `ssim`, such pixels make all other pixels of both images darker and therefore more similar.
    """
    percentiles = torch.tensor([0.005, 0.995], device=originals.device)
    low, high = torch.quantile(originals.flatten(1), percentiles, dim=1)  # (B,) each
    originals = rescale(originals, low, high)
    similarity = ssim_map(originals, rescale(reconstructions, low, high))
    mask = body_mask(originals.cpu()).to(similarity.device)
    mask = _crop_centre(mask, *similarity.shape[-2:])
    return (similarity * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp_min(1)


def psnr(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Compute `psnr` in dB of each slice, (B,), from two batches (B, 1, H, W)."""
    originals, reconstructions = _scale_to_range(originals, reconstructions)
    return _decibels((reconstructions - originals).square().mean((1, 2, 3)))


def ssim_map(
    originals: Tensor, reconstructions: Tensor, kernel_size: int = 11, gaussian: bool = True
) -> Tensor:
    """Compute SSIM (Wang et al. 2004) for each window that is completely inside the slice.

    scikit-image averages over the same windows. Some versions of torchmetrics also average over
    windows that extend into a reflected border.

    Args:
        originals, reconstructions: both (B, 1, H, W), with a data range of 1.
        kernel_size: side of the window in pixels.
        gaussian: use a Gaussian window with sigma 1.5, otherwise a uniform window.

    Returns:
        (B, 1, H - kernel_size + 1, W - kernel_size + 1).
    """
    # This import takes seconds, so commands that only print help or an error should avoid it.
    from torchmetrics.functional.image import structural_similarity_index_measure

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
    """Compute the power of each reconstruction relative to its original in one frequency octave.

    A ratio of 1 means that the reconstruction is as sharp as the original. A Hann window suppresses
    the slice's edges.

    Args:
        originals, reconstructions: both (B, 1, H, W), z-scored.
        octave: 0 for radial frequencies from half the Nyquist frequency to the Nyquist frequency,
            1 for the octave below, and so on.

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
    return power[0] / torch.where(power[1] > 0, power[1], 1)


# ---------------------------------------------------------------- scaling


def rescale(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map the range [low, high] of images (B, 1, H, W) to [0, 1], and clip; low, high: (B,)."""
    low = low.view(-1, 1, 1, 1)
    span = high.view(-1, 1, 1, 1) - low
    return ((images - low) / torch.where(span > 0, span, 1)).clamp(0, 1)


def _scale_to_range(originals: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
    """Scale both images to [0, 1] by the original's minimum and maximum, and clip them."""
    pixels = originals.flatten(1)
    low, high = pixels.amin(1), pixels.amax(1)
    return rescale(originals, low, high), rescale(reconstructions, low, high)


def _positive_std(images: Tensor) -> Tensor:
    """Return the standard deviation of each slice, (B, 1, H, W) -> (B, 1, 1, 1); 1 if it is 0."""
    # Squares of large intensities exceed float32. Division by a power of two causes no rounding.
    unit = images.abs().amax((1, 2, 3), keepdim=True).log2().floor().exp2()
    unit = torch.where(unit > 0, unit, 1)
    std = (images / unit).std((1, 2, 3), keepdim=True, correction=0) * unit
    return torch.where(std > 0, std, 1)


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
    """Score each reconstruction inside each organ (ORGANS without the background).

    Args:
        originals, reconstructions: both (B, 1, H, W), in the same unit.
        labels: (B, H, W), indices of ORGANS.

    Returns:
        {organ: {score: (B,)}}, NaN for slices with fewer than 20 pixels of the organ. `ssim` is the
        mean of the SSIM map over the organ's pixels, and `psnr` is computed from the mean squared
        error over the organ's pixels. For both scores, images are scaled as in the table at the top
        of this file. `bias` is the mean of reconstruction minus original over the organ's pixels,
        in standard deviations of the original slice.
    """
    originals = originals.float()
    reconstructions = reconstructions.float()
    labels = labels[:, None]
    bias = (reconstructions - originals) / _positive_std(originals)
    originals, reconstructions = _scale_to_range(originals, reconstructions)
    squared_error = (reconstructions - originals).square()
    similarity = ssim_map(originals, reconstructions)
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
    counts: Tensor  # (num_codebooks * K,) int64, how often each code is used
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

    Data-parallel processes divide the slices among them, and each process returns the results of
    all slices. The results depend neither on the batch size nor on the number of processes.

    Args:
        model: a VQVAE, on the device; put into eval mode for the duration of the call.
        data: a `dataset.SliceDataset`, or any object with a length, `batches` and `constant`.
        batch_size: slices per batch.
        device: the device to compute on.
        names: the scores to compute, from SCORE_NAMES.
        progress: function that wraps the iterable of batches, for instance in a progress bar.
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
    for name, values in scores.items():  # scores from other processes are still 0
        scores[name] = all_reduce_sum(values).masked_fill(data.constant, torch.nan)
    return Evaluation(scores, all_reduce_sum(counts), float(all_reduce_sum(loss)) / len(data))


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
            # An organ at the slice's edge has a PSNR, but no SSIM if no window is centred in it.
            has_score = ~np.isnan(organ_values)
            scored_cases = cases[has_score].tolist()
            results[organ][name] = mean_by_case(organ_values[has_score], scored_cases)
        results[organ]["slices"] = num_slices
    return results


def mean_by_case(values: np.ndarray, cases: list[str]) -> dict:
    """Average a score over all slices, and over the slices of each case.

    Args:
        values: (N,), a score per slice.
        cases: N names, the case of each slice.

    Returns:
        {"mean": float, "by_case": {case: float}}; the mean is None if there are no slices.
    """
    if not len(values):
        return {"mean": None, "by_case": {}}
    case_of_slice = np.array(cases)
    by_case = {case: float(values[case_of_slice == case].mean()) for case in dict.fromkeys(cases)}
    return {"mean": float(values.mean()), "by_case": by_case}


def bootstrap_interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of one value per case.

    Cases are resampled instead of slices, because slices of one patient are not independent.
    """
    generator = np.random.default_rng(0)
    means = generator.choice(values, size=(10_000, len(values))).mean(1)
    return tuple(np.percentile(means, [2.5, 97.5]))


def code_usage(counts: Tensor) -> tuple[int, float]:
    """Return the number of codes used, and the perplexity, which is exp(entropy of the codes).

    Args:
        counts: (K,), how often each code is used in a whole split.
    """
    frequencies = counts.double() / counts.sum()
    perplexity = torch.special.entr(frequencies).sum().exp()
    return int((counts > 0).sum()), float(perplexity)
