"""Show the progress bar of a run, and estimate the remaining time."""

from __future__ import annotations

import time

import torch
from tqdm import tqdm

from training.distributed import get_rank
from training.totals import EpochTotals

WARN_AFTER_STEPS = 20  # steps before the remaining time is estimated
SLOW_SECONDS = 2 * 3600  # remaining time from which a warning is printed


class ProgressBar:
    """A progress bar over all examples of a run, shown by rank 0 only.

    Args:
        num_examples: number of examples in the training set.
        batch_size: examples per step.
        epochs: number of epochs of the whole run.
        steps_done: steps that a resumed run has already done (0 for a new run).
        device: the device; on a CPU, a warning is printed if the run will take hours.
    """

    def __init__(
        self, num_examples: int, batch_size: int, epochs: int, steps_done: int, device: torch.device
    ):
        self.epochs = epochs
        self.device = device
        self.steps_per_epoch = -(-num_examples // batch_size)
        self.steps_done = steps_done
        self._timed_steps = 0
        self._start = self._first_step_end = self._last_step_end = time.perf_counter()
        epochs_done, steps_left_over = divmod(steps_done, self.steps_per_epoch)
        self._bar = tqdm(
            total=epochs * num_examples,
            initial=epochs_done * num_examples + steps_left_over * batch_size,
            unit=" slices",
            smoothing=0.05,
            disable=get_rank() > 0,
        )

    def start_epoch(self, epoch: int) -> None:
        """Show the number of the epoch, counted from 1."""
        self._bar.set_description(f"epoch {epoch}/{self.epochs}")

    def update(self, examples: int) -> bool:
        """Record a step of `examples` examples; return whether the bar was redrawn."""
        self.steps_done += 1
        self._last_step_end = time.perf_counter()
        if self._timed_steps == 0:
            self._first_step_end = self._last_step_end  # not timed: it may include compilation
        self._timed_steps += 1
        if self._timed_steps == WARN_AFTER_STEPS and self.device.type == "cpu":
            self._warn_if_slow()
        return bool(self._bar.update(examples))

    def seconds_per_step(self) -> float:
        """Return the mean duration of a step in seconds; exclude the first step if possible."""
        if self._timed_steps < 2:
            return self._last_step_end - self._start
        return (self._last_step_end - self._first_step_end) / (self._timed_steps - 1)

    def seconds_left(self, seconds_per_validation: float = 0.0) -> float:
        """Return the expected duration of the rest of the run in seconds, at the speed so far."""
        steps_left = self.epochs * self.steps_per_epoch - self.steps_done
        epochs_left = self.epochs - self.steps_done // self.steps_per_epoch
        return steps_left * self.seconds_per_step() + epochs_left * seconds_per_validation

    def _warn_if_slow(self) -> None:
        """Print a warning if the rest of the run will take hours."""
        seconds = self.seconds_left()
        if seconds < SLOW_SECONDS:
            return
        epochs_done = self.steps_done // self.steps_per_epoch
        steps_per_hour = 3600 / self.seconds_per_step()
        epochs = epochs_done + max(1, int(steps_per_hour / self.steps_per_epoch))
        self.write(
            f"warning: the remaining steps will take about {seconds / 3600:.0f} hours on this CPU; "
            f"--epochs {epochs} takes about one hour"
        )

    def show(self, totals: EpochTotals, num_shown: int, best: dict[str, float]) -> None:
        """Show the loss, the number of skipped steps and the best scores.

        Args:
            totals: the totals of the epoch so far.
            num_shown: number of losses; the sum of their means is shown as the loss.
            best: name -> best score.
        """
        *losses, examples, skipped, last_skipped = totals.to_tensor().tolist()
        postfix = {"loss": f"{sum(losses[:num_shown]) / max(examples, 1):.4f}"}
        if skipped:
            postfix["skipped"] = f"{skipped:.0f} (last: step {last_skipped:.0f})"
        for name, value in best.items():
            postfix[name] = f"{value:.4f}"
        self._bar.set_postfix(postfix)

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line)

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()
