"""Sample slices from a VQ-VAE and its prior, a flow.

sampler = load_sampler(Path("runs/x"), device, seed=0, steps=40)
images = sampler.decode(sampler.sample(positions))
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dataset import SliceDataset
from evaluation.reconstruct import PELVIS_MODEL
from modules import VQVAE
from prior.codes import evenly_spaced, hash_codebook
from prior.flow import FlowPrior
from training.checkpoint import load_model, read_checkpoint
from training.run_names import PRIORS
from utils import UserError, format_command

BATCH_SIZE = 40  # number of slices that are sampled at a time, to bound the memory
PELVIS_PRIOR = PELVIS_MODEL.with_name("pelvis_prior.pt")  # a flow for the bundled model


@dataclass(frozen=True)
class Sampler:
    """A VQ-VAE and its prior, with methods that encode, decode and sample on a device."""

    vqvae: VQVAE
    prior: FlowPrior
    device: torch.device
    slices: dict  # result of `describe_slices` for the training slices
    steps: int = 40  # as for `FlowPrior.sample`; this is the default of --steps
    guidance: float = 1.5  # as for `FlowPrior.sample`; this is the default of --guidance
    seed: int = 0

    @property
    def settings(self) -> str:
        """The options and the seed in words, for headings and tables."""
        return f"{self.steps} steps, guidance {self.guidance:g}, seed {self.seed}"

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 1, H, W) on the device; return codes (B, h, w) on the CPU."""
        batches = [self.vqvae.encode(batch.to(self.device)).cpu() for batch in images.split(16)]
        return torch.cat(batches)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes (B, h, w) on the device; return images (B, 1, H, W) float32 on the CPU."""
        batches = []
        for batch in codes.split(16):  # each goes to the CPU before the next is decoded
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
        prefix = None
        if image is not None:
            image = image[None].to(self.device)
            prefix = self.prior.pca.transform(self.vqvae.encoder(image))
            prefix = prefix[:, :, : prefix.shape[2] // 2]
        batches = []
        for position in positions.to(self.device).split(BATCH_SIZE):
            components = self.prior.sample(
                position,
                generator,
                self.steps,
                self.guidance,
                prefix,
                partial(tqdm, desc=f"sampling {len(position)} of {len(positions)}", unit=" steps"),
            )
            latents = self.prior.pca.inverse_transform(components)
            batches.append(self.vqvae.vector_quantization(latents).indices.cpu())
        codes = torch.cat(batches)
        if image is not None:  # the components left out could change a few of these codes
            rows = prefix.shape[2]
            codes[:, :rows] = self.vqvae.encode(image)[:, :rows].cpu()
        return codes


def describe_slices(slices: SliceDataset) -> dict:
    """Describe the training slices for the checkpoint of a flow, so that sampling needs no data.

    Returns:
        - "size", "spacing", "axis", "nan_value": `SliceDataset.description`;
        - "fit": as in `mri.preprocessing.Preprocessing`;
        - "affine": the affine of the first slice, (4, 4);
        - "mean", "std": medians of the means and of the standard deviations of the slices;
        - "positions": up to 101 quantiles of the positions of the slices; NaN if unknown.
    """
    positions = slices.positions.sort().values
    quantiles = evenly_spaced(len(positions), min(101, len(positions)))
    return {
        **slices.description,
        "fit": slices.preprocessing.fit,
        "affine": slices.affine.tolist(),
        "mean": float(slices.mean.median()),
        "std": float(slices.std.median()),
        "positions": positions[quantiles].tolist(),
    }


def load_sampler(
    run: Path | None, device: torch.device, path: Path | None = None, **options: float
) -> Sampler:
    """Load the VQ-VAE and the prior of a run, or the bundled ones.

    Args:
        run: folder of the run; None for the bundled VQ-VAE and prior.
        device: the device to compute on.
        path: checkpoint of the prior (default: <run>/prior/best.pt).
        options: steps, guidance and seed (see Sampler).

    Raises:
        UserError: if a checkpoint cannot be read, or the prior is not a flow for this VQ-VAE.
    """
    vqvae_path = run / "best.pt" if run else PELVIS_MODEL
    if path is None and run:
        paths = [run / folder / "best.pt" for folder in PRIORS.values()]  # the flow first
        path = next(filter(Path.exists, paths), paths[0])
    path = path or PELVIS_PRIOR
    vqvae = load_model(VQVAE, vqvae_path, device)
    checkpoint = read_checkpoint(path)
    command = format_command("train_prior.py", *(("--run", run) if run else ()))
    arguments, slices = checkpoint["model_args"], checkpoint.get("slices")
    if not isinstance(slices, dict) or not isinstance(arguments, dict):
        raise UserError(f"{path} was trained by an earlier version; train it again with {command}")
    if "num_embeddings" in arguments:
        raise UserError(
            f"{path} is a causal prior, which gives code lengths only; train a flow with {command}"
        )
    prior = load_model(FlowPrior, path, device)
    if str(checkpoint.get("fingerprint")).split()[-1:] != [hash_codebook(vqvae)]:
        raise UserError(
            f"{path} was trained on the codes of a different model, not on those of {vqvae_path}; "
            f"train it again with {command}"
        )
    print(f"models: {vqvae_path}, {path}")
    return Sampler(vqvae, prior, device, slices, **options)
