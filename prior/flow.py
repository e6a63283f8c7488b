"""A rectified flow over the VQ-VAE's latents, from which new slices are sampled.

    flow = FlowPrior(latent_channels=64, grid=(64, 32))
    flow.fit_components(latents)                        # (N, 64, 64, 32), before quantisation
    losses = flow.loss(flow.to_components(latents), position)
    components = flow.sample(position, generator)
    quantized = vqvae.vector_quantization(flow.to_latents(components))

The flow transports noise to data along straight lines (Liu et al. 2022, arXiv 2209.03003; Lipman et
al. 2022, arXiv 2210.02747): at time t, from 0 to 1, x_t = (1 - t) noise + t data, and a U-Net
learns the velocity, data - noise. The data are the principal components of latents. Most components have
little variance and are left out.

Shapes: B slices; latents (B, D, h, w); components (B, C, h, w); positions of the slices in their
volumes (B,), from 0 to 1, or NaN if unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prior.unet import UNet


class FlowPrior(nn.Module):
    """A U-Net and the principal components on which it works.

    Args:
        latent_channels: D.
        grid: h and w.
        components: C, number of principal components, at most D.
        channels: widths of the U-Net.
    """

    def __init__(
        self,
        latent_channels: int,
        grid: tuple[int, int],
        components: int = 8,
        channels: tuple[int, ...] = (64, 96, 128),
    ):
        self.arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.grid = tuple(grid)
        self.unet = UNet(components, self.grid, channels)
        self.register_buffer("mean", torch.zeros(latent_channels))
        # Columns are principal directions, multiplied by the components' standard deviations.
        self.register_buffer("directions", torch.zeros(latent_channels, components))

    @torch.no_grad()
    def fit_components(self, latents: Tensor) -> None:
        """Set the principal components of latents (N, D, h, w), each with a variance of 1."""
        vectors = latents.movedim(1, -1).flatten(0, 2).float()  # (N h w, D)
        self.mean.copy_(vectors.mean(0))
        variances, directions = torch.linalg.eigh(torch.cov(vectors.T).cpu())  # in ascending order
        scaled = directions * variances.clamp_min(1e-12).sqrt()
        self.directions.copy_(scaled.flip(1)[:, : self.directions.shape[1]])

    def to_components(self, latents: Tensor) -> Tensor:  # (B, D, h, w) -> (B, C, h, w)
        inverse = self.directions / self.directions.square().sum(0)
        return torch.einsum("bdhw,dc->bchw", latents - self.mean[:, None, None], inverse)

    def to_latents(self, components: Tensor) -> Tensor:  # (B, C, h, w) -> (B, D, h, w)
        latents = torch.einsum("bchw,dc->bdhw", components, self.directions)
        return latents + self.mean[:, None, None]

    def loss(self, x: Tensor, position: Tensor, time: Tensor | None = None) -> Tensor:
        """Compute the squared error of the velocity, (B,), at random noise, for components x.

        By default, times are logit-normal (Esser et al. 2024, arXiv 2403.03206), so that those in
        the middle, where the velocity is hard to predict, are sampled more often.
        """
        if time is None:
            time = torch.randn(len(x), device=x.device).sigmoid()
        noise = torch.randn_like(x)
        velocity = self.unet(noise.lerp(x, time.view(-1, 1, 1, 1)), time, position).float()
        return (velocity - (x - noise)).square().mean((1, 2, 3))

    @torch.no_grad()
    def sample(
        self,
        position: Tensor,
        generator: torch.Generator,
        steps: int = 25,
        guidance: float = 1.0,
        given: Tensor | None = None,
        keep: Tensor | None = None,
        progress: Callable = iter,
    ) -> Tensor:
        """Sample components by Heun's method; the same generator state gives the same samples.

        Args:
            position: positions of the slices, (B,); NaN if unknown.
            generator: random generator on the CPU.
            steps: number of steps, each with two evaluations of the velocity.
            guidance: 1 follows the velocity for the position; more exaggerates its difference from
                the velocity for an unknown position (Ho and Salimans 2022, arXiv 2207.12598).
            given, keep: components (B, C, h, w) of which the positions in `keep`, (h, w) bool, are
                not sampled; None: all positions are sampled.
            progress: a function such as tqdm, which wraps the range of steps.

        Returns:
            Components, (B, C, h, w).
        """
        size = (len(position), self.directions.shape[1], *self.grid)
        noise = torch.randn(size, generator=generator).to(position.device)
        unknown = torch.full_like(position, math.nan)

        def velocity(x: Tensor, time: float) -> Tensor:
            times = torch.full_like(position, time)
            result = self.unet(x, times, position)
            if guidance != 1:
                other = self.unet(x, times, unknown)
                result = other + guidance * (result - other)
            return result

        def insert(x: Tensor, time: float) -> Tensor:
            """Replace the kept positions by their values at this time."""
            return x if keep is None else torch.where(keep, noise.lerp(given, time), x)

        x = noise
        for step in progress(range(steps)):
            start, end = step / steps, (step + 1) / steps
            first = velocity(x, start)
            second = velocity(insert(x + first / steps, end), end)
            x = insert(x + (first + second) / (2 * steps), end)
        return x
