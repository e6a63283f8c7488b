"""Encode a split as codes for the prior, and measure their compressed size without a prior."""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import dataset
from modules import VQVAE
from mri.files import SliceName

# The views of a slice: unchanged, mirrored left-right, mirrored inferior-superior, and mirrored
# both ways. Each entry lists the axes of (B, 1, H, W) that are flipped.
MIRRORS = ((), (-2,), (-1,), (-2, -1))


@dataclass(frozen=True, eq=False)
class CodeDataset:
    """The codes of a split's slices and of their mirror images (see `encode_split`)."""

    codes: Tensor  # (N, V, h, w) int32; V is the number of views (see MIRRORS)
    positions: Tensor  # (N,), positions of the slices in their volumes, 0 to 1; NaN if unknown
    brightness: Tensor  # (K,), mean brightness of the pixels that each code represents
    names: Sequence[SliceName]  # names of the N slices
    spacing: Sequence[float] | None = None  # mm between rows and between columns, if known

    def __len__(self) -> int:
        return len(self.codes)

    def batches(
        self, groups: Sequence[Tensor], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield codes (B, V, h, w) int64 and positions (B,) for each group of indices (B,)."""
        for group in groups:
            yield self.codes[group].to(device).long(), self.positions[group].to(device)


@torch.no_grad()
def encode_split(
    model: VQVAE, slices: dataset.SliceDataset, mirrors: Sequence[tuple]
) -> CodeDataset:
    """Encode all slices of a split, each in several views.

    To compute the brightness of a code, the z-scored pixels that it represents are averaged at each
    position where the code occurs. The brightness is the mean of asinh(average) over these
    positions. On a linear scale, fat and bladder would occupy most of the range; asinh compresses
    large values like a logarithm.

    Args:
        model: the VQ-VAE; it must have only one codebook.
        slices: the split.
        mirrors: the views to encode, such as MIRRORS; the first must be the slice itself.
    """
    device = next(model.parameters()).device
    num_embeddings = model.vector_quantization.num_embeddings
    brightness_sums = torch.zeros(num_embeddings, device=device)
    counts = torch.zeros(num_embeddings, device=device)
    codes = []
    groups = torch.arange(len(slices)).split(16)
    batches = slices.batches(groups, device)
    for images in tqdm(batches, f"encoding {slices.split}", len(groups), unit=" batches"):
        views = torch.stack([model.encode(images.flip(axes)) for axes in mirrors], 1)
        codes.append(views.int().cpu())  # (B, V, h, w)
        indices = views[:, 0].flatten()
        brightness = torch.asinh(F.avg_pool2d(images, model.stride)[:, 0]).flatten()
        brightness_sums.index_add_(0, indices, brightness)
        counts.index_add_(0, indices, torch.ones_like(brightness))
    return CodeDataset(
        codes=torch.cat(codes),
        positions=slices.positions,
        brightness=(brightness_sums / counts.clamp_min(1)).cpu(),
        names=slices.names,
        spacing=slices.description["spacing"],
    )


def hash_codebook(model: VQVAE) -> str:
    """Return a hash of the codebook, or of all codebooks, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in model.vector_quantization.state_dict().items():
        if name.endswith("embedding.weight"):
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def compressed_bits(train: Tensor, codes: Tensor, num_embeddings: int) -> dict[str, float]:
    """Compute the bits per code of three baselines that need no prior.

    Args:
        train: training codes, (M, h, w), in which frequencies are counted.
        codes: codes to compress, (N, h, w).
        num_embeddings: K, number of codes.

    Returns:
        Bits per code. "fixed_length": log2 K; "empirical_entropy": cross entropy under the marginal
        frequencies of `train`; "gzip": gzip, applied to each slice separately.
    """
    counts = torch.bincount(train.flatten(), minlength=num_embeddings).double() + 0.1
    bits = -(counts / counts.sum()).log2()  # (K,)
    dtype = np.uint8 if num_embeddings <= 256 else np.uint16
    num_bytes = 0
    for slice_codes in codes:
        num_bytes += len(gzip.compress(slice_codes.numpy().astype(dtype).tobytes(), 9))
    return {
        "fixed_length": math.log2(num_embeddings),
        "empirical_entropy": float(bits[codes.flatten()].mean()),
        "gzip": 8 * num_bytes / codes.numel(),
    }
