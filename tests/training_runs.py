"""Helpers for tests that train: start processes, read what runs wrote, compare weights."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from training.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[1]


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv; none before the end of its first epoch."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with open(path) as file:
        return list(csv.DictReader(file))


def rows_without_seconds(folder: Path) -> list[dict[str, str]]:
    """Return `read_rows` without the one column that differs between equal runs."""
    rows = read_rows(folder)
    for row in rows:
        del row["seconds"]
    return rows


def read_weights(folder: Path, module: str = "model", file: str = "last.pt") -> dict[str, Tensor]:
    return read_checkpoint(folder / file)[module]


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Check that two state dictionaries are equal bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def start_process(folder: Path, script: str, *arguments: object, processes: int = 1):
    """Start a script in `folder`; it writes to folder/log, as an unread pipe would fill up."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(processes), "--"]
    command += [str(ROOT / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, folder: Path) -> None:
    """Wait for a condition; fail with the process's output if it ends before."""
    while not condition():
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(0.002)


def finish(process: subprocess.Popen, folder: Path) -> str:
    """Wait for a process that should succeed and return its output."""
    code, output = process.wait(), (folder / "log").read_text()
    assert code == 0, output
    return output
