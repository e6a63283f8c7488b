"""Sample slices from a VQ-VAE and its prior.

sampler = Sampler(vqvae, prior, device, SamplingOptions(temperature=0.9))
images = sampler.decode(sampler.sample(positions))
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from modules import VQVAE
from prior.model import CodePrior

BATCH_SIZE = 40  # number of slices that are sampled at a time, to bound the memory


@dataclass(frozen=True)
class SamplingOptions:
    """The options of `prior.model.sample_codes`, and the seed."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        """Describe the options, for headings and tables."""
        text = f"temperature {self.temperature:g}"
        if self.top_k:
            text += f", top-k {self.top_k}"
        if self.top_p < 1:
            text += f", top-p {self.top_p}"
        return f"{text}, seed {self.seed}"


@dataclass(frozen=True)
class Sampler:
    """A VQ-VAE and its prior, with methods that encode, decode and sample on a device."""

    vqvae: VQVAE
    prior: CodePrior
    device: torch.device
    options: SamplingOptions

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 1, H, W) on the device; return codes (B, h, w) on the CPU."""
        batches = [self.vqvae.encode(batch.to(self.device)).cpu() for batch in images.split(16)]
        return torch.cat(batches)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes (B, h, w) on the device; return images (B, 1, H, W) float32 on the CPU."""
        batches = []
        for batch in codes.split(16):
            batches.append(self.vqvae.decode_codes(batch.to(self.device)).float().cpu())
        return torch.cat(batches)

    def sample(
        self,
        positions: Tensor,
        view: int = 0,
        prefix: Tensor | None = None,
        prefix_rows: int = 0,
    ) -> Tensor:
        """Sample codes (B, h, w) on the device, and return them on the CPU.

        The same options on the same device give the same codes.

        Args:
            positions: positions of the slices in their volumes, (B,), 0 to 1; NaN if unknown.
            view: index into `prior.codes.MIRRORS`.
            prefix: codes, (h, w), whose first rows are kept; the other rows are sampled.
            prefix_rows: number of rows that are kept; must be divisible by `CodePrior.block`.
        """
        generator = torch.Generator().manual_seed(self.options.seed)
        codes = []
        for batch in positions.to(self.device).split(BATCH_SIZE):
            size = len(batch)
            batch_prefix = None
            if prefix is not None:
                batch_prefix = prefix.to(self.device).expand(size, -1, -1)
            description = f"sampling {size} of {len(positions)}"
            sampled = self.prior.sample(
                batch,
                torch.full((size,), view, device=self.device),
                generator,
                self.options.temperature,
                self.options.top_k,
                self.options.top_p,
                prefix=batch_prefix,
                prefix_rows=prefix_rows,
                progress=partial(tqdm, desc=description, unit=" segments"),
            )
            codes.append(sampled.cpu())
        return torch.cat(codes)
