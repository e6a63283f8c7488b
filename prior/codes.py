"""The codes of a data set, as the prior is trained on them."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import dataset
from modules import VQVAE
from mri.files import SliceName

MIRRORS = ((), (-2,), (-1,), (-2, -1))  # CodePrior.VIEWS: axes of (B, 1, H, W) that are flipped


class CodeDataset:
    """The codes of a split's N slices and of their mirror images, and where each slice lies in its volume.

    codes: (N, V, h, w) int32, V of MIRRORS. positions: (N,). brightness: (K,), of the slices where each code stands.
    names: the N slices'. spacing: of their pixels in mm, None where that is not known.
    """

    def __init__(
        self, codes: Tensor, positions: Tensor, brightness: Tensor, names: Sequence[SliceName],
        spacing: Sequence[float] | None = None,
    ):  # fmt: skip
        self.codes, self.positions, self.brightness, self.names = (
            codes,
            positions,
            brightness,
            names,
        )
        self.spacing = spacing

    def __len__(self) -> int:
        return len(self.codes)

    def batches(
        self, groups: Sequence[Tensor], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for group in groups:
            yield self.codes[group].to(device).long(), self.positions[group].to(device)


@torch.no_grad()
def encode_split(
    model: VQVAE, slices: dataset.SliceDataset, mirrors: Sequence[tuple]
) -> CodeDataset:
    """All slices of a split, seen through each of the mirrors.

    Brightness is the mean z-score over the pixels that a code stands for, on a scale that bends like a logarithm: fat
    and bladder would take up most of a straight one.
    """
    device = next(model.parameters()).device
    groups = torch.arange(len(slices)).split(16)
    codes, sums = [], torch.zeros(2, model.vector_quantization.num_embeddings, device=device)
    for images in tqdm(
        slices.batches(groups, device), f"encoding {slices.split}", len(groups), unit=" batches"
    ):
        views = torch.stack(
            [model.encode(images.flip(axes)) for axes in mirrors], 1
        )  # (B, V, h, w)
        bright = torch.asinh(F.avg_pool2d(images, model.stride)[:, 0])  # (B, h, w)
        for total, values in zip(sums, (bright, torch.ones_like(bright)), strict=True):
            total.index_add_(0, views[:, 0].flatten(), values.flatten())
        codes.append(views.int().cpu())
    brightness = (sums[0] / sums[1].clamp_min(1)).cpu()
    return CodeDataset(
        torch.cat(codes), slices.positions, brightness, slices.names, slices.description["spacing"]
    )


def compressed_bits(train: Tensor, codes: Tensor, num_embeddings: int) -> dict[str, float]:
    """Bits a code of (N, h, w) by what knows no context: fixed length, frequencies in `train`, and gzip of a slice."""
    counts = torch.bincount(train.flatten(), minlength=num_embeddings).double() + 0.1
    kind = np.uint8 if num_embeddings <= 256 else np.uint16
    files = [len(gzip.compress(one.numpy().astype(kind).tobytes(), 9)) for one in codes]
    return {
        "fixed_length": math.log2(num_embeddings),
        "empirical_entropy": float(-(counts / counts.sum()).log2()[codes.flatten()].mean()),
        "gzip": 8 * sum(files) / codes.numel(),
    }
