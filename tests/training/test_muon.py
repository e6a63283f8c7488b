"""Tests of training/muon.py: orthogonal updates, skipped steps, resumed training."""

import copy

import pytest
import torch
from torch import nn

from training.muon import SCALE, Muon, orthogonalize


def make(seed: int = 0) -> tuple[nn.Module, Muon]:
    """Return a network with gradients, and its optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))
    hidden = [model[1].weight]
    others = [p for p in model.parameters() if p is not model[1].weight]
    optimizer = Muon(hidden, others, learning_rate=0.1, weight_decay=0.5)
    return model, optimizer


def train_step(model: nn.Module, optimizer: Muon, seed: int) -> None:
    images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5)])
def test_singular_values_become_about_1(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    singular_values = torch.linalg.svdvals(orthogonalize(matrix))
    assert singular_values.min() > 0.3
    assert singular_values.max() < 1.3
    torch.testing.assert_close(orthogonalize(100 * matrix), orthogonalize(matrix))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert ((u @ v) * orthogonalize(matrix)).sum() > 0.9 * min(shape) * 0.8


def test_a_zero_gradient_gives_a_zero_update():
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_updates_have_the_size_of_the_learning_rate():
    model, optimizer = make()
    before = copy.deepcopy(model)
    train_step(model, optimizer, seed=1)
    decayed = before[1].weight * (1 - 0.1 * 0.5)
    rms = (model[1].weight - decayed).square().mean().sqrt()
    assert rms.item() == pytest.approx(0.1 * SCALE, rel=0.3)
    for index in (0, 2):  # the first update of AdamW has the size of the learning rate
        change = (model[index].bias - before[index].bias).detach()
        torch.testing.assert_close(change.abs(), torch.full_like(change, 0.1), rtol=0.01, atol=0)


def test_weight_decay_is_for_matrices():
    model, optimizer = make()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = copy.deepcopy(model)
    optimizer.step()
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new, old * (0.95 if old.ndim > 1 else 1))


def test_a_step_with_non_finite_gradients_changes_nothing():
    model, optimizer = make()
    train_step(model, optimizer, seed=1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    after = (model.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    optimizer.found_inf = torch.tensor(0.0)
    train_step(model, optimizer, seed=2)
    assert not torch.equal(model[1].weight, before[0]["1.weight"])


def test_resumed_training_is_identical(tmp_path):
    model, optimizer = make()
    for seed in range(3):
        train_step(model, optimizer, seed)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "last.pt")
    for seed in range(3, 6):
        train_step(model, optimizer, seed)

    resumed, resumed_optimizer = make(seed=1)
    weights, state = torch.load(tmp_path / "last.pt", weights_only=True)
    resumed.load_state_dict(weights)
    resumed_optimizer.load_state_dict(state)
    for seed in range(3, 6):
        train_step(resumed, resumed_optimizer, seed)
    for expected, parameter in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, expected)
