"""Score reconstructions: four SSIM variants, PSNR, and codebook usage.

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

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dataset import pin, prefetch, transfer
from evaluation.body import Body, find_body, rescale
from training.distributed import all_reduce_sum, get_rank, get_world_size
from utils import full_float32

SSIM_NAMES = ("ssim", "ssim_zscore", "ssim_uniform", "ssim_body")
SCORE_NAMES = (*SSIM_NAMES, "psnr")

# ---------------------------------------------------------------- scores per slice


@full_float32()
def slice_scores(
    originals: Tensor,
    reconstructions: Tensor,
    names: tuple[str, ...] = SCORE_NAMES,
    body: Body | None = None,
) -> dict[str, Tensor]:
    """Score each reconstruction; the table at the top of this file defines the scores.

    Args:
        originals: (B, 1, H, W), in any unit, H and W at least 11.
        reconstructions: the same shape and unit.
        names: the scores to compute, from SCORE_NAMES.
        body: result of `find_body` for the originals, on their device; None: computed on the CPU.

    Returns:
        {name: (B,)}.
    """
    unknown = set(names) - set(SCORE_NAMES)
    if unknown:
        raise ValueError(f"unknown scores {sorted(unknown)}; expected some of {SCORE_NAMES}")
    originals = originals.float()
    reconstructions = reconstructions.float()
    scaled = scale_to_range(originals, reconstructions)  # for three of the scores
    functions = {
        # `modules.ssim_loss` is the differentiable version, which does not clip reconstructions.
        "ssim": lambda: ssim_map(*scaled).mean((1, 2, 3)),
        "ssim_zscore": lambda: ssim_zscore(originals, reconstructions),
        "ssim_uniform": lambda: ssim_map(*scaled, kernel_size=7, gaussian=False).mean((1, 2, 3)),
        "ssim_body": lambda: ssim_body(originals, reconstructions, body),
        "psnr": lambda: decibels((scaled[1] - scaled[0]).square().mean((1, 2, 3))),
    }
    return {name: function() for name, function in functions.items() if name in names}


def ssim_zscore(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Compute `ssim_zscore` of each slice, (B,), from two batches (B, 1, H, W)."""
    mean = originals.mean((1, 2, 3), keepdim=True)
    std = positive_std(originals)
    return ssim_map((originals - mean) / std, (reconstructions - mean) / std).mean((1, 2, 3))


def ssim_body(originals: Tensor, reconstructions: Tensor, body: Body | None = None) -> Tensor:
    """Compute `ssim_body` of each slice, (B,), from two batches (B, 1, H, W).

    Unlike `ssim`, it depends neither on the air around the body nor on a few very bright pixels.
    In `ssim`, such pixels make all other pixels of both images darker and therefore more similar.
    """
    if body is None:
        body = Body(*[part.to(originals.device) for part in find_body(originals)])
    low, high, mask = body
    similarity = ssim_map(rescale(originals, low, high), rescale(reconstructions, low, high))
    mask = crop_centre(mask, *similarity.shape[-2:])
    return (similarity * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp_min(1)


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

    # Each slice becomes a channel. torchmetrics filters channels separately, and on a CPU, a slice
    # of eight channels is filtered ten times as fast as eight slices of one channel.
    similarities = []
    for pair in zip(reconstructions.split(8), originals.split(8), strict=True):
        _, similarity = structural_similarity_index_measure(
            *[images.transpose(0, 1) for images in pair],
            gaussian_kernel=gaussian,
            sigma=1.5,
            kernel_size=kernel_size,
            data_range=1.0,
            reduction="none",
            return_full_image=True,
        )
        similarities.append(similarity.transpose(0, 1))
    height, width = originals.shape[-2:]
    size = (height - kernel_size + 1, width - kernel_size + 1)
    return crop_centre(torch.cat(similarities), *size)


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
    return power[0] / power[1].masked_fill(~(power[1] > 0), 1)


# ---------------------------------------------------------------- scaling


def scale_to_range(originals: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
    """Scale both images to [0, 1] by the original's minimum and maximum, and clip them."""
    pixels = originals.flatten(1)
    low, high = pixels.amin(1), pixels.amax(1)
    return rescale(originals, low, high), rescale(reconstructions, low, high)


def positive_std(images: Tensor) -> Tensor:
    """Return the standard deviation of each slice, (B, 1, H, W) -> (B, 1, 1, 1); 1 if it is 0."""
    # Squares of large intensities exceed float32. Division by a power of two causes no rounding.
    unit = images.abs().amax((1, 2, 3), keepdim=True).log2().floor().exp2()
    unit = unit.masked_fill(~(unit > 0), 1)
    std = (images / unit).std((1, 2, 3), keepdim=True, correction=0) * unit
    return std.masked_fill(~(std > 0), 1)


def crop_centre(images: Tensor, height: int, width: int) -> Tensor:
    """Return the central (B, 1, height, width) part of images (B, 1, H, W)."""
    top = (images.shape[-2] - height) // 2
    left = (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def decibels(squared_error: Tensor) -> Tensor:
    """Convert mean squared errors of images with range 1 to PSNR in dB, at most 100."""
    return -10 * squared_error.clamp_min(1e-10).log10()


# ---------------------------------------------------------------- a split


class Evaluation(NamedTuple):
    """Results of a model on a split of N slices."""

    scores: dict[str, Tensor]  # {name: (N,)}, NaN for constant slices
    counts: Tensor  # (num_codebooks * K,) int64, how often each code is used
    loss: float  # mean of the training loss over the slices


@full_float32()
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
        data: a `dataset.SliceDataset`, or any object with a length, `batch`, `batches` and
            `constant`.
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
    batches = torch.arange(len(data)).split(batch_size)[get_rank() :: get_world_size()]
    bodies = itertools.repeat(None, len(batches))
    if "ssim_body" in names:
        bodies = _find_bodies(data, batches, device)
    batch_scores = []  # on the device, so that the host waits for it only once
    inputs = zip(progress(batches), data.batches(batches, device), bodies, strict=True)
    for _, images, body in inputs:
        reconstruction, quantized = model(images)
        counts += quantized.counts.long()
        loss += sum(model.loss(images, reconstruction, quantized)) * len(images)
        values = slice_scores(images, reconstruction, names, body)
        batch_scores.append(torch.stack([values[name] for name in names]))
    model.train(was_training)
    scores = torch.zeros(len(names), len(data))  # 0 for the slices of other processes
    if batch_scores:
        scores[:, torch.cat(batches)] = torch.cat(batch_scores, 1).cpu()
    scores = all_reduce_sum(scores).masked_fill(data.constant, torch.nan)
    by_name = dict(zip(names, scores, strict=True))
    return Evaluation(by_name, all_reduce_sum(counts), float(all_reduce_sum(loss)) / len(data))


def _find_bodies(data, batches: Sequence[Tensor], device: torch.device) -> Iterator[Body]:
    """Yield the bodies of each batch, which a thread computes on the CPU ahead of the model."""

    def find(indices: Tensor) -> list[Tensor]:
        return [pin(part, device) for part in find_body(data.batch(indices))]

    for parts in prefetch(find, batches):
        yield Body(*[transfer(part, device) for part in parts])


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
