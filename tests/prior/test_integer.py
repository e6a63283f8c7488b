"""prior/integer.py: frequencies are integers that no order of summation changes."""

import math

import pytest
import torch
from models import make_formula_prior, make_prior, make_varied_prior

from prior.causal_training import mean_bits
from prior.integer import FRACTION, LIMIT, TOTAL, IntegerLayer, IntegerPrior
from utils import UserError


def integer_bits(prior: IntegerPrior, codes: torch.Tensor) -> float:
    """Return the mean of -log2 p over codes (B, h, w)."""
    frequencies = prior(codes).gather(-1, codes[..., None])
    return float(-(frequencies.double() / TOTAL).log2().mean())


def float_bits(prior, codes: torch.Tensor) -> torch.Tensor:
    view = torch.zeros(len(codes), dtype=torch.long)
    return mean_bits(prior, codes, torch.full((len(codes),), math.nan), view)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_frequencies_do_not_depend_on_batches_threads_and_order(set_threads):
    """Compare batches of 1, 3 and all, 1 and 2 threads, and codes at once and one by one."""
    prior = IntegerPrior(make_varied_prior())
    codes = torch.randint(20, (4, 8, 16), generator=torch.Generator().manual_seed(1))
    expected = prior(codes)
    assert expected.dtype == torch.int64
    assert bool((expected >= 1).all() and (expected.sum(-1) == TOTAL).all())
    assert not torch.equal(expected[0], expected[1])
    for threads, size in ((1, 1), (2, 3), (2, 4)):
        set_threads(threads)
        for batch, batch_expected in zip(codes.split(size), expected.split(size), strict=True):
            assert torch.equal(prior(batch), batch_expected)
            by_code = torch.zeros_like(batch_expected)

            def choose(counts, row, column, batch=batch, by_code=by_code):
                by_code[:, row, column] = counts
                return batch[:, row, column]

            assert torch.equal(prior.decode(len(batch), choose), batch)
            assert torch.equal(by_code, batch_expected)


@pytest.mark.parametrize("scale", [0.1, 30.0, 1e6])
def test_a_layer_is_exact_for_the_largest_inputs(scale):
    """Compared with Python's integers, for inputs at the limit with the signs of the weights."""
    generator = torch.Generator().manual_seed(0)
    layer = IntegerLayer(
        torch.randn(3, 40, generator=generator) * scale, torch.randn(3, generator=generator)
    )
    x = torch.cat([layer.weight.sign() * LIMIT, torch.arange(40.0)[None] * 1e12]).double()
    for inputs, outputs in zip(x.clamp(-LIMIT, LIMIT).long().tolist(), layer(x), strict=True):
        for weights, bias, y in zip(layer.weight, layer.bias, outputs.tolist(), strict=True):
            products = [a * b for a, b in zip(inputs, weights.long().tolist(), strict=True)]
            total = sum(products) + int(bias)
            assert sum(map(abs, products)) + abs(int(bias)) <= 2**53
            bits = int(layer.bits)
            floor = total >> bits if bits >= 0 else total << -bits
            assert y == max(-LIMIT, min(LIMIT, floor))


def test_integers_cost_hardly_any_bits():
    """At most 1 % on a prior that has learned stripes of codes."""
    prior = make_prior()
    generator = torch.Generator().manual_seed(0)
    ramps = torch.randint(20, (8, 1, 1), generator=generator) + torch.arange(16)
    codes = (ramps + torch.randint(3, (8, 8, 16), generator=generator)) % 20
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    with torch.no_grad():
        before = float(float_bits(prior, codes))
    for _ in range(30):
        optimizer.zero_grad()
        loss = float_bits(prior, codes)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        bits = float(float_bits(prior, codes))
    assert bits < 0.7 * before
    assert integer_bits(IntegerPrior(prior), codes) == pytest.approx(bits, rel=0.01)


def test_weights_that_are_not_finite_are_an_error():
    for value in (math.nan, math.inf, 1e30):
        prior = make_prior()
        torch.nn.init.constant_(prior.last.bias, value)
        with pytest.raises(UserError, match="not finite or too large"):
            IntegerPrior(prior)


def test_the_fingerprint_identifies_the_weights():
    prior = make_formula_prior()
    before = IntegerPrior(prior).fingerprint()
    with torch.no_grad():
        prior.views[0, 0] += 2.0**-FRACTION
    assert IntegerPrior(prior).fingerprint() != before
