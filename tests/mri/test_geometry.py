"""Geometry: units, both transforms of a header, and headers without patient data."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from mri import nifti
from mri.geometry import affine_of, geometry_header, geometry_record, header_from_record
from mri.preprocessing import Preprocessing, median_spacing, slice_affine

VOLUME = np.random.default_rng(0).integers(0, 900, (12, 13, 14)).astype(np.int16)
TURN = np.deg2rad(20)
ROTATED = np.array([
    [1.7 * np.cos(TURN), -1.5 * np.sin(TURN), 0, -20],
    [1.7 * np.sin(TURN), 1.5 * np.cos(TURN), 0, 7],
    [0, 0, -2, 3],
    [0, 0, 0, 1],
])  # fmt: skip
SHEARED = np.array([[-2, 0.3, 0.1, 5], [0, 1.5, 0.2, -7], [0.1, 0, 3, 9], [0, 0, 0, 1.0]])
SHAPES = [(12, 13, 14), (12, 13), (12, 13, 1), (12, 13, 14, 1)]


def make_image(
    shape=VOLUME.shape,
    image_class=nib.Nifti1Image,
    byte_order="<",
    qform=(ROTATED, 1),
    sform=(SHEARED, 2),
    units=("mm", "sec"),
) -> nib.Nifti1Image:
    """Return an image whose header has these transforms and codes, and private text."""
    header = image_class.header_class(endianness=byte_order)
    header.set_data_dtype(np.int16)
    image = image_class(np.resize(VOLUME, shape), None, header)
    image.header["descrip"] = b"DOE^JANE"
    image.set_qform(qform[0], code=qform[1])
    image.set_sform(sform[0], code=sform[1])
    image.header.set_xyzt_units(*units)
    return image


def write_back(path, **options) -> nib.Nifti1Image:
    """Read a file as a scan, and return the file that is written with its own planes."""
    scan = nifti.read_scan(path, **options)
    result = path.with_name("back.nii.gz")
    result.write_bytes(scan.to_bytes(scan.planes))
    return nib.load(result)


def assert_same_geometry(image, expected):
    for name in ("get_qform", "get_sform"):
        for actual, value in zip(
            getattr(image, name)(coded=True), getattr(expected, name)(coded=True), strict=True
        ):
            np.testing.assert_array_equal(actual, value)
    np.testing.assert_array_equal(image.affine, expected.affine)
    np.testing.assert_array_equal(image.get_fdata(), expected.get_fdata())
    assert image.header.get_zooms() == expected.header.get_zooms()
    assert image.header.get_xyzt_units() == expected.header.get_xyzt_units()
    np.testing.assert_array_equal(image.header["pixdim"], expected.header["pixdim"])


# ---------------------------------------------------------------- written files


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("codes", [(1, 2), (0, 3), (4, 0), (0, 0)])
def test_both_transforms_and_their_codes_stay(tmp_path, shape, image_class, byte_order, codes):
    qform, sform = (ROTATED, codes[0]), (SHEARED, codes[1])
    make_image(shape, image_class, byte_order, qform, sform).to_filename(tmp_path / "a.nii")
    expected = nib.load(tmp_path / "a.nii")
    written = write_back(tmp_path / "a.nii", axis="sagittal")
    assert_same_geometry(written, expected)
    assert type(written.header) is image_class.header_class
    assert written.header["descrip"].item() == b""


@pytest.mark.parametrize("unit", ["micron", "mm", "meter", "unknown"])
def test_units_stay_and_spacings_are_in_mm(tmp_path, unit):
    path = tmp_path / "a.nii"
    make_image(qform=(ROTATED, 1), sform=(ROTATED, 1), units=(unit, "msec")).to_filename(path)
    assert_same_geometry(write_back(path), nib.load(path))
    factor = {"micron": 1e-3, "mm": 1, "meter": 1e3, "unknown": 1}[unit]
    scan = nifti.read_scan(path)
    np.testing.assert_allclose(scan.spacing, [1.7 * factor, 2 * factor], rtol=1e-6)
    to_mm = np.diag([factor] * 3 + [1])
    np.testing.assert_allclose(scan.affine, to_mm @ ROTATED, rtol=1e-6, atol=1e-6 * factor)
    preprocessing = Preprocessing("3D", size=(12, 14))
    spacing = median_spacing([path], preprocessing)
    np.testing.assert_allclose(spacing, [1.7 * factor, 2 * factor], rtol=1e-6)
    voxel_sizes = nib.affines.voxel_sizes(slice_affine(path, preprocessing))
    np.testing.assert_allclose(voxel_sizes, np.array([1.7, 2, 1.5]) * factor, rtol=1e-6)


def test_an_invalid_code_of_the_time_unit_does_not_change_the_unit_of_length(tmp_path):
    image = make_image(units=("micron", "unknown"))
    image.header["xyzt_units"] = 3 + 56
    image.to_filename(tmp_path / "a.nii")
    assert write_back(tmp_path / "a.nii").header.get_xyzt_units() == ("micron", "unknown")


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [(0, 5, np.int8), (np.nan, np.nan, np.int16), (2, -1, np.float32)],
)
def test_scaled_and_unscaled_values_agree_with_nibabel(tmp_path, slope, intercept, dtype):
    image = nib.Nifti1Image((VOLUME % 100).astype(np.int8 if dtype == np.int8 else np.int16), None)
    content = bytearray(image.to_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    written = write_back(tmp_path / "a.nii", axis=0)
    expected = nib.load(tmp_path / "a.nii").get_fdata()
    np.testing.assert_array_equal(written.get_fdata(), expected)
    assert written.get_data_dtype() == dtype


# ---------------------------------------------------------------- affines


def test_the_qform_replaces_an_sform_of_zeros(tmp_path):
    image = make_image(sform=(np.diag([0, 0, 0, 1]), 2), qform=(ROTATED, 1))
    image.to_filename(tmp_path / "a.nii")
    scan = nifti.read_scan(tmp_path / "a.nii", "coronal")
    np.testing.assert_allclose(scan.affine, ROTATED, atol=1e-5)
    np.testing.assert_array_equal(scan.planes, VOLUME[:, :, ::-1].transpose(1, 0, 2))


@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_the_qform_replaces_an_sform_with_impossible_numbers(tmp_path, value):
    image = make_image(qform=(ROTATED, 1))
    image.header["srow_y"] = value
    (tmp_path / "a.nii").write_bytes(image.header.binaryblock + bytes(4) + VOLUME.tobytes("F"))
    header = nifti.read_header(tmp_path / "a.nii")
    np.testing.assert_allclose(affine_of(header), ROTATED, atol=1e-5)


def test_a_quaternion_that_is_slightly_too_long_is_normalised(tmp_path):
    image = make_image(qform=(np.diag([-1.7, -1.5, 2, 1]), 1), sform=(None, 0))
    image.header["quatern_d"] = 1.00001
    (tmp_path / "a.nii").write_bytes(image.header.binaryblock + bytes(4) + VOLUME.tobytes("F"))
    header = nifti.read_header(tmp_path / "a.nii")
    with pytest.raises(ValueError, match="w2 should be positive"):
        header.get_qform()
    affine = np.diag([-1.7, -1.5, 2, 1])
    np.testing.assert_allclose(affine_of(header)[:3, :3], affine[:3, :3], atol=1e-5)
    scan = nifti.read_scan(tmp_path / "a.nii")
    content = gzip.decompress(scan.to_bytes(scan.planes))
    assert nib.Nifti1Header(content[:348])["quatern_d"] == np.float32(1.00001)


@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
def test_geometry_records_restore_the_header(image_class):
    header = geometry_header(make_image(image_class=image_class).header)
    restored = header_from_record(geometry_record(header), header.get_data_shape())
    restored["datatype"] = header["datatype"]
    assert restored == header


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"srow_x": np.nan, "qform_code": 0}, (12, 13, 14), "affine with NaN"),
        ({}, (0, 13, 14), "expected 1 to 7 positive numbers"),
        ({}, (40_000, 13, 14), "its geometry is invalid"),
        (None, (12, 13, 14), "its geometry has unknown fields"),
    ],
)
def test_invalid_geometry_records_are_refused(changes, shape, message):
    record = geometry_record(make_image().header)
    for name, value in (changes or {}).items():
        record[name] = value
    with pytest.raises(ValueError, match=message):
        header_from_record(np.zeros(3) if changes is None else record, shape)
