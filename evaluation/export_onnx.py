"""Export a model's encoder and decoder to ONNX, for use in other programs.

    python -m evaluation.export_onnx -o out               # the model of the newest run
    python -m evaluation.export_onnx --run runs/x -o out

encoder.onnx maps z-scored `images`, (B, 1, H, W) float32, to `codes`, (B, h, w) int64.
decoder.onnx maps `codes` to `images`. B, h and w may have any size; H and W must be multiples of
the model's stride. The packages onnx and onnxscript are required.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch
from torch import Tensor, nn

import utils
from evaluation.reconstruct import find_run, load_run_model
from modules import VQVAE
from utils import UserError


class _Encoder(nn.Module):
    """`VQVAE.encode` as a module, as `torch.onnx.export` requires."""

    def __init__(self, model: VQVAE):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode(images)


class _Decoder(nn.Module):
    """`VQVAE.decode_codes` as a module."""

    def __init__(self, model: VQVAE):
        super().__init__()
        self.model = model

    def forward(self, codes: Tensor) -> Tensor:
        return self.model.decode_codes(codes)


def export(run: str | Path | None, runs_dir: str | Path, out: Path) -> None:
    """Write encoder.onnx and decoder.onnx to the folder `out`.

    Args:
        run, runs_dir: the run with the model (see `reconstruct.find_run`).
        out: the folder to write to.

    Raises:
        UserError: if a required package is not installed, or `out` is a file.
    """
    model, _ = load_run_model(find_run(run, runs_dir), torch.device("cpu"))
    utils.make_folder(out)
    batch = torch.export.Dim("batch", min=1)
    height = torch.export.Dim("h", min=1)
    width = torch.export.Dim("w", min=1)
    images = torch.zeros(2, 1, 16 * model.stride, 8 * model.stride)  # example input for tracing
    image_sizes = {0: batch, 2: model.stride * height, 3: model.stride * width}
    code_sizes = {0: batch, 1: height, 2: width}
    _export_module(_Encoder(model), images, image_sizes, "images", "codes", out / "encoder.onnx")
    codes = model.encode(images)
    _export_module(_Decoder(model), codes, code_sizes, "codes", "images", out / "decoder.onnx")
    print(f"written: encoder.onnx, decoder.onnx in {out}")


def _export_module(
    module: nn.Module, example: Tensor, sizes: dict, input_name: str, output_name: str, path: Path
) -> None:
    """Export a module with one input and one output.

    Args:
        module: the module.
        example: example input, for tracing.
        sizes: input dimension -> symbolic size.
        input_name, output_name: names of the input and the output in the ONNX file.
        path: the file to write.
    """
    try:
        program = torch.onnx.export(
            module.eval(),
            (example,),
            input_names=[input_name],
            output_names=[output_name],
            dynamic_shapes=(sizes,),
            dynamo=True,
            verbose=False,
        )
    except ImportError as error:
        raise UserError(
            f"ONNX export needs two more packages ({error}): pip install onnx onnxscript"
        ) from None
    content = io.BytesIO()
    program.save(content)
    utils.write_bytes(path, content.getbuffer())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.export_onnx",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run", metavar="DIR", help="folder of the run (default: the newest run in --runs-dir)"
    )
    parser.add_argument(
        "--runs-dir", metavar="DIR", default="runs", help="folder of all runs (default: runs)"
    )
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="output folder")
    args = parser.parse_args(argv)
    export(args.run, args.runs_dir, Path(args.out))
    return 0


if __name__ == "__main__":
    utils.run_script(main)
