"""The prior over codes: order, cache, drawing; its training, by train_prior.py; and coding under it."""

import math
import sys
from pathlib import Path

import pytest
import torch

from prior.codes import compressed_bits
from prior.model import CodePrior

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

ROOT = Path(__file__).parents[1]
COLUMNS = ["epoch", "step", "train_loss", "train_outline_2", "train_codes", "val_loss", "val_bits",
           "val_outline_bits", "lr", "seconds"]  # fmt: skip


def untrained(num_grids: int) -> CodePrior:
    """A prior of 8 x 16 codes out of 20, with outlines out of 6."""
    torch.manual_seed(0)
    shape = {
        "channels": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_outlines": 6,
        "num_grids": num_grids,
    }
    prior = CodePrior(20, 5, 8, 16, **shape).eval()
    prior.initialize(
        torch.randn(20, 5), torch.randn(20), torch.randint(20, (9, 8, 16)), torch.linspace(0, 1, 9)
    )
    return prior


@pytest.fixture(params=[1, 2, 3])
def prior(request) -> CodePrior:
    """With no, one and two outlines; its logits differ widely."""
    prior = untrained(request.param)
    for grid in prior.grids:
        torch.nn.init.normal_(grid.last[1].weight, std=0.5)
    return prior


@pytest.fixture
def inputs() -> tuple:
    """CodeDataset of three slices, where they lie (one unknown), and how they are mirrored."""
    codes = torch.randint(20, (3, 8, 16), generator=torch.Generator().manual_seed(1))
    return codes, torch.tensor([0.1, 0.9, math.nan]), torch.tensor([0, 1, 3])


def order(prior: CodePrior) -> list[tuple[int, int, int]]:
    """Grid, row and column of each code, in which order they come: reading order, grid after grid."""
    return [
        (n, i, j)
        for n, grid in enumerate(prior.grids)
        for i in range(grid.height)
        for j in range(grid.width)
    ]


# ---------------------------------------------------------------- the model


def test_bits_without_context():
    """CodeDataset that take turns: log2 4 fixed, 1 bit by frequency, and gzip of a pattern next to nothing."""
    codes = torch.tensor([1, 2]).repeat(4, 64, 16)
    bits = compressed_bits(codes, codes, 4)
    assert bits["fixed_length"] == 2 and bits["empirical_entropy"] == pytest.approx(1, abs=1e-3)
    assert 0 < bits["gzip"] < 0.3
    noise = torch.randint(4, (4, 64, 32), generator=torch.Generator().manual_seed(0))
    assert 2 < compressed_bits(noise, noise, 4)["gzip"] < 3
