"""Evaluate sampled slices: measure their distances to real slices, and search for copies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from prior import realism
from prior.sampling import Sampler

NUM_SUBSETS = 5  # number of random subsets over which each distance is averaged


def evaluate_samples(
    sampler: Sampler, sampled: Tensor, images: dict[str, Tensor], cases: Sequence[str]
) -> dict:
    """Measure the distance of sampled slices to the training slices, and search for copies.

    For comparison, the same distance is measured for real test slices, for reconstructions, and for
    slices that are decoded from independently sampled codes.

    Args:
        sampler: the VQ-VAE, the device and the seed.
        sampled: the sampled slices, (count, 1, H, W).
        images: "train", "validate" and "test" -> real slices of that split, (N, 1, H, W).
        cases: N names, the case of each training slice.

    Returns:
        Entries of evaluation.json:

        - "drawn": number of sampled slices;
        - "slices_a_side": number of slices in each of the two sets that a distance compares;
        - "training_slices", "cases": numbers of training slices and of their cases;
        - "distances": the rows of `realism.distance_table`;
        - "audit": the result of `realism.search_copies`.
    """
    device = sampler.device
    training = images["train"]
    codes = {split: sampler.encode(images[split]) for split in images}
    reconstructed = {split: sampler.decode(codes[split]) for split in images}
    generator = torch.Generator().manual_seed(sampler.options.seed)
    halves = [realism.split_cases(cases, generator) for _ in range(NUM_SUBSETS)]
    independent = sample_independently(codes["train"], len(sampled), generator)

    features = realism.Features().to(device).fit(training.to(device))
    image_sets = {
        "test, real": images["test"],
        "test, reconstructed": reconstructed["test"],
        "training, reconstructed": reconstructed["train"],
        "drawn from the prior": sampled,
        "codes drawn independently": sampler.decode(independent),
    }
    # Distances are computed in float64 on the CPU, because mps has no float64.
    training_features = features(training.to(device)).cpu()
    feature_sets = {
        name: features(image_set.to(device)).cpu() for name, image_set in image_sets.items()
    }
    half_sizes = [len(half) for pair in halves for half in pair]
    size = min(len(images["test"]), len(sampled), *half_sizes)
    distances = realism.distance_table(feature_sets, training_features, halves, size)

    held_out = torch.cat([reconstructed["validate"], reconstructed["test"]])
    copies = realism.search_copies(
        sampled.to(device),
        held_out.to(device),
        training.to(device),
        features,
        cases,
        progress=partial(tqdm, desc="searching for copies", unit=" shifts"),
    )
    return {
        "drawn": len(sampled),
        "slices_a_side": size,
        "training_slices": len(training),
        "cases": len(set(cases)),
        "distances": distances,
        "audit": copies,
    }


def sample_independently(codes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sample each code independently from the marginal frequencies: (N, h, w) -> (count, h, w)."""
    pool = codes.flatten()
    return pool[torch.randint(len(pool), (count, *codes.shape[1:]), generator=generator)]


def print_evaluation(result: dict) -> None:
    """Print the result of `evaluate_samples` as tables."""
    rows = {row["set"]: row for row in result["distances"]}
    print(
        f"\ndistance to the training slices: mean ± half the range over {NUM_SUBSETS} random "
        f"subsets of {result['slices_a_side']} slices"
    )
    print(f"{'':28}{'kernel distance':>22}{'Frechet distance':>22}")
    for name, row in rows.items():
        cells = []
        for key in ("kernel", "frechet"):
            cells.append(f"{row[key]['mean']:>14.3f} ± {row[key]['spread']:5.3f}")
        print(f"{name:28}{''.join(cells)}")
    low = rows["training, two halves"]["kernel"]["mean"]
    high = rows["codes drawn independently"]["kernel"]["mean"]
    sampled = rows["drawn from the prior"]["kernel"]["mean"]
    print(
        "kernel distance of the samples, on a scale from the first row (0 %) to the last (100 %): "
        f"{(sampled - low) / (high - low):.1%}"
    )
    if result["cases"] == 1:
        print(
            "note: there is only one training case. Both halves show the same patient, so the "
            "distance in the first row is smaller than it would be between different patients"
        )
    print(
        "\ndistance to the nearest training slice: samples below the 1st percentile of held-out "
        "reconstructions are flagged as possible copies; about 1 % are flagged by chance"
    )
    for name, search in result["audit"].items():
        by_case = search["flagged_by_case"]
        suffix = f", by case of the nearest slice: {by_case}" if by_case else ""
        print(
            f"{name:10}held-out median {search['held_out_median']:.3f}, 1st percentile "
            f"{search['threshold']:.3f}; sampled median {search['drawn_median']:.3f}; flagged "
            f"{search['flagged']:.1%}{suffix}"
        )
