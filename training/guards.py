"""Lock a run's folder, collect stop signals, and restore the state of the caller's process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import Timeout

import utils
from utils import CUBLAS_VARIABLE, UserError

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # schedulers send SIGUSR1 before pre-emption


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create a run's folder and lock it; raise UserError if another process holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(utils.lock(folder / ".lock"))
        except Timeout:
            raise UserError(
                f"another process is training {folder}; wait until it ends, or start another run"
            ) from None
        yield


@contextlib.contextmanager
def collect_stop_signals(numbers: list[int]) -> Iterator[None]:
    """Append the number of each stop signal to `numbers` instead of ending the process.

    After a first signal, Ctrl-C raises KeyboardInterrupt at once. Previous handlers are restored at
    the end. Outside the main thread, where Python allows no handlers, nothing is changed.
    """

    def handle(number: int, frame) -> None:
        if numbers and number == signal.SIGINT:
            raise KeyboardInterrupt
        numbers.append(number)

    previous = {}
    if _handles_signals():
        for name in STOP_SIGNALS:
            if hasattr(signal, name):  # Windows has no SIGUSR1
                number = getattr(signal, name)
                previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- the caller's process


@contextlib.contextmanager
def preserve_process_state() -> Iterator[None]:
    """Restore global state at the end of the block, so that any program can call a script's main().

    The block restores signal handlers, torch's random generators (CPU and CUDA), the setting of
    `torch.use_deterministic_algorithms`, cuBLAS's environment variable and the current GPU.
    docs/data.md lists the state that it does not restore.

    During the block, torch has its defaults (see `_use_torch_defaults`) but computes float32
    without TF32. Unless the caller handles SIGTERM, it raises SystemExit, so that unfinished files
    are deleted.
    """
    workspace = os.environ.get(CUBLAS_VARIABLE)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    used_cuda = torch.cuda.is_initialized()
    gpu = torch.cuda.current_device() if used_cuda else 0
    gpus = range(torch.cuda.device_count()) if used_cuda else []
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_restore_signal_handlers())
            stack.enter_context(_use_torch_defaults())
            stack.enter_context(utils.full_float32())
            stack.enter_context(torch.random.fork_rng(gpus))
            if sys.stderr is None:  # in programs without a console; progress bars need a file
                null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stderr(null))
            if _handles_signals() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
                signal.signal(signal.SIGTERM, _exit)
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        if torch.cuda.is_initialized():
            torch.cuda.set_device(gpu)
        if workspace is None:
            os.environ.pop(CUBLAS_VARIABLE, None)


@contextlib.contextmanager
def _use_torch_defaults() -> Iterator[None]:
    """Create tensors as float32 on the CPU, and record gradients, despite the caller's settings.

    A notebook may have called `torch.set_default_dtype` or `torch.set_default_device`. It may also
    call main() inside `torch.no_grad()` or `torch.inference_mode()`.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.empty(0).device.type != "cpu":  # the context would slow down every call of torch
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


@contextlib.contextmanager
def _restore_signal_handlers() -> Iterator[None]:
    """Restore all signal handlers at the end of the block."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            # The handler is None if it was not set from Python.
            if _handles_signals() and handler not in (None, signal.getsignal(number)):
                signal.signal(number, handler)


def _handles_signals() -> bool:
    """Return whether this is the main thread, the only one in which Python allows handlers."""
    return threading.current_thread() is threading.main_thread()


def _exit(number: int, frame) -> None:
    """Handle a signal: raise SystemExit with the exit status that shells use for the signal."""
    sys.exit(128 + number)
