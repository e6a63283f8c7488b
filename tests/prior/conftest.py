"""Fixtures for the tests of prior/: small priors and codes for them."""

import math

import pytest
import torch

from prior.model import CodePrior


@pytest.fixture(scope="session")
def make_prior():
    """make_prior(num_grids): an untrained prior of 8 x 16 codes out of 20, 6 outline levels."""

    def make_prior(num_grids: int) -> CodePrior:
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

    return make_prior


@pytest.fixture(params=[1, 2, 3])
def prior(request, make_prior) -> CodePrior:
    """A prior with no, one or two outlines, with widely differing logits."""
    prior = make_prior(request.param)
    for grid in prior.grids:
        torch.nn.init.normal_(grid.last[1].weight, std=0.5)
    return prior


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, positions (one unknown) and views of three slices."""
    codes = torch.randint(20, (3, 8, 16), generator=torch.Generator().manual_seed(1))
    return codes, torch.tensor([0.1, 0.9, math.nan]), torch.tensor([0, 1, 3])
