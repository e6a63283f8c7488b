"""Start the scripts as real processes, and kill them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(folder: Path, script: str, *arguments) -> subprocess.Popen:
    """Start a script in `folder`, in its own process group; write its output to `log` there."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HIPMRI_CACHE": str(folder / "cache")}
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(folder: Path, script: str, *arguments) -> None:
    """Run a script to its end; raises RuntimeError if it fails."""
    code = start(folder, script, *arguments).wait()
    if code:
        output = (folder / "log").read_text()
        raise RuntimeError(f"{script} exited with status {code}:\n{output[-3000:]}")


def kill_when(process: subprocess.Popen, condition: Callable[[], bool], delay: float) -> bool:
    """Send SIGKILL to a process `delay` seconds after `condition()` becomes true.

    Returns:
        Whether the process was killed; False if it had already ended.
    """
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.0002)
    end = time.perf_counter() + delay
    while time.perf_counter() < end:
        time.sleep(min(0.001, delay))
    was_running = process.poll() is None
    process.kill()
    process.wait()
    return was_running


def has_workers(process: subprocess.Popen, timeout: float = 5) -> bool:
    """Return whether any process of the same group is still running after `timeout` seconds."""
    end = time.perf_counter() + timeout
    while time.perf_counter() < end:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True
