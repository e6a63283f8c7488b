"""Evaluate sampled slices: anatomy, texture, variety, and copies of training slices."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset import SliceDataset
from mri.files import SliceName
from prior import anatomy, realism
from prior.sampling import Sampler

NUM_SPLITS = 5  # number of random splits of the patients over which kernel distances are averaged
ENOUGH_CASES = 30  # number of patients in each group that makes a kernel distance reliable


class RealSlices(NamedTuple):
    """The N slices of one or more splits that are not constant."""

    images: Tensor  # (N, 1, H, W), z-scored
    labels: Tensor  # (N, H / 2, W / 2) uint8, indices of ORGANS; zeros without a segmentation
    positions: Tensor  # (N,), 0 to 1; NaN if unknown
    names: list[SliceName]


def read_slices(*splits: SliceDataset) -> RealSlices:
    """Read splits with their segmentations."""
    images, labels, positions, names = [], [], [], []
    for split in splits:
        indices = (~split.constant).nonzero().flatten()
        split_labels = split.labels()
        if split_labels is None:
            split_labels = torch.zeros(len(split), *split.size, dtype=torch.uint8)
        images.append(split.batch(indices))
        labels.append(split_labels[indices, ::2, ::2])
        positions.append(split.positions[indices])
        names += [split.names[i] for i in indices.tolist()]
    return RealSlices(torch.cat(images), torch.cat(labels), torch.cat(positions), names)


def evaluate_samples(
    sampler: Sampler,
    sampled: Tensor,
    positions: Tensor,
    training: RealSlices,
    held_out: RealSlices,
) -> dict:
    """Measure how realistic sampled slices are, and search for copies.

    The same is measured for real slices, for reconstructions, and for two sets that must fail:
    chimeras (see `realism.make_chimeras`) and slices decoded from independently sampled codes.

    Args:
        sampler: the VQ-VAE, the device and the seed.
        sampled: the sampled slices, (count, 1, H, W).
        positions: their positions in the volume, (count,); NaN if unknown.
        training: the training slices.
        held_out: the validation and test slices.

    Returns:
        Entries of evaluation.json:

        - "drawn", "held_out_slices", "training_slices", "cases": numbers of sampled, held-out and
          training slices, and of training cases;
        - "anatomy": the result of `measure_anatomy`; None if no training slice has a segmentation;
        - "kernel": {set of slices: {"mean", "spread"}}, the kernel distance from a random half of
          the training cases: mean and half the range over NUM_SPLITS halves. "training" is the
          other half;
        - "coverage": {set of slices: `realism.coverage` of the held-out slices}, by equally many
          random slices of each set;
        - "coverage_slices": that number;
        - "audit": the result of `realism.search_copies`.
    """
    device = sampler.device
    generator = torch.Generator().manual_seed(sampler.options.seed)
    cases = [name.case for name in training.names]
    reconstructed = sampler.decode(sampler.encode(held_out.images))
    codes = sample_independently(sampler.encode(training.images), len(sampled), generator)
    sets = {
        "held-out": (held_out.images, held_out.positions),
        "reconstructed": (reconstructed, held_out.positions),
        "sampled": (sampled, positions),
        "chimeras": (realism.make_chimeras(held_out.images, generator), held_out.positions),
        "independent codes": (sampler.decode(codes), positions),
    }
    result = {
        "drawn": len(sampled),
        "held_out_slices": len(held_out.images),
        "training_slices": len(training.images),
        "cases": len(set(cases)),
        "anatomy": measure_anatomy(sets, training, held_out, device),
    }
    # Distances are computed in float64 on the CPU, because mps has no float64.
    network = realism.Features().to(device).fit(training.images.to(device))
    features = {"training": network(training.images.to(device)).cpu()}
    for name, (images, _) in sets.items():
        features[name] = network(images.to(device)).cpu()
    halves = [realism.split_cases(cases, generator) for _ in range(NUM_SPLITS)]
    size = min(map(len, features.values()))
    result |= {"kernel": {}, "coverage": {}, "coverage_slices": size}
    for name, x in features.items():
        distances = []
        for first, second in halves:
            compared = x[second] if name == "training" else x
            distances.append(realism.kernel_distance(compared, features["training"][first]))
        spread = (max(distances) - min(distances)) / 2
        result["kernel"][name] = {"mean": float(np.mean(distances)), "spread": spread}
        if name not in ("held-out", "reconstructed"):  # they cover themselves
            subset = x[torch.randperm(len(x), generator=generator)[:size]]
            result["coverage"][name] = realism.coverage(features["held-out"], subset)
    result["audit"] = realism.search_copies(
        sampled.to(device),
        reconstructed.to(device),
        training.images.to(device),
        network,
        cases,
        progress=partial(tqdm, desc="searching for copies", unit=" shifts"),
    )
    return result


def measure_anatomy(
    sets: dict[str, tuple[Tensor, Tensor]],
    training: RealSlices,
    held_out: RealSlices,
    device: torch.device,
) -> dict | None:
    """Measure how plausible the anatomy of several sets of slices is.

    Args:
        sets: name -> slices, (N, 1, H, W), and their positions, (N,). The names include "held-out"
            and "reconstructed".
        training, held_out: real slices with segmentations.
        device: the device of the segmentation network.

    Returns:
        - "mean_z": {set: mean of `anatomy.implausibility`};
        - "implausible": {set: fraction of slices above the 95th percentile of held-out slices};
        - "dice": {"held-out" or "reconstructed": `anatomy.dice` of the segmentation network}.

        None if no training slice has a segmentation.
    """
    if not training.labels.any():
        return None
    network = anatomy.train_network(training.images, training.labels, device)
    reference = anatomy.organ_statistics(anatomy.segment(network, training.images))
    result = {"mean_z": {}, "implausible": {}, "dice": {}}
    threshold = None
    for name, (images, positions) in sets.items():
        labels = anatomy.segment(network, images)
        statistics = anatomy.organ_statistics(labels)
        scores = anatomy.implausibility(statistics, positions, reference, training.positions)
        if name == "held-out":
            threshold = np.quantile(scores, 0.95)
        if name in ("held-out", "reconstructed"):
            result["dice"][name] = anatomy.dice(labels, held_out.labels)
        result["mean_z"][name] = float(scores.mean())
        result["implausible"][name] = float((scores > threshold).mean())
    return result


def sample_independently(codes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sample each code independently from the marginal frequencies: (N, h, w) -> (count, h, w)."""
    pool = codes.flatten()
    return pool[torch.randint(len(pool), (count, *codes.shape[1:]), generator=generator)]


