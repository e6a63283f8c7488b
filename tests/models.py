"""Helpers for tests of models: small models, their checkpoints, and checks of known defects."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from modules import Quantized
from prior.model import CodePrior
from training.checkpoint import CHECKPOINT_FORMAT, write_checkpoint


def save_model(path: Path, model: nn.Module, **content: object) -> None:
    """Write a model's checkpoint and its folder; `content` is further content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "model_args": model.arguments,
        "model": model.state_dict(),
    }
    write_checkpoint(path, checkpoint | content)


def save_compressed(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint as a compressed zip file."""
    stored = path.with_name("stored.pt")
    torch.save(checkpoint, stored)
    with (
        zipfile.ZipFile(stored) as original,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for record in original.infolist():
            compressed.writestr(record.filename, original.read(record))


def make_prior(num_grids: int) -> CodePrior:
    """Return an untrained prior of 8 x 16 codes out of 20, with 6 outline levels."""
    torch.manual_seed(0)
    prior = CodePrior(
        num_embeddings=20,
        embedding_dim=5,
        height=8,
        width=16,
        channels=16,
        num_layers=2,
        num_heads=2,
        num_grids=num_grids,
        num_outlines=6,
    ).eval()
    codes = torch.randint(20, (9, 8, 16))
    prior.initialize(torch.randn(20, 5), torch.randn(20), codes, torch.linspace(0, 1, 9))
    return prior


def make_varied_prior(num_grids: int) -> CodePrior:
    """Return `make_prior` with widely different logits."""
    prior = make_prior(num_grids)
    for grid in prior.grids:
        nn.init.normal_(grid.last[1].weight, std=0.5)
    return prior


def train_codebook(quantizer: nn.Module, z: Tensor) -> Quantized:
    """Quantise encoder outputs (B, D, h, w), and update the codebook as a training step does."""
    result = quantizer(z)
    quantizer.update_codebook(result.vectors, result.indices)
    return result


def to_vectors(z: Tensor) -> Tensor:
    """Return encoder outputs (B, D, h, w) as vectors, (B h w, D)."""
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def fails(check: Callable, *args: object) -> bool:
    """Return whether an assertion of the check fails."""
    try:
        check(*args)
    except AssertionError:
        return True
    return False
