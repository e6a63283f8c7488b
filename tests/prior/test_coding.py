"""benchmarks/entropy.py: codes survive arithmetic coding, at about the prior's bits."""

import math

import entropy
import pytest
import torch
from models import make_varied_prior
from torch.nn.functional import cross_entropy

from prior.model import CodePrior
from utils import UserError

NUM_SLICES = 40  # more than a batch


def mean_bits(prior: CodePrior, codes: torch.Tensor) -> float:
    """Return -log2 of the probability that the prior gives to a slice's codes, as a mean."""
    position = torch.full((len(codes),), math.nan)
    view = torch.zeros(len(codes), dtype=torch.long)
    logits = prior(codes, position, view)
    nats = float(cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="sum"))
    return nats / math.log(2) / len(codes)


@pytest.mark.skipif(entropy.constriction is None, reason="constriction is not installed")
def test_codes_are_decoded_from_streams_of_about_the_priors_bits():
    """The first set of codes are samples of the prior, and the second are noise."""
    prior = make_varied_prior()
    position = torch.full((NUM_SLICES,), math.nan)
    view = torch.zeros(NUM_SLICES, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)

    def sample(logits, row, column):
        return torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]

    likely = prior.decode(position, view, sample)
    noise = torch.randint(20, likely.shape, generator=torch.Generator().manual_seed(1))
    lengths = []
    with torch.no_grad():
        for codes in (likely, noise):
            streams = entropy.encode(prior, codes)
            assert len(streams) == NUM_SLICES
            assert {words.dtype.name for words in streams} == {"uint32"}
            assert torch.equal(entropy.decode(prior, streams), codes)
            lengths.append(32 * sum(map(len, streams)) / NUM_SLICES)
            excess = lengths[-1] - mean_bits(prior, codes)
            assert excess < 64  # two words
            if codes is likely:  # the coder raises very small probabilities, which noise has
                assert excess >= 0
    assert lengths[0] < lengths[1]


def test_a_missing_coder_is_an_error(monkeypatch):
    monkeypatch.setattr(entropy, "constriction", None)
    with pytest.raises(UserError, match="constriction, the arithmetic coder, is not installed"):
        entropy.check_installed()
