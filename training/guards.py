"""Guards around a run: a lock of its folder, and signals that stop it after the current step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout

import utils
from utils import UserError

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # schedulers send the last one before pre-emption


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
    the end. Outside the main thread, where Python allows no handlers, signals are left alone.
    """

    def handle(number: int, frame) -> None:
        if numbers and number == signal.SIGINT:
            raise KeyboardInterrupt
        numbers.append(number)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for name in STOP_SIGNALS:
            if hasattr(signal, name):  # Windows has no SIGUSR1
                number = getattr(signal, name)
                previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
