"""What train_prior.py needs to train the flow; prior/causal_training.py has the same functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from dataset import SliceDataset
from modules import VQVAE
from mri.files import SliceName
from prior.config import PriorConfig
from prior.flow import FlowPrior
from training import distributed
from utils import UserError

BEST_COLUMN = "val_velocity"
NUM_FITTED = 256  # maximum number of slices to which principal components are fitted
MIRRORS = ((), (-2,))  # the axes of (B, 1, H, W) that are flipped: none, and left-right


@dataclass(frozen=True, eq=False)
class LatentDataset:
    """Principal components of the latents of a split's slices and of their mirror images."""

    components: Tensor  # (N, V, C, h, w) float16; V is the number of views
    positions: Tensor  # (N,), positions of the slices in their volumes, 0 to 1; NaN if unknown
    names: Sequence[SliceName]  # names of the N slices
    spacing: Sequence[float] | None = None  # mm between rows and between columns, if known

    def __len__(self) -> int:
        return len(self.components)

    def batches(
        self, groups: Sequence[Tensor], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield components (B, V, C, h, w) and positions (B,) for each group of indices (B,)."""
        for group in groups:
            yield self.components[group].to(device), self.positions[group].to(device)


# ---------------------------------------------------------------- before training


@torch.no_grad()
def prepare(
    vqvae: VQVAE, train_slices: SliceDataset, val_slices: SliceDataset, config: PriorConfig
) -> tuple[FlowPrior, LatentDataset, LatentDataset]:
    """Return an untrained flow, and the encoded training and validation slices.

    The principal components are fitted to slices that are spread evenly over the training split.

    Raises:
        UserError: if the configuration does not fit.
    """
    device = next(vqvae.parameters()).device
    count = min(NUM_FITTED, len(train_slices))
    indices = torch.linspace(0, len(train_slices) - 1, count).round().long()
    batches = train_slices.batches(indices.split(16), device)
    latents = torch.cat([vqvae.encoder(images) for images in batches])
    latent_channels, *grid = latents.shape[1:]
    num_components = min(config.components, latent_channels)
    try:
        model = FlowPrior(latent_channels, tuple(grid), num_components, config.channels)
    except ValueError as error:
        raise UserError(str(error)) from None
    fraction = model.to(device).fit_components(latents)
    print(
        f"latents: {num_components} of {latent_channels} principal components, with "
        f"{fraction:.1%} of the variance"
    )
    train = encode_split(vqvae, model, train_slices, MIRRORS)
    val = encode_split(vqvae, model, val_slices, MIRRORS[:1])
    return model, train, val


@torch.no_grad()
def encode_split(
    vqvae: VQVAE, model: FlowPrior, slices: SliceDataset, mirrors: Sequence[tuple]
) -> LatentDataset:
    """Encode all slices of a split, each in several views, as components of the flow.

    Images are flipped before they are encoded, because the encoder is not symmetric.
    """
    device = next(vqvae.parameters()).device
    groups = torch.arange(len(slices)).split(16)
    batches = slices.batches(groups, device)
    components = []
    for images in tqdm(batches, f"encoding {slices.split}", len(groups), unit=" batches"):
        views = []
        for axes in mirrors:
            views.append(model.to_components(vqvae.encoder(images.flip(axes))))
        components.append(torch.stack(views, 1).half().cpu())  # (B, V, C, h, w)
    return LatentDataset(
        components=torch.cat(components),
        positions=slices.positions,
        names=slices.names,
        spacing=slices.description["spacing"],
    )


# ---------------------------------------------------------------- losses, validation


def loss_names(config: PriorConfig) -> tuple[str, ...]:
    """Return the names of the losses that `compute_losses` returns."""
    return ("train_velocity",)


def compute_losses(
    model: FlowPrior, components: Tensor, position: Tensor, precision: str, config: PriorConfig
) -> Tensor:
    """Compute the mean squared error of the velocity, (1,), for a random view of each slice.

    Times are logit-normal (Esser et al. 2024, arXiv 2403.03206), so that those in the middle, where
    the velocity is hard to predict, are frequent.

    Args:
        model: the flow.
        components: components of both views of each slice, (B, 2, C, h, w).
        position: positions of the slices in their volumes, (B,), 0 to 1; NaN if unknown.
        precision: data type of the convolutions, "float32" or "bfloat16".
        config: the configuration.
    """
    count, device = len(components), components.device
    is_mirrored = torch.rand(count, 1, 1, 1, device=device) < 0.5
    is_hidden = torch.rand(count, device=device) < config.unknown_position
    x = torch.where(is_mirrored, components[:, 1], components[:, 0]).float()
    noise = torch.randn_like(x)
    time = torch.randn(count, device=device).sigmoid()
    position = position.masked_fill(is_hidden, math.nan)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return model.loss(x, noise, time, position).mean()[None]


@torch.no_grad()
def validate(
    model: FlowPrior, val: LatentDataset, config: PriorConfig, device: torch.device
) -> dict[str, float]:
    """Compute the validation columns of metrics.csv in float32, from unmirrored slices.

    The noise and the times are the same in all epochs, so that epochs can be compared.
    """
    total = torch.zeros((), device=device)
    groups = torch.arange(len(val)).split(config.batch_size)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    numbers = range(rank, len(groups), world_size)
    batches = val.batches(groups[rank::world_size], device)
    for number, (components, position) in zip(numbers, batches, strict=True):
        generator = torch.Generator().manual_seed(number)
        x = components[:, 0].float()
        noise = torch.randn(x.shape, generator=generator).to(device)
        time = torch.randn(len(x), generator=generator).sigmoid().to(device)
        total += model.loss(x, noise, time, position).sum()
    velocity = float(distributed.all_reduce_sum(total)) / len(val)
    return {"val_loss": velocity, "val_velocity": velocity}


# ---------------------------------------------------------------- results


def sample_codes(
    model: FlowPrior, vqvae: VQVAE, position: Tensor, generator: torch.Generator
) -> Tensor:
    """Sample codes, (B, h, w) or (B, h, w, R), of slices at these positions, (B,)."""
    latents = model.to_latents(model.sample(position, generator))
    return vqvae.vector_quantization(latents).indices


def describe_scores(scores: dict[str, float]) -> str:
    """Describe the result of `validate` for the line that is printed after an epoch."""
    return f"validation velocity error {scores['val_velocity']:.4f}"


def final_scores(
    scores: dict[str, float], vqvae: VQVAE, train: LatentDataset, val: LatentDataset
) -> dict[str, dict[str, float]]:
    """Print the scores of the best checkpoint, and return them for metrics.json."""
    print(f"\nvalidation, {len(val)} slices: velocity error {scores['val_velocity']:.4f}")
    return {"flow": {"velocity_error": scores["val_velocity"]}}
