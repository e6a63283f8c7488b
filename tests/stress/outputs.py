"""Check that the files of a run are complete, and compare the results of two runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imread

from training.checkpoint import read_checkpoint


def final_files(folder: Path) -> set[Path]:
    """Return all files in a folder, at any depth, except temporary files, locks and logs.

    The names of temporary files and locks start with a dot. The names of temporary folders of the
    cache contain ".tmp-".
    """
    files = set()
    for path in folder.rglob("*"):
        is_temporary = path.name.startswith(".") or ".tmp-" in path.parent.name
        if path.is_file() and not is_temporary and path.name != "log":
            files.add(path)
    return files


def broken_files(folder: Path) -> tuple[list[str], int]:
    """Read all `final_files` of known types; return the errors and the number of files."""
    readers: dict[str, Callable[[Path], object]] = {
        ".pt": read_checkpoint,
        ".json": lambda path: json.loads(path.read_text()),
        ".csv": read_table,
        ".png": imread,
        ".npy": np.load,
        ".npz": lambda path: dict(np.load(path)),
    }
    errors = []
    files = sorted(path for path in final_files(folder) if path.suffix in readers)
    for path in files:
        try:
            readers[path.suffix](path)
        except Exception as error:
            errors.append(f"{path.name}: {error!r:.200}")
    return errors, len(files)


def read_table(path: Path) -> None:
    """Raise ValueError if a CSV file is truncated."""
    text = path.read_text()
    lengths = {len(row) for row in csv.reader(text.splitlines())}
    if len(lengths) != 1 or not text.endswith("\n"):
        raise ValueError(f"rows have {sorted(lengths)} columns; the file ends in {text[-1:]!r}")


# ---------------------------------------------------------------- comparison


def cache_content(folder: Path) -> dict[str, bytes]:
    """Return {split: pixels} for all complete caches."""
    content = {}
    for path in (folder / "cache").iterdir():
        if path.is_dir() and ".tmp-" not in path.name:
            content[path.name.split("-")[0]] = (path / "pixels.npy").read_bytes()
    return content


def run_content(run: Path) -> dict:
    """Return the weights of both checkpoints, and metrics.csv without its last column (seconds)."""
    content = {}
    for name in ("best", "last"):
        weights = read_checkpoint(run / f"{name}.pt")["model"]
        content |= {f"{name} {key}": value for key, value in weights.items()}
    lines = (run / "metrics.csv").read_text().splitlines()
    content["metrics.csv"] = [line.rsplit(",", 1)[0] for line in lines]
    return content


def prediction_content(run: Path) -> dict:
    """Return the scores and slices.csv of a run's test split."""
    scores = json.loads((run / "test" / "metrics.json").read_text())
    return {"slices.csv": (run / "test" / "slices.csv").read_text(), "scores": scores}


def are_equal(one: dict, other: dict) -> bool:
    """Return whether two contents are equal, bit for bit."""
    if one.keys() != other.keys():
        return False
    for key, value in one.items():
        is_tensor = isinstance(value, torch.Tensor)
        if not (torch.equal(value, other[key]) if is_tensor else value == other[key]):
            return False
    return True
