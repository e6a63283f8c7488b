"""Measure whether the anatomy of slices is plausible.

    network = train_network(training_images, training_labels, device)
    statistics = organ_statistics(segment(network, images))         # (N, 5 organs, 5 statistics)
    implausibility(statistics, positions, training_statistics, training_positions)

A U-Net that is trained on the segmentations of the training slices segments real and sampled
slices. Their organs are then described by a few statistics, which are compared with those of
training slices at a similar position in the volume. All label maps have half the resolution of the
slices.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from evaluation.body import label_components
from evaluation.organs import ORGANS

STEPS = 300  # number of training steps of the network
FRAGMENT = 12  # components with fewer pixels are fragments
# Smallest standard deviations of the statistics of an organ: area (pixels), parts, fragments,
# largest part and mirror overlap (fractions).
MIN_STD = np.array([20, 0.5, 0.5, 0.05, 0.05])


class UNet(nn.Module):
    """Segment slices: (N, 1, H, W) -> logits (N, 6, H / 2, W / 2). See arXiv 1505.04597."""

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64)):
        super().__init__()
        pairs = list(itertools.pairwise((1, *channels)))
        self.down = nn.ModuleList(_block(inputs, outputs) for inputs, outputs in pairs)
        self.up = nn.ModuleList(_block(low + high, low) for low, high in pairs[:0:-1])
        self.head = nn.Conv2d(channels[0], len(ORGANS), 1)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        levels = []
        for block in self.down:
            x = block(F.avg_pool2d(x, 2))
            levels.append(x)
        for block, level in zip(self.up, levels[-2::-1], strict=True):
            x = block(torch.cat([level, F.interpolate(x, level.shape[-2:])], 1))
        return self.head(x)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def train_network(images: Tensor, labels: Tensor, device: torch.device) -> UNet:
    """Train a U-Net for STEPS batches of 16 slices, of which half are mirrored left-right.

    Args:
        images: z-scored slices, (N, 1, H, W).
        labels: their segmentations, (N, H / 2, W / 2), indices of ORGANS. Slices without a label
            are not used.
        device: the device on which to train.
    """
    segmented = (labels.flatten(1).amax(1) > 0).nonzero().flatten()
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet().to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in tqdm(range(STEPS), desc="training the segmentation network", unit=" steps"):
        indices = segmented[torch.randint(len(segmented), (16,), generator=generator)]
        batch, target = images[indices], labels[indices].long()
        mirrored = torch.rand(16, generator=generator) < 0.5
        batch[mirrored] = batch[mirrored].flip(-2)
        target[mirrored] = target[mirrored].flip(-2)
        loss = F.cross_entropy(network(batch.to(device)), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def segment(network: UNet, images: Tensor) -> Tensor:
    """Segment images (N, 1, H, W); return labels (N, H / 2, W / 2) uint8 on the CPU."""
    device = network.head.weight.device
    batches = [network(batch.to(device)).argmax(1).byte().cpu() for batch in images.split(64)]
    return torch.cat(batches)


def dice(prediction: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute the Dice score of each organ over all pixels of the slices that have labels.

    Args:
        prediction, labels: both (N, h, w), indices of ORGANS.

    Returns:
        {organ: 2 |A & B| / (|A| + |B|)}, without organs that neither contains.
    """
    segmented = labels.flatten(1).amax(1) > 0
    prediction, labels = prediction[segmented], labels[segmented]
    scores = {}
    for label, organ in enumerate(ORGANS[1:], start=1):
        a, b = prediction == label, labels == label
        total = int(a.sum() + b.sum())
        if total:
            scores[organ] = 2 * int((a & b).sum()) / total
    return scores


def organ_statistics(labels: Tensor) -> np.ndarray:
    """Describe each organ in each label map, (N, h, w): return (N, 5 organs, 5 statistics).

    The statistics are the area in pixels, the number of parts (4-connected components), the number
    of fragments (parts of fewer than FRAGMENT pixels), the largest part as a fraction of the area,
    and the Dice overlap with the organ's left-right mirror image. They are 0 for absent organs.
    """
    statistics = np.zeros((len(labels), len(ORGANS) - 1, len(MIN_STD)))
    for i, organ in itertools.product(range(len(labels)), range(1, len(ORGANS))):
        mask = labels[i].numpy() == organ
        area = mask.sum()
        if area:
            sizes = np.unique(label_components(mask)[mask], return_counts=True)[1]
            fragments = (sizes < FRAGMENT).sum()
            overlap = (mask & mask[::-1]).sum() / area
            statistics[i, organ - 1] = area, len(sizes), fragments, sizes.max() / area, overlap
    return statistics


def implausibility(
    statistics: np.ndarray,
    positions: Tensor,
    training_statistics: np.ndarray,
    training_positions: Tensor,
) -> np.ndarray:
    """Return the mean absolute z score over all organs and statistics of each slice, (N,).

    The z scores are computed with the mean and standard deviation (at least MIN_STD) over the
    quarter of the training slices that is nearest by position, or over all training slices if the
    position is unknown.

    Args:
        statistics, training_statistics: results of `organ_statistics`.
        positions, training_positions: positions of the slices, 0 to 1; NaN if unknown.
    """
    scores = []
    for values, position in zip(statistics, positions.tolist(), strict=True):
        distance = np.abs(training_positions.numpy() - position)
        is_near = np.ones(len(distance), bool)
        if not np.isnan(distance).all():
            is_near = distance <= np.nanquantile(distance, 0.25)
        reference = training_statistics[is_near]
        std = np.maximum(reference.std(0), MIN_STD)
        scores.append(np.abs((values - reference.mean(0)) / std).mean())
    return np.array(scores)
