"""Evaluate sampled slices: anatomy, texture, variety, and copies of training slices."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset import SliceDataset
from evaluation.organs import ORGANS
from mri.files import SliceName
from prior import anatomy, realism
from prior.sampling import Sampler

NUM_SPLITS = 5  # number of random halves of the training cases, for the kernel distance
ENOUGH_CASES = 30  # with fewer cases in a half, the kernel distance does not detect bad anatomy
# Columns of the table, and how their values are printed.
COLUMNS = {
    "implausible": ".1%",
    "mean_z": ".2f",
    "kernel_distance": ".3f",
    "half_range": ".3f",
    "coverage": ".1%",
}


class RealSlices(NamedTuple):
    """The N slices of one or more splits that are not constant."""

    images: Tensor  # (N, 1, H, W), z-scored
    labels: Tensor  # (N, H / 2, W / 2) uint8, indices of ORGANS; 0: others, or no segmentation
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
        split_labels[split_labels >= len(ORGANS)] = 0
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
        - "measures": {set of slices: {name in COLUMNS: value}}, from `measure_anatomy` and
          `measure_features`;
        - "dice": Dice of the network for held-out slices, from `measure_anatomy`;
        - "audit": the result of `realism.search_copies`.
    """
    device = sampler.device
    generator = torch.Generator().manual_seed(sampler.seed)
    reconstructed = sampler.decode(sampler.encode(held_out.images))
    codes = sample_independently(sampler.encode(training.images), len(sampled), generator)
    sets = {
        "held-out": (held_out.images, held_out.positions),
        "reconstructed": (reconstructed, held_out.positions),
        "sampled": (sampled, positions),
        "chimeras": (realism.make_chimeras(held_out.images, generator), held_out.positions),
        "independent codes": (sampler.decode(codes), positions),
    }
    features = realism.Features().to(device).fit(training.images.to(device))
    cases = [name.case for name in training.names]
    # Distances are computed in float64 on the CPU, because mps has no float64.
    feature_sets = {"training": features(training.images.to(device)).cpu()}
    for name, (images, _) in sets.items():
        feature_sets[name] = features(images.to(device)).cpu()
    measures = measure_features(feature_sets, cases, generator)
    dice = {}
    if training.labels.any():
        rows, dice = measure_anatomy(sets, training, held_out, device)
        measures = {name: rows.get(name, {}) | measures[name] for name in measures}
    copies = realism.search_copies(
        sampled.to(device),
        reconstructed.to(device),
        training.images.to(device),
        features,
        cases,
        progress=partial(tqdm, desc="searching for copies", unit=" shifts"),
    )
    return {
        "drawn": len(sampled),
        "held_out_slices": len(held_out.images),
        "training_slices": len(training.images),
        "cases": len(set(cases)),
        "measures": measures,
        "dice": dice,
        "audit": copies,
    }


def measure_features(
    features: dict[str, Tensor], cases: list[str], generator: torch.Generator
) -> dict[str, dict[str, float]]:
    """Measure kernel distances and coverage.

    Args:
        features: set of slices -> features, (N, F). The sets include "training" and "held-out".
        cases: case of each training slice.
        generator: random generator on the CPU.

    Returns:
        A row for each set:

        - "kernel_distance", "half_range": mean and half the range of the kernel distances from
          NUM_SPLITS random halves of the training cases. The "training" row has the distance
          between the two halves, which have no case in common;
        - "coverage": `realism.coverage` of the held-out slices by random slices of the set, as many
          as the smallest set has. Held-out slices and their reconstructions cover themselves.
    """
    halves = [realism.split_cases(cases, generator) for _ in range(NUM_SPLITS)]
    size = min(map(len, features.values()))
    rows = {}
    for name, x in features.items():
        distances = []
        for first, second in halves:
            compared = x[second] if name == "training" else x
            distances.append(realism.kernel_distance(compared, features["training"][first]))
        half_range = (max(distances) - min(distances)) / 2
        rows[name] = {"kernel_distance": float(np.mean(distances)), "half_range": half_range}
        if name not in ("held-out", "reconstructed"):
            subset = x[torch.randperm(len(x), generator=generator)[:size]]
            rows[name]["coverage"] = realism.coverage(features["held-out"], subset)
    return rows


def measure_anatomy(
    sets: dict[str, tuple[Tensor, Tensor]],
    training: RealSlices,
    held_out: RealSlices,
    device: torch.device,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Measure how plausible the anatomy of slices is, with a network trained on segmentations.

    Args:
        sets: set of slices -> images, (N, 1, H, W), and positions, (N,). The first sets are
            "held-out" and "reconstructed".
        training, held_out: real slices. At least one training slice has a segmentation.
        device: the device of the network.

    Returns:
        A row for each set, and `anatomy.dice` for "held-out" and "reconstructed":

        - "implausible": fraction of slices whose `anatomy.implausibility` is above the 95th
          percentile of that of held-out slices;
        - "mean_z": mean `anatomy.implausibility`.
    """
    network = anatomy.train_network(training.images, training.labels, device)
    reference = anatomy.organ_statistics(anatomy.segment(network, training.images))
    scores, dice = {}, {}
    for name, (images, positions) in sets.items():
        labels = anatomy.segment(network, images)
        statistics = anatomy.organ_statistics(labels)
        scores[name] = anatomy.implausibility(statistics, positions, reference, training.positions)
        if name in ("held-out", "reconstructed"):
            dice[name] = anatomy.dice(labels, held_out.labels)
    threshold = np.quantile(scores["held-out"], 0.95)
    rows = {}
    for name, z in scores.items():
        rows[name] = {"implausible": float((z > threshold).mean()), "mean_z": float(z.mean())}
    return rows, dice


def sample_independently(codes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sample each code independently from the marginal frequencies: (N, h, w) -> (count, h, w)."""
    pool = codes.flatten()
    return pool[torch.randint(len(pool), (count, *codes.shape[1:]), generator=generator)]


def print_evaluation(result: dict) -> None:
    """Print the result of `evaluate_samples` as a table."""
    print(f"\n{'':18}" + "".join(f"{name:>16}" for name in COLUMNS))
    for name, row in result["measures"].items():
        cells = [format(row[key], COLUMNS[key]) if key in row else "-" for key in COLUMNS]
        print(f"{name:18}" + "".join(f"{cell:>16}" for cell in cells))
    print(
        "implausible: slices whose organs differ more from those of training slices at a similar\n"
        "  position (mean_z: mean absolute z score) than those of 95 % of the held-out slices\n"
        "kernel_distance: from half the training patients, mean ± half_range over "
        f"{NUM_SPLITS} random halves\n"
        "coverage: held-out slices that have a slice of the set in their neighbourhood"
    )
    for name, scores in result["dice"].items():
        values = [f"{organ} {score:.2f}" for organ, score in scores.items()]
        text = ", ".join(values) or "no segmentations"
        print(f"Dice of the segmentation network, {name} slices: {text}")
    if not result["dice"]:
        print("note: anatomy is not measured, because no training slice has a segmentation")
    if result["cases"] < 2 * ENOUGH_CASES:
        print(
            f"note: kernel distances need {2 * ENOUGH_CASES} training cases to detect disordered "
            f"anatomy; there are {result['cases']}"
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
