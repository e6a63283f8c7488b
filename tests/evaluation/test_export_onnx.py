"""A person's own files: they come back as they were, at their own size; codes out and in; organs; odd ones."""

import csv
import gzip

import nibabel as nib
import numpy as np
import pytest
import torch

import predict
from evaluation import reconstruct
from modules import VQVAE
from training.checkpoint import write_checkpoint
from utils import UserError

AFFINE = np.array([[1.7, 0, 0, -20], [0, 1.5, 0, 7], [0, 0, 2, 3], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a best.pt of a small, untrained model, whose training slices had voxels of 1.7 x 2 mm."""
    torch.manual_seed(0)
    model = VQVAE(hidden_channels=8, residual_channels=4, num_embeddings=16, embedding_dim=4)
    folder = tmp_path_factory.mktemp("runs") / "x"
    folder.mkdir()
    slices = {"size": [256, 128], "spacing": [1.7, 2.0], "axis": "coronal"}
    kept = {
        "format": 3,
        "model_args": model.arguments,
        "model": model.state_dict(),
        "slices": slices,
    }
    write_checkpoint(folder / "best.pt", kept)
    return folder


@pytest.fixture
def reconstruct(run, tmp_path):
    """reconstruct(path, "--flags") -> output folder."""

    def reconstruct(path, flags="", out="out"):
        command = [
            str(path),
            "-o",
            str(tmp_path / out),
            "--run",
            str(run),
            "--device",
            "cpu",
            *flags.split(),
        ]
        assert predict.main(command) == 0
        return tmp_path / out

    return reconstruct


def volume(shape=(20, 24, 28), dtype=np.int16):
    return np.random.default_rng(0).integers(0, 900, shape).astype(dtype)


def write(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header["descrip"] = b"DOE^JANE"
    path.write_bytes(gzip.compress(image.to_bytes()))
    return path


def rows_of(folder):
    with open(folder / "scores.csv") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- files as slices, and back


@pytest.mark.parametrize("codebooks", [1, 2])
def test_exported_parts_do_what_the_model_does(tmp_path, codebooks, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = VQVAE(
        hidden_channels=8,
        residual_channels=4,
        num_embeddings=16,
        embedding_dim=4,
        num_codebooks=codebooks,
    )
    kept = {"format": 3, "model_args": model.arguments, "model": model.state_dict()}
    (tmp_path / "x").mkdir()
    write_checkpoint(tmp_path / "x" / "best.pt", kept)
    out = tmp_path / "out"
    assert (
        predict.main(["--export", "-o", str(out), "--run", str(tmp_path / "x"), "--device", "cpu"])
        == 0
    )
    encoder, decoder = (
        onnxruntime.InferenceSession(out / f"{name}.onnx") for name in ("encoder", "decoder")
    )
    model.eval()
    for shape in ((1, 1, 256, 128), (3, 1, 40, 36)):  # other sizes than the example's
        images = torch.randn(shape)
        with torch.no_grad():
            codes = model.encode(images)
            expected = model.decode_codes(codes)
        assert np.array_equal(encoder.run(None, {"images": images.numpy()})[0], codes.numpy())
        found = decoder.run(None, {"codes": codes.numpy()})[0]
        assert np.abs(found - expected.numpy()).max() < 1e-4


def test_export_without_its_packages_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.onnx,
        "export",
        lambda *_, **__: (_ for _ in ()).throw(ModuleNotFoundError("onnxscript")),
    )
    with pytest.raises(UserError, match="pip install onnx onnxscript"):
        predict.main(["--export", "-o", str(tmp_path), "--run", str(run), "--device", "cpu"])
