"""training/schedule.py: the learning rate over a run."""

import pytest
import torch

from training.config import TrainConfig
from training.schedule import learning_rate, set_learning_rate


def rates(**values) -> list[float]:
    config = TrainConfig(learning_rate=1.0, **values)
    return [learning_rate(config, step, total_steps=100) for step in range(100)]


def test_a_cosine_follows_a_linear_warm_up():
    values = rates(warmup=0.1, schedule="cosine")
    assert values[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert values[10] == 1.0
    assert values[55] == pytest.approx(0.5)
    assert 0 < values[99] < 1e-3
    assert values[9:] == sorted(values[9:], reverse=True)


def test_a_constant_rate_stays_at_its_peak():
    assert set(rates(warmup=0.0, schedule="constant")) == {1.0}


def test_a_linear_decay_starts_after_the_first_third():
    values = rates(warmup=0.05, schedule="linear")
    assert values[4:34] == [1.0] * 30
    assert values[50] == pytest.approx(0.75)
    assert values[99] == pytest.approx(0.015)


def test_a_warm_up_may_take_the_whole_run():
    assert rates(warmup=1.0, schedule="cosine")[-1] == 1.0


def test_the_rate_is_set_in_all_groups_times_their_factors():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    groups[1]["rate_factor"] = 0.1
    optimizer = torch.optim.Adam(groups, lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25, 0.025])
