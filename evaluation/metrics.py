"""How good reconstructions are, and how codes are used: the protocol that the README's section on SSIM names states."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure as torchmetrics_ssim

from training.distributed import all_reduce_sum, get_rank, get_world_size

SSIM_NAMES = ("ssim", "ssim_zscore", "ssim_uniform", "ssim_body")
SCORE_NAMES = (*SSIM_NAMES, "psnr")
ORGANS = ("background", "body", "bone", "bladder", "rectum", "prostate")  # by HipMRI's labels


def rescale(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(B, 1, H, W) to [0, 1] between each slice's low and high, (B,), clipped."""
    low, high = low.view(-1, 1, 1, 1), high.view(-1, 1, 1, 1)
    return ((images - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def _spread(labels: Tensor, mask: Tensor) -> Tensor:
    """Give each 4-connected region of `mask` its largest label; (B, 1, H, W) int64 and bool, labels below 2^20.

    Sweeps along rows and columns, both ways, carry a label through a whole run of the mask at once.
    """
    gaps = {
        axis: ((~mask).cumsum(axis) << 20, (~mask).flip(axis).cumsum(axis) << 20)
        for axis in (-1, -2)
    }
    while True:
        before = labels
        for axis, (forth, back) in gaps.items():  # a new gap outweighs all labels before it
            labels = ((labels + forth).cummax(axis).values - forth) * mask
            labels = (((labels.flip(axis) + back).cummax(axis).values - back).flip(axis)) * mask
        if torch.equal(labels, before):
            return labels


def _otsu(images: Tensor) -> Tensor:
    """Otsu's threshold of each slice in [0, 1], over 256 bins: (B, 1, H, W) -> (B,)."""
    bins = (images.flatten(1) * 255).round().long()
    share = torch.zeros(len(bins), 256, device=bins.device).scatter_add_(
        1, bins, torch.ones_like(bins).float()
    )
    share /= bins.shape[1]
    levels = torch.arange(256, device=bins.device) / 255
    below, moment = share.cumsum(1), (share * levels).cumsum(1)
    between = (moment[:, -1:] * below - moment).square() / (below * (1 - below)).clamp_min(
        1e-9
    )  # between classes
    return levels[between[:, :-1].argmax(1)]


def body_mask(images: Tensor) -> Tensor:
    """The body in each slice: over Otsu's threshold, the largest component, its holes filled.

    images: (B, 1, H, W) in [0, 1]; returns the same shape, bool. Otsu looks at log(1 + 50 x): on plain intensities
    it parts fat from muscle, and the largest component is a strip of fat; on this scale it parts body from air.
    """
    images = torch.log1p(50 * images) / math.log(51)
    bright = images > _otsu(images).view(-1, 1, 1, 1)
    labels = torch.arange(1, images[0].numel() + 1, device=images.device).view_as(images[:1])
    components = _spread(labels * bright, bright)
    sizes = torch.zeros(len(images), labels.numel() + 1, device=images.device)
    sizes.scatter_add_(1, components.flatten(1), bright.flatten(1).float())
    body = (components == sizes.argmax(1).view(-1, 1, 1, 1)) & bright
    border = torch.ones_like(body)
    border[..., 1:-1, 1:-1] = False
    return _spread((border & ~body).long(), ~body) == 0


def ssim_map(
    reconstructions: Tensor, originals: Tensor, kernel_size: int = 11, gaussian: bool = True
) -> Tensor:
    """SSIM (Wang et al. 2004) at each window that lies wholly inside the slice, for images whose range is 1.

    (B, 1, H, W) twice -> (B, 1, H - kernel_size + 1, W - kernel_size + 1). torchmetrics' own mean counts windows
    over the reflected border too, in some versions; scikit-image's doesn't.
    """
    options = {
        "gaussian_kernel": gaussian,
        "sigma": 1.5,
        "kernel_size": kernel_size,
        "data_range": 1.0,
    }
    _, full = torchmetrics_ssim(
        reconstructions, originals, reduction="none", return_full_image=True, **options
    )
    height, width = (size - kernel_size + 1 for size in originals.shape[-2:])
    return _inside(full, originals[..., :height, :width])


def _inside(images: Tensor, smaller: Tensor) -> Tensor:
    """The middle of (B, 1, H, W) images, as large as `smaller`."""
    top, left = ((a - b) // 2 for a, b in zip(images.shape[-2:], smaller.shape[-2:], strict=True))
    return images[..., top : top + smaller.shape[-2], left : left + smaller.shape[-1]]


def slice_scores(
    originals: Tensor, reconstructions: Tensor, names: tuple[str, ...] = SCORE_NAMES
) -> dict[str, Tensor]:
    """Quality of each slice by the protocol of the README: (B, 1, H, W) twice, in one unit -> {name: (B,)}.

    ssim: both scaled by the original's own range to [0, 1], clipped; Gaussian window 11, sigma 1.5; data_range 1.
    ssim_zscore: z-scored by the original's mean and deviation, not clipped; the same window; data_range 1.
    ssim_uniform: as ssim, uniform window 7 x 7.
    ssim_body: scaled by the original's 0.5 and 99.5 percentiles; the SSIM map's mean over `body_mask`.
    psnr: dB on ssim's images, at most 100.
    """
    unknown = set(names) - set(SCORE_NAMES)
    if unknown:
        raise ValueError(f"unknown scores {sorted(unknown)}; expected some of {SCORE_NAMES}")
    originals, reconstructions = originals.float(), reconstructions.float()
    pixels = originals.flatten(1)
    low, high = pixels.amin(1), pixels.amax(1)
    pair = [rescale(x, low, high) for x in (reconstructions, originals)]
    scores = {}
    if "ssim" in names:
        scores["ssim"] = ssim_map(*pair).mean((1, 2, 3))
    if "ssim_zscore" in names:
        mean, std = pixels.mean(1).view(-1, 1, 1, 1), pixels.std(1, correction=0).view(-1, 1, 1, 1)
        zscored = [(x - mean) / std.clamp_min(1e-12) for x in (reconstructions, originals)]
        scores["ssim_zscore"] = ssim_map(*zscored).mean((1, 2, 3))
    if "ssim_uniform" in names:
        scores["ssim_uniform"] = ssim_map(*pair, kernel_size=7, gaussian=False).mean((1, 2, 3))
    if "ssim_body" in names:
        limits = torch.quantile(
            pixels, torch.tensor([0.005, 0.995], device=pixels.device), dim=1
        )  # (2, B)
        clipped = [rescale(x, *limits) for x in (reconstructions, originals)]
        quality = ssim_map(*clipped)
        mask = _inside(body_mask(clipped[1].cpu()).to(quality.device), quality)
        scores["ssim_body"] = (quality * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp_min(1)
    if "psnr" in names:
        scores["psnr"] = -10 * (pair[0] - pair[1]).square().mean((1, 2, 3)).clamp_min(1e-10).log10()
    return scores


def organ_scores(
    originals: Tensor, reconstructions: Tensor, labels: Tensor
) -> dict[str, dict[str, Tensor]]:
    """Fidelity inside each of ORGANS: {organ: {score: (B,)}}, NaN where a slice shows under 20 pixels of it.

    (B, 1, H, W) twice, in one unit, and labels (B, H, W). psnr and ssim: of `slice_scores`' pictures and map, over the
    organ's pixels. bias: the mean of reconstruction minus original there, in standard deviations of the slice.
    """
    originals, reconstructions = originals.float(), reconstructions.float()
    pixels, labels = originals.flatten(1), labels[:, None]
    pair = [rescale(x, pixels.amin(1), pixels.amax(1)) for x in (reconstructions, originals)]
    squares = (pair[0] - pair[1]).square()
    quality = ssim_map(*pair)
    bias = (reconstructions - originals) / pixels.std(1, correction=0).clamp_min(1e-12).view(
        -1, 1, 1, 1
    )
    scores = {}
    for label, organ in enumerate(ORGANS[1:], start=1):
        inside = labels == label
        seen = inside.sum((1, 2, 3)) >= 20

        def mean(values: Tensor, where: Tensor, seen: Tensor = seen) -> Tensor:
            found = (values * where).sum((1, 2, 3)) / where.sum((1, 2, 3))
            return found.masked_fill(~seen, torch.nan)

        scores[organ] = {
            "psnr": -10 * mean(squares, inside).clamp_min(1e-10).log10(),
            "ssim": mean(quality, _inside(inside, quality)),
            "bias": mean(bias, inside),
        }
    return scores


def power_ratio(originals: Tensor, reconstructions: Tensor, octave: int = 0) -> Tensor:
    """Power of each reconstruction over its original's in an octave of radial frequency, (B,): 1 is as sharp.

    (B, 1, H, W) twice, z-scored. octave 0: from half the Nyquist frequency up to it; 1: the octave below; and so on.
    A Hann window keeps the slices' edges out of it.
    """
    height, width = originals.shape[-2:]
    window = torch.hann_window(height, False)[:, None] * torch.hann_window(width, False)
    radius = torch.hypot(
        torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    )  # cycles a pixel
    inside = ((radius >= 0.25 / 2**octave) & (radius < 0.5 / 2**octave)).to(originals.device)
    both = torch.stack([reconstructions, originals]).float() * window.to(originals.device)
    powers = (torch.fft.rfft2(both).abs().square() * inside).sum((2, 3, 4))  # (2, B)
    return powers[0] / powers[1].clamp_min(1e-12)


def mean_by_case(values: np.ndarray, cases: list[str]) -> dict:
    """A score of N slices, (N,), and the case of each: the mean over slices, and over each case's slices."""
    by_case = {case: float(values[np.array(cases) == case].mean()) for case in dict.fromkeys(cases)}
    return {"mean": float(values.mean()), "by_case": by_case}


def code_usage(counts: Tensor) -> tuple[int, float]:
    """CodeDataset used, and perplexity exp(entropy), from the counts (K,) over a whole split."""
    share = counts.double() / counts.sum()
    return int((counts > 0).sum()), float(torch.special.entr(share).sum().exp())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data,
    batch_size: int,
    device: torch.device,
    names=("ssim", "psnr"),
    progress=iter,
):
    """Reconstruct a whole split: ({score: (N,)}, counts of use of all codes, mean loss); constant slices score NaN.

    data: has `len`, `batches(groups, device)` and `constant`, as dataset.SliceDataset. Several processes share the slices,
    and all return the same. Nothing depends on the batch size, or on how many processes there are.
    """
    was_training = model.training
    model.eval()
    scores = {name: torch.zeros(len(data)) for name in names}
    quantizer = model.vector_quantization
    counts = torch.zeros(
        quantizer.num_codebooks * quantizer.num_embeddings, dtype=torch.long, device=device
    )
    loss = torch.zeros((), device=device)
    share = torch.arange(len(data)).split(batch_size)[get_rank() :: get_world_size()]
    for indices, images in zip(progress(share), data.batches(share, device), strict=True):
        reconstruction, quantized = model(images)
        counts += quantized.counts.long()
        loss += sum(model.loss(images, reconstruction, quantized)) * len(images)
        for name, values in slice_scores(images, reconstruction, names).items():
            scores[name][indices] = values.cpu()
    model.train(was_training)
    scores = {
        name: all_reduce_sum(values) for name, values in scores.items()
    }  # each slice is in one's share
    scores = {name: values.masked_fill(data.constant, torch.nan) for name, values in scores.items()}
    return scores, all_reduce_sum(counts), float(all_reduce_sum(loss)) / len(data)
