"""training/progress.py: what the bar shows, and the time that is left."""

import time

import pytest
import torch

from training.progress import WARN_AFTER_STEPS, ProgressBar
from training.totals import EpochTotals

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """clock(3.0) lets so many seconds pass."""
    seconds = 100.0

    def advance(duration):
        nonlocal seconds
        seconds += duration

    monkeypatch.setattr(time, "perf_counter", lambda: seconds)
    return advance


def train_steps(bar, clock, durations):
    for duration in durations:
        clock(duration)
        bar.update(4)


def test_the_time_left_is_that_of_the_remaining_steps_and_validations(clock):
    """The first step may compile, so it does not count; nor does what follows the last one."""
    bar = ProgressBar(num_examples=10, batch_size=4, epochs=4, steps_done=0, device=CPU)
    train_steps(bar, clock, [50.0, 2.0, 2.0])
    clock(1000)
    assert bar.seconds_per_step() == 2
    assert bar.seconds_left() == 9 * 2
    assert bar.seconds_left(seconds_per_validation=5) == 9 * 2 + 3 * 5
    bar.close()


def test_the_time_of_a_single_step_is_its_own(clock):
    bar = ProgressBar(num_examples=3, batch_size=4, epochs=4, steps_done=0, device=CPU)
    train_steps(bar, clock, [2.0])
    assert bar.seconds_left() == 3 * 2
    bar.close()


def test_a_resumed_run_has_fewer_steps_left(clock):
    bar = ProgressBar(num_examples=10, batch_size=4, epochs=4, steps_done=7, device=CPU)
    assert bar.seconds_left(seconds_per_validation=5) == 2 * 5  # no step was timed
    train_steps(bar, clock, [2.0, 2.0])
    assert bar.seconds_left() == 3 * 2
    bar.close()


@pytest.mark.parametrize(
    ("device", "seconds", "warnings"), [("cpu", 60, 1), ("cpu", 1, 0), ("cuda", 60, 0)]
)
def test_only_slow_runs_on_a_cpu_are_announced(clock, capsys, device, seconds, warnings):
    """300 steps of 60 s: 280 of them remain at the warning; an hour has time for 60."""
    bar = ProgressBar(40, 4, epochs=30, steps_done=0, device=torch.device(device))
    train_steps(bar, clock, [seconds] * (WARN_AFTER_STEPS + 5))
    bar.close()
    text = "warning: the remaining steps will take about 5 hours on this CPU; --epochs 8 takes"
    assert capsys.readouterr().out.count(text) == warnings


def test_the_bar_shows_loss_skipped_steps_and_best_score(capsys):
    totals = EpochTotals(3, CPU)
    totals.add(torch.tensor([0.25, 0.5, 9.0]), torch.tensor(True), 4, step=1)
    totals.add(torch.tensor([1.0, 1.0, 1.0]), torch.tensor(False), 4, step=2)
    bar = ProgressBar(10, 4, epochs=4, steps_done=0, device=CPU)
    bar.start_epoch(2)
    bar.show(totals, num_shown=2, best={"best_val_ssim": 0.5})
    bar.close()
    shown = capsys.readouterr().err
    for text in ("epoch 2/4", "loss=0.7500", "skipped=1 (last: step 2)", "best_val_ssim=0.5000"):
        assert text in shown
