"""The estimate of the codes' entropy: causal, a proper code length, and right where the answer is known."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modules import VQVAE
from utils import UserError

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


def test_estimate_of_a_run_and_its_refusal(monkeypatch):
    monkeypatch.setattr(entropy, "STEPS", 3)
    small = {"hidden_channels": 8, "residual_channels": 4, "embedding_dim": 4, "num_embeddings": 16}
    images = torch.randn(3, 1, 32, 16)

    class Slices(SimpleNamespace):
        def __len__(self):
            return 3

    slices = Slices(batch=lambda indices: images[indices])
    model = VQVAE(**small)
    assert entropy.encode(model, slices).shape == (12, 8, 4)
    bits, parameters = entropy.estimate(model, slices, model.encode(images))
    assert 0 < bits < 3 * math.log2(16) and parameters > 100_000
    with pytest.raises(UserError, match="2 codebooks; the estimate is made for one"):
        entropy.estimate(VQVAE(**small, num_codebooks=2), slices, None)
