"""ONNX export: the exported parts compute what the model computes."""

import numpy as np
import pytest
import torch
from models import save_model

import predict
from evaluation import export_onnx
from modules import VQVAE
from utils import UserError


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_exported_parts_compute_what_the_model_computes(tmp_path, num_codebooks):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = VQVAE(
        hidden_channels=8,
        residual_channels=4,
        num_embeddings=16,
        embedding_dim=4,
        num_codebooks=num_codebooks,
    ).eval()
    save_model(tmp_path / "runs" / "x" / "best.pt", model)
    out = tmp_path / "out"
    assert export_onnx.main(["--runs-dir", str(tmp_path / "runs"), "-o", str(out)]) == 0
    encoder = onnxruntime.InferenceSession(out / "encoder.onnx")
    decoder = onnxruntime.InferenceSession(out / "decoder.onnx")
    for shape in ((1, 1, 256, 128), (3, 1, 40, 36), (9, 1, 256, 128)):  # unlike the example
        images = torch.randn(shape)
        with torch.no_grad():
            codes = model.encode(images)
            expected = model.decode_codes(codes)
        (exported_codes,) = encoder.run(None, {"images": images.numpy()})
        (exported_images,) = decoder.run(None, {"codes": codes.numpy()})
        assert np.array_equal(exported_codes, codes.numpy())
        assert np.abs(exported_images - expected.numpy()).max() < 1e-4


def test_missing_packages_are_named(untrained_run, tmp_path, monkeypatch):
    """Through predict.py --export, an alias of the command."""

    def export(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'onnxscript'")

    monkeypatch.setattr(torch.onnx, "export", export)
    command = ["--export", "-o", str(tmp_path), "--run", str(untrained_run), "--device", "cpu"]
    with pytest.raises(UserError, match=r"'onnxscript'\): pip install onnx onnxscript"):
        predict.main(command)
