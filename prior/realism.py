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

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from prior.codes import MIRRORS
from utils import full_float32

SHIFT = 8  # maximum shift in the search for copies, in pixels
NUM_NEIGHBOURS = 5  # k of the neighbourhoods of `coverage`
BLOCK = 512  # slices that are compared with all others at a time, to bound the memory


# ---------------------------------------------------------------- copies


def search_copies(
    sampled: Tensor, held_out: Tensor, training: Tensor, features: Features, cases: Sequence[str]
) -> dict[str, dict]:
    """Search for sampled slices that may be copies, by pixels and by features.

    The three sets of slices are (N, 1, H, W) and on the same device; N differs between them.

    Args:
        sampled: slices decoded from sampled codes.
        held_out: reconstructions of validation and test slices, which set the threshold.
        training: the original training slices, not their reconstructions.
        features: `Features` fitted to the training slices.
        cases: case of each training slice.

    Returns:
        {"pixels": {...}, "features": {...}}; each of the two dictionaries contains

        - "threshold": 1st percentile of the distances of the held-out slices;
        - "held_out_median", "sampled_median": median distance of the held-out and sampled slices;
        - "flagged": fraction of the sampled slices with a distance below the threshold;
        - "flagged_by_case": case of the nearest training slice -> number of flagged slices;
        - "distance", "nearest": for each sampled slice, the distance to the nearest training slice,
          and the index of that training slice.
    """
    training_features = features(training)
    searches = {
        "pixels": lambda images: nearest_pixels(images, training),
        "features": lambda images: nearest_features(images, training_features, features),
    }
    result = {}
    for name, search in searches.items():
        held_out_distance, _ = search(held_out)
        distance, nearest = search(sampled)
        threshold = held_out_distance.quantile(0.01).item()
        flagged = distance < threshold
        flagged_cases = Counter(cases[i] for i in nearest[flagged].tolist())
        result[name] = {
            "threshold": threshold,
            "held_out_median": held_out_distance.median().item(),
            "sampled_median": distance.median().item(),
            "flagged": flagged.float().mean().item(),
            "flagged_by_case": dict(sorted(flagged_cases.items())),
            "distance": distance.tolist(),
            "nearest": nearest.tolist(),
        }
    return result


