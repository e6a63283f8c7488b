"""Slices as int16 pixels: the rounding error, and the reasons why files cannot be decoded."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mri.encoding import decode_file, quantize
from mri.preprocessing import Preprocessing

IMAGE = np.random.default_rng(0).integers(0, 900, (256, 128)).astype(np.int16)

# ---------------------------------------------------------------- rounding


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, (8, 8), elements=st.floats(-1e30, 1e30)))
def test_rounding_error_is_at_most_half_a_step(image):
    low = image.min()
    pixels, scale = quantize(image, low, image.max())
    restored = (pixels.astype(np.float64) + 32768) * scale + low
    half_step = np.ptp(image) / 131070
    float_error = 1e-15 * np.abs(image).max() + 1e-300
    assert pixels.dtype == np.int16
    assert np.abs(restored - image).max() <= half_step * (1 + 1e-9) + float_error


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 65535], 1),
        ([-32768, 0, 32767], 1),
        ([0, 65536], 65536 / 65535),
        ([0, 0.5, 1], 1 / 65535),
        ([7], 1),
    ],
)
def test_steps_divide_the_range_of_the_values(values, expected):
    pixels, scale = quantize(np.array([values], np.float64), min(values), max(values))
    assert scale == expected
    assert pixels.min() == -32768
    if len(values) > 1:
        assert pixels.max() == 32767


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.int64, (8, 8), elements=st.integers(0, 65535)), st.integers(-(2**31), 2**31))
def test_integers_that_span_65535_steps_are_exact(image, offset):
    image += offset
    pixels, scale = quantize(image.astype(np.float64), float(image.min()), float(image.max()))
    assert scale == 1
    assert np.array_equal(pixels.astype(np.int64) + 32768 + image.min(), image)


# ---------------------------------------------------------------- files


def test_slices_come_with_the_statistics_of_their_values(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "a.nii.gz", IMAGE[:, :100])
    slices, reason = decode_file(path, Preprocessing("2D", size=(256, 100)))
    assert reason == ""
    ((pixels, record),) = slices
    assert np.array_equal((pixels + 32768.0) * record.scale + record.low, IMAGE[:, :100])
    assert record.mean == pytest.approx(IMAGE[:, :100].mean())
    assert record.std == pytest.approx(IMAGE[:, :100].std())
    assert (record.plane, record.height, record.width) == (0, 256, 100)
    assert not record.constant


def test_planes_are_numbered_by_their_place_in_the_volume(tmp_path, write_nifti):
    volume = np.random.default_rng(0).integers(0, 900, (20, 9, 30)).astype(np.int16)
    path = write_nifti(tmp_path / "a.nii.gz", volume)
    slices, _ = decode_file(path, Preprocessing("3D", size=(20, 30), planes=3))
    assert [record.plane for _, record in slices] == [3, 4, 5]
    for pixels, record in slices:
        assert np.array_equal(pixels + 32768.0 + record.low, volume[:, record.plane])


def to_nifti(image: np.ndarray) -> bytes:
    return nib.Nifti1Image(image, np.eye(4)).to_bytes()


def bad_contents() -> dict[str, tuple[bytes, str]]:
    """Return {name: (content of a file, reason that is reported)}."""
    with_nan = IMAGE.astype(np.float32)
    with_nan[3, 4:6] = np.nan
    with_inf = IMAGE.astype(np.float32)
    with_inf[0, 0] = np.inf
    huge = np.linspace(0, 1e300, IMAGE.size).reshape(IMAGE.shape)
    rgb = np.zeros(IMAGE.shape, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    content = to_nifti(IMAGE)
    return {
        "truncated gzip": (gzip.compress(content)[:5000], "truncated or damaged gzip"),
        "truncated": (content[:5000], "it has 5,000 of the 65,888 bytes that its header specifies"),
        "nan": (to_nifti(with_nan), "has 2 NaN or infinite pixels"),
        "infinity": (to_nifti(with_inf), "has 1 NaN or infinite pixels"),
        "huge values": (to_nifti(huge), "has intensities up to 1e+300; expected at most 1e30"),
        "4D": (to_nifti(IMAGE[:96].reshape(16, 16, 3, 16)), "has shape 16 x 16 x 3 x 16, expected"),
        "volume": (to_nifti(IMAGE[:48].reshape(16, 16, 24)), "has shape 16 x 16 x 24, expected a"),
        "thin": (to_nifti(IMAGE[:, :2]), "has shape 256 x 2, expected a 2D slice of at least 8"),
        "empty": (b"", "is empty (zero bytes)"),
        "text": (b"slice,score\n" * 99, "is not a NIfTI file"),
        "short": (b"hello", "is not a NIfTI file"),
        "complex": (to_nifti(IMAGE.astype(np.complex64)), "holds complex64 values"),
        "rgb": (to_nifti(rgb), "expected one real number per voxel"),
    }


@pytest.mark.parametrize("name", bad_contents())
def test_bad_files_are_described_not_decoded(tmp_path, name):
    content, expected = bad_contents()[name]
    path = tmp_path / "a.nii.gz"
    path.write_bytes(content)
    slices, reason = decode_file(path, Preprocessing("2D"))
    assert slices == []
    assert expected in reason


def test_a_volume_with_one_bad_slice_is_bad(tmp_path, write_nifti):
    volume = np.random.default_rng(0).random((20, 9, 30)).astype(np.float32)
    volume[2, 5, 7] = np.nan
    path = write_nifti(tmp_path / "a.nii.gz", volume)
    slices, reason = decode_file(path, Preprocessing("3D", size=(20, 30), planes=9))
    assert slices == []
    assert "NaN" in reason


def test_nan_is_replaced_on_request(tmp_path, write_nifti):
    image = IMAGE.astype(np.float32)
    image[:20] = np.nan
    path = write_nifti(tmp_path / "a.nii.gz", image)
    slices, reason = decode_file(path, Preprocessing("2D"))
    assert (slices, reason) == (
        [],
        "has 2,560 NaN or infinite pixels; --nan-value X replaces NaN by X",
    )
    for form in ("2D", "scans"):
        slices, _ = decode_file(path, Preprocessing(form, nan_value=-3))
        pixels, record = slices[0]
        restored = (pixels + 32768.0) * record.scale + record.low
        np.testing.assert_array_equal(restored, np.nan_to_num(image, nan=-3))


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e-6, 1e6, 1e20])
def test_z_scores_do_not_depend_on_the_unit(tmp_path, write_nifti, factor):
    path = write_nifti(tmp_path / "a.nii", IMAGE * factor)
    ((pixels, record),), _ = decode_file(path, Preprocessing("2D"))
    image = (pixels + 32768.0) * record.scale + record.low
    zscored = (IMAGE - IMAGE.mean()) / IMAGE.std()
    assert not record.constant
    np.testing.assert_allclose((image - record.mean) / record.std, zscored, atol=1e-4)


def test_unexpected_errors_are_reasons_too(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "a.nii.gz", IMAGE)
    slices, reason = decode_file(path, Preprocessing("2D", size=("x", "y")))
    assert slices == []
    assert reason.startswith("cannot be decoded (")
