"""What train_prior.py needs to train the causal transformer, as prior/flow_training.py."""

from __future__ import annotations

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import SliceDataset
from modules import VQVAE
from prior.codes import MIRRORS, CodeDataset, compressed_bits, encode_split
from prior.config import PriorConfig
from prior.model import CodePrior
from training import distributed
from utils import UserError

BEST_COLUMN = "val_bits"

# ---------------------------------------------------------------- before training


def prepare(
    vqvae: VQVAE, train_slices: SliceDataset, val_slices: SliceDataset, config: PriorConfig
) -> tuple[CodePrior, CodeDataset, CodeDataset]:
    """Return an untrained prior, and the codes of the training and validation slices.

    Raises:
        UserError: if the VQ-VAE, its codes or the configuration do not fit.
    """
    num_codebooks = vqvae.vector_quantization.num_codebooks
    if num_codebooks > 1:
        raise UserError(
            f"the VQ-VAE has {num_codebooks} codebooks; a causal prior needs a run with "
            "--num-codebooks 1, or omit --model causal to train a flow"
        )
    train = encode_split(vqvae, train_slices, MIRRORS)
    val = encode_split(vqvae, val_slices, MIRRORS[:1])
    model = make_prior(vqvae, train, config)
    return model.to(next(vqvae.parameters()).device), train, val


def make_prior(vqvae: VQVAE, train_codes: CodeDataset, config: PriorConfig) -> CodePrior:
    """Return a prior for the VQ-VAE's codebook, initialised from the training codes.

    Raises:
        UserError: if the code grid or the codes do not fit the configuration.
    """
    quantizer = vqvae.vector_quantization
    names = inspect.signature(CodePrior).parameters
    arguments = {name: getattr(config, name) for name in names if hasattr(config, name)}
    shape = (quantizer.num_embeddings, quantizer.embedding_dim, *train_codes.codes.shape[-2:])
    try:
        model = CodePrior(*shape, **arguments)
        model.initialize(
            quantizer.embedding.weight.detach().cpu(),
            train_codes.brightness,
            train_codes.codes[:, 0].long(),
            train_codes.positions,
            torch.Generator().manual_seed(config.seed),
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return model


# ---------------------------------------------------------------- losses, validation


def loss_names(config: PriorConfig) -> tuple[str, ...]:
    """Return the names of the losses that `compute_losses` returns, coarse to fine."""
    outline_blocks = [2**n for n in reversed(range(1, config.num_grids))]
    return (*(f"train_outline_{block}" for block in outline_blocks), "train_codes")


def compute_losses(
    model: CodePrior, codes: Tensor, position: Tensor, precision: str, config: PriorConfig
) -> Tensor:
    """Compute the mean -ln p per code of each grid, (num_grids,), for a random view of each slice.

    All grids have the same weight: an outline has few codes, but they decide most of the layout.

    Args:
        model: the prior.
        codes: codes of the V views of each slice (see MIRRORS), (B, V, h, w).
        position: positions of the slices in their volumes, (B,), 0 to 1; NaN if unknown.
        precision: data type of the matrix products, "float32" or "bfloat16".
        config: the configuration, which includes the fraction of mirrored slices.
    """
    draws = torch.rand(3, len(codes), device=codes.device)
    num_mirrored = len(MIRRORS) - 1
    mirrored_view = 1 + (draws[1] * num_mirrored).long().clamp_max(num_mirrored - 1)
    view = mirrored_view.masked_fill(draws[0] >= config.mirrored, 0)
    position = position.masked_fill(draws[2] < config.unknown_position, math.nan)
    codes = codes[torch.arange(len(codes), device=codes.device), view]  # (B, h, w)
    with torch.autocast(codes.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return negative_log_likelihood(model, codes, position, view)


def negative_log_likelihood(
    model: CodePrior, codes: Tensor, position: Tensor, view: Tensor
) -> Tensor:
    """Compute the mean -ln p per code of each grid, (num_grids,), given the coarser grids."""
    grids = model.to_grids(codes)
    logits = model(grids, position, view)
    losses = []
    for grid_logits, grid in zip(logits, grids, strict=True):
        losses.append(F.cross_entropy(grid_logits.flatten(0, 2), grid.flatten()))
    return torch.stack(losses)


@torch.no_grad()
def validate(
    model: CodePrior, val: CodeDataset, config: PriorConfig, device: torch.device
) -> dict[str, float]:
    """Compute the validation columns of metrics.csv in float32, from unmirrored slices.

    Bits are per code of the VQ-VAE. "val_bits" includes the bits of outlines.
    """
    model.eval()
    totals = torch.zeros(config.num_grids, device=device)
    batches = torch.arange(len(val)).split(config.batch_size)
    batches = batches[distributed.get_rank() :: distributed.get_world_size()]
    for codes, position in val.batches(batches, device):
        view = torch.zeros(len(codes), dtype=torch.long, device=device)
        nats = negative_log_likelihood(model, codes[:, 0], position, view)
        totals += nats * len(codes)
    model.train()
    nats = (distributed.all_reduce_sum(totals) / len(val)).tolist()
    bits = []
    for n, value in zip(reversed(range(config.num_grids)), nats, strict=True):
        bits.append(value * 4.0**-n / math.log(2))  # halved n times, a grid has 4^-n as many codes
    return {"val_loss": sum(nats), "val_bits": sum(bits), "val_outline_bits": sum(bits[:-1])}


# ---------------------------------------------------------------- results


def sample_codes(
    model: CodePrior, vqvae: VQVAE, position: Tensor, generator: torch.Generator
) -> Tensor:
    """Sample codes, (B, h, w), of unmirrored slices at these positions, (B,)."""
    view = torch.zeros(len(position), dtype=torch.long, device=position.device)
    model.eval()
    codes = model.sample(position, view, generator)
    model.train()
    return codes


def describe_scores(scores: dict[str, float]) -> str:
    """Describe the result of `validate` for the line that is printed after an epoch."""
    return (
        f"validation {scores['val_bits']:.4f} bits per code (outlines: "
        f"{scores['val_outline_bits']:.4f})"
    )


def final_scores(
    scores: dict[str, float], vqvae: VQVAE, train: CodeDataset, val: CodeDataset
) -> dict[str, dict[str, float]]:
    """Print the bits per code and per pixel of the prior and of three baselines.

    Returns:
        Name of a method -> its scores, for metrics.json.
    """
    train_codes, val_codes = train.codes[:, 0].long(), val.codes[:, 0].long()
    num_embeddings = vqvae.vector_quantization.num_embeddings
    bits = {"prior": scores["val_bits"], **compressed_bits(train_codes, val_codes, num_embeddings)}
    pixels = vqvae.stride**2  # that one code covers
    rows = {}
    print(f"\nvalidation, {len(val)} slices{'bits per code':>26}{'bits per pixel':>18}")
    for name, value in sorted(bits.items(), key=lambda item: item[1]):
        rows[name] = {"bits_per_code": value, "bits_per_pixel": value / pixels}
        print(f"{name.replace('_', ' '):24}{value:26.3f}{value / pixels:18.4f}")
    return rows
