"""Fixtures for the tests of prior/: phantoms, and a codec."""

import pytest
import torch
import torch.nn.functional as F

import dataset
from dataset import SliceDataset
from mri import hipmri, phantom
from mri.files import SPLITS


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> dict[str, SliceDataset]:
    """Ten training, one validation and one test phantom, of eight slices each."""
    folder = tmp_path_factory.mktemp("phantoms")
    phantom.write_phantom(folder / "data", volumes=(10, 1, 1), slices=8, workers=1, progress=False)
    source = hipmri.find_hipmri(folder / "data")
    splits = {}
    for split in SPLITS:
        splits[split] = dataset.load_split(
            source, split, cache_dir=folder / "cache", progress=False
        )
    return splits


class Codec:
    """Stand-in for a `Sampler`, without training: a code is the brightness of 2 x 2 pixels."""

    device = torch.device("cpu")

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return ((F.avg_pool2d(images, 2)[:, 0] + 3) * 5).round().clamp(0, 40).long()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return F.interpolate(codes[:, None] / 5 - 3, scale_factor=2.0)


@pytest.fixture(scope="session")
def codec() -> Codec:
    return Codec()
