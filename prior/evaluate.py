"""Evaluate sampled slices: anatomy, texture, variety, and copies of training slices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dataset import SliceDataset
from evaluation.organs import ORGANS
from mri.files import SliceName
from prior import anatomy, realism
from prior.codes import evenly_spaced
from prior.sampling import Sampler

NUM_SPLITS = 5  # number of random halves of the training cases, for the kernel distance
MAX_REFERENCES = 512  # maximum number of held-out slices that set the threshold for copies
ENOUGH_CASES = 30  # with fewer cases in a half, the kernel distance does not detect bad anatomy
# Columns of the table: how values are printed, and what they are.
COLUMNS = {
    "implausible": (".1%", "slices with a z score above the 95th percentile of held-out slices"),
    "mean_z": (".2f", "mean |z| of the organs, compared with training slices of similar position"),
    "bone": (".1%", "mean area of bone, in % of the slice"),
    "symmetry": (".2f", "mean Dice overlap of bone with its left-right mirror image"),
    "fragments": (".2f", f"mean number of parts of bone under {anatomy.FRAGMENT} pixels"),
    "kernel_distance": (".3f", f"from half the training patients, mean over {NUM_SPLITS} halves"),
    "half_range": (".3f", "half the range of the kernel distances over these halves"),
    "coverage": (".1%", "held-out slices that have a slice of the set in their neighbourhood"),
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
    sampler: Sampler, sampled: Tensor, positions: Tensor, training: RealSlices, held_out: RealSlices
) -> dict:
    """Measure how realistic sampled slices are, and search for copies.

    The same is measured for real slices, for reconstructions, and for two sets that must fail:
    chimeras (see `realism.make_chimeras`) and slices decoded from independently sampled codes.

    Args:
        sampler: encodes and decodes slices.
        sampled: the sampled slices, (count, 1, H, W).
        positions: their positions in the volume, (count,); NaN if unknown.
        training: the training slices.
        held_out: the validation and test slices.

    Returns:
        Entries of evaluation.json:

        - "sampled_slices", "held_out_slices", "training_slices", "cases": numbers of slices of each
          kind, and of training cases;
        - "measures": {set of slices: results of `measure_features` and `measure_anatomy`};
        - "dice": {set of slices: `anatomy.dice` of the segmentation network};
        - "audit": the result of `realism.search_copies`.
    """
    device = sampler.device
    generator = torch.Generator().manual_seed(0)
    reconstructed = sampler.decode(sampler.encode(held_out.images))
    codes = sample_independently(sampler.encode(training.images), len(sampled), generator)
    sets = {
        "held-out": (held_out.images, held_out.positions),
        "reconstructed": (reconstructed, held_out.positions),
        "sampled": (sampled, positions),
        "chimeras": (realism.make_chimeras(held_out.images, generator), held_out.positions),
        "independent codes": (sampler.decode(codes), positions),
    }
    cases = [name.case for name in training.names]
    training_images = training.images.to(device)
    features = realism.Features().to(device).fit(training_images)
    # Features are compared on the CPU, because their distances are summed in float64.
    feature_sets = {"training": features(training_images).cpu()}
    for name, (images, _) in sets.items():
        feature_sets[name] = features(images.to(device)).cpu()
    measures = measure_features(feature_sets, cases, generator)
    dice = {}
    if training.labels.any():
        rows, dice = measure_anatomy(sets, training, held_out, device)
        for name, row in rows.items():
            measures[name] |= row
    count = min(len(reconstructed), MAX_REFERENCES)
    references = reconstructed[evenly_spaced(len(reconstructed), count)]
    copies = realism.search_copies(
        sampled.to(device), references.to(device), training_images, features, cases
    )
    return {
        "sampled_slices": len(sampled),
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
        for in_first in halves:
            compared = x[~in_first] if name == "training" else x
            distances.append(realism.kernel_distance(compared, features["training"][in_first]))
        half_range = (max(distances) - min(distances)) / 2
        rows[name] = {"kernel_distance": sum(distances) / NUM_SPLITS, "half_range": half_range}
        if name not in ("held-out", "reconstructed"):
            subset = x[torch.randperm(len(x), generator=generator)[:size]]
            rows[name]["coverage"] = realism.coverage(features["held-out"], subset)
    return rows


def measure_anatomy(
    sets: dict[str, tuple], training: RealSlices, held_out: RealSlices, device: torch.device
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Measure how plausible the anatomy of slices is, with a network trained on segmentations.

    Args:
        sets: set of slices -> images, (N, 1, H, W), and positions, (N,). The sets include
            "held-out" and "reconstructed".
        training, held_out: real slices. At least one training slice has a segmentation.
        device: the device of the network.

    Returns:
        A row for each set, and `anatomy.dice` for "held-out" and "reconstructed":

        - "implausible": fraction of slices whose `anatomy.implausibility` is above the 95th
          percentile of that of held-out slices;
        - "mean_z": mean `anatomy.implausibility`;
        - "bone", "symmetry", "fragments": mean area of bone as a fraction of the slice, mean Dice
          overlap of bone with its mirror image, and mean number of fragments of bone.
    """
    network = anatomy.train_network(training.images, training.labels, device)
    reference = anatomy.organ_statistics(anatomy.segment(network, training.images))
    rows, scores, dice = {}, {}, {}
    for name, (images, positions) in sets.items():
        labels = anatomy.segment(network, images)
        statistics = anatomy.organ_statistics(labels)
        scores[name] = anatomy.implausibility(statistics, positions, reference, training.positions)
        area, _, fragments, _, symmetry = statistics[:, ORGANS.index("bone") - 1].mean(0).tolist()
        area_of_slice = labels[0].numel()
        rows[name] = {"bone": area / area_of_slice, "symmetry": symmetry, "fragments": fragments}
        if name in ("held-out", "reconstructed"):
            dice[name] = anatomy.dice(labels, held_out.labels)
    threshold = scores["held-out"].quantile(0.95)
    for name, z in scores.items():
        rows[name]["implausible"] = (z > threshold).double().mean().item()
        rows[name]["mean_z"] = z.mean().item()
    return rows, dice


def sample_independently(codes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sample each position's code from the marginal frequencies: (N, h, w, ...) -> (count, ...)."""
    pool = codes.flatten(0, 2)
    return pool[torch.randint(len(pool), (count, *codes.shape[1:3]), generator=generator)]


def print_evaluation(result: dict) -> None:
    """Print the result of `evaluate_samples` as a table."""
    print(f"\n{'':17}" + "".join(f"{name:>{len(name) + 2}}" for name in COLUMNS))
    for set_name, row in result["measures"].items():
        line = f"{set_name:17}"
        for name, (spec, _) in COLUMNS.items():
            cell = format(row[name], spec) if name in row else "-"
            line += f"{cell:>{len(name) + 2}}"
        print(line)
    for name, (_, explanation) in COLUMNS.items():
        print(f"{name:17}{explanation}")
    for name, scores in result["dice"].items():
        text = ", ".join(f"{organ} {score:.2f}" for organ, score in scores.items())
        print(f"Dice of the segmentation network, {name} slices: {text or 'no segmentations'}")
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
    template = (
        "held-out median {held_out_median:.3f}, 1st percentile {threshold:.3f}; sampled median "
        "{sampled_median:.3f}; flagged {flagged:.1%}"
    )
    for name, search in result["audit"].items():
        by_case = search["flagged_by_case"]
        suffix = f", by case of the nearest slice: {by_case}" if by_case else ""
        print(f"{name:10}{template.format(**search)}{suffix}")
