"""Copies of training files, which are recognised by their content."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from mri.copies import FileSet


@pytest.fixture
def volume(tmp_path, write_nifti) -> Path:
    rng = np.random.default_rng(0)
    return write_nifti(
        tmp_path / "d" / "a.nii.gz", rng.integers(0, 900, (24, 24, 24)).astype(np.int16)
    )


COPIES = {
    "the file itself": lambda path: path.read_bytes(),
    "unpacked": lambda path: gzip.decompress(path.read_bytes()),
    "compressed again": lambda path: gzip.compress(gzip.decompress(path.read_bytes()), 9, mtime=7),
}


@pytest.mark.parametrize("stored", COPIES)
@pytest.mark.parametrize("copied", COPIES)
def test_copies_are_recognised(volume, tmp_path, stored, copied):
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.write_bytes(COPIES[stored](volume))
    copy.write_bytes(COPIES[copied](volume))
    assert FileSet([original]).has_copy(copy)
    assert FileSet([original]).has_copy(original)


@pytest.mark.parametrize("compress", [True, False])
def test_other_files_are_not_copies(volume, tmp_path, compress):
    """Also not if their size and CRC-32, which the end of a gzip file contains, are the same."""
    data = bytearray(gzip.decompress(volume.read_bytes()))
    data[-1] ^= 1
    other = tmp_path / "other.nii.gz"
    other.write_bytes(gzip.compress(data) if compress else data)
    assert not FileSet([volume]).has_copy(other)
    if compress:
        other.write_bytes(other.read_bytes()[:-8] + volume.read_bytes()[-8:])
        assert not FileSet([volume]).has_copy(other)
    other.write_bytes(b"")
    assert not FileSet([volume]).has_copy(other)


def test_unreadable_files_are_not_copies(volume, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    trained_on = FileSet([tmp_path / "missing", tmp_path, tmp_path / "fifo", volume])
    copy = tmp_path / "copy.nii.gz"
    copy.write_bytes(volume.read_bytes())
    assert trained_on.has_copy(copy)
    assert not trained_on.has_copy(tmp_path / "nothing")
