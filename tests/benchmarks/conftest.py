"""Fixtures of the tests of benchmarks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import save_model

import utils
from modules import VQVAE


@pytest.fixture(scope="session")
def smooth_slices() -> np.ndarray:
    """Return (3, 256, 128) in [0, 1]: smooth shapes with little noise, which compress well."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((3, 1, 12, 6)))
    images = torch.nn.functional.interpolate(coarse, (256, 128), mode="bicubic")[:, 0].numpy()
    images += 0.01 * rng.standard_normal(images.shape)
    low = images.min((1, 2), keepdims=True)
    high = images.max((1, 2), keepdims=True)
    return (images - low) / (high - low)


@pytest.fixture
def write_run():
    """Return a function that writes a run with an untrained model at 0.25 bits per pixel.

    Its arguments are the run's folder, the folder of its data, the seed of its weights, and further
    arguments for config.json.
    """

    def write(folder: Path, data: Path, seed: int = 0, **arguments) -> Path:
        torch.manual_seed(seed)
        model = VQVAE(hidden_channels=8, residual_channels=4, embedding_dim=4, num_embeddings=16)
        save_model(folder / "best.pt", model)
        arguments = {"recipe": "tuned", "data": str(data), "seed": seed, **arguments}
        config = {
            "arguments": arguments,
            "device": "cpu",
            "precision": "float32",
            "versions": {"commit": "abc"},
        }
        utils.write_json(folder / "config.json", config)
        return folder

    return write
