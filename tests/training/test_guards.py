"""training/guards.py: the lock of a run's folder, and stop signals."""

import contextlib
import os
import signal
import sys
import threading

import pytest
import torch

import utils
from training.guards import (
    STOP_SIGNALS,
    collect_stop_signals,
    lock_folder,
    preserve_process_state,
)
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


# ---------------------------------------------------------------- the caller's process


def process_state() -> list:
    return [
        handlers(),
        torch.get_rng_state().tolist(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    ]


@pytest.mark.parametrize("error", [None, ValueError, SystemExit])
@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_the_state_of_the_callers_process_is_restored(monkeypatch, error, workspace):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if workspace:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    before = process_state()

    @preserve_process_state()
    def main():
        utils.set_deterministic(True)
        torch.manual_seed(123)
        for number in NUMBERS:
            signal.signal(number, signal.SIG_IGN)
        assert process_state() != before
        if error:
            raise error

    for _ in range(2):
        if error:
            with pytest.raises(error):
                main()
        else:
            main()
        assert process_state() == before


@pytest.mark.parametrize(
    "setting",
    [torch.no_grad(), torch.inference_mode(), torch.device("meta"), None],
    ids=["no_grad", "inference_mode", "device", "dtype"],
)
def test_torchs_settings_of_the_caller_have_no_effect_and_are_unchanged(setting):
    def state():
        tensor = torch.ones(1)
        recorded = (torch.ones(1, requires_grad=True) * 2).requires_grad
        return tensor.dtype, tensor.device.type, recorded, tensor.is_inference()

    defaults = state()
    if setting is None:
        torch.set_default_dtype(torch.float64)
    try:
        with setting or contextlib.nullcontext():
            before = state()
            assert before != defaults
            with preserve_process_state():
                assert state() == defaults
            assert state() == before
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_program_without_a_console_can_show_progress_bars(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with preserve_process_state():
        print("bar", file=sys.stderr)
        sys.stderr.flush()
    assert sys.stderr is None


def test_sigterm_lets_a_script_delete_unfinished_files():
    deleted = []
    with pytest.raises(SystemExit) as error, preserve_process_state():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            deleted.append("file")
    assert error.value.code == 128 + signal.SIGTERM
    assert deleted == ["file"]


def test_a_handler_of_the_caller_stays_in_use():
    received = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with preserve_process_state():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [signal.SIGTERM]


def test_the_state_is_restored_outside_the_main_thread():
    enabled = []

    def target():
        with preserve_process_state():
            utils.set_deterministic(True)
        enabled.append(torch.are_deterministic_algorithms_enabled())

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert enabled == [False]
