"""Manage a run's folder, lock, signals, history and checkpoints; scripts have the training loop.

    run = Run(folder=folder, config=config, modules={"model": model}, optimizer=optimizer, ...)
    if checkpoint:
        run.restore(checkpoint)
    with run:                                     # locks the folder, traps signals
        for epoch in run.epochs():
            for step in run.steps(train):         # the remaining steps of this epoch
                ...                               # losses, backward, optimizer.step()
                run.record_step(losses, finite)
                if run.should_stop():             # after SIGINT, SIGTERM or SIGUSR1
                    return run.stop()             # saves last.pt
            run.end_epoch({"val_loss": ...})
            run.save("last.pt")

How a killed run is resumed: last.pt is replaced atomically at the end of every epoch and, after a
signal, at the end of the current step (during validation: after the next epoch's first step). After
SIGKILL, everything since last.pt is repeated. `--resume` reads last.pt
(`training.run_folder.open_run`), `restore` loads weights, optimizer and counters from it, and
`steps` continues with the next step. Without a last.pt, the run starts from the beginning. All
randomness depends only on the seed, the step number and the rank, so the final weights are those of
an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import utils
from training import distributed, environment
from training.checkpoint import CHECKPOINT_FORMAT, read_checkpoint, write_checkpoint
from training.config import RunConfig
from training.distributed import get_rank, get_world_size
from training.guards import collect_stop_signals, lock_folder
from training.progress import ProgressBar
from training.step import Step
from training.totals import EpochTotals
from utils import UserError

SEED_STRIDE = 1_000_003  # distance between the seeds of two runs; a run has fewer steps
DRY_RUN_STEPS = 4  # the first is a warm-up; the others are timed


@dataclass(kw_only=True, eq=False)
class Run:
    """A run's folder and progress."""

    folder: Path  # where rank 0 writes checkpoints and tables
    config: RunConfig  # the script's configuration, which must also have epochs and batch_size
    device: torch.device  # device to which batches are copied
    precision: str  # precision of convolutions and matrix products, for config.json
    modules: dict[str, nn.Module]  # "model", and other modules to train
    optimizer: torch.optim.Optimizer  # optimizer of all modules
    num_examples: int  # size of the training set
    losses: tuple[str, ...]  # names of the recorded losses, which are columns of metrics.csv
    num_shown: int  # `train_loss` is the sum of the first `num_shown` losses
    best_column: str  # validation column that determines the best epoch
    best: float  # best value of `best_column` so far; initially, the worst possible value
    fingerprint: str  # hashes of the data; a run can only be resumed on the same data
    info: dict  # further entries of config.json
    extra_state: dict = field(default_factory=dict)  # further entries of checkpoints
    resume_command: str  # printed when the run is interrupted

    # Progress, which checkpoints contain
    epochs_done: int = 0
    steps_done: int = 0  # steps of the current epoch
    seconds: float = 0.0  # duration of the current epoch so far
    history: list[dict] = field(default_factory=list)  # rows of metrics.csv

    def __post_init__(self):
        self.steps_per_epoch = math.ceil(self.num_examples / self.config.batch_size)
        self.total_steps = self.config.epochs * self.steps_per_epoch
        self.totals = EpochTotals(len(self.losses), self.device)
        self._signals: list[int] = []  # stop signals received so far

    # ------------------------------------------------ folder, lock and signals

    def __enter__(self) -> Run:
        """Lock the folder, write config.json, and collect stop signals for `should_stop`.

        A dry run does none of this.

        Raises:
            UserError: if another process trains this run, or has trained it since last.pt was read.
        """
        self._stack = contextlib.ExitStack()
        try:
            if not self.config.dry_run:
                self._claim_folder()
            self._bar = ProgressBar(
                self.num_examples,
                self.config.batch_size,
                self.config.epochs,
                self.epochs_done * self.steps_per_epoch + self.steps_done,
                self.device,
            )
            self._stack.callback(self._bar.close)
        except BaseException:
            self._stack.close()
            raise
        return self

    def _claim_folder(self) -> None:
        if get_rank() == 0:
            self._stack.enter_context(lock_folder(self.folder))
            self._check_unchanged()
            self._write_config()
        self._stack.enter_context(collect_stop_signals(self._signals))

    def _write_config(self) -> None:
        content = {"name": self.folder.name, "arguments": self.config.to_json(), **self.info}
        content["device"] = environment.describe_device(self.device, get_world_size())
        content["precision"] = self.precision
        content["versions"] = environment.versions()
        utils.write_json(self.folder / "config.json", content)

    def __exit__(self, error_type, error, traceback) -> None:
        self._stack.close()
        if isinstance(error, RuntimeError) and distributed.is_lost_process(error):
            raise distributed.LostProcessError(
                f"another process of this run has ended or hangs ({utils.first_line(error)}); to "
                "resume from the end of the last epoch, with any number of processes:\n"
                f"    {self.resume_command}"
            ) from None

    def _check_unchanged(self) -> None:
        """Raise UserError if last.pt has changed since this process read it."""
        last = self.folder / "last.pt"
        epochs_done, steps_done = 0, 0
        if last.exists():
            checkpoint = read_checkpoint(last)
            epochs_done, steps_done = checkpoint["epochs_done"], checkpoint["steps_done"]
        if (epochs_done, steps_done) != (self.epochs_done, self.steps_done):
            raise UserError(
                f"another process has trained {self.folder} in the meantime; to resume:\n"
                f"    {self.resume_command}"
            )

    def should_stop(self) -> bool:
        """Return whether any process received a stop signal; all processes must call this.

        Raises:
            UserError: after a signal, if the loss of a step was not finite; nothing is saved.
        """
        received = distributed.all_reduce_sum(torch.tensor(len(self._signals)))
        if received:
            self._check_losses()
        return bool(received)

    def stop(self) -> int:
        """Save last.pt after a signal, and return the exit code, 128 + the signal's number."""
        self.save("last.pt")
        self._bar.close()
        print(f"stopped in epoch {self.epochs_done + 1}; to resume:\n    {self.resume_command}")
        number = self._signals[0] if self._signals else signal.SIGTERM
        return 128 + number

    # ------------------------------------------------ epochs and steps

    def epochs(self) -> Iterator[int]:
        """Yield the numbers of the remaining epochs, which are counted from 1."""
        while self.epochs_done < self.config.epochs:
            epoch = self.epochs_done + 1
            self._bar.start_epoch(epoch)
            yield epoch

    def steps(self, data) -> Iterator[Step]:
        """Yield the remaining steps of the current epoch; in a dry run, only the first few.

        Before each step, torch's generator is seeded from the seed, the step number and the rank.

        Args:
            data: the training set, with `len`, `names` and `batches(groups, device)`.
        """
        rank, world_size = get_rank(), get_world_size()
        order = epoch_order(self.num_examples, self.config.seed, self.epochs_done + 1)
        batches = order.split(self.config.batch_size)
        self._parts = [batch.tensor_split(world_size)[rank] for batch in batches]
        self._names = data.names
        end = min(len(batches), self.steps_done + DRY_RUN_STEPS) if self.config.dry_run else None
        remaining = range(len(batches))[self.steps_done : end]
        parts = self._parts[self.steps_done : end]
        self._start = time.perf_counter() - self.seconds
        for i, part, batch in zip(remaining, parts, data.batches(parts, self.device), strict=True):
            number = self.epochs_done * len(batches) + i
            torch.manual_seed(self.config.seed * SEED_STRIDE + number + (rank << 48))
            self._current = (number, len(part), len(batches[i]))
            yield Step(
                number=number,
                progress=number / self.total_steps,
                batch=batch,
                size=len(part),
                weight=len(part) * world_size / len(batches[i]),
                is_full=len(batches[i]) == self.config.batch_size,
            )
        self._check_losses()

    def record_step(self, losses: Tensor, finite: Tensor) -> None:
        """Record a finished step.

        Args:
            losses: (n,) losses on the device, in the order of `Run.losses`.
            finite: () bool, false if non-finite gradients made the optimizer skip the step.

        Raises:
            UserError: if the loss of a step was not finite. A check waits for the device, so losses
                are checked only when the progress bar is redrawn (a few times per second) and at
                the end of the epoch.
        """
        number, examples, batch_size = self._current
        self.totals.add(losses.detach(), finite, examples, number + 1)
        self.steps_done += 1
        self.seconds = time.perf_counter() - self._start
        if self.config.dry_run:
            finite.item()  # waits for the device, so that the measured time is correct
        if self._bar.update(batch_size):
            best = {f"best_{self.best_column}": self.best} if self.history else {}
            self._bar.show(self.totals, self.num_shown, best)
            self._check_losses()

    def describe_plan(self) -> str:
        """Return a line with the epochs, steps, device and precision of the run."""
        steps_left = self.total_steps - self.epochs_done * self.steps_per_epoch - self.steps_done
        device = environment.describe_device(self.device, get_world_size())
        return (
            f"training: {self.config.epochs} epochs of {self.steps_per_epoch} steps of "
            f"{self.config.batch_size} slices, {steps_left} steps left, on {device} in "
            f"{self.precision}"
        )

    def print_expected_time(self, seconds_per_validation: float) -> None:
        """Print the expected duration of the rest of the run, at the end of a dry run."""
        minutes = math.ceil(self._bar.seconds_left(seconds_per_validation) / 60)
        self._bar.close()
        print(
            f"dry run: the rest of the run takes about {minutes} min; nothing was written to "
            f"{self.folder}"
        )

    def _check_losses(self) -> None:
        """Raise UserError if the loss of a step was not finite; the error names its slices."""
        step = int(self.totals.nonfinite_step)
        if step == 0:
            return
        last = self.folder / "last.pt"
        saved = f"{last} has the last saved state" if last.exists() else "nothing was saved yet"
        part = self._parts[(step - 1) % self.steps_per_epoch]
        names = ", ".join(self._names[i].stem for i in part)
        which = "Some slices" if get_world_size() > 1 else "The slices"
        raise UserError(
            f"the loss is not finite at step {step} of the run, in epoch {self.epochs_done + 1}. "
            f"That step was not taken; {saved}.\n{which} of the step: {names}\nCheck them, or "
            "lower --learning-rate"
        )

    def end_epoch(self, scores: dict[str, float]) -> dict:
        """End the epoch and return its row of metrics.csv.

        Args:
            scores: validation columns, the same on all ranks, with "val_loss" and `best_column`.

        Raises:
            UserError: if no step had finite gradients, or the validation loss is not finite.
            RuntimeError: if the processes hold different weights.
        """
        for module in self.modules.values():
            distributed.check_replicas(module.state_dict())
        *sums, examples, skipped, last_skipped = self.totals.over_processes().tolist()
        epoch = self.epochs_done + 1
        if not examples or not math.isfinite(scores["val_loss"]):
            raise UserError(
                f"training has diverged in epoch {epoch} ({skipped:.0f} of {self.steps_done} steps "
                f"skipped, validation loss {scores['val_loss']}); the checkpoints contain the "
                "earlier epochs; try a lower --learning-rate"
            )
        if skipped:
            self._bar.write(
                f"warning: {skipped:.0f} of {self.steps_done} steps of epoch {epoch} were skipped "
                f"because of non-finite gradients, the last at step {last_skipped:.0f}"
            )
        losses = [value / examples for value in sums]
        row = {"epoch": epoch, "step": epoch * self.steps_per_epoch}
        row["train_loss"] = sum(losses[: self.num_shown])
        if len(losses) > 1:
            row |= dict(zip(self.losses, losses, strict=True))
        row |= scores
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["seconds"] = round(time.perf_counter() - self._start, 2)
        self.history.append(row)
        self.epochs_done = epoch
        self.steps_done = 0
        self.seconds = 0.0
        self.totals = EpochTotals(len(self.losses), self.device)
        return row

    def is_plot_epoch(self, epoch: int) -> bool:
        """Return whether to plot: on rank 0, after the first and last epoch and at intervals."""
        at_interval = epoch % self.config.plot_every == 0
        return get_rank() == 0 and (epoch in (1, self.config.epochs) or at_interval)

    def write(self, line: str) -> None:
        """Print a line above the progress bar."""
        self._bar.write(line)

    # ------------------------------------------------ checkpoints

    def save(self, name: str) -> None:
        """Write a checkpoint; all processes must call this.

        The state of random generators is not saved, because every step is seeded. There is no
        scheduler to save, because the learning rate is a function of the step number.
        """
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "model_args": self.modules["model"].arguments,
            "epochs_done": self.epochs_done,
            "history": self.history,
            "best": self.best,
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(),
            "sums": self.totals.over_processes(),
            "fingerprint": self.fingerprint,
            **self.extra_state,
        }
        for module_name, module in self.modules.items():
            checkpoint[module_name] = module.state_dict()
        if get_rank() == 0:
            write_checkpoint(self.folder / name, checkpoint)

    def write_history(self) -> None:
        """Write metrics.csv on rank 0."""
        if get_rank() == 0:
            utils.write_csv(self.folder / "metrics.csv", self.history)

    def restore(self, checkpoint: dict) -> None:
        """Continue from a checkpoint of this run.

        Raises:
            UserError: if the checkpoint is corrupt, or is of another version, data set or model.
        """
        if checkpoint["format"] != CHECKPOINT_FORMAT:
            raise UserError(
                f"{self.folder} was created by an older version and cannot be resumed; start a "
                "new run"
            )
        if checkpoint.get("fingerprint") != self.fingerprint:
            raise UserError(
                f"{self.folder} was trained on other slices than those in {self.config.data}; give "
                "the same data with --data"
            )
        if checkpoint["model_args"] != self.modules["model"].arguments:
            raise UserError(
                f"{self.folder} was created by another version, whose recipe made a different "
                "model; start a new run"
            )
        try:
            self._load(checkpoint)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.folder / 'last.pt'} is corrupt ({utils.first_line(error)}), so the run "
                "cannot be resumed; start a new run (predict.py may still be able to use best.pt)"
            ) from None

    def _load(self, checkpoint: dict) -> None:
        """Load progress and states; raises various exceptions if the checkpoint is corrupt."""
        history = checkpoint["history"]
        counts = (checkpoint["epochs_done"], checkpoint["steps_done"])
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"it has {counts[0]!r} epochs and {counts[1]!r} steps")
        if len(history) != counts[0]:
            raise ValueError(f"it has {counts[0]} epochs, but {len(history)} rows of metrics")
        values = [checkpoint["best"], checkpoint["seconds"]]
        for row in history:
            values += [row[name] for name in ("epoch", "train_loss", "val_loss", self.best_column)]
        if not all(isinstance(value, int | float) for value in values):
            raise ValueError("its history contains values that are not numbers")
        for name, module in self.modules.items():
            module.load_state_dict(checkpoint[name])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.totals.load(checkpoint["sums"])
        self.epochs_done, self.steps_done = counts
        self.history = history
        self.best = checkpoint["best"]
        self.seconds = checkpoint["seconds"]


def epoch_order(num_examples: int, seed: int, epoch: int) -> Tensor:
    """Return the shuffled indices of an epoch, (N,), which depend only on the seed and epoch."""
    generator = torch.Generator().manual_seed(seed * SEED_STRIDE + epoch)
    return torch.randperm(num_examples, generator=generator)
