"""Measure how realistic sampled slices are, and search them for copies of training slices.

    features = Features().fit(training)                         # fixed random filters, no download
    kernel_distance(features(sampled), features(training))      # about 0 for equal distributions
    coverage(features(held_out), features(sampled))             # 1 if samples are as varied
    search_copies(sampled, held_out, training, features, cases)

Images are z-scored slices (N, 1, H, W). The measures depend on the choice of features, so they
cannot be compared with published values.

A sample is flagged as a possible copy if its distance to the nearest training slice is below a
threshold. The threshold is the 1st percentile of the same distance for held-out slices, which are
reconstructions of validation and test slices. About 1 % of the samples are flagged by chance;
a fraction well above 1 % suggests that the prior repeats its training slices. There are two
searches, both over four views of each slice (unchanged, mirrored along one axis, or along both):

- `nearest_pixels` searches over shifts of up to 8 pixels in steps of 2, along both axes;
- `nearest_features` searches over shifts of -8, 0 and 8 pixels, along both axes.

Neither search finds copies that are rotated (other than by 180 degrees), scaled or shifted further,
or that are only a part of a slice.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.codes import MIRRORS
from utils import full_float32

SHIFT = 8  # maximum shift in the search for copies, in pixels
NUM_NEIGHBOURS = 5  # k of the neighbourhoods of `coverage`


# ---------------------------------------------------------------- copies


def search_copies(
    sampled: Tensor,
    held_out: Tensor,
    training: Tensor,
    features: Features,
    cases: Sequence[str],
    progress: Callable = iter,
) -> dict[str, dict]:
    """Search for sampled slices that may be copies, by pixels and by features.

    The three sets of slices are (N, 1, H, W) and on the same device; N differs between them.

    Args:
        sampled: slices decoded from sampled codes.
        held_out: reconstructions of validation and test slices, which set the threshold.
        training: the original training slices, not their reconstructions.
        features: `Features` fitted to the training slices.
        cases: case of each training slice.
        progress: a function such as tqdm, which wraps the list of shifts.

    Returns:
        {"pixels": {...}, "features": {...}}; each of the two dictionaries contains

        - "threshold": 1st percentile of the distances of the held-out slices;
        - "held_out_median", "drawn_median": median distance of the held-out and sampled slices;
        - "flagged": fraction of the sampled slices with a distance below the threshold;
        - "flagged_by_case": case of the nearest training slice -> number of flagged slices;
        - "distance", "nearest": for each sampled slice, the distance to the nearest training slice,
          and the index of that training slice.
    """
    by_pixels = (
        nearest_pixels(held_out, training, progress),
        nearest_pixels(sampled, training, progress),
    )
    by_features = (
        nearest_features(held_out, training, features),
        nearest_features(sampled, training, features),
    )
    result = {}
    for name, searches in (("pixels", by_pixels), ("features", by_features)):
        (held_out_distance, _), (distance, nearest) = searches
        held_out_distance = held_out_distance.cpu()
        distance, nearest = distance.cpu(), nearest.cpu()
        threshold = held_out_distance.double().quantile(0.01).item()
        flagged = distance < threshold
        flagged_cases = Counter(cases[i] for i in nearest[flagged].tolist())
        result[name] = {
            "threshold": threshold,
            "held_out_median": held_out_distance.median().item(),
            "drawn_median": distance.median().item(),
            "flagged": flagged.float().mean().item(),
            "flagged_by_case": dict(sorted(flagged_cases.items())),
            "distance": distance.tolist(),
            "nearest": nearest.tolist(),
        }
    return result


def nearest_pixels(
    images: Tensor, training: Tensor, progress: Callable = iter
) -> tuple[Tensor, Tensor]:
    """Find the nearest training slice by root mean squared difference of pixels.

    The distance between two slices is the smallest over all flips and shifts. Slices are compared
    at half resolution. A margin of SHIFT pixels at each edge of an image is ignored.

    Args:
        images: the slices to compare with the training slices, (B, 1, H, W).
        training: training slices, (N, 1, H, W).
        progress: a function such as tqdm, which wraps the list of shifts.

    Returns:
        For each image, the distance to the nearest training slice, (B,), and the index of that
        training slice, (B,).
    """
    images = F.avg_pool2d(images, 2)[:, 0]
    training = F.avg_pool2d(training, 2)[:, 0]
    margin = SHIFT // 2
    height = training.shape[1] - 2 * margin
    width = training.shape[2] - 2 * margin
    inner = images[:, margin : margin + height, margin : margin + width]
    flipped = torch.cat([inner.flip(axes) for axes in MIRRORS]).flatten(1)  # (4 B, P)
    flipped_squares = flipped.square().sum(1, keepdim=True)
    best = torch.full((len(images),), math.inf, device=images.device)  # squared distances
    best_index = torch.zeros(len(images), dtype=torch.long, device=images.device)
    shifts = list(itertools.product(range(2 * margin + 1), repeat=2))
    for top, left in progress(shifts):
        for start in range(0, len(training), 1024):
            part = training[start : start + 1024, top : top + height, left : left + width]
            part = part.flatten(1)  # (n, P)
            squares = flipped_squares + part.square().sum(1)
            squares = torch.addmm(squares, flipped, part.T, alpha=-2)  # (4 B, n)
            nearest = squares.view(len(MIRRORS), len(images), -1).amin(0).min(1)
            better = nearest.values < best
            best = torch.where(better, nearest.values, best)
            best_index = torch.where(better, nearest.indices + start, best_index)
    return (best.clamp_min(0) / flipped.shape[1]).sqrt(), best_index


def nearest_features(images: Tensor, training: Tensor, features: Features) -> tuple[Tensor, Tensor]:
    """Find the nearest training slice by root mean squared difference of features.

    The distance between two slices is the smallest over all flips and over shifts of -SHIFT, 0 and
    SHIFT pixels along each axis.

    Args:
        images: the slices to compare with the training slices, (B, 1, H, W).
        training: training slices, (N, 1, H, W).
        features: `Features` fitted to the training slices.

    Returns:
        For each image, the distance to the nearest training slice, (B,), and the index of that
        training slice, (B,).
    """
    training_features = features(training)
    height, width = images.shape[-2:]
    offsets = (0, SHIFT, 2 * SHIFT)
    distances, indices = [], []
    for batch in images.split(64):
        padded = F.pad(batch, (SHIFT,) * 4, mode="replicate")
        variants = []
        for top, left in itertools.product(offsets, offsets):
            shifted = padded[..., top : top + height, left : left + width]
            for axes in MIRRORS:
                variants.append(features(shifted.flip(axes)))
        pairs = torch.cdist(torch.cat(variants), training_features)  # (36 B, N)
        nearest = pairs.view(-1, len(batch), len(training)).amin(0).min(1)
        distances.append(nearest.values / math.sqrt(training_features.shape[1]))
        indices.append(nearest.indices)
    return torch.cat(distances), torch.cat(indices)


# ---------------------------------------------------------------- features


class Features(nn.Module):
    """Features of texture and layout from fixed random filters: (N, 1, H, W) -> (N, F) float32.

    Texture is measured at four scales, each at half the resolution of the previous scale, by

    - the absolute outputs of 32 zero-mean 5 x 5 filters, sampled with seed 0;
    - the absolute outputs of 32 zero-mean 3 x 3 filters that are applied to the outputs above.

    A texture feature is the logarithm of the mean output in a cell of a 4 x 2 grid. The logarithm
    is used because textures differ by factors. The layout features are the slice's mean intensities
    in the cells of an 8 x 4 grid. This is a scattering network (Bruna and Mallat, arXiv 1203.1513)
    with random filters. Random features can distinguish distributions (arXiv 2203.06026), and they
    do not need a network that was trained on photographs.
    """

    def __init__(self, filters: int = 32, scales: int = 4, grid: tuple[int, int] = (4, 2)):
        super().__init__()
        self.scales = scales
        self.grid = grid
        generator = torch.Generator().manual_seed(0)
        first = torch.randn(filters, 1, 5, 5, generator=generator)
        second = torch.randn(filters, filters, 3, 3, generator=generator)
        self.register_buffer("first", _normalise_filters(first))
        self.register_buffer("second", _normalise_filters(second))
        num_features = 2 * scales * filters * math.prod(grid) + 32
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))

    @full_float32()
    @torch.no_grad()
    def fit(self, images: Tensor) -> Features:
        """Standardise each feature by its mean and standard deviation over two or more images."""
        raw = torch.cat([self.raw(batch) for batch in images.split(16)])
        self.mean.copy_(raw.mean(0))
        self.std.copy_(raw.std(0).clamp_min(1e-3))
        return self

    @full_float32()
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        batches = [(self.raw(batch) - self.mean) / self.std for batch in images.split(16)]
        return torch.cat(batches)

    def raw(self, images: Tensor) -> Tensor:
        """Compute features without standardising them: (B, 1, H, W) -> (B, F)."""
        layout = images
        textures = []
        for _ in range(self.scales):
            first = F.conv2d(layout, self.first).abs()
            second = F.conv2d(F.avg_pool2d(first, 2), self.second).abs()
            for outputs in (first, second):
                textures.append(F.adaptive_avg_pool2d(outputs, self.grid).flatten(1))
            layout = F.avg_pool2d(layout, 2)
        # The offset suppresses texture fainter than 0.05 standard deviations of a slice.
        texture = (torch.cat(textures, 1) + 0.05).log()
        return torch.cat([texture, F.adaptive_avg_pool2d(layout, (8, 4)).flatten(1)], 1)


def _normalise_filters(filters: Tensor) -> Tensor:
    """Normalise filters (N, C, h, w) to mean 0, so that they ignore constant areas, and norm 1."""
    filters = filters - filters.flatten(1).mean(1).view(-1, 1, 1, 1)
    return filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


# ---------------------------------------------------------------- distances


def split_cases(cases: Sequence[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split slices at random into two groups of equally many cases, without a common case.

    If there is only one case, its slices are split.

    Args:
        cases: case of each slice.
        generator: random generator on the CPU.

    Returns:
        Indices of the slices in the first group and in the second group.
    """
    names = sorted(set(cases))
    order = torch.randperm(len(names), generator=generator)
    first_cases = {names[i] for i in order[: len(names) // 2]}
    in_first = torch.tensor([case in first_cases for case in cases])
    if len(names) == 1:
        in_first = torch.randperm(len(cases), generator=generator) < len(cases) // 2
    return in_first.nonzero().flatten(), (~in_first).nonzero().flatten()


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Estimate the squared maximum mean discrepancy of x (N, F) and y (M, F), where N, M > 1.

    The estimate is unbiased (Gretton et al. 2012, equation 3), so its mean is 0 for equal
    distributions. The kernel is (x.y / F + 1)^3, as in arXiv 1801.01401.
    """
    x = x.double()
    y = y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(k: Tensor) -> Tensor:  # (n, n), without the diagonal
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    within = mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y))
    return float(within - 2 * kernel(x, y).mean())


def coverage(real: Tensor, samples: Tensor) -> float:
    """Compute the fraction of real slices that have a sample in their neighbourhood.

    The neighbourhood of a real slice is a ball whose radius is the distance to the fifth nearest
    other real slice (arXiv 2002.09797, equation 10). Many copies of a good slice cover few slices.

    Args:
        real, samples: features, (N, F) and (M, F); N > 1.
    """
    # The nearest real slice is the slice itself.
    neighbours = min(NUM_NEIGHBOURS + 1, len(real))
    radius = torch.cdist(real, real).kthvalue(neighbours, dim=1).values
    nearest_sample = torch.cdist(real, samples).amin(1)
    return (nearest_sample <= radius).float().mean().item()


def make_chimeras(images: Tensor, generator: torch.Generator) -> Tensor:
    """Compose as many slices, (N, 1, H, W), from 64 x 64 blocks of random slices of `images`.

    Each block stays at its place, so texture and layout are real, but organs do not fit together.
    """
    chimeras = torch.empty_like(images)
    height, width = images.shape[-2:]
    for top, left in itertools.product(range(0, height, 64), range(0, width, 64)):
        sources = torch.randint(len(images), (len(images),), generator=generator)
        block = (..., slice(top, top + 64), slice(left, left + 64))
        chimeras[block] = images[sources][block]
    return chimeras
