"""Export encoder and decoder to ONNX."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch

import utils
from evaluation.reconstruct import pick_model
from modules import VQVAE
from utils import UserError


class _Method(torch.nn.Module):
    """A model's method as a module, which is what can be exported."""

    def __init__(self, model: VQVAE, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self.model, self.method)(x)


def export(args: argparse.Namespace) -> int:
    """encoder.onnx: z-scored `images` (B, 1, H, W) -> `codes` (B, h, w); decoder.onnx: back. B, h and w are free."""
    model, _ = pick_model(args)
    model, folder = model.cpu(), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.zeros(2, 1, 16 * model.stride, 8 * model.stride)
    batch, height, width = (torch.export.Dim(name, min=1) for name in ("batch", "h", "w"))
    free = {0: batch, 2: model.stride * height, 3: model.stride * width}
    grid = {0: batch, 1: height, 2: width}
    parts = (
        ("encoder", "encode", images, free, ["images", "codes"]),
        ("decoder", "decode_codes", model.encode(images), grid, ["codes", "images"]),
    )
    for name, method, example, dimensions, (source, target) in parts:
        content = io.BytesIO()
        try:
            program = torch.onnx.export(
                _Method(model, method).eval(), (example,), input_names=[source], output_names=[target],
                dynamic_shapes=(dimensions,), dynamo=True, verbose=False,
            )  # fmt: skip
        except ImportError as error:
            raise UserError(
                f"--export needs more packages ({error}): pip install onnx onnxscript"
            ) from None
        program.save(content)
        utils.write_bytes(folder / f"{name}.onnx", content.getbuffer())
    print(f"written: encoder.onnx, decoder.onnx in {folder}")
    return 0