def nearest_pixels(images: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest training slice by root mean squared difference of pixels.

    The distance between two slices is the smallest over all flips and shifts. Slices are compared
    at half resolution. A margin of SHIFT pixels at each edge of an image is ignored.

    Args:
        images: the slices to compare with the training slices, (B, 1, H, W).
        training: training slices, (N, 1, H, W).

    Returns:
        For each image, the distance to the nearest training slice, (B,), and the index of that
        training slice, (B,); both on the CPU.
    """
    images = F.avg_pool2d(images, 2)[:, 0]
    training = F.avg_pool2d(training, 2)[:, 0]
    margin = SHIFT // 2
    height, width = images.shape[1] - 2 * margin, images.shape[2] - 2 * margin
    inner = images[:, margin : margin + height, margin : margin + width]
    windows = training.unfold(1, height, 1).unfold(2, width, 1)  # (N, shifts, shifts, h, w)

    def distances(batch: Tensor) -> Iterator[Tensor]:  # (B, N) for each shift
        mirrored = torch.cat([batch.flip(axes) for axes in MIRRORS])
        for top, left in itertools.product(range(2 * margin + 1), repeat=2):
            pairs = rms_distance(mirrored, windows[:, top, left])  # (4 B, N)
            yield pairs.view(len(MIRRORS), len(batch), -1).amin(0)

    return _find_nearest(inner, distances)


def nearest_features(
    images: Tensor, training_features: Tensor, features: Features
) -> tuple[Tensor, Tensor]:
    """Find the nearest training slice by root mean squared difference of features.

    The distance between two slices is the smallest over all flips and over shifts of -SHIFT, 0 and
    SHIFT pixels along each axis.

    Args:
        images: the slices to compare with the training slices, (B, 1, H, W).
        training_features: features of the training slices, (N, F).
        features: `Features` fitted to the training slices.

    Returns:
        As `nearest_pixels`.
    """

    def distances(batch: Tensor) -> Iterator[Tensor]:  # (B, N) for each shift and flip
        padded = F.pad(batch, (SHIFT,) * 4, mode="replicate")
        windows = padded.unfold(2, batch.shape[2], SHIFT).unfold(3, batch.shape[3], SHIFT)
        for top, left, axes in itertools.product(range(3), range(3), MIRRORS):
            yield rms_distance(features(windows[:, :, top, left].flip(axes)), training_features)

    return _find_nearest(images, distances)


def _find_nearest(
    images: Tensor, distances: Callable[[Tensor], Iterator[Tensor]]
) -> tuple[Tensor, Tensor]:
    """Minimise `distances(batch)`, which yields (B, N) for each variant of a batch of images."""
    values, indices = [], []
    for batch in tqdm(images.split(64), desc="searching for copies", unit=" batches"):
        nearest = functools.reduce(torch.minimum, distances(batch)).min(1)
        values.append(nearest.values.cpu())
        indices.append(nearest.indices.cpu())
    return torch.cat(values), torch.cat(indices)


def rms_distance(a: Tensor, b: Tensor) -> Tensor:
    """Compute root mean squared differences: (B, ...) and (N, ...) -> (B, N)."""
    a, b = a.flatten(1), b.flatten(1)
    return torch.cdist(a, b) / math.sqrt(a.shape[1])


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


def split_cases(cases: Sequence[str], generator: torch.Generator) -> Tensor:
    """Split slices at random into two groups of equally many cases, without a common case.

    If a group would have fewer than two slices, for example because there is only one case, slices
    are split instead.

    Args:
        cases: case of each slice.
        generator: random generator on the CPU.

    Returns:
        Whether each slice is in the first group, (N,) bool.
    """
    for groups in (cases, range(len(cases))):
        names = sorted(set(groups))
        order = torch.randperm(len(names), generator=generator)
        first = {names[i] for i in order[: len(names) // 2]}
        in_first = torch.tensor([group in first for group in groups])
        if 2 <= in_first.sum() <= len(cases) - 2:
            break
    return in_first


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Estimate the squared maximum mean discrepancy of x (N, F) and y (M, F), where N, M > 1.

    The estimate is unbiased (Gretton et al. 2012, equation 3), so its mean is 0 for equal
    distributions. The kernel is (x.y / F + 1)^3, as in arXiv 1801.01401. Both are on the CPU.
    """

    def kernel_sum(products: Tensor) -> float:
        return ((products / x.shape[1] + 1) ** 3).sum(dtype=torch.float64).item()

    def sum_of_pairs(a: Tensor, b: Tensor) -> float:
        return sum(kernel_sum(block @ b.T) for block in a.split(BLOCK))

    def mean_within(a: Tensor) -> float:  # without the pairs of a slice and itself
        with_itself = kernel_sum(a.square().sum(1))
        return (sum_of_pairs(a, a) - with_itself) / (len(a) * (len(a) - 1))

    return mean_within(x) + mean_within(y) - 2 * sum_of_pairs(x, y) / (len(x) * len(y))


def coverage(real: Tensor, samples: Tensor) -> float:
    """Compute the fraction of real slices that have a sample in their neighbourhood.

    The neighbourhood of a real slice is a ball whose radius is the distance to the fifth nearest
    other real slice (arXiv 2002.09797, equation 10). Many copies of a good slice cover few slices.

    Args:
        real, samples: features, (N, F) and (M, F); N > 1.
    """
    neighbours = min(NUM_NEIGHBOURS + 1, len(real))  # the nearest real slice is the slice itself
    covered = []
    for block in real.split(BLOCK):
        radius = torch.cdist(block, real).kthvalue(neighbours, dim=1).values
        covered.append(torch.cdist(block, samples).amin(1) <= radius)
    return torch.cat(covered).float().mean().item()


def make_chimeras(images: Tensor, generator: torch.Generator) -> Tensor:
    """Compose as many slices, (N, 1, H, W), from 64 x 64 blocks of random slices of `images`.

    Each block stays at its place, so texture and layout are real, but organs do not fit together.
    """
    chimeras = torch.empty_like(images)
    height, width = images.shape[-2:]
    for top, left in itertools.product(range(0, height, 64), range(0, width, 64)):
        sources = torch.randint(len(images), (len(images),), generator=generator)
        block = (..., slice(top, top + 64), slice(left, left + 64))
        chimeras[block] = images[block][sources]
    return chimeras
