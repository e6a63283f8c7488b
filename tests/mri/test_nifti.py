"""NIfTI files: planes in every orientation, writing them back, and hostile or broken files."""

import gzip
import itertools
import logging
import os

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, ornt_transform

from mri import nifti

# The volume's axes run right, anterior, superior; the scanner's bed is turned by 10 degrees.
VOLUME = np.random.default_rng(0).integers(0, 900, (9, 10, 11)).astype(np.int16)
TURN = np.deg2rad(10)
AFFINE = np.array([
    [1.7 * np.cos(TURN), -1.5 * np.sin(TURN), 0, -20],
    [1.7 * np.sin(TURN), 1.5 * np.cos(TURN), 0, 7],
    [0, 0, 2, 3],
    [0, 0, 0, 1],
])  # fmt: skip
# (row, column, plane) axes of the planes among the volume's axes.
PLANE_AXES = {"sagittal": (1, 2, 0), "coronal": (0, 2, 1), "axial": (0, 1, 2)}
ORIENTATIONS = [
    "".join(letters)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*axes)
]


@pytest.fixture(params=ORIENTATIONS)
def stored(request, tmp_path) -> nib.Nifti1Image:
    """VOLUME, stored in one of the 48 orientations in the file that `get_filename` names."""
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(request.param))
    image = nib.Nifti1Image(VOLUME, AFFINE).as_reoriented(turn)
    image.to_filename(tmp_path / "scan.nii")
    assert nib.aff2axcodes(image.affine) == tuple(request.param)
    return image


# ---------------------------------------------------------------- orientation


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


def test_planes_are_identical_in_every_orientation(stored):
    path = stored.get_filename()
    for axis, order in PLANE_AXES.items():
        scan = nifti.read_scan(path, axis)
        np.testing.assert_array_equal(scan.planes, VOLUME.transpose(order[2], order[0], order[1]))
        header = nifti.read_header(path)
        assert nifti.planes_shape(header, axis) == scan.planes.shape
        affine = nifti.planes_affine(header, axis)
        np.testing.assert_allclose(affine, AFFINE[:, [*order, 3]], atol=1e-4)
        sizes = np.array([1.7, 1.5, 2.0])
        np.testing.assert_allclose(scan.spacing, sizes[list(order[:2])], rtol=1e-5)


def test_axis_numbers_cut_along_the_stored_axes(stored):
    path = stored.get_filename()
    voxels = np.asarray(stored.dataobj)
    for axis in (0, 1, 2):
        scan = nifti.read_scan(path, axis)
        np.testing.assert_array_equal(scan.planes, np.moveaxis(voxels, axis, 0))
        assert nifti.planes_shape(nifti.read_header(path), axis) == scan.planes.shape


def test_reconstructions_are_written_in_the_orientation_of_their_file(stored, tmp_path):
    for axis in (*nifti.AXES, 0, 1, 2):
        scan = nifti.read_scan(stored.get_filename(), axis)
        assert scan.axis == axis
        (tmp_path / "back.nii.gz").write_bytes(scan.to_bytes(scan.planes + 0.3))  # is rounded
        back = nib.load(tmp_path / "back.nii.gz")
        np.testing.assert_array_equal(np.asarray(back.dataobj), np.asarray(stored.dataobj))
        np.testing.assert_allclose(back.affine, stored.affine, atol=1e-4)
        assert nib.aff2axcodes(back.affine) == nib.aff2axcodes(stored.affine)
        assert back.get_data_dtype() == np.int16


def test_axes_without_directions_can_only_be_cut_by_number(tmp_path):
    image = nib.Nifti1Image(VOLUME, None)
    image.set_sform(np.diag([1.7, 0, 0, 1]), code=1)
    path = tmp_path / "flat.nii"
    path.write_bytes(image.to_bytes())
    with pytest.raises(ValueError, match="does not determine the directions of its axes"):
        nifti.read_scan(path, "coronal")
    assert nifti.read_scan(path, 1).planes.shape == (10, 9, 11)


def test_an_affine_without_finite_numbers_is_refused(tmp_path):
    content = bytearray(nib.Nifti1Image(VOLUME, AFFINE).to_bytes())
    content[280:284] = np.float32(np.nan).tobytes()  # srow_x
    (tmp_path / "nan.nii").write_bytes(content)
    header = nifti.read_header(tmp_path / "nan.nii")
    with pytest.raises(ValueError, match="affine with NaN, infinite or too large numbers"):
        nifti.affine_of(header)


