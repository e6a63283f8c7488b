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
MIN_STD = torch.tensor([20, 0.5, 0.5, 0.05, 0.05], dtype=torch.float64)


class UNet(nn.Module):
    """Segment slices: (N, 1, H, W) -> logits (N, 6, H / 2, W / 2). See arXiv 1505.04597."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([_block(1, 16), _block(16, 32), _block(32, 64)])
        self.up = nn.ModuleList([_block(32 + 64, 32), _block(16 + 32, 16)])
        self.head = nn.Conv2d(16, len(ORGANS), 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.down[0](F.avg_pool2d(images, 2))  # (N, 16, H / 2, W / 2)
        middle = self.down[1](F.avg_pool2d(fine, 2))  # (N, 32, H / 4, W / 4)
        coarse = self.down[2](F.avg_pool2d(middle, 2))  # (N, 64, H / 8, W / 8)
        x = self.up[0](torch.cat([middle, F.interpolate(coarse, middle.shape[-2:])], 1))
        x = self.up[1](torch.cat([fine, F.interpolate(x, fine.shape[-2:])], 1))
        return self.head(x)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def train_network(images: Tensor, labels: Tensor, device: torch.device) -> UNet:
    """Train a U-Net for STEPS batches of 16 slices; every other batch is mirrored left-right.

    Args:
        images: z-scored slices, (N, 1, H, W).
        labels: their segmentations, (N, H / 2, W / 2), indices of ORGANS. Slices without a label
            are not used.
        device: the device on which to train.
    """
    segmented = (labels.flatten(1).amax(1) > 0).nonzero().flatten()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet().to(device)
        batches = segmented[torch.randint(len(segmented), (STEPS, 16))]
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    progress = tqdm(batches, desc="training the segmentation network", unit=" steps")
    for step, indices in enumerate(progress):
        batch, target = images[indices], labels[indices].long()
        if step % 2:
            batch, target = batch.flip(-2), target.flip(-2)
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
    pairs = len(ORGANS) * labels[segmented].long() + prediction[segmented]
    confusion = torch.bincount(pairs.flatten(), minlength=len(ORGANS) ** 2).view(len(ORGANS), -1)
    totals = confusion.sum(0) + confusion.sum(1)
    scores = (2 * confusion.diagonal() / totals).tolist()
    return {organ: scores[i] for i, organ in enumerate(ORGANS) if i and totals[i]}


def organ_statistics(labels: Tensor) -> Tensor:
    """Describe each organ in each label map, (N, h, w): return (N, 5 organs, 5 statistics) float64.

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
    return torch.from_numpy(statistics)


def implausibility(
    statistics: Tensor, positions: Tensor, training_statistics: Tensor, training_positions: Tensor
) -> Tensor:
    """Return the mean absolute z score over all organs and statistics of each slice, (N,).

    The z scores are computed with the mean and standard deviation (at least MIN_STD) over the
    quarter of the training slices that is nearest by position, or over all training slices if the
    position is unknown.

    Args:
        statistics, training_statistics: results of `organ_statistics`.
        positions, training_positions: positions of the slices, 0 to 1; NaN if unknown.
    """
    scores = []
    for values, position in zip(statistics, positions, strict=True):
        distance = (training_positions - position).abs().nan_to_num(1)
        near = training_statistics[distance <= distance.quantile(0.25)]
        std, mean = torch.std_mean(near, 0, correction=0)
        scores.append(((values - mean) / torch.maximum(std, MIN_STD)).abs().mean())
    return torch.stack(scores)
