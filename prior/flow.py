"""A rectified flow over the VQ-VAE's latents, from which new slices are sampled.

    flow = FlowPrior(latent_channels=64, grid=(64, 32))
    flow.pca.fit(latents)                                 # (N, 64, 64, 32), before quantisation
    losses = flow.loss(flow.pca.transform(latents), noise, time, position, given)
    components = flow.sample(position, generator, steps=40, guidance=1.5)
    codes = vqvae.vector_quantization(flow.pca.inverse_transform(components)).indices

The flow moves noise to data along straight lines (Liu et al. 2022, arXiv 2209.03003; Lipman et al.
2022, arXiv 2210.02747): at time t, from 0 to 1, x = (1 - t) noise + t data, and a network learns
the velocity, data - noise. The data are the principal components of the latents.

Shapes: B slices; latents (B, D, h, w); components (B, C, h, w); positions of the slices in their
volumes (B,), from 0 to 1, or NaN if unknown; `given` (B,) int64, the number of leading rows of each
slice that are already data, so that only the others are sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prior.pca import PCA
from prior.unet import UNet

# Factors on the odds of noise to data, (1 - t) / t (see `shift_time`). With 3 in sampling too, the
# last steps would be too large, and fine texture would be lost.
TRAINING_SHIFT = 3
SAMPLING_SHIFT = 1.5
VARIANCE = 0.1  # rough fraction of a component's variance that its surroundings do not explain
RENEWED = 0.4  # amplitude of the new noise in each step of sampling


class FlowPrior(nn.Module):
    """A U-Net that predicts velocities, and the principal components on which it works.

    Args:
        latent_channels: D.
        grid: h and w.
        components: C, number of principal components, at most D.
        channels: width of the U-Net on the grid of latents, a multiple of 12. The three coarser
            grids are 4/3, 8/3 and 4 times as wide.
    """

    def __init__(
        self, latent_channels: int, grid: tuple[int, int], components: int = 8, channels: int = 48
    ):
        self.arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.grid = tuple(grid)
        self.pca = PCA(latent_channels, components)
        widths = tuple(channels * n // 3 for n in (3, 4, 8, 12))
        self.unet = UNet(components + 1, components, self.grid, widths)

    def velocity(
        self, x: Tensor, time: Tensor, position: Tensor, given: Tensor, attend: bool = True
    ) -> Tensor:
        """Predict the velocity, (B, C, h, w), at times (B,); it has no meaning in given rows.

        The U-Net's output is added to the best linear prediction from each value alone, for data of
        variance VARIANCE (as in Karras et al. 2022, arXiv 2206.00364, section 5).
        """
        is_given = self.mask(given).expand(-1, 1, *x.shape[2:])
        inputs = torch.cat([x, is_given.to(x.dtype)], 1)
        output = self.unet(inputs, time, position, attend).float()
        t = time[:, None, None, None]
        total = VARIANCE * t**2 + (1 - t) ** 2
        return ((VARIANCE * t - (1 - t)) * x + total.sqrt() * output) / total

    def mask(self, given: Tensor) -> Tensor:
        """Return which rows are given, (B, 1, h, 1) bool."""
        rows = torch.arange(self.grid[0], device=given.device)
        return (rows < given[:, None])[:, None, :, None]

    def loss(
        self, components: Tensor, noise: Tensor, time: Tensor, position: Tensor, given: Tensor
    ) -> Tensor:
        """Compute the weighted mean squared error of the velocity from noise to each slice, (B,).

        Components are weighted by their standard deviation in the latents. The first ones describe
        tissues, and the last ones little more than noise. Given rows are not counted.
        """
        is_given = self.mask(given)
        x = noise.lerp(components, time[:, None, None, None]).where(~is_given, components)
        errors = self.velocity(x, time, position, given) - (components - noise)
        errors = errors.masked_fill(is_given, 0).square().mean(3).sum(2)  # (B, C)
        errors = errors / (self.grid[0] - given)[:, None]
        return errors @ (self.pca.stds / self.pca.stds.sum())

    @torch.no_grad()
    def sample(
        self,
        position: Tensor,
        generator: torch.Generator,
        steps: int,
        guidance: float,
        prefix: Tensor | None = None,
        progress: Callable = iter,
    ) -> Tensor:
        """Sample components, (B, C, h, w), reproducibly for the same generator state and arguments.

        Each step predicts the data and the noise, replaces a part of the noise (as in Song et al.
        2021, arXiv 2010.02502, equation 12), and mixes them for the next time. Later steps can
        therefore correct errors of earlier ones.

        Args:
            position: positions of the slices, (B,).
            generator: random generator on the CPU.
            steps: number of steps.
            guidance: factor on the difference between the velocity and that of a weaker network,
                which knows neither the position (Ho and Salimans 2022, arXiv 2207.12598) nor, by
                attention, distant places (Ahn et al. 2024, arXiv 2403.17377). It decays to 1 as the
                noise vanishes; otherwise, it would exaggerate texture. 1: no guidance.
            prefix: components of the given rows, (1 or B, C, rows, w).
            progress: a function such as tqdm, which wraps the range of steps.
        """
        count, rows = len(position), 0 if prefix is None else prefix.shape[2]

        shape = (count, len(self.pca.stds), *self.grid)
        x = torch.randn(shape, generator=generator).to(position.device)
        unknown = torch.full_like(position, math.nan)
        given = torch.full((count,), rows, device=position.device)
        for step in progress(range(steps)):
            if rows:
                x[:, :, :rows] = prefix
            time = shift_time(step / steps, SAMPLING_SHIFT)
            next_time = shift_time((step + 1) / steps, SAMPLING_SHIFT)
            times = torch.full_like(position, time)
            velocity = self.velocity(x, times, position, given)
            if guidance != 1:
                weaker = self.velocity(x, times, unknown, given, attend=False)
                velocity = weaker.lerp(velocity, 1 + (guidance - 1) * (1 - time))
            data, noise = x + (1 - time) * velocity, x - time * velocity
            fresh = RENEWED * torch.randn(shape, generator=generator).to(x.device)
            x = (math.sqrt(1 - RENEWED**2) * noise + fresh).lerp(data, next_time)
        if rows:
            x[:, :, :rows] = prefix
        return x


def shift_time(time: Tensor | float, shift: float) -> Tensor | float:
    """Shift times, 0 to 1, towards the noise (Esser et al. 2024, arXiv 2403.03206, section 5.3.2).

    Neighbouring latents are similar, so the anatomy emerges when there is still much noise.
    """
    return time / (time + shift * (1 - time))
