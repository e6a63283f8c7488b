"""The prior over codes: order, cache, drawing; its training, by train_prior.py; and coding under it."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from prior.model import CodePrior
from utils import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import entropy

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


@pytest.mark.skipif(
    entropy.constriction is None, reason="constriction, the arithmetic coder, is not installed"
)
def test_codes_come_back_from_their_streams_at_about_the_priors_bits(prior):
    position, view = torch.full((40,), math.nan), torch.zeros(40, dtype=torch.long)
    likely = prior.sample(position, view, torch.Generator().manual_seed(0))
    noise = torch.randint(20, likely.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for codes in (likely, noise):
            streams = entropy.encode(prior, codes)
            assert torch.equal(entropy.decode(prior, streams), codes)
            pyramid = prior.to_grids(codes)
            pairs = zip(prior(pyramid, position, view), pyramid, strict=True)
            nats = sum(
                cross_entropy(found.flatten(0, 2), true.flatten(), reduction="sum")
                for found, true in pairs
            )
            bits = 32 * sum(map(len, streams)) / 40
            excess = bits - float(nats) / math.log(2) / 40
            assert excess < 64  # two words a stream
            # The coder has a least probability, under which noise falls, and outlines that do not fit their codes.
            assert excess >= 0 or codes is noise or len(prior.grids) > 1
    assert len(streams) == 40 and all(words.dtype == np.uint32 for words in streams)
    assert sum(map(len, entropy.encode(prior, likely))) < sum(map(len, streams))


def test_without_a_coder_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(entropy, "constriction", None)
    with pytest.raises(
        UserError, match="constriction, the arithmetic coder, is missing: pip install"
    ):
        entropy.check_installed()


# ---------------------------------------------------------------- training
