"""Fixtures for the tests of prior/: phantoms."""

import pytest

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
