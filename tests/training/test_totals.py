"""training/totals.py: sums over the steps of an epoch."""

import math

import pytest
import torch

from training.totals import EpochTotals

CPU = torch.device("cpu")


def add(totals, losses, examples, step, finite=True):
    totals.add(torch.tensor(losses), torch.tensor(finite), examples, step)


def test_losses_are_weighted_by_their_examples():
    totals = EpochTotals(2, CPU)
    add(totals, [1.0, 2.0], examples=4, step=1)
    add(totals, [5.0, 0.5], examples=1, step=2)
    assert totals.to_tensor().tolist() == [9.0, 8.5, 5.0, 0.0, 0.0]
    assert totals.over_processes().tolist() == totals.to_tensor().tolist()


def test_steps_with_non_finite_gradients_are_counted_and_not_added():
    totals = EpochTotals(1, CPU)
    add(totals, [1.0], examples=4, step=1)
    add(totals, [math.inf], examples=4, step=2, finite=False)
    add(totals, [7.0], examples=4, step=3, finite=False)
    add(totals, [2.0], examples=4, step=4)
    assert totals.to_tensor().tolist() == [12.0, 8.0, 2.0, 3.0]


def test_the_first_non_finite_loss_is_remembered():
    totals = EpochTotals(1, CPU)
    add(totals, [1.0], examples=4, step=1)
    assert totals.nonfinite_step == 0
    for step in (2, 3):
        add(totals, [math.nan], examples=4, step=step, finite=False)
    assert totals.nonfinite_step == 2


def test_a_resumed_epoch_continues_its_sums():
    first, second, whole = (EpochTotals(1, CPU) for _ in range(3))
    add(first, [1.0], examples=4, step=1, finite=False)
    second.load(first.over_processes())
    add(second, [3.0], examples=2, step=2)
    add(whole, [1.0], examples=4, step=1, finite=False)
    add(whole, [3.0], examples=2, step=2)
    assert torch.equal(second.to_tensor(), whole.to_tensor())


def test_sums_of_another_number_of_losses_cannot_be_loaded():
    with pytest.raises(ValueError, match="has 5 epoch totals; expected 4"):
        EpochTotals(1, CPU).load(torch.zeros(5))