# ---------------------------------------------------------------- values and formats


@pytest.mark.parametrize("image_class", [nib.Nifti2Image, nib.Nifti1Image])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_versions_and_byte_orders(tmp_path, image_class, byte_order):
    header = image_class.header_class(endianness=byte_order)
    header.set_data_dtype(np.int16)
    path = tmp_path / "scan.nii"
    path.write_bytes(image_class(VOLUME, AFFINE, header).to_bytes())
    scan = nifti.read_scan(path, "axial")
    np.testing.assert_array_equal(scan.planes, VOLUME.transpose(2, 0, 1))
    assert scan.dtype == np.int16


def test_scale_factors_are_applied(tmp_path):
    image = nib.Nifti1Image(VOLUME, AFFINE)
    image.header.set_slope_inter(0.5, 10)
    (tmp_path / "scan.nii").write_bytes(image.to_bytes())
    scan = nifti.read_scan(tmp_path / "scan.nii", "axial")
    np.testing.assert_allclose(scan.planes, VOLUME.transpose(2, 0, 1) * 0.5 + 10)
    assert scan.dtype == np.float32  # unscaled integers could not hold the values


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 1), (20, 30, 1, 1)])
def test_slices_may_have_further_dimensions_of_one(tmp_path, write_nifti, shape):
    image = np.arange(600, dtype=np.int16).reshape(shape)
    scan = nifti.read_scan(write_nifti(tmp_path / "scan.nii.gz", image))
    np.testing.assert_array_equal(scan.planes, image.reshape(1, 20, 30))
    (tmp_path / "back.nii.gz").write_bytes(scan.to_bytes(scan.planes))
    assert nib.load(tmp_path / "back.nii.gz").shape == shape


def test_integers_are_clipped_to_the_range_of_the_file(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "scan.nii", np.zeros((20, 30), np.uint8))
    planes = np.full((1, 20, 30), 300.0)
    planes[0, 0, 0] = -5
    (tmp_path / "back.nii.gz").write_bytes(nifti.read_scan(path).to_bytes(planes))
    voxels = np.asarray(nib.load(tmp_path / "back.nii.gz").dataobj)
    assert voxels[0, 0] == 0
    assert voxels[1, 1] == 255


