"""Fixtures for the tests of evaluation/: files of a user, and a run to reconstruct them with."""

import csv

import numpy as np
import pytest
import torch
from models import save_model

import predict
from modules import VQVAE


@pytest.fixture(scope="session")
def noise():
    """noise(shape, dtype=int16): seeded values from 0 to 899 (255 for uint8)."""

    def noise(shape, dtype=np.int16) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 900, shape).astype(dtype)

    return noise


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory):
    """A run with a small untrained model; its training slices had voxels of 1.7 x 2 mm."""
    torch.manual_seed(0)
    model = VQVAE(hidden_channels=8, residual_channels=4, num_embeddings=16, embedding_dim=4)
    folder = tmp_path_factory.mktemp("runs") / "untrained"
    slices = {"size": [256, 128], "spacing": [1.7, 2.0], "axis": "coronal"}
    save_model(folder / "best.pt", model, slices=slices)
    return folder


@pytest.fixture
def reconstruct_path(untrained_run, tmp_path):
    """reconstruct_path(path, "--flags", out="out"): call predict.py; returns the output folder."""

    def reconstruct_path(path, flags="", out="out"):
        command = [str(path), "-o", str(tmp_path / out), "--run", str(untrained_run)]
        assert predict.main([*command, "--device", "cpu", *flags.split()]) == 0
        return tmp_path / out

    return reconstruct_path


@pytest.fixture(scope="session")
def read_scores():
    """read_scores(folder): the rows of its scores.csv."""

    def read_scores(folder) -> list[dict[str, str]]:
        with open(folder / "scores.csv") as file:
            return list(csv.DictReader(file))

    return read_scores
