"""training/guards.py: the lock of a run's folder, and stop signals."""

import os
import signal
import threading

import pytest

from training.guards import STOP_SIGNALS, collect_stop_signals, lock_folder
from utils import UserError

NUMBERS = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]


def handlers() -> list:
    return [signal.getsignal(number) for number in NUMBERS]


def test_signals_are_collected_and_handlers_restored():
    before, numbers = handlers(), []
    with collect_stop_signals(numbers):
        for number in NUMBERS[1:]:
            os.kill(os.getpid(), number)
        assert handlers() != before
    assert numbers == NUMBERS[1:]
    assert handlers() == before


def test_handlers_are_restored_after_an_error():
    before = handlers()
    with pytest.raises(ValueError, match="in the run"), collect_stop_signals([]):
        raise ValueError("in the run")
    assert handlers() == before


def test_a_second_ctrl_c_ends_the_run_at_once():
    numbers = []
    with pytest.raises(KeyboardInterrupt), collect_stop_signals(numbers):
        os.kill(os.getpid(), signal.SIGINT)
        assert numbers == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)


def test_signals_are_left_alone_outside_the_main_thread():
    before, inside = handlers(), []

    def target():
        with collect_stop_signals([]):
            inside.append(handlers())

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert inside == [before]


def test_a_locked_folder_is_an_error_until_it_is_released(tmp_path):
    folder = tmp_path / "runs" / "a"
    with (
        lock_folder(folder),
        pytest.raises(UserError, match="another process is training"),
        lock_folder(folder),
    ):
        pass
    with lock_folder(folder):
        assert folder.is_dir()
