"""Fixtures for the tests of prior/: small priors and codes for them."""

import math

import pytest
import torch
from models import make_varied_prior

from prior.model import CodePrior


@pytest.fixture(params=[1, 2, 3])
def prior(request) -> CodePrior:
    """A prior with no, one or two outlines, with widely different logits."""
    return make_varied_prior(request.param)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, positions (one unknown) and views of three slices."""
    codes = torch.randint(20, (3, 8, 16), generator=torch.Generator().manual_seed(1))
    return codes, torch.tensor([0.1, 0.9, math.nan]), torch.tensor([0, 1, 3])
