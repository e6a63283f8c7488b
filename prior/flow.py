"""A rectified flow over the VQ-VAE's latents, from which new slices are sampled.

    flow = FlowPrior(latent_channels=64, grid=(64, 32))
    flow.fit_components(latents)                          # (N, 64, 64, 32), before quantisation
    losses = flow.loss(flow.to_components(latents), noise, time, position)
    components = flow.sample(position, generator)
    codes = vqvae.vector_quantization(flow.to_latents(components)).indices

The flow moves noise to data along straight lines (Liu et al. 2022, arXiv 2209.03003; Lipman et al.
2022, arXiv 2210.02747): at time t, from 0 to 1, x = (1 - t) noise + t data, and a U-Net learns the
velocity, data - noise. The data are the principal components of the latents; components with little
variance are left out.

Shapes: B slices; latents (B, D, h, w); components (B, C, h, w); positions of the slices in their
volumes (B,), from 0 to 1, or NaN if unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prior.unet import UNet

SHIFT = 3  # odds of noise, by which times are shifted (see `shift_time`)


class FlowPrior(nn.Module):
    """A U-Net, and the principal components on which it works.

    Args:
        latent_channels: D.
        grid: h and w.
        components: C, number of principal components, at most D.
        channels: width of the U-Net at its finest grid, a multiple of 8. The two coarser grids are
            2 and 3 times as wide.

    Raises:
        ValueError: if `components` or `channels` is invalid.
    """

    def __init__(
        self, latent_channels: int, grid: tuple[int, int], components: int = 8, channels: int = 64
    ):
        self.arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        if components > latent_channels:
            raise ValueError(f"components is {components}; expected at most {latent_channels}")
        if channels % 8 or channels < 8:
            raise ValueError(f"channels is {channels}; expected a multiple of 8")
        self.grid = tuple(grid)
        self.unet = UNet(components, self.grid, (channels, 2 * channels, 3 * channels))
        self.register_buffer("mean", torch.zeros(latent_channels))
        # Columns are principal directions, multiplied by the components' standard deviations.
        self.register_buffer("directions", torch.eye(latent_channels, components))

    # ------------------------------------------------ principal components

    @torch.no_grad()
    def fit_components(self, latents: Tensor) -> float:
        """Set the principal components of latents (N, D, h, w), each with a variance of 1.

        Returns:
            The fraction of the latents' variance that the components contain.
        """
        vectors = latents.movedim(1, -1).flatten(0, 2).float()  # (N h w, D)
        self.mean.copy_(vectors.mean(0))
        covariance = torch.cov(vectors.T, correction=0).cpu().double()
        variances, directions = torch.linalg.eigh(covariance)  # in ascending order
        variances = variances.flip(0).clamp_min(0)
        directions = directions.flip(1)
        # An eigenvector's sign is arbitrary. Here its largest entry is always positive.
        largest = directions.abs().argmax(0, keepdim=True)
        directions = directions * directions.gather(0, largest).sign()
        # The minimum prevents that rounding errors in components without variance are amplified.
        stds = (variances + 1e-6 * variances[0] + 1e-12).sqrt()
        count = self.directions.shape[1]
        self.directions.copy_((directions * stds)[:, :count])
        return float(variances[:count].sum() / variances.sum().clamp_min(1e-12))

    def to_components(self, latents: Tensor) -> Tensor:  # (B, D, h, w) -> (B, C, h, w)
        inverse = self.directions / self.directions.square().sum(0)
        return torch.einsum("bdhw,dc->bchw", latents - self.mean[:, None, None], inverse)

    def to_latents(self, components: Tensor) -> Tensor:  # (B, C, h, w) -> (B, D, h, w)
        latents = torch.einsum("bchw,dc->bdhw", components, self.directions)
        return latents + self.mean[:, None, None]

    # ------------------------------------------------ velocities

    def loss(self, components: Tensor, noise: Tensor, time: Tensor, position: Tensor) -> Tensor:
        """Compute the weighted mean squared error of the velocity of each slice, (B,).

        Components are weighted by their standard deviation in the latents. The first ones describe
        tissues, and the last ones little more than noise.

        Args:
            components: data, (B, C, h, w).
            noise: standard normal noise of the same shape.
            time: times, (B,), 0 to 1.
            position: positions of the slices, (B,).
        """
        x = noise.lerp(components, time[:, None, None, None])
        velocity = self.unet(x, time, position).float()
        errors = (velocity - (components - noise)).square().mean((2, 3))  # (B, C)
        stds = self.directions.norm(dim=0)
        return errors @ (stds / stds.sum())

    @torch.no_grad()
    def sample(
        self,
        position: Tensor,
        generator: torch.Generator,
        steps: int = 25,
        guidance: float = 1.0,
        prefix: Tensor | None = None,
        prefix_rows: int = 0,
        progress: Callable = iter,
    ) -> Tensor:
        """Sample components, (B, C, h, w), reproducibly for the same generator state and arguments.

        Args:
            position: positions of the slices, (B,).
            generator: random generator on the CPU.
            steps: number of steps of Heun's method, each with two evaluations of the velocity.
            guidance: factor on the difference between the velocities for the known and for an
                unknown position (Ho and Salimans 2022, arXiv 2207.12598); 1: no guidance.
            prefix: components, (B, C, h, w), whose first rows are kept; the others are sampled.
            prefix_rows: number of rows that are kept.
            progress: a function such as tqdm, which wraps the range of steps.
        """
        shape = (len(position), self.directions.shape[1], *self.grid)
        noise = torch.randn(shape, generator=generator).to(position.device)
        unknown = torch.full_like(position, math.nan)

        def predict_velocity(x: Tensor, time: float) -> Tensor:
            times = torch.full_like(position, time)
            velocity = self.unet(x, times, position)
            if guidance != 1:
                velocity = self.unet(x, times, unknown).lerp(velocity, guidance)
            if prefix_rows:  # the kept rows move straight from the noise to the prefix
                velocity[:, :, :prefix_rows] = (prefix - noise)[:, :, :prefix_rows]
            return velocity

        x = noise
        for step in progress(range(steps)):
            time, next_time = shift_time(step / steps), shift_time((step + 1) / steps)
            duration = next_time - time
            first = predict_velocity(x, time)
            second = predict_velocity(x + duration * first, next_time)
            x = x + duration * (first + second) / 2
        return x


def shift_time(time: Tensor | float) -> Tensor | float:
    """Shift times, 0 to 1, towards the noise (Esser et al. 2024, arXiv 2403.03206, section 5.3.2).

    Neighbouring latents are similar, so the anatomy emerges when there is still much noise.
    """
    return time / (time + SHIFT * (1 - time))