def print_evaluation(result: dict) -> None:
    """Print the result of `evaluate_samples` as a table."""
    anatomy_scores = result["anatomy"] or {"mean_z": {}, "implausible": {}, "dice": {}}
    print(f"\n{'':20}{'implausible':>12}{'mean |z|':>10}{'kernel distance':>18}{'coverage':>10}")
    for name, kernel in result["kernel"].items():
        print(
            f"{name:20}"
            f"{_format(anatomy_scores['implausible'].get(name), '.1%'):>12}"
            f"{_format(anatomy_scores['mean_z'].get(name), '.2f'):>10}"
            f"{kernel['mean']:>10.3f} ± {kernel['spread']:5.3f}"
            f"{_format(result['coverage'].get(name), '.1%'):>10}"
        )
    print(
        "implausible: slices whose organs differ from those of training slices at a similar "
        "position (mean |z|) by more than in 95 % of held-out slices\n"
        "kernel distance: from half the training patients, mean ± half the range over "
        f"{NUM_SPLITS} splits; training: distance between the halves\n"
        f"coverage: held-out slices with one of {result['coverage_slices']} slices of the set "
        "among their nearest neighbours"
    )
    for name, scores in anatomy_scores["dice"].items():
        values = [f"{organ} {_format(score, '.2f')}" for organ, score in scores.items()]
        print(f"Dice of the segmentation network, {name} slices: {', '.join(values)}")
    if not result["anatomy"]:
        print("note: anatomy is not measured, because the training slices have no segmentations")
    if result["cases"] < 2 * ENOUGH_CASES:
        print(
            f"note: the training split has {result['cases']} cases; a kernel distance between "
            f"fewer than {ENOUGH_CASES} and {ENOUGH_CASES} does not detect disordered anatomy"
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


def _format(value: float | None, specification: str) -> str:
    """Format a number, or return a dash if there is none."""
    return "-" if value is None else format(value, specification)
