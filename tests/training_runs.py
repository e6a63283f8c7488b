"""Helpers for tests that train: read what runs wrote, and compare weights."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from training.checkpoint import read_checkpoint


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
