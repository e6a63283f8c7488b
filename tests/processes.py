"""Run the scripts as real processes, which tests signal, kill, and deprive of disk space.

A process is forked from a server that has imported the scripts already: these imports take up to
ten seconds.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import utils

ROOT = Path(__file__).parents[1]
PRELOAD = ["train", "predict", "train_prior"]
PRELOAD += ["torchmetrics.functional.image", "torch._dynamo"]  # imported on demand; by torch.optim


@functools.cache
def fork_context() -> multiprocessing.context.BaseContext:
    """Return the context of processes that are forked from a server; start the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), path]))
    try:
        forkserver.ensure_running()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
    return context


def start(
    folder: Path,
    script: str,
    *arguments: object,
    log: str = "log",
    max_bytes: int = resource.RLIM_INFINITY,
    before: Callable = bool,
    **variables: object,
) -> BaseProcess:
    """Start a script in `folder`, in its own process group; write its output to a file there.

    Args:
        folder: the working directory.
        script: file name of the script, such as "train.py".
        arguments: its flags.
        log: name of the file for its output.
        max_bytes: the size above which no file can grow, as on a full disk.
        before: a function that the process calls first.
        variables: environment variables.
    """
    argv = [script, *map(str, arguments)]
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    process = fork_context().Process(
        target=_run_script,
        args=(folder, argv, folder / log, environment, torch.get_num_threads(), max_bytes, before),
    )
    (folder / log).write_text("")
    process.start()
    atexit.register(process.kill)  # otherwise, Python would wait for it after a failed test
    return process


def _run_script(
    folder: Path,
    argv: list[str],
    log: Path,
    environment: dict[str, str],
    num_threads: int,
    max_bytes: int,
    before: Callable,
) -> None:
    """Do in the new process what `python script.py ...` would do; arguments as in `start`."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = argv
    multiprocessing.set_start_method(None, force=True)  # the default, as in any new process
    torch.set_num_threads(num_threads)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    before()
    utils.run_script(importlib.import_module(argv[0].removesuffix(".py")).main)


def start_ranks(folder: Path, script: str, *arguments: object, **options) -> list[BaseProcess]:
    """Start two processes that train as one, as torchrun does; the logs are log_0 and log_1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    options |= {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    return [
        start(folder, script, *arguments, log=f"log_{rank}", RANK=rank, LOCAL_RANK=rank, **options)
        for rank in range(2)
    ]


def wait(process: BaseProcess) -> int:
    """Wait for the end of a process and return its exit code; -9 after a SIGKILL."""
    process.join()
    return process.exitcode


def wait_until(condition: Callable[[], bool], process: BaseProcess, log: Path) -> None:
    """Wait for a condition; fail with the process's output if it ends before."""
    while not condition():
        assert process.is_alive(), log.read_text()
        time.sleep(0.002)


def finish(folder: Path, script: str, *arguments: object) -> str:
    """Run a script to its end, which must be a success, and return its output."""
    code = wait(start(folder, script, *arguments))
    output = (folder / "log").read_text()
    assert code == 0, output
    return output


def kill_when(process: BaseProcess, condition: Callable[[], bool], delay: float) -> bool:
    """Send SIGKILL to a process `delay` seconds after `condition()` becomes true.

    Returns:
        Whether the process was killed; False if it had already ended.
    """
    while not condition():
        if not process.is_alive():
            return False
        time.sleep(0.0002)
    end = time.perf_counter() + delay
    while time.perf_counter() < end:
        time.sleep(min(0.001, delay))
    was_running = process.is_alive()
    process.kill()
    process.join()
    return was_running


def has_workers(process: BaseProcess, timeout: float = 5) -> bool:
    """Return whether any process of the same group is still running after `timeout` seconds."""
    end = time.perf_counter() + timeout
    while time.perf_counter() < end:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True
