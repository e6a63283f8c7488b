"""Sample slices from a VQ-VAE and its prior.

prior = load_prior(path, vqvae, device)
sampler = make_sampler(vqvae, prior, device, seed=0, steps=25)
images = sampler.decode(sampler.sample(positions))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from modules import VQVAE
from prior.codes import hash_codebook
from prior.flow import FlowPrior
from prior.model import CodePrior
from training.checkpoint import load_model, read_checkpoint
from training.options import flag_name
from utils import UserError

BATCH_SIZE = 40  # number of slices that are sampled at a time, to bound the memory


@dataclass(frozen=True)
class FlowOptions:
    """The options of `FlowPrior.sample`, and the seed."""

    steps: int = 25
    guidance: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        """Describe the options, for headings and tables."""
        text = f"{self.steps} steps"
        if self.guidance != 1:
            text += f", guidance {self.guidance:g}"
        return f"{text}, seed {self.seed}"


@dataclass(frozen=True)
class CausalOptions:
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


# ---------------------------------------------------------------- samplers


@dataclass(frozen=True)
class Sampler:
    """A VQ-VAE and its prior, with methods that encode, decode and sample on a device."""

    vqvae: VQVAE
    prior: FlowPrior | CodePrior
    device: torch.device
    options: FlowOptions | CausalOptions

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
    def sample(self, positions: Tensor, image: Tensor | None = None, view: int = 0) -> Tensor:
        """Sample codes (B, h, w) on the device, and return them on the CPU.

        The same options on the same device give the same codes.

        Args:
            positions: positions of the slices in their volumes, (B,), 0 to 1; NaN if unknown.
            image: a slice, (1, H, W). The codes of its first rows, up to about the middle, are
                kept; the others are sampled.
            view: index into `prior.codes.MIRRORS`; a flow ignores it, because it does not
                distinguish mirrored slices from others.
        """
        generator = torch.Generator().manual_seed(self.options.seed)
        if image is not None:
            image = image[None].to(self.device)
        codes = []
        for batch in positions.to(self.device).split(BATCH_SIZE):
            progress = partial(tqdm, desc=f"sampling {len(batch)} of {len(positions)}")
            codes.append(self.sample_batch(batch, generator, progress, image, view).cpu())
        return torch.cat(codes)

    def sample_batch(
        self,
        position: Tensor,
        generator: torch.Generator,
        progress: Callable,
        image: Tensor | None,
        view: int,
    ) -> Tensor:
        """Do what `sample` does, for one batch on the device; `image` is (1, 1, H, W)."""
        raise NotImplementedError


class FlowSampler(Sampler):
    """A sampler with a flow."""

    def sample_batch(self, position, generator, progress, image, view):
        prefix, prefix_rows = None, 0
        if image is not None:
            latents = self.vqvae.encoder(image)
            prefix = self.prior.to_components(latents).expand(len(position), -1, -1, -1)
            prefix_rows = latents.shape[2] // 2
        components = self.prior.sample(
            position,
            generator,
            self.options.steps,
            self.options.guidance,
            prefix=prefix,
            prefix_rows=prefix_rows,
            progress=partial(progress, unit=" steps"),
        )
        codes = self.vqvae.vector_quantization(self.prior.to_latents(components)).indices
        if image is not None:  # the components left out could change a few of these codes
            codes[:, :prefix_rows] = self.vqvae.encode(image)[:, :prefix_rows]
        return codes


class CausalSampler(Sampler):
    """A sampler with a causal transformer."""

    def sample_batch(self, position, generator, progress, image, view):
        prefix, prefix_rows = None, 0
        if image is not None:
            prefix = self.vqvae.encode(image).expand(len(position), -1, -1)
            prefix_rows = self.prior.height // 2 // self.prior.block * self.prior.block
        return self.prior.sample(
            position,
            torch.full((len(position),), view, device=self.device),
            generator,
            self.options.temperature,
            self.options.top_k,
            self.options.top_p,
            prefix=prefix,
            prefix_rows=prefix_rows,
            progress=partial(progress, unit=" segments"),
        )


# ---------------------------------------------------------------- loading


def is_flow(checkpoint: dict) -> bool:
    """Return whether a prior's checkpoint holds a flow, rather than a causal transformer."""
    arguments = checkpoint["model_args"]
    return isinstance(arguments, dict) and "latent_channels" in arguments


def load_prior(path: Path, vqvae: VQVAE, device: torch.device) -> FlowPrior | CodePrior:
    """Load a prior of either kind.

    Raises:
        UserError: if the checkpoint cannot be read, or the prior was trained for another VQ-VAE.
    """
    checkpoint = read_checkpoint(path)
    quantizer = vqvae.vector_quantization
    if is_flow(checkpoint):
        prior = load_model(FlowPrior, path, device)
        fits = str(checkpoint.get("fingerprint")).split()[-1:] == [hash_codebook(vqvae)]
    else:
        prior = load_model(CodePrior, path, device)
        fits = quantizer.num_codebooks == 1 and prior.has_codebook(quantizer.embedding.weight)
    if not fits:
        raise UserError(
            f"{path} was trained on the codes of a different model, not on those of this run's "
            "best.pt; train the prior again"
        )
    return prior


def make_sampler(
    vqvae: VQVAE, prior: FlowPrior | CodePrior, device: torch.device, seed: int, **options
) -> Sampler:
    """Return the sampler of a prior.

    Args:
        vqvae, prior, device: on the same device.
        seed: seed of all random numbers.
        options: fields of FlowOptions and of CausalOptions; None: the default.

    Raises:
        UserError: if an option that is not None does not apply to the prior.
    """
    if isinstance(prior, FlowPrior):
        name, sampler_class, options_class = "flow", FlowSampler, FlowOptions
    else:
        name, sampler_class, options_class = "causal prior", CausalSampler, CausalOptions
    fields = {field.name for field in dataclasses.fields(options_class)}
    values = {"seed": seed}
    for option, value in options.items():
        if value is None:
            continue
        if option not in fields:
            allowed = ", ".join(flag_name(field) for field in sorted(fields & options.keys()))
            raise UserError(
                f"{flag_name(option)} does not apply to this prior, which is a {name}; omit it. "
                f"Options of a {name}: {allowed}"
            )
        values[option] = value
    return sampler_class(vqvae, prior, device, options_class(**values))
