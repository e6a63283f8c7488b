"""The adversarial loss of --gan."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Tells patches of slices from patches of reconstructions (arXiv 1611.07004): (B, 1, H, W) -> (B, 1, H/8, W/8).

    Each number is high where its 42 x 42 pixels look real. Beside a slice it is shown what a 3 x 3 mean takes from it,
    enlarged: reconstructions lack the finest detail first, and there it is too faint to be noticed among the rest.
    """

    def __init__(self, channels: int = 16):
        super().__init__()
        # The first convolution has no stride: those with one alone would push reconstructions towards a grid.
        layers: list[nn.Module] = [
            nn.Conv2d(2, channels, kernel_size=3, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for inputs, outputs in itertools.pairwise(
            (channels, 2 * channels, 4 * channels, 8 * channels)
        ):
            layers.append(nn.Conv2d(inputs, outputs, kernel_size=4, stride=2, padding=1))
            if inputs > channels:
                layers.append(
                    nn.GroupNorm(8, outputs)
                )  # of each slice by itself, whatever the batch
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * channels, 1, kernel_size=3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        mean = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
        return self.layers(torch.cat([images, 4 * (images - mean)], 1)).float()

    def hinge_loss(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """What the discriminator is trained by (arXiv 1705.02894): (B, 1, H, W) twice -> (); 2: it sees nothing."""
        images = images.to(reconstructions.dtype)  # rounding must not tell one from the other
        return F.relu(1 - self(images)).mean() + F.relu(1 + self(reconstructions)).mean()


def adversarial_losses(discriminator, images, reconstructions, reconstruction_loss, gan_weight):
    """Interim."""
    import torch.distributed as dist

    from training.distributed import get_world_size

    leaf = reconstructions.detach().requires_grad_()
    adversarial = -discriminator(leaf).mean()
    reconstruction = reconstruction_loss(leaf, images)
    pulls = [torch.autograd.grad(loss, leaf)[0].float() for loss in (reconstruction, adversarial)]
    squares = torch.stack([pull.square().sum() for pull in pulls])
    if get_world_size() > 1:
        dist.all_reduce(squares)
    weight = gan_weight * (squares[0] / squares[1].clamp_min(1e-12)).sqrt().clamp_max(1e4)
    push = (reconstructions.float() * (weight * pulls[1]).to(reconstructions)).sum()
    hinge = discriminator.hinge_loss(images, leaf.detach())
    return push - push.detach() + adversarial.detach().float(), hinge, weight
