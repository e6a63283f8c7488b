"""What train_prior.py needs to train the causal prior, as prior/flow_training.py for the flow."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import SliceDataset
from modules import VQVAE
from prior.codes import MIRRORS, EncodedDataset, compressed_bits, encode_split
from prior.config import PriorConfig
from prior.model import CodePrior
from training import distributed
from training.step import decay_groups
from utils import UserError

METRIC = "bits"  # per code

# ---------------------------------------------------------------- before training


def prepare(
    vqvae: VQVAE, train_slices: SliceDataset, val_slices: SliceDataset, config: PriorConfig
) -> tuple[CodePrior, EncodedDataset, EncodedDataset]:
    """Return an untrained prior, and the codes of the training and validation slices.

    Raises:
        UserError: if the VQ-VAE has several codebooks.
    """
    quantizer = vqvae.vector_quantization
    if quantizer.num_codebooks > 1:
        raise UserError(
            f"the VQ-VAE has {quantizer.num_codebooks} codebooks; a causal prior needs one that "
            "was trained with --num-codebooks 1. To train a flow instead, omit --model causal"
        )
    device = next(vqvae.parameters()).device

    def encode(images: Tensor) -> Tensor:  # (B, 1, H, W) -> (B, h, w) int32
        return vqvae.encode(images).int()

    train = encode_split(encode, train_slices, MIRRORS, device)
    val = encode_split(encode, val_slices, MIRRORS[:1], device)
    embedding = quantizer.embedding.weight.detach().cpu()
    model = CodePrior(
        *embedding.shape,
        *train.encoded.shape[2:],
        channels=config.channels,
        num_layers=config.num_layers,
        dropout=config.dropout,
    )
    model.initialize(embedding, train.encoded[:, 0])
    return model.to(device), train, val


def make_optimizer(model: CodePrior, config: PriorConfig) -> torch.optim.AdamW:
    """Return an AdamW optimizer with weight decay on all matrices."""
    return torch.optim.AdamW(
        decay_groups(model.parameters()),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.95),
        fused=True,
    )


# ---------------------------------------------------------------- loss, validation


def compute_loss(
    model: CodePrior, codes: Tensor, position: Tensor, precision: str, config: PriorConfig
) -> Tensor:
    """Compute the mean bits per code, a scalar, for a random view of each slice.

    Args:
        model: the prior.
        codes: codes of the views of each slice (see MIRRORS), (B, 4, h, w).
        position: positions of the slices in their volumes, (B,), 0 to 1; NaN if unknown.
        precision: data type of the convolutions, "float32" or "bfloat16".
        config: the configuration, which includes the fraction of mirrored slices.
    """
    count, device = len(codes), codes.device
    is_mirrored = torch.rand(count, device=device) < config.mirrored
    is_hidden = torch.rand(count, device=device) < config.unknown_position
    view = torch.randint(1, len(MIRRORS), (count,), device=device) * is_mirrored
    position = position.masked_fill(is_hidden, math.nan)
    codes = codes[torch.arange(count, device=device), view]  # (B, h, w)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return mean_bits(model, codes, position, view)


def mean_bits(model: CodePrior, codes: Tensor, position: Tensor, view: Tensor) -> Tensor:
    """Compute the mean of -log2 p over the codes (B, h, w), a scalar."""
    codes = codes.long()
    logits = model(codes, position, view)
    return F.cross_entropy(logits.flatten(0, 2), codes.flatten()) / math.log(2)


@torch.no_grad()
def validate(
    model: CodePrior, val: EncodedDataset, config: PriorConfig, device: torch.device
) -> float:
    """Compute the bits per code of unmirrored slices, in float32."""
    model.eval()
    total = torch.zeros((), device=device)
    groups = torch.arange(len(val)).split(config.batch_size)
    groups = groups[distributed.get_rank() :: distributed.get_world_size()]
    for codes, position in val.batches(groups, device):
        view = torch.zeros(len(codes), dtype=torch.long, device=device)
        total += mean_bits(model, codes[:, 0], position, view) * len(codes)
    model.train()
    return float(distributed.all_reduce_sum(total)) / len(val)


# ---------------------------------------------------------------- results


def final_scores(
    bits: float, vqvae: VQVAE, train: EncodedDataset, val: EncodedDataset
) -> dict[str, dict[str, float]]:
    """Print the bits per code and per pixel of the prior and of three baselines.

    Returns:
        Name of a method -> its scores, for metrics.json.
    """
    train_codes, val_codes = train.encoded[:, 0].long(), val.encoded[:, 0].long()
    num_embeddings = vqvae.vector_quantization.num_embeddings
    methods = {"prior": bits, **compressed_bits(train_codes, val_codes, num_embeddings)}
    pixels = vqvae.stride**2  # that one code covers
    rows = {}
    print(f"\nvalidation, {len(val)} slices{'bits per code':>26}{'bits per pixel':>18}")
    for name, value in sorted(methods.items(), key=lambda item: item[1]):
        rows[name] = {"bits_per_code": value, "bits_per_pixel": value / pixels}
        print(f"{name.replace('_', ' '):24}{value:26.3f}{value / pixels:18.4f}")
    return rows
