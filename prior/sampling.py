"""Sample slices from a VQ-VAE and its prior, a flow.

sampler = load_sampler(Path("runs/x"), device, seed=0, steps=25)
images = sampler.decode(sampler.sample(positions))
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from modules import VQVAE
from prior.codes import hash_codebook
from prior.flow import FlowPrior
from training.checkpoint import load_model, read_checkpoint
from training.run_names import PRIORS
from utils import UserError, format_command

BATCH_SIZE = 40  # number of slices that are sampled at a time, to bound the memory


@dataclass(frozen=True)
class Sampler:
    """A VQ-VAE and its prior, with methods that encode, decode and sample on a device."""

    vqvae: VQVAE
    prior: FlowPrior
    device: torch.device
    steps: int = 25  # as for `FlowPrior.sample`
    guidance: float = 1.0  # as for `FlowPrior.sample`
    seed: int = 0

    @property
    def settings(self) -> str:
        """The options and the seed in words, for headings and tables."""
        guidance = f", guidance {self.guidance:g}" if self.guidance != 1 else ""
        return f"{self.steps} steps{guidance}, seed {self.seed}"

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

    @torch.no_grad()
    def sample(self, positions: Tensor, image: Tensor | None = None) -> Tensor:
        """Sample codes (B, h, w) on the device, and return them on the CPU.

        The same options on the same device give the same codes.

        Args:
            positions: positions of the slices in their volumes, (B,), 0 to 1; NaN if unknown.
            image: a slice, (1, H, W). The codes of its first rows, up to about the middle, are
                kept; the others are sampled.
        """
        generator = torch.Generator().manual_seed(self.seed)
        prefix, prefix_rows = None, 0
        if image is not None:
            image = image[None].to(self.device)
            prefix = self.prior.to_components(self.vqvae.encoder(image))
            prefix_rows = prefix.shape[2] // 2
        batches = []
        for position in positions.to(self.device).split(BATCH_SIZE):
            components = self.prior.sample(
                position,
                generator,
                self.steps,
                self.guidance,
                prefix,
                prefix_rows,
                partial(tqdm, desc=f"sampling {len(position)} of {len(positions)}", unit=" steps"),
            )
            latents = self.prior.to_latents(components)
            batches.append(self.vqvae.vector_quantization(latents).indices.cpu())
        codes = torch.cat(batches)
        if image is not None:  # the components left out could change a few of these codes
            codes[:, :prefix_rows] = self.vqvae.encode(image)[:, :prefix_rows].cpu()
        return codes


def load_sampler(
    run: Path, device: torch.device, path: Path | None = None, **options: float
) -> Sampler:
    """Load the VQ-VAE and the prior of a run.

    Args:
        run, device: folder of the run, and the device to compute on.
        path: checkpoint of the prior (default: <run>/prior/best.pt).
        options: steps, guidance and seed (see Sampler).

    Raises:
        UserError: if a checkpoint cannot be read, or the prior is not a flow for this VQ-VAE.
    """
    if path is None:
        paths = [run / folder / "best.pt" for folder in PRIORS.values()]  # the flow first
        path = next(filter(Path.exists, paths), paths[0])
    vqvae = load_model(VQVAE, run / "best.pt", device)
    checkpoint = read_checkpoint(path)
    command = format_command("train_prior.py", "--run", run)
    arguments = checkpoint["model_args"]
    if isinstance(arguments, dict) and "num_heads" in arguments:
        raise UserError(f"{path} was trained by an earlier version; train it again with {command}")
    if isinstance(arguments, dict) and "num_embeddings" in arguments:
        raise UserError(
            f"{path} is a causal prior, which gives code lengths only; train a flow with {command}"
        )
    prior = load_model(FlowPrior, path, device)
    if str(checkpoint.get("fingerprint")).split()[-1:] != [hash_codebook(vqvae)]:
        raise UserError(
            f"{path} was trained on the codes of a different model, not on those of this run's "
            "best.pt; train the prior again"
        )
    print(f"models: {run / 'best.pt'}, {path}")
    return Sampler(vqvae, prior, device, **options)
