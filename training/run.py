"""What train.py and train_prior.py share: a run that can be killed at any moment and goes on, on one device or several.

A script has a subclass of `Run` that says what is trained and how it is measured; `carry_out` takes one to its last
epoch. Whatever is drawn at random follows from the seed and the step, so a resumed run ends as if it had never been
stopped.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import utils
from mri.files import SliceName
from training import distributed
from training.checkpoint import CHECKPOINT_FORMAT, read_checkpoint, write_checkpoint
from training.distributed import all_reduce_sum, get_rank, get_world_size
from training.schedule import learning_rate
from utils import UserError

UNCOMPILED = "the step can't be compiled here, and goes on uncompiled"
SEED_STEP = 1_000_003  # between the seeds of two runs, more than a run has steps


class Split(Protocol):
    """What a run is trained on: dataset.SliceDataset, or CodeDataset."""

    names: Sequence[SliceName]

    def __len__(self) -> int: ...

    def batches(self, groups: Sequence[Tensor], device: torch.device):
        """For each group of indices (B,) a batch on the device: a tensor of B examples, or a tuple of such tensors."""


class Run:
    """What a run consists of: folder, arguments, model, optimizer, and how far it has come.

    A subclass names its losses, and how epochs are ranked and told:
    LOSSES: columns of metrics.csv, `train_loss` the sum of the first SHOWN of them. BEST: the validation column that
    picks best.pt, HIGHER if more is better. LINE: what is printed of an epoch.
    """

    LOSSES: tuple[str, ...]
    SHOWN: int
    BEST: str
    HIGHER: bool
    LINE: str
    PROGRESS = (
        "epochs_done",
        "history",
        "best",
        "steps_done",
        "seconds",
    )  # as checkpoints keep it, beside `sums`

    def __init__(self, folder: Path, args: dict, fingerprint: str, **modules: nn.Module):
        """fingerprint: of the training and validation split. modules: `model`, which checkpoints are named for, and
        what else is trained; they are moved to the device that `args` names."""
        self.folder, self.args, self.fingerprint = folder, args, fingerprint
        self.device = utils.pick_device(args["device"])
        self.precision = utils.pick_precision(args["precision"], self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.modules = {name: module.to(self.device) for name, module in modules.items()}
        self.model = self.modules["model"]
        self.optimizer = self.make_optimizer()
        self.parallel = self.model
        if (
            get_world_size() > 1
        ):  # each process has a copy of the model; backward takes the mean of their gradients
            # The codebook's averages are kept equal by the quantiser; copying them at each step would hide where not.
            known = inspect.signature(DistributedDataParallel).parameters
            copying = (
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            )  # its old name
            self.parallel = DistributedDataParallel(self.model, **{copying: False})
        self.losses = self.eager_losses
        if args["compile"] or (
            args["compile"] is None and self.device.type == "cuda" and get_world_size() == 1
        ):
            self.compile()
        self.epochs_done, self.history, self.best = 0, [], -math.inf if self.HIGHER else math.inf
        self.share = (
            1.0  # of all steps, which are done; until it trains, a step is as the last ones will be
        )
        self.begin_epoch()

    # ------------------------------------------------ what a subclass says

    def make_optimizer(self) -> torch.optim.Optimizer:
        """A fused one: it leaves out a step whose `found_inf` is set."""
        raise NotImplementedError

    def eager_losses(self, batch) -> Tensor:
        """LOSSES of a batch, (n,); their sum is trained, and of several processes its mean over examples."""
        raise NotImplementedError

    def validate(self, validation: Split) -> dict[str, float]:
        """Columns of metrics.csv, `val_loss` and BEST among them; equal in all processes."""
        raise NotImplementedError

    def plot(self, validation: Split) -> None:
        """Pictures of what it can do, and the curves of its history; the first process is asked for them."""
        raise NotImplementedError

    def is_best(self, row: dict) -> bool:
        """Whether the epoch of this row of metrics.csv is to be best.pt."""
        return row[self.BEST] > self.best if self.HIGHER else row[self.BEST] < self.best

    # ------------------------------------------------ the rest

    def finish_gradients(self) -> Tensor:
        """After backward: their mean over processes where DDP has not taken it, clipped. Whether all are finite, ()."""
        norms = []
        for module in self.modules.values():
            parameters = [p for p in module.parameters() if p.grad is not None]
            if get_world_size() > 1 and module is not self.model:
                for p in parameters:
                    dist.all_reduce(p.grad)
                    p.grad /= get_world_size()
            if parameters:
                norms.append(
                    torch.nn.utils.clip_grad_norm_(
                        parameters, self.args["clip_grad_norm"] or math.inf
                    )
                )
        return torch.stack(norms).isfinite().all()

    def compile(self) -> None:
        """The losses of a whole batch, on a GPU as CUDA graphs; `seconds_a_step` tries it."""
        try:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.losses = torch.compile(self.eager_losses, mode=mode, dynamic=False)
        except RuntimeError as error:  # a Python that it does not know
            print(f"warning: {UNCOMPILED}: {utils.first_line(error)}")

    @property
    def compiled(self) -> bool:
        return self.losses != self.eager_losses

    def begin_epoch(self) -> None:
        self.steps_done, self.seconds = 0, 0.0
        # Over this process's share, on the device: each loss, these examples, steps skipped; and the last such step.
        self.sums = torch.zeros(len(self.LOSSES) + 3, device=self.device)
        self.lost = torch.zeros(
            (), device=self.device
        )  # the first step since then whose loss was not finite, or 0

    def add(self, losses: Tensor, finite: Tensor, count: int, step: int) -> None:
        """To `sums`, what `train_step` returned for `count` examples."""
        self.sums[:-3] += torch.where(finite, losses * count, 0)
        self.sums[-3] += finite * count
        self.sums[-2] += ~finite
        self.sums[-1] = torch.where(finite, self.sums[-1], step)
        self.lost = torch.where((self.lost == 0) & ~losses.isfinite().all(), step, self.lost)

    def sums_of_all(self) -> Tensor:
        """`sums` over the examples of all processes, on the CPU."""
        return torch.cat(
            [all_reduce_sum(self.sums[:-2]), self.sums[-2:].cpu()]
        )  # all skip the same steps

    def state(self) -> dict:
        """No generator's, since each step seeds itself, and no schedule's, a function of the step."""
        state = {key: getattr(self, key) for key in self.PROGRESS}
        state |= {name: module.state_dict() for name, module in self.modules.items()}
        return state | {"optimizer": self.optimizer.state_dict(), "sums": self.sums_of_all()}

    def load(self, state: dict) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        for key in self.PROGRESS:
            setattr(self, key, state[key])
        if state["sums"].shape != self.sums.shape:
            raise ValueError(f"{len(state['sums'])} sums of losses, not {len(self.sums)}")
        self.sums = state["sums"].to(self.device)
        if get_rank():  # what was summed is the first process's, also where others had a part in it
            self.sums[:-2] = 0

    def save(self, name: str) -> None:
        """By the first process; all must call it."""
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "model_args": self.model.arguments,
            **self.state(),
        }
        if get_rank() == 0:
            write_checkpoint(self.folder / name, checkpoint | {"fingerprint": self.fingerprint})

    def restore(self, checkpoint: dict) -> None:
        if checkpoint["format"] != CHECKPOINT_FORMAT:
            raise UserError(
                f"{self.folder} was begun by an older version, which this one can't go on from; start anew"
            )
        if checkpoint.get("fingerprint") != self.fingerprint:
            data = self.args["data"]
            raise UserError(
                f"{self.folder} was trained on other slices than {data} holds; name the same with --data"
            )
        if checkpoint["model_args"] != self.model.arguments:
            raise UserError(
                f"{self.folder} is of another version, whose recipe made another model; start a new run"
            )
        try:
            check_progress(checkpoint, {"epoch", "train_loss", "val_loss", self.BEST})
            self.load(checkpoint)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.folder / 'last.pt'} is damaged ({utils.first_line(error)}), and can't be gone on from; best.pt "
                "beside it may still be whole; start a new run"
            ) from None


def check_progress(state: dict, columns: set[str]) -> None:
    """Raises ValueError, or what Python raises of other types, where Run.PROGRESS is not what a run writes."""
    counts, history = [state["epochs_done"], state["steps_done"]], state["history"]
    if any(type(count) is not int or count < 0 for count in counts) or len(history) != counts[0]:
        raise ValueError(f"{counts} epochs and steps, {len(history)} rows")
    values = [state["best"], state["seconds"], *(row[name] for row in history for name in columns)]
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError("its history is not of numbers")


def epoch_order(train: Split, seed: int, epoch: int) -> Tensor:
    """A shuffle that depends on seed and epoch alone, so that a resumed run draws the same."""
    return torch.randperm(
        len(train), generator=torch.Generator().manual_seed(seed * SEED_STEP + epoch)
    )


def train_step(run: Run, batch, count: int | None = None) -> tuple[Tensor, Tensor]:
    """One update on a batch, of several processes this one's share of a batch of `count`.

    Returns the losses, (n,), and whether the gradient was finite, (): if not, no weight was updated (nor a moving
    average, where the encoder's output was not finite). They stay on the device: nothing here waits for it.
    """
    length = len(batch if isinstance(batch, Tensor) else batch[0])
    count = count or length * get_world_size()
    share = length * get_world_size() / count  # the mean is over examples, not over processes
    whole = count == run.args["batch_size"]  # compiled for one shape
    losses = (run.losses if whole else run.eager_losses)(batch)
    if not length:
        losses = losses.nan_to_num()  # the mean over no example
    run.optimizer.zero_grad(set_to_none=True)
    (losses.sum() * share).backward()
    finite = run.finish_gradients()
    run.optimizer.found_inf = (~finite).float()
    run.optimizer.step()
    return losses.detach(), finite


def train_epoch(run: Run, train: Split, bar: tqdm, interrupted: list[int]) -> int:
    """The steps that the epoch under way still lacks, or up to a signal to any process; its number, or 0."""
    args, epoch = run.args, run.epochs_done + 1
    batches = epoch_order(train, args["seed"], epoch).split(args["batch_size"])
    left, steps = batches[run.steps_done :], args["epochs"] * len(batches)
    shares = [batch.tensor_split(get_world_size())[get_rank()] for batch in left]
    start = time.perf_counter() - run.seconds
    run.share = (
        max(0, run.epochs_done * len(batches) + run.steps_done - 1) / steps
    )  # where no step is left
    for whole, share, batch in zip(left, shares, train.batches(shares, run.device), strict=True):
        step = run.epochs_done * len(batches) + run.steps_done
        # Whatever the losses draw: anew each step, and otherwise in each process.
        torch.manual_seed(args["seed"] * SEED_STEP + step + (get_rank() << 48))
        run.share = step / steps
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(args, step, steps)
        losses, finite = train_step(run, batch, len(whole))
        run.add(losses, finite, len(share), step + 1)
        run.steps_done += 1
        run.seconds = time.perf_counter() - start
        if bar.update(
            len(whole)
        ):  # a few times a second the bar is drawn anew: only then wait for the device
            bar.set_postfix(progress(run))
            refuse_lost(run, train, batches)
        if all_reduce_sum(torch.tensor(len(interrupted))):
            refuse_lost(run, train, batches)
            return interrupted[0] if interrupted else signal.SIGTERM
    refuse_lost(run, train, batches)
    return 0


def refuse_lost(run: Run, train: Split, batches: Sequence[Tensor]) -> None:
    """Raises UserError, with the names of its slices, where the loss of a step of this epoch was not finite."""
    if not (step := int(run.lost)):
        return
    share = batches[(step - 1) % len(batches)].tensor_split(get_world_size())[get_rank()]
    last = run.folder / "last.pt"
    kept = (
        f"{last} keeps the epochs before it" if last.exists() else "no epoch was finished before it"
    )
    names, among = (
        ", ".join(train.names[i].stem for i in share),
        "Among its" if get_world_size() > 1 else "Its",
    )
    raise UserError(
        f"the loss is not finite at step {step}, in epoch {run.epochs_done + 1}. It changed no weight, and {kept}.\n"
        f"{among} slices: {names}\nLook at them, or lower --learning-rate"
    )


def progress(run: Run) -> dict[str, str]:
    """What the bar shows."""
    *losses, examples, skipped, last = run.sums.tolist()
    shown = {"loss": f"{sum(losses[: run.SHOWN]) / max(examples, 1):.4f}"}
    if skipped:
        shown["skipped"] = f"{skipped:.0f} (last: step {last:.0f})"
    return shown | ({f"best_{run.BEST}": f"{run.best:.4f}"} if run.history else {})


def end_epoch(run: Run, validation: Split) -> dict:
    """Validate, and close the epoch with its row of metrics.csv."""
    start = time.perf_counter()
    for module in run.modules.values():
        distributed.check_replicas(module.state_dict())
    measured = run.validate(validation)
    *losses, examples, skipped, last = run.sums_of_all().tolist()
    if not examples or not math.isfinite(measured["val_loss"]):
        raise UserError(
            f"the loss is no longer finite in epoch {run.epochs_done + 1} ({skipped:.0f} of {run.steps_done} steps "
            f"skipped, validation {measured['val_loss']}); the checkpoints keep the epochs before it, if any; try a "
            "lower --learning-rate"
        )
    run.epochs_done += 1
    if skipped:
        tqdm.write(
            f"warning: {skipped:.0f} of {run.steps_done} steps of epoch {run.epochs_done} were skipped, the last of "
            f"them step {last:.0f}: their gradients were not finite"
        )
    losses = [loss / examples for loss in losses]
    row = {
        "epoch": run.epochs_done,
        "step": run.epochs_done * run.steps_done,
        "train_loss": sum(losses[: run.SHOWN]),
    }
    row |= dict(zip(run.LOSSES, losses, strict=True)) if len(losses) > 1 else {}
    row |= measured | {"lr": run.optimizer.param_groups[0]["lr"]}
    row["seconds"] = round(run.seconds + time.perf_counter() - start, 2)
    run.history.append(row)
    run.begin_epoch()
    return row


def seconds_a_step(run: Run, train: Split, steps: int = 3) -> float:
    """Measured, after one that warms up, or three that compile and record CUDA graphs; all changes are put back."""
    before = copy.deepcopy(run.state())
    whole = torch.arange(run.args["batch_size"]) % len(train)
    batch = next(
        iter(train.batches([whole.tensor_split(get_world_size())[get_rank()]], run.device))
    )
    start = time.perf_counter()
    try:
        for _ in range(3 if run.compiled else 1):
            train_step(run, batch)[1].item()  # waits for the device
    except Exception as error:  # compilers fail in many ways
        if not run.compiled:
            raise
        print(f"warning: {UNCOMPILED}: {utils.first_line(error)}")
        run.losses = run.eager_losses
        run.load(before)
        return seconds_a_step(run, train, steps)
    if run.compiled:
        print(f"step compiled in {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    for _ in range(steps):
        train_step(run, batch)[1].item()
    seconds = (time.perf_counter() - start) / steps
    run.load(before)
    return seconds


class _Beginning:
    """The first examples of a split, to be validated on."""

    def __init__(self, split: Split, count: int):
        self._split, self._count = split, min(count, len(split))

    def __len__(self) -> int:
        return self._count

    def __getattr__(self, name: str):
        found = getattr(self._split, name)
        return found[: self._count] if isinstance(found, Tensor) else found


def seconds_to_validate(run: Run, validation: Split) -> float:
    """By a batch for each process, measured after one that warms up."""
    few = _Beginning(validation, run.args["batch_size"] * get_world_size())
    for _ in range(2):
        start = time.perf_counter()
        run.validate(few)
    return (time.perf_counter() - start) * len(validation) / len(few)


def announce(run: Run, train: Split, validation: Split, what: str) -> None:
    """Print what will be done, how many steps that takes, and about how long."""
    args = run.args
    steps_an_epoch = math.ceil(len(train) / args["batch_size"])
    epochs = args["epochs"] - run.epochs_done
    steps = epochs * steps_an_epoch - run.steps_done
    seconds = steps * seconds_a_step(run, train) + epochs * seconds_to_validate(run, validation)
    print(
        f"training: {what}, {args['epochs']} epochs of {steps_an_epoch} steps of {args['batch_size']} "
        f"slices, {steps} steps to go, on {utils.describe_device(run.device)} in {run.precision}: "
        f"about {math.ceil(seconds / 60)} min"
    )
    if run.device.type == "cpu" and seconds > 2 * 3600:
        epochs = run.epochs_done + max(1, int(epochs * 3600 / seconds))
        print(
            f"warning: over two hours on this CPU; --epochs {epochs} takes about one hour, a GPU minutes"
        )


def fit(run: Run, train: Split, validation: Split) -> int:
    """Train up to the last epoch, or up to a signal, whose number is returned (0: to the end)."""
    epochs, folder = run.args["epochs"], run.folder
    interrupted: list[int] = []

    def interrupt(number, frame):
        if interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C waits for nothing
        interrupted.append(number)

    for name in (
        "SIGINT",
        "SIGTERM",
        "SIGUSR1",
    ):  # the last is what schedulers send before pre-emption
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), interrupt)
    done = run.epochs_done * len(train) + run.steps_done * run.args["batch_size"]
    first = get_rank() == 0
    with tqdm(
        total=epochs * len(train), initial=done, unit=" slices", smoothing=0.05, disable=not first
    ) as bar:
        while run.epochs_done < epochs:
            bar.set_description(f"epoch {run.epochs_done + 1}/{epochs}")
            if number := train_epoch(run, train, bar, interrupted):
                run.save("last.pt")
                return number
            row = end_epoch(run, validation)
            bar.write(run.LINE.format(**row))
            if run.is_best(row):
                run.best = row[run.BEST]
                run.save("best.pt")
            if first and (
                run.epochs_done in (1, epochs) or run.epochs_done % run.args["plot_every"] == 0
            ):
                run.plot(validation)
            if first:
                utils.write_csv(folder / "metrics.csv", run.history)
            run.save(
                "last.pt"
            )  # after the rest: a run that is killed before this does the epoch again
    return 0


def carry_out(run: Run, train: Split, validation: Split, config: dict, resume: str) -> int:
    """Write config.json and train; 0, or the exit code of a run that a signal stopped.

    resume: the command that goes on with it, printed where it is stopped.
    """
    if run.args["dry_run"]:
        print(f"dry run: nothing trained, nothing written to {run.folder}")
        distributed.cleanup()
        return 0
    with lock_folder(run.folder) if get_rank() == 0 else contextlib.nullcontext():
        if get_rank() == 0:
            last, done = run.folder / "last.pt", (run.epochs_done, run.steps_done)
            found = read_checkpoint(last) if last.exists() else {"epochs_done": 0, "steps_done": 0}
            if (found["epochs_done"], found["steps_done"]) != done:
                raise UserError(
                    f"another process has trained {run.folder} meanwhile; to go on:\n    {resume}"
                )
            config = {"name": run.folder.name, "arguments": run.args, **config}
            config |= {"device": utils.describe_device(run.device), "precision": run.precision}
            utils.write_json(run.folder / "config.json", config | {"versions": utils.versions()})
        try:
            number = fit(run, train, validation)
        except RuntimeError as error:
            if not distributed.is_lost_process(error):
                raise
            reason = utils.first_line(error)
            raise UserError(
                f"another process of this run ended or hangs ({reason}); to go on from the last epoch's end, "
                f"with any number of processes:\n    {resume}"
            ) from None
    distributed.cleanup()
    if number:
        print(f"stopped in epoch {run.epochs_done + 1}; to go on:\n    {resume}")
        return 128 + number
    return 0


@contextlib.contextmanager
def lock_folder(folder):
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with utils.lock(folder / ".lock"):
            yield
    except utils.Timeout:
        raise UserError(
            f"another process is training {folder}; wait until it ends, or train another run"
        ) from None
