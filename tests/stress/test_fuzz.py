"""Test damaged, hostile and unusual input: a file is read, or refused with one clear error.

`python tests/stress/fuzz.py` is the long form of the first test. Hostile checkpoints and private
headers are in `test_security.py`.
"""

import functools
import gzip
import json
import os
import random
import struct
from pathlib import Path

import fuzz
import nibabel as nib
import numpy as np
import pytest
from damage import ODD_VALUES, damage_values
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from mri import hipmri
from mri.preprocessing import Preprocessing, slice_affine
from training.config import TrainConfig
from training.run_folder import read_arguments
from utils import DataError, UserError

SHAPE = (24, 16)
# Without subnormal numbers: older versions of torch turn them off in the whole process.
FLOATS = st.floats(width=32, allow_subnormal=False)
DATA_TYPES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1792, 2304)  # NIfTI codes
INT16 = st.integers(-(1 << 15), (1 << 15) - 1)


def nifti_bytes(array: np.ndarray | None = None, **fields) -> bytes:
    """Return a complete NIfTI-1 file in which header fields were changed afterwards."""
    if array is None:
        array = np.arange(384, dtype=np.int16).reshape(SHAPE)
    content = bytearray(nib.Nifti1Image(array, np.eye(4)).to_bytes())
    for name, value in fields.items():
        dtype, offset = nib.Nifti1Header.template_dtype.fields[name][:2]
        item = np.array(value).astype(dtype.base).tobytes()
        content[offset : offset + dtype.itemsize] = item.ljust(dtype.itemsize)
    return bytes(content)


# ---------------------------------------------------------------- random damage


def test_damage_does_not_change_the_values_that_it_inserts():
    """A dictionary that was inserted once could otherwise be damaged, and inserted into itself."""
    rng = random.Random(0)
    for _ in range(3000):
        json.dumps(damage_values(rng, {"a": {"b": 1}, "c": {"d": {"e": 2}}}))
    assert ODD_VALUES[-1] == {"a": 1}


def test_damaged_files_are_read_or_refused_with_an_error(tmp_path):
    rows = fuzz.fuzz(200, 1, tmp_path)
    assert sum(row["files"] for row in rows) == 700
    for row in rows:
        assert row["crashes"] == [], row
        assert row["refused"] > 0, row
    # The damage is neither always fatal nor always harmless.
    for row in (rows[0], rows[-1]):
        assert row["read"] > 3, row
        assert row["refused"] > 5, row


def divide_by_zero(path: Path) -> bool:
    return bool(1 / 0)


def loop_forever(path: Path) -> bool:
    while True:
        pass


def suppress_exceptions(path: Path) -> bool:
    try:
        return loop_forever(path)
    except Exception:
        return False


def use_two_gibibytes(path: Path) -> bool:
    return bool(np.ones(1 << 28).sum())


@pytest.mark.parametrize(
    "read, message",
    [
        (divide_by_zero, "ZeroDivisionError"),
        (loop_forever, "over 1 s"),
        (suppress_exceptions, "over 1 s"),
        (use_two_gibibytes, "MemoryError"),
    ],
)
def test_exceptions_time_and_memory_count_as_crashes(tmp_path, read, message, monkeypatch):
    monkeypatch.setattr(fuzz, "MAX_SECONDS", 1)
    row = fuzz.read_all("x", 1, lambda: b"", tmp_path / "file", read)
    assert len(row["crashes"]) == 1
    assert message in row["crashes"][0]


@settings(max_examples=300, deadline=None)
@given(
    dims=st.lists(st.integers(-3, 40) | INT16, min_size=8, max_size=8),
    datatype=st.sampled_from(DATA_TYPES) | st.integers(0, 3000),
    slope=FLOATS,
    intercept=FLOATS,
    offset=FLOATS | st.just(352.0),
    order=st.sampled_from("<>"),
    compress=st.booleans(),
    pixels=st.binary(max_size=2000),
)
def test_any_header_is_read_or_refused_with_an_error(
    tmp_path_factory, dims, datatype, slope, intercept, offset, order, compress, pixels
):
    header = nib.Nifti1Header(endianness=order)
    with np.errstate(all="ignore"):
        header["dim"] = dims
        header["scl_slope"] = slope
        header["scl_inter"] = intercept
        header["vox_offset"] = offset
    header["datatype"] = datatype
    content = header.binaryblock + b"\0" * 4 + pixels
    path = tmp_path_factory.getbasetemp() / "any.nii.gz"
    path.write_bytes(gzip.compress(content) if compress else content)
    with fuzz.limits():
        fuzz.read_nifti(path)


# ---------------------------------------------------------------- special files


