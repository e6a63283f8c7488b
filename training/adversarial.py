"""Compute the adversarial loss of `--gan`: a patch discriminator with VQGAN's adaptive weight."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from training.distributed import get_world_size

# Learning rate of the discriminator, as a fraction of the model's. At the model's own rate, it soon
# separates all reconstructions from slices by a wide margin, and its gradients then teach little.
DISCRIMINATOR_RATE = 0.1


class PatchDiscriminator(nn.Module):
    """Distinguish patches of slices from patches of reconstructions (arXiv 1611.07004).

    The second input channel is the slice's high-frequency residual (the slice minus its 3 x 3
    mean), amplified four times, because missing fine detail is hard to see in the slice itself.
    """

    def __init__(self, channels: int = 16):
        super().__init__()
        # The first convolution has stride 1. If a strided convolution saw the slice directly, its
        # gradient would imprint a grid pattern on the reconstructions.
        layers: list[nn.Module] = [nn.Conv2d(2, channels, kernel_size=3, padding=1)]
        layers.append(nn.LeakyReLU(0.2))
        widths = (channels, 2 * channels, 4 * channels, 8 * channels)
        for inputs, outputs in itertools.pairwise(widths):
            layers.append(nn.Conv2d(inputs, outputs, kernel_size=4, stride=2, padding=1))
            if inputs > channels:
                layers.append(nn.GroupNorm(8, outputs))  # per slice, unlike batch norm
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(8 * channels, 1, kernel_size=3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:  # (B, 1, H, W)
        """Return logits (B, 1, H/8, W/8); a high logit means that its 42 x 42 patch looks real."""
        mean = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
        detail = 4 * (images - mean)  # (B, 1, H, W)
        return self.layers(torch.cat([images, detail], 1)).float()

    def hinge_loss(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Return the discriminator's hinge loss (arXiv 1705.02894), which is 2 if all logits are 0.

        Args:
            images, reconstructions: both (B, 1, H, W).
        """
        # If only the reconstructions were rounded to bfloat16, the rounding would identify them.
        images = images.to(reconstructions.dtype)
        return F.relu(1 - self(images)).mean() + F.relu(1 + self(reconstructions)).mean()


def adversarial_losses(
    discriminator: PatchDiscriminator,
    images: Tensor,
    reconstruction: Tensor,
    reconstruction_loss: Callable[[Tensor, Tensor], Tensor],
    gan_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the adversarial losses of a batch, and their adaptive weight.

    The adaptive weight scales the gradient of the generator's loss, but not its returned value. It
    makes the norm of this gradient `gan_weight` times that of the reconstruction loss's gradient,
    both with respect to the reconstruction. VQGAN (arXiv 2012.09841, equation 7) compares the
    gradients at the generator's last layer instead. The weight is at most 1e4 `gan_weight`.

    Args:
        discriminator: the discriminator, which only its own loss trains.
        images: (B, 1, H, W).
        reconstruction: (B, 1, H, W), attached to the generator's graph.
        reconstruction_loss: function (reconstruction, images) -> scalar.
        gan_weight: ratio of the gradients' norms, adversarial loss to reconstruction loss.

    Returns:
        Three scalars: the generator's loss, the discriminator's loss, and the adaptive weight.
    """
    leaf = reconstruction.detach().requires_grad_()
    adversarial = -discriminator(leaf).mean()
    losses = (reconstruction_loss(leaf, images), adversarial)
    gradients = [torch.autograd.grad(loss, leaf)[0].float() for loss in losses]  # (B, 1, H, W)
    squares = torch.stack([gradient.square().sum() for gradient in gradients])  # (2,)
    if get_world_size() > 1:  # not `distributed.all_reduce_sum`, which waits for the device
        dist.all_reduce(squares)
    ratio = squares[0] / squares[1].clamp_min(1e-12)
    weight = gan_weight * ratio.sqrt().clamp_max(1e4)
    # The derivative of `product` with respect to the reconstruction is `gradient`, which is
    # constant. Subtracting the detached product leaves the adversarial loss as the value.
    gradient = (weight * gradients[1]).to(reconstruction)
    product = (reconstruction.float() * gradient).sum()
    generator_loss = product - product.detach() + adversarial.detach().float()
    return generator_loss, discriminator.hinge_loss(images, leaf.detach()), weight
