"""Describe the machine and the software for result files."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
from pathlib import Path

import torch


def describe_device(device: torch.device, world_size: int = 1) -> str:
    """Describe the device, and the number of processes if there are several, for result files."""
    name = str(device)
    if device.type == "cuda":
        gpu = f"({torch.cuda.get_device_name(device)})"
        name = gpu if world_size > 1 else f"{device} {gpu}"
    elif device.type == "cpu":
        name = f"{device} ({processor_name()}, {torch.get_num_threads()} threads)"
    return f"{world_size} processes, {name}" if world_size > 1 else name


def processor_name() -> str:
    """Return the name of the processor, such as "AMD EPYC 7B13"."""
    with contextlib.suppress(OSError):  # not on Linux
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python, of the packages that affect results, and of this repository.

    The key "commit" holds the output of `git describe`, which ends in "-dirty" if files differ from
    the commit.
    """
    import matplotlib
    import nibabel
    import numpy
    import torchmetrics
    import torchvision

    packages = (torch, torchvision, torchmetrics, nibabel, numpy, matplotlib)
    numbers = {package.__name__: str(package.__version__) for package in packages}
    repository = str(Path(__file__).parents[1])
    describe = ["git", "-C", repository, "describe", "--always", "--dirty", "--abbrev=12"]
    describe.append("--match=NeVeRmAtCh")  # no tag matches, so git prints the commit's hash
    try:
        result = subprocess.run(describe, capture_output=True, text=True, check=True)
        commit = result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without git
        commit = "unknown"
    return {"python": sys.version.split()[0], **numbers, "commit": commit}
