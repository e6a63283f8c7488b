"""Files that other programs read: padding, missing offsets, several gzip streams, and large files.

tests/mri/test_nifti.py tests files that cannot be read.
"""

import gzip
import shlex

import nibabel as nib
import numpy as np
import pytest

from mri import nifti
from mri.encoding import decode_file
from mri.preprocessing import Preprocessing

VOLUME = np.random.default_rng(0).integers(0, 900, (16, 17, 18)).astype(np.int16)
LARGE = (513, 512, 512)  # one plane more than fits into memory


@pytest.fixture(params=[nib.Nifti1Image, nib.Nifti2Image])
def content(request) -> bytes:
    return request.param(VOLUME, np.eye(4)).to_bytes()


def assert_is_read(path):
    planes = nifti.read_scan(path, 0).planes
    np.testing.assert_array_equal(planes, VOLUME)
    assert nifti.read_header(path).get_data_shape() == VOLUME.shape


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_without_an_offset_the_voxels_follow_the_header(tmp_path, content, byte_order):
    header_class = nib.Nifti1Header if content[344:346] == b"n+" else nib.Nifti2Header
    header = header_class(content[: header_class.sizeof_hdr]).as_byteswapped(byte_order)
    header["vox_offset"] = 0
    start = header.binaryblock.ljust(header.single_vox_offset, b"\0")
    voxels = VOLUME.astype(np.dtype(np.int16).newbyteorder(byte_order)).tobytes("F")
    for compress in (bytes, gzip.compress):
        (tmp_path / "a.nii").write_bytes(compress(start + voxels))
        assert_is_read(tmp_path / "a.nii")


@pytest.mark.parametrize(
    "padding", [b"\0" * 700, b"garbage", b"\x1f\x8b", b"\x1f", b"\x1f\x8b\x08 not gzip"]
)
def test_bytes_after_the_gzip_stream_are_ignored(tmp_path, content, padding):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(content) + padding)
    assert_is_read(path)
    small = nib.Nifti1Image(VOLUME[:8, :8, 0].astype(np.uint8), np.eye(4)).to_bytes()
    path.write_bytes(gzip.compress(small) + padding)  # shorter than a NIfTI-2 header
    assert nifti.read_scan(path).planes.shape == (1, 8, 8)


def test_a_file_may_consist_of_several_gzip_streams(tmp_path, content):
    streams = [gzip.compress(content[i : i + 999]) for i in range(0, len(content), 999)]
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"".join(streams) + bytes(100))
    assert_is_read(path)
    path.write_bytes(b"".join(streams[:-1]))
    with pytest.raises(ValueError, match="is truncated or damaged"):
        nifti.read_nifti(path)


def test_damage_in_a_later_stream_is_reported(tmp_path, content):
    second = bytearray(gzip.compress(content[5000:]))
    second[-6] ^= 1  # its checksum
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content[:5000]) + second)
    with pytest.raises(ValueError, match="is truncated or damaged: it has 5,000 of the"):
        nifti.read_nifti(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("missing", [1, 4, 8, 9, 300])
def test_incomplete_streams_are_refused(tmp_path, content, missing):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content)[:-missing])
    with pytest.raises(ValueError, match="is truncated or damaged gzip"):
        nifti.read_nifti(tmp_path / "a.nii.gz")


# ---------------------------------------------------------------- large files


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """A sparse file of uint8 voxels, in which only the last two axial planes are not zero."""
    path = tmp_path_factory.mktemp("large") / "large scan.nii"
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(LARGE)
    header["vox_offset"] = 352
    rng = np.random.default_rng(0)
    planes = rng.integers(1, 255, (2, LARGE[1], LARGE[0])).astype(np.uint8)
    with open(path, "wb") as file:
        file.write(header.binaryblock)
        file.seek(352 + LARGE[0] * LARGE[1] * (LARGE[2] - 2))
        file.write(planes.tobytes())
    return path, planes.transpose(0, 2, 1)


def test_planes_of_large_files_are_read_one_at_a_time(large_file):
    path, planes = large_file
    header, data = nifti.read_nifti(path)
    assert not isinstance(data, bytes)
    stored, scale = nifti.stored_planes(header, data, 3, 2)
    np.testing.assert_array_equal(scale(stored[-2:]), planes)


def test_large_files_can_be_used_for_training(large_file):
    path, planes = large_file
    preprocessing = Preprocessing("scans", size=(512, 512), fit="trim", axis=2, planes=1 << 27)
    slices, reason = decode_file(path, preprocessing)
    assert reason == ""
    assert [record.plane for _, record in slices] == [510, 511]
    pixels, record = slices[1]
    np.testing.assert_array_equal(pixels + 32768.0 + record.low, planes[1, :512])


def test_large_files_are_refused_with_a_command_that_splits_them(large_file, tmp_path, monkeypatch):
    path, _ = large_file
    with pytest.raises(ValueError, match="has shape 513 x 512 x 512, expected at most") as error:
        nifti.read_scan(path)
    command = str(error.value).partition("for example: ")[2]
    assert "slicer[:, :, :511]" in command
    program, option, code = shlex.split(command.replace(":511", ":2"))
    assert (program, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(code)
    assert nib.load(tmp_path / "part_1.nii").shape == (513, 512, 2)


def test_large_compressed_files_are_refused_with_a_command_that_unpacks_them(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(LARGE)
    content = gzip.compress(header.binaryblock + bytes(200_000))
    for name, command in (
        ("a b.nii.gz", "gunzip '{}/a b.nii.gz'"),
        ("c.nii", "mv {0}/c.nii {0}/c.nii.gz; gunzip {0}/c.nii.gz"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="too large to be read compressed") as error:
            nifti.read_nifti(tmp_path / name)
        assert command.format(tmp_path) in str(error.value)
