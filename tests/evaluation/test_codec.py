"""Slices as codes: encoding at any size, and .npz files that restore a scan exactly."""

import io
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch

from evaluation.codec import decode_planes, encode_planes, fingerprint, read_codes
from modules import VQVAE
from mri import nifti
from training.checkpoint import load_model
from utils import DataError


def test_slices_are_padded_not_resampled(noise, untrained_run):
    """A slice of 30 x 21 gets the model's own output for the padded slice, without the padding."""
    image = noise((30, 21)).astype(np.float32)
    model = load_model(VQVAE, untrained_run / "best.pt")
    coded = encode_planes(model, image[None])
    assert coded.codes.shape == (1, 8, 6)
    assert coded.codes.dtype == np.uint16
    zscored = torch.from_numpy((image - image.mean()) / image.std())[None, None]
    padded = torch.nn.functional.pad(zscored, (0, 3, 0, 2), mode="replicate")
    with torch.no_grad():
        reconstruction, _ = model(padded)
    expected = reconstruction[0, 0, :30, :21] * image.std() + image.mean()
    np.testing.assert_allclose(decode_planes(model, coded)[0], expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("factor", [2.0**-66, 2.0**-20, 2.0**66])
def test_codes_do_not_depend_on_the_unit(noise, untrained_run, factor):
    planes = noise((2, 32, 24)).astype(np.float64)
    model = load_model(VQVAE, untrained_run / "best.pt")
    coded = encode_planes(model, planes)
    scaled = encode_planes(model, planes * factor)
    np.testing.assert_array_equal(scaled.codes, coded.codes)
    expected = decode_planes(model, coded) * factor
    np.testing.assert_allclose(decode_planes(model, scaled), expected, rtol=1e-5)


def test_more_than_65536_codes_are_stored_as_uint32():
    torch.manual_seed(0)
    model = VQVAE(hidden_channels=8, residual_channels=4, num_embeddings=70_000, embedding_dim=4)
    image = np.random.default_rng(0).normal(size=(1, 64, 64)).astype(np.float32)
    coded = encode_planes(model, image)
    zscored = torch.from_numpy((image - image.mean()) / image.std())[None]
    assert coded.codes.dtype == np.uint32
    assert np.array_equal(coded.codes, model.encode(zscored).numpy())


@pytest.mark.parametrize("flags", ["", "--resize", "--axis sagittal", "--axis 0"])
def test_codes_restore_the_same_file(
    tmp_path, write_nifti, noise, reconstruct_path, read_scores, flags
):
    path = write_nifti(tmp_path / "scan.nii.gz", noise((20, 24, 28)))
    first = reconstruct_path(path, f"--export-codes {flags}")
    again = reconstruct_path(first, "--from-codes", "again")
    name = "scan_reconstruction.nii.gz"
    assert (first / name).read_bytes() == (again / name).read_bytes()
    row = read_scores(first)[0]
    assert int(row["npz_bytes"]) == (first / "scan_codes.npz").stat().st_size
    assert int(row["file_bytes"]) == path.stat().st_size


@pytest.fixture
def codes_path(tmp_path, write_nifti, noise, reconstruct_path):
    """A file of --export-codes, of the model in `untrained_run`."""
    scan = write_nifti(tmp_path / "scan.nii.gz", noise((20, 24, 28)))
    return reconstruct_path(scan, "--export-codes") / "scan_codes.npz"


def test_the_format_of_code_files_stays(codes_path):
    with np.load(codes_path) as file:
        assert file.files == [
            "format", "model", "codes", "mean", "std", "size",
            "resized", "affine", "shape", "kind", "axis", "turn",
            "geometry",
        ]  # fmt: skip
        assert file["format"] == 1
        assert file["codes"].dtype == np.uint16
        assert file["size"].tolist() == [20, 28]
        assert file["shape"].tolist() == [20, 24, 28]
        assert file["kind"] == "<i2"


def test_codes_of_earlier_versions_have_only_an_affine(codes_path, untrained_run):
    model = load_model(VQVAE, untrained_run / "best.pt")
    with np.load(codes_path) as file:
        arrays = dict(file)
    affine = np.array([[1.7, 0.2, 0, -20], [0, 1.5, 0, 7], [0, 0, 2, 3], [0, 0, 0, 1]])
    del arrays["geometry"]
    np.savez_compressed(codes_path, **arrays | {"affine": affine})
    coded, scan = read_codes(codes_path, model)
    codes_path.with_name("old.nii.gz").write_bytes(scan.to_bytes(decode_planes(model, coded)))
    header = nib.load(codes_path.with_name("old.nii.gz")).header
    np.testing.assert_allclose(header.get_best_affine(), affine, atol=1e-6)
    assert (header["sform_code"], header["qform_code"]) == (2, 0)
    assert header.get_xyzt_units() == ("mm", "unknown")
    assert scan.shape == (20, 24, 28)


def test_damaged_codes_are_reported(codes_path, untrained_run):
    model = load_model(VQVAE, untrained_run / "best.pt")
    other = VQVAE(hidden_channels=8, residual_channels=4, num_embeddings=16, embedding_dim=4)
    with np.load(codes_path) as file:
        arrays = dict(file)
    codes = arrays["codes"]

    def damaged(**changes) -> bytes:
        content = io.BytesIO()
        np.savez_compressed(content, **(arrays | changes))
        return content.getvalue()

    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("codes.npy", b"\0" * (nifti.MAX_VOXELS + 1))
    without_axis = io.BytesIO()
    np.savez_compressed(without_axis, **{k: v for k, v in arrays.items() if k != "axis"})
    cases = {
        "is not an .npz or .vqc file from --export-codes": [
            b"text",
            codes_path.read_bytes()[:-50],
            without_axis.getvalue(),
            damaged(shape=np.array(3)),
            damaged(size=[20]),
        ],
        "is damaged": [
            damaged(codes=codes + 16),
            damaged(codes=codes[:3]),
            damaged(codes=codes[:0]),
            damaged(codes=codes.astype(float)),
            damaged(mean=arrays["mean"][:, None]),
            damaged(shape=[1, 2, 3]),
            damaged(shape=[-20, -24, 28]),
            damaged(size=[200, 20]),
            damaged(kind="c8"),
            damaged(axis=7),
            damaged(affine=np.eye(3)),
            damaged(turn=np.zeros((3, 2))),
            damaged(geometry=np.zeros(3)),
        ],
        "has format 9": [damaged(format=9)],
        "was made by model": [damaged(model=fingerprint(other))],
        "unpacks to": [bomb.getvalue()],
        "pickle": [damaged(codes=np.array([Exception()], object))],
    }
    for message, contents in cases.items():
        for content in contents:
            codes_path.write_bytes(content)
            with pytest.raises(DataError, match=message):
                read_codes(codes_path, model)
