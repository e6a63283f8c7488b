"""The estimate of the codes' entropy: causal, a proper code length, and right where the answer is known."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modules import VQVAE

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import entropy


def test_a_code_is_predicted_from_those_before_it_alone():
    torch.manual_seed(0)
    model = entropy.ContextModel(torch.randn(16, 4), torch.ones(16)).eval()
    torch.nn.init.normal_(model.last.weight)
    codes = torch.randint(16, (1, 8, 6))
    other = codes.clone()
    other[0, 4, 3] = (other[0, 4, 3] + 1) % 16
    changed = (model(codes) != model(other)).any(-1).flatten().tolist()
    assert changed.index(True) == 4 * 6 + 4  # the next in reading order: not itself, and nothing before it


def test_it_starts_from_the_frequencies():
    codes = torch.tensor([0, 0, 0, 1]).repeat(1, 6, 4)
    counts = torch.bincount(codes.flatten(), minlength=3).float()
    bits = entropy.ContextModel(torch.randn(3, 4), counts).bits(codes)
    expected = -torch.log2((counts + 0.1) / (counts + 0.1).sum())[codes]
    torch.testing.assert_close(bits, expected)


def test_it_finds_what_the_neighbours_tell():
    """Rows that repeat a fair coin's: a bit for the first row, nothing after; no less than that can be right."""
    torch.manual_seed(1)
    codes = torch.randint(2, (300, 1, 8)).expand(300, 12, 8)
    model = entropy.fit(codes[:200], torch.eye(2), steps=150)
    with torch.no_grad():
        bits = model.bits(codes[200:]).mean((0, 2))
    assert bits[0] == pytest.approx(1, abs=0.1) and bits[1:].mean() < 0.1


class Slices(SimpleNamespace):
    def __len__(self):
        return 3


@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_estimate_of_a_run(monkeypatch, num_codebooks):
    monkeypatch.setattr(entropy, "STEPS", 3)
    images = torch.randn(3, 1, 32, 16)
    slices = Slices(batch=lambda indices: images[indices])
    model = VQVAE(16, 8, embedding_dim=4, num_embeddings=16, num_codebooks=num_codebooks).eval()
    assert entropy.encode(model, slices).shape[:3] == (12, 8, 4)
    bits, parameters = entropy.estimate(model, slices, model.encode(images))
    assert 0 < bits < 3 * num_codebooks * math.log2(16 * num_codebooks) and parameters > 100_000


def test_it_learns_whose_turn_is_next():
    """Two codebooks of which each is a fair coin: a bit for each, not two; a first code that tells the second: one."""
    torch.manual_seed(1)
    first, second = torch.randint(2, (2, 300, 4, 4))
    table = torch.cat([torch.randn(4, 3), torch.eye(2).repeat_interleave(2, 0)], 1)
    for other, expected in ((second, 2), (first, 1)):
        codes = entropy.interleave(torch.stack([first, other], -1), 2)
        assert codes[0, 0, :2].tolist() == [first[0, 0, 0], 2 + other[0, 0, 0]]
        model = entropy.fit(codes[:200], table, steps=150)
        with torch.no_grad():
            assert 2 * float(model.bits(codes[200:]).mean()) == pytest.approx(expected, abs=0.25)
