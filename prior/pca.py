"""Principal components of latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PCA(nn.Module):
    """Principal component analysis, with the method names of scikit-learn.

    Shapes: N or B slices; latents (B, D, h, w); components (B, C, h, w).

    Args:
        latent_channels: D.
        components: C, number of principal components, at most D.
    """

    def __init__(self, latent_channels: int, components: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(latent_channels))
        # Columns are principal directions, multiplied by the components' standard deviations.
        self.register_buffer("directions", torch.eye(latent_channels, components))

    @torch.no_grad()
    def fit(self, latents: Tensor) -> float:
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

    @property
    def stds(self) -> Tensor:
        """Standard deviations of the components in the latents, (C,)."""
        return self.directions.norm(dim=0)

    def transform(self, latents: Tensor) -> Tensor:  # (B, D, h, w) -> (B, C, h, w)
        inverse = self.directions / self.directions.square().sum(0)
        return torch.einsum("bdhw,dc->bchw", latents - self.mean[:, None, None], inverse)

    def inverse_transform(self, components: Tensor) -> Tensor:  # (B, C, h, w) -> (B, D, h, w)
        latents = torch.einsum("bchw,dc->bdhw", components, self.directions)
        return latents + self.mean[:, None, None]