@functools.cache
def special_files() -> dict[str, tuple[bytes, str]]:
    """Return name -> (content, part of the error); "" for files that can be read."""
    intact = nifti_bytes()
    zeros = gzip.compress(b"\0" * (1 << 28))
    unfilled = nifti_bytes(dim=[2, 11000, 11000, 1, 1, 1, 1, 1])
    extension = struct.pack("<4bii", 1, 0, 0, 0, 1 << 30, 6)  # of a gigabyte
    rgb = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    swapped = bytes(nib.Nifti1Header(endianness=">").binaryblock)
    swapped_pixels = np.ones(SHAPE, ">i2") * np.arange(16)
    huge = nib.Nifti2Header()
    huge["dim"] = [3, 10**4, 10**4, 10**4, 1, 1, 1, 1]
    huge["datatype"] = 4
    huge["bitpix"] = 16
    return {
        "10^12 voxels": (
            huge.binaryblock + b"\0" * 999,
            "it has 1,539 of the 2,000,000,000,544 bytes that its header",
        ),
        "slice and a gzip bomb": (gzip.compress(intact) + zeros, ""),  # only the slice is unpacked
        "gzip bomb of a slice": (gzip.compress(unfilled), "of the 242,000,352 bytes that its"),
        "dimension of 0": (nifti_bytes(dim=[2, 0, 16, 1, 1, 1, 1, 1]), "has shape 0 x 16"),
        "negative dimension": (nifti_bytes(dim=[2, -24, 16, 1, 1, 1, 1, 1]), "has shape -24 x 16"),
        "no dimensions": (nifti_bytes(dim=[0] * 8), "has shape"),
        "NaN slope": (nifti_bytes(scl_slope=np.nan), ""),  # by the standard, no scaling
        "NaN intercept": (
            nifti_bytes(scl_slope=1.0, scl_inter=np.nan),
            "Valid slope but invalid intercept nan",
        ),
        "5 dimensions": (
            nifti_bytes(np.zeros((9, 9, 1, 2, 3), np.int16)),
            "has shape 9 x 9 x 1 x 2 x 3, expected a 2D slice",
        ),
        "complex": (nifti_bytes(np.zeros(SHAPE, np.complex64)), "holds complex64 values"),
        "RGB": (nifti_bytes(rgb), "expected one real number per voxel"),
        "pair of files": (nifti_bytes(magic=b"ni1\0"), "is the header of a pair of files"),
        "big-endian": (
            nib.Nifti1Image(swapped_pixels, np.eye(4), nib.Nifti1Header(swapped)).to_bytes(),
            "",
        ),
        "distant pixels": (nifti_bytes(vox_offset=3e9), "has its voxels at byte"),
        "extension of a gigabyte": (intact[:348] + extension + intact[360:], ""),
    }


@pytest.mark.parametrize("name", special_files())
def test_special_files(tmp_path, name):
    content, message = special_files()[name]
    path = tmp_path / "case_004_week_0_slice_0.nii.gz"
    path.write_bytes(content)
    with fuzz.limits():
        fuzz.read_nifti(path)
        if message:
            with pytest.raises(DataError) as error:
                dataset.read_slice(path, Preprocessing("2D"))
            assert message in str(error.value)
            assert "cannot be decoded" not in str(error.value)
        else:
            assert dataset.read_slice(path, Preprocessing("2D")).shape == (1, 256, 128)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("fifo", "is not a regular file"),
        ("loop", "Too many levels"),
        ("device", "is not a regular file"),
        ("folder", "is a folder"),
    ],
)
def test_paths_that_are_not_files_are_named_with_the_reason(tmp_path, write_slices, kind, reason):
    data = write_slices(tmp_path / "d")
    path = data / "keras_slices_train" / "odd.nii.gz"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    pattern = rf"odd\.nii\.gz.*{reason}"
    source = hipmri.find_hipmri(data)
    with fuzz.limits():
        with pytest.raises(DataError, match=pattern):
            dataset.load_split(source, "train", cache_dir=tmp_path / "cache", progress=False)
        with pytest.raises(DataError, match=pattern):
            slice_affine(path, Preprocessing("2D"))


def test_pairs_of_hdr_and_img_are_counted_in_the_error(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for name in ("a.hdr", "a.img"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"no slices found(?s:.*)1 \.hdr/\.img file\(s\).*convert"):
        hipmri.find_hipmri(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "[" * 100_000,
        "\xff",
        '{"arguments": 3}',
        '{"arguments": {"stride": "4"}}',
        '{"arguments": {"epochs": true}}',
        '{"arguments": {"data": [1]}}',
    ],
)
def test_an_unusable_config_is_named_in_the_error(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        read_arguments(tmp_path, TrainConfig)