def test_written_files_have_a_new_header_in_mm(tmp_path):
    image = np.arange(256.0 * 128, dtype=np.float32).reshape(256, 128, 1) / 10 - 5
    affine = np.array([[1.68, 0, 0, -214], [0, 0, 1.68, 0], [0, 1.56, 0, -99], [0, 0, 0, 1]])
    (tmp_path / "x.nii.gz").write_bytes(nifti.nifti_bytes(image, affine))
    written = nib.load(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(written.get_fdata(), image)
    np.testing.assert_allclose(written.affine, affine, atol=1e-4)
    assert written.header["descrip"] == b""
    assert written.header.get_xyzt_units()[0] == "mm"


def test_odd_header_fields_are_not_logged(tmp_path, write_nifti, capfd, caplog):
    path = write_nifti(tmp_path / "a.nii", VOLUME)
    content = bytearray(path.read_bytes())
    content[76:80] = np.float32(7).tobytes()  # pixdim[0] should be 1 or -1
    path.write_bytes(content)
    nifti.read_scan(path)
    assert capfd.readouterr() == ("", "")
    caplog.set_level(logging.DEBUG, "nibabel.global")
    nifti.read_scan(path)
    assert not caplog.records
    nib.Nifti1Header(bytes(content[:348]))  # other code still gets its messages
    assert "pixdim[0]" in caplog.text


# ---------------------------------------------------------------- hostile and broken files


def with_planes(count: int) -> bytes:
    """Return a file with 11 planes whose header claims another number of them."""
    content = bytearray(nib.Nifti1Image(VOLUME, AFFINE).to_bytes())
    content[46:48] = count.to_bytes(2, "little")
    return bytes(content)


def test_headers_may_not_claim_more_than_the_file_contains(tmp_path):
    path = tmp_path / "scan.nii.gz"
    for content in (with_planes(30_000), gzip.compress(with_planes(30_000))):
        path.write_bytes(content)
        for read in (nifti.read_header, nifti.read_nifti):
            with pytest.raises(ValueError, match="is truncated or damaged"):
                read(path)


@pytest.mark.parametrize("shape", [(20, 30, 10, 4), (20, 30, 1, 6)])
def test_time_series_must_be_saved_as_one_file_per_volume(tmp_path, write_nifti, shape):
    path = write_nifti(tmp_path / "scan.nii", np.zeros(shape, np.int16))
    with pytest.raises(ValueError, match="save each of its volumes or channels as a file of its"):
        nifti.read_scan(path, "coronal")


def test_headers_may_not_claim_terabytes(tmp_path):
    content = bytearray(with_planes(30_000))
    content[42:46] = content[46:48] * 2
    for data in (content, gzip.compress(content)):
        (tmp_path / "scan.nii").write_bytes(data)
        with pytest.raises(ValueError, match="is truncated or damaged"):
            nifti.read_header(tmp_path / "scan.nii")
    with pytest.raises(ValueError, match="has shape 30000 x 30000 x 30000; it is too large"):
        nifti.read_nifti(tmp_path / "scan.nii")


def test_no_more_is_unpacked_than_the_header_asks_for(tmp_path):
    bomb = gzip.compress(with_planes(11) + bytes(20_000_000))
    (tmp_path / "bomb.nii.gz").write_bytes(bomb)
    _, data = nifti.read_nifti(tmp_path / "bomb.nii.gz")
    assert len(data) < 100_000


@pytest.mark.parametrize("damage", ["cut", "checksum", "middle"])
def test_damaged_gzip_is_reported(tmp_path, damage):
    content = bytearray(gzip.compress(with_planes(11)))
    if damage == "cut":
        del content[-500:]
    else:
        position = -8 if damage == "checksum" else len(content) // 2
        content[position] ^= 0xFF
    (tmp_path / "scan.nii.gz").write_bytes(content)
    with pytest.raises(ValueError, match="is truncated or damaged gzip"):
        nifti.read_nifti(tmp_path / "scan.nii.gz")


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing"])
def test_paths_without_a_regular_file_are_refused(tmp_path, kind):
    path = tmp_path / "scan.nii.gz"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    messages = {
        "folder": "is a folder, expected exactly one .nii or .nii.gz in it",
        "pipe": "is not a regular file but a pipe",
        "missing": r"cannot be read \(No such file",
    }
    for read in (nifti.read_header, nifti.read_nifti):
        with pytest.raises(ValueError, match=messages[kind]):
            read(path)


def test_the_header_of_a_pair_of_files_is_refused(tmp_path):
    content = bytearray(with_planes(11))
    content[344:348] = b"ni1\0"
    (tmp_path / "scan.nii").write_bytes(content)
    with pytest.raises(ValueError, match="is the header of a pair of files"):
        nifti.read_nifti(tmp_path / "scan.nii")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scans_with_values_that_are_not_finite_are_refused(tmp_path, write_nifti, value):
    volume = VOLUME.astype(np.float32)
    volume[3, 4, 5:7] = value
    path = write_nifti(tmp_path / "scan.nii.gz", volume)
    advice = "; --nan-value X replaces NaN by X" if np.isnan(value) else "$"
    with pytest.raises(ValueError, match=f"has 2 NaN or infinite voxels{advice}"):
        nifti.read_scan(path)
    if np.isnan(value):
        filled = nifti.read_scan(path, 0, nan_value=-5).planes
        np.testing.assert_array_equal(filled, np.nan_to_num(volume, nan=-5))


def test_intensities_that_a_float32_cannot_represent_are_refused(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "scan.nii.gz", VOLUME * 1e50)
    with pytest.raises(ValueError, match=r"has intensities up to 9e\+52; expected at most 1e30"):
        nifti.read_scan(path)


@pytest.mark.parametrize(
    ("shape", "axis", "message"),
    [
        ((1, 64, 80), "coronal", "cut along coronal, its planes have 1 x 80 pixels"),
        ((64, 80, 5), "coronal", "cut along coronal, its planes have 64 x 5 pixels"),
        ((64, 80, 5), 0, "cut along axis 0, its planes have 80 x 5 pixels"),
    ],
)
def test_small_planes_are_described_with_their_axis(tmp_path, write_nifti, shape, axis, message):
    path = write_nifti(tmp_path / "scan.nii", np.resize(VOLUME, shape))
    message += ", expected at least 8 x 8; --axis chooses another direction"
    with pytest.raises(ValueError, match=message):
        nifti.read_scan(path, axis)
