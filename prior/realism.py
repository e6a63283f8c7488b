"""How far drawn slices are from real ones: features, kernel and Frechet distance, and the search for copies.

    features = Features().fit(training_images)           # fixed random filters, no download
    kernel_distance(features(drawn), features(real))      # 0 where both are of one distribution
    nearest_pixels(drawn, training_images)                # how near each is to a training slice, and to which

None of these is FID, and no figure of theirs may be set against a published one. Images are z-scored slices
(B, 1, H, W).
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHIFT = 8  # pixels up to which a copy may be moved
FLIPS = ((), (-2,), (-1,), (-2, -1))


class Features(nn.Module):
    """Texture and layout of a slice, by fixed random filters: images (B, 1, H, W) -> (B, F) float32.

    At four scales, each half the one before: 32 zero-mean 5 x 5 filters drawn from seed 0, rectified; 32 filters of
    3 x 3 over those, rectified; the mean of each in the cells of a 4 x 2 grid, and its logarithm, since texture differs
    by factors; and the slice itself on an 8 x 4 grid. It is a scattering network (Bruna and Mallat, arXiv 1203.1513)
    with random filters, as random features are known to tell distributions apart (arXiv 2203.06026) without a network
    trained on photographs. `fit` scales each feature by its mean and deviation over the training slices.
    """

    def __init__(self, filters: int = 32, scales: int = 4, grid: tuple[int, int] = (4, 2)):
        super().__init__()
        self.scales, self.grid = scales, grid
        generator = torch.Generator().manual_seed(0)
        self.register_buffer(
            "first", _zero_mean(torch.randn(filters, 1, 5, 5, generator=generator))
        )
        self.register_buffer(
            "second", _zero_mean(torch.randn(filters, filters, 3, 3, generator=generator))
        )
        size = 2 * scales * filters * math.prod(grid) + 32
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(
            [(self.raw(some) - self.mean) / self.deviation for some in images.split(16)]
        )

    def raw(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, F), not scaled."""
        found = []
        for _ in range(self.scales):
            once = F.conv2d(images, self.first).abs()
            twice = F.conv2d(F.avg_pool2d(once, 2), self.second).abs()
            found += [F.adaptive_avg_pool2d(x, self.grid).flatten(1) for x in (once, twice)]
            images = F.avg_pool2d(images, 2)
        texture = (
            torch.cat(found, 1) + 0.05
        ).log()  # 0.05 of a slice's deviation: what is fainter is no texture
        return torch.cat([texture, F.adaptive_avg_pool2d(images, (8, 4)).flatten(1)], 1)

    @torch.no_grad()
    def fit(self, images: Tensor) -> Features:
        """Scale by these slices, two or more, from here on."""
        raw = torch.cat([self.raw(some) for some in images.split(16)])
        self.mean.copy_(raw.mean(0))
        self.deviation.copy_(raw.std(0).clamp_min(1e-3))
        return self


def _zero_mean(filters: Tensor) -> Tensor:
    """Each of the filters (F, ...) with mean 0 and length 1: blind to what is constant."""
    filters = filters - filters.flatten(1).mean(1).view(-1, 1, 1, 1)
    return filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy of (N, F) and (M, F), unbiased: its mean is 0 for equal distributions.

    Gretton et al. 2012, equation 3, with the polynomial kernel (x.y / F + 1)^3 of arXiv 1801.01401. N and M over 1.
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(sum(within) - 2 * kernel(x, y).mean())


def main_directions(x: Tensor, most: int = 64) -> Tensor:
    """The directions in which (N, F) varies most, (F, d): d at most 64, and under a fourth of N."""
    directions = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False).Vh
    return directions[: max(1, min(most, len(x) // 4))].T


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Between normal distributions with the means and covariances of (N, d) and (M, d) (Dowson and Landau 1982).

    Biased upwards for few slices: compare at equal numbers only.
    """
    x, y = x.double(), y.double()
    a, b = torch.cov(x.T).view(x.shape[1], -1), torch.cov(y.T).view(x.shape[1], -1)
    root = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()  # trace of (a b)^(1/2)
    return float((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root)


def inception_distance(x: Tensor, y: Tensor) -> float | None:
    """Torchmetrics' FID of (N, 1, H, W) twice; None where its package or its weights are not on this machine.

    For comparisons within this project alone: its network was trained on photographs.
    """
    weights = (
        Path(torch.hub.get_dir()) / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    )
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        if not weights.exists():
            return None
        fid = FrechetInceptionDistance(normalize=True)
    except ImportError:  # ModuleNotFoundError: torch-fidelity is not installed
        return None
    low, high = torch.quantile(x[:64].flatten(), torch.tensor([0.005, 0.995], device=x.device))
    for images, real in ((x, True), (y, False)):
        for some in images.split(16):
            fid.update(
                ((some - low) / (high - low)).clamp(0, 1).expand(-1, 3, -1, -1).cpu(), real=real
            )
    return float(fid.compute())


# ---------------------------------------------------------------- copies


def nearest_pixels(images: Tensor, training: Tensor, progress=iter) -> tuple[Tensor, Tensor]:
    """How near each image is to a training slice, (B,), and to which, (B,): (B, 1, H, W) and (N, 1, H, W).

    The root mean squared difference, at half resolution, of all but a margin of SHIFT pixels: the smallest over
    flips, and over shifts of up to SHIFT pixels in steps of 2.
    """
    images, training = (F.avg_pool2d(x, 2)[:, 0] for x in (images, training))
    margin, (height, width) = SHIFT // 2, training.shape[1:]
    size = (height - 2 * margin, width - 2 * margin)
    inner = images[:, margin : margin + size[0], margin : margin + size[1]]
    flipped = torch.cat([inner.flip(axes) for axes in FLIPS]).flatten(1)  # (4 B, P)
    own = flipped.square().sum(1, keepdim=True)
    best = torch.full((len(images),), math.inf, device=images.device)
    which = torch.zeros(len(images), dtype=torch.long, device=images.device)
    offsets = list(itertools.product(range(2 * margin + 1), repeat=2))
    for top, left in progress(offsets):
        for start in range(0, len(training), 1024):
            part = training[
                start : start + 1024, top : top + size[0], left : left + size[1]
            ].flatten(1)
            squares = torch.addmm(own + part.square().sum(1), flipped, part.T, alpha=-2)  # (4 B, n)
            nearest = squares.view(len(FLIPS), len(images), -1).amin(0).min(1)
            better = nearest.values < best
            best = torch.where(better, nearest.values, best)
            which = torch.where(better, nearest.indices + start, which)
    return (best.clamp_min(0) / flipped.shape[1]).sqrt(), which


def nearest_features(images: Tensor, training: Tensor, features: Features) -> tuple[Tensor, Tensor]:
    """As `nearest_pixels`, in the features (root mean squared difference): over flips, and shifts of SHIFT pixels."""
    known = features(training)
    best, which = [], []
    for some in images.split(64):
        padded = F.pad(some, (SHIFT,) * 4, mode="replicate")
        (height, width), steps = some.shape[-2:], (0, SHIFT, 2 * SHIFT)
        moved = [
            padded[..., i : i + height, j : j + width] for i, j in itertools.product(steps, steps)
        ]
        seen = torch.cat([features(image.flip(axes)) for image in moved for axes in FLIPS])
        nearest = torch.cdist(seen, known).view(-1, len(some), len(known)).amin(0).min(1)
        best.append(nearest.values / math.sqrt(known.shape[1]))
        which.append(nearest.indices)
    return torch.cat(best), torch.cat(which)
