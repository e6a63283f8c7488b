"""Tests of prior/model.py: the order of codes, codes one by one, and codebooks."""

import math

import pytest
import torch
from models import make_prior, make_varied_prior

from prior.model import CausalConv2d, CodePrior


@pytest.fixture
def prior() -> CodePrior:
    return make_varied_prior()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, positions (one unknown) and views of three slices."""
    codes = torch.randint(20, (3, 8, 16), generator=torch.Generator().manual_seed(1))
    return codes, torch.tensor([0.1, 0.9, math.nan]), torch.tensor([0, 1, 3])


@pytest.mark.parametrize(("size", "itself"), [(3, True), (7, False)])
def test_a_causal_convolution_is_a_convolution_with_a_masked_kernel(size, itself):
    torch.manual_seed(0)
    conv = CausalConv2d(4, 5, size, itself)
    x = torch.randn(2, 4, 6, 8)
    kernel = torch.zeros(5, 4, size, size)
    kernel[:, :, : size // 2 + 1] = conv.weight.detach()
    kernel.flatten(2)[:, :, size**2 // 2 + itself :] = 0
    expected = torch.nn.functional.conv2d(x, kernel, conv.bias, padding=size // 2)
    torch.testing.assert_close(conv(conv.pad(x)), expected)


def test_a_code_changes_only_later_logits(prior, inputs):
    """Logits up to its own stay the same, bit for bit; some later one changes in every slice."""
    codes, *where = inputs
    last = codes[0].numel() - 1
    with torch.no_grad():
        before = prior(codes, *where)
        for index in range(last + 1):
            row, column = divmod(index, 16)
            changed_codes = codes.clone()
            changed_codes[:, row, column] = (codes[:, row, column] + 1) % 20
            changed = (prior(changed_codes, *where) != before).any(-1).flatten(1)  # (B, h w)
            assert not changed[:, : index + 1].any()
            assert changed[:, index + 1 :].any(1).all() == (index < last)


def test_code_by_code_gives_the_same_logits_as_all_at_once(prior, inputs):
    codes, *where = inputs
    logits = torch.zeros(3, 8, 16, 20)
    order = []

    def choose(code_logits, row, column):
        order.append((row, column))
        logits[:, row, column] = code_logits
        return codes[:, row, column]

    assert torch.equal(prior.decode(*where, choose), codes)
    assert order == [divmod(index, 16) for index in range(8 * 16)]
    with torch.no_grad():
        torch.testing.assert_close(logits, prior(codes, *where), rtol=1e-5, atol=1e-5)


def test_position_and_view_matter_and_a_position_may_be_unknown(prior, inputs):
    codes, position, view = inputs
    with torch.no_grad():
        before = prior(codes, position, view)
        assert before.isfinite().all()
        for other in ((1 - position, view), (position, (view + 1) % 4)):
            changed = prior(codes, *other) != before
            assert changed.flatten(1).any(1)[:2].all()


def test_an_untrained_prior_predicts_the_frequencies(inputs):
    prior = CodePrior(20, 5, 8, 16, channels=16, num_layers=1)
    codes = torch.randint(20, (400, 8, 16), generator=torch.Generator().manual_seed(0))
    codes = codes.square() // 20  # not uniform
    prior.initialize(torch.randn(20, 5), codes)
    frequencies = torch.bincount(codes.flatten(), minlength=20) / codes.numel()
    probabilities = prior(*inputs).softmax(-1)
    torch.testing.assert_close(probabilities, frequencies.expand(3, 8, 16, 20), atol=1e-4, rtol=0)


def test_a_prior_recognises_its_codebook():
    prior = make_prior()
    embedding = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    prior.initialize(embedding, torch.randint(20, (9, 8, 16)))
    assert prior.has_codebook(embedding)
    assert not prior.has_codebook(embedding.flip(0))
    assert not prior.has_codebook(embedding[:19])
