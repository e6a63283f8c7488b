"""What train_prior.py needs to train the flow; prior/causal_training.py has the same functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dataset import SliceDataset
from modules import VQVAE
from prior.codes import MIRRORS, EncodedDataset, encode_split, evenly_spaced
from prior.config import PriorConfig
from prior.flow import TRAINING_SHIFT, FlowPrior, shift_time
from training import distributed
from training.muon import Muon

METRIC = "velocity"  # its mean squared error
NUM_FITTED = 256  # maximum number of slices to which principal components are fitted

# ---------------------------------------------------------------- before training


@torch.no_grad()
def prepare(
    vqvae: VQVAE, train_slices: SliceDataset, val_slices: SliceDataset, config: PriorConfig
) -> tuple[FlowPrior, EncodedDataset, EncodedDataset]:
    """Return an untrained flow, and the encoded training and validation slices.

    The principal components are fitted to slices that are spread evenly over the training split.
    """
    device = next(vqvae.parameters()).device
    count = min(NUM_FITTED, len(train_slices))
    indices = evenly_spaced(len(train_slices), count)
    batches = train_slices.batches(indices.split(16), device)
    latents = torch.cat([vqvae.encoder(images) for images in batches])
    latent_channels, *grid = latents.shape[1:]
    num_components = min(config.components, latent_channels)
    model = FlowPrior(latent_channels, tuple(grid), num_components, config.channels)
    fraction = model.to(device).pca.fit(latents)
    print(
        f"latents: {num_components} of {latent_channels} principal components, with "
        f"{fraction:.1%} of the variance"
    )

    def encode(images: Tensor) -> Tensor:  # (B, 1, H, W) -> (B, C, h, w) float16
        return model.pca.transform(vqvae.encoder(images)).half()

    train = encode_split(encode, train_slices, MIRRORS[:2], device)
    val = encode_split(encode, val_slices, MIRRORS[:1], device)
    return model, train, val


def make_optimizer(model: FlowPrior, config: PriorConfig) -> Muon:
    """Return Muon for the weights of the blocks, and AdamW for all other parameters."""
    hidden, others = [], []
    for name, parameter in model.unet.named_parameters():
        is_hidden = name.startswith(("down", "middle", "up")) and parameter.ndim > 1
        (hidden if is_hidden else others).append(parameter)
    return Muon(hidden, others, config.learning_rate, config.weight_decay)


# ---------------------------------------------------------------- loss, validation


def compute_loss(
    model: FlowPrior, components: Tensor, position: Tensor, precision: str, config: PriorConfig
) -> Tensor:
    """Compute the mean squared error of the velocity, a scalar, for a random view of each slice.

    Times are logit-normal (Esser et al. 2024, arXiv 2403.03206), and shifted towards the noise.
    Some slices have a given half, so that the flow learns to complete slices.

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
    time = shift_time(torch.randn(count, device=device).sigmoid(), TRAINING_SHIFT)
    position = position.masked_fill(is_hidden, math.nan)
    is_completed = torch.rand(count, device=device) < config.completed
    given = is_completed.long() * (model.grid[0] // 2)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return model.loss(x, noise, time, position, given).mean()


@torch.no_grad()
def validate(
    model: FlowPrior, val: EncodedDataset, config: PriorConfig, device: torch.device
) -> float:
    """Compute the mean squared error of the velocity of unmirrored slices, in float32.

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
        time = shift_time(time, TRAINING_SHIFT)
        given = torch.zeros(len(x), dtype=torch.long, device=device)
        total += model.loss(x, noise, time, position, given).sum()
    return float(distributed.all_reduce_sum(total)) / len(val)


# ---------------------------------------------------------------- results


def final_scores(
    velocity: float, vqvae: VQVAE, train: EncodedDataset, val: EncodedDataset
) -> dict[str, dict[str, float]]:
    """Print the error of the best checkpoint, and return it for metrics.json."""
    print(f"\nvalidation, {len(val)} slices: velocity error {velocity:.4f}")
    return {"flow": {"velocity_error": velocity}}
