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


def make_prior(
    num_embeddings: int = 20, embedding_dim: int = 5, grid: tuple[int, int] = (8, 16)
) -> CodePrior:
    """Return an untrained causal prior, which predicts the frequencies of random codes."""
    torch.manual_seed(0)
    prior = CodePrior(num_embeddings, embedding_dim, *grid, channels=16, num_layers=2).eval()
    codes = torch.randint(num_embeddings, (9, *grid))
    prior.initialize(torch.randn(num_embeddings, embedding_dim), codes)
    return prior


def make_varied_prior() -> CodePrior:
    """Return `make_prior()` with widely different logits."""
    prior = make_prior()
    nn.init.normal_(prior.places)
    nn.init.normal_(prior.last.weight, std=0.5)
    return prior


def make_formula_prior() -> CodePrior:
    """Return a small causal prior whose weights are given by a formula, without random numbers."""
    prior = CodePrior(20, 5, 4, 6, channels=8, num_layers=2).eval()
    for number, tensor in enumerate(prior.state_dict().values(), start=1):
        values = torch.arange(tensor.numel()) * (7 * number + 2) % 251 - 125
        tensor.copy_(values.view(tensor.shape) / 256)  # exact
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
