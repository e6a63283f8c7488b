"""Encode a split for a prior, and measure the compressed size of codes without a prior."""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset import SliceDataset
from modules import VQVAE
from mri.files import SliceName

# The views of a slice: unchanged, mirrored left-right, mirrored inferior-superior, and mirrored
# both ways. Each entry lists the axes of (B, 1, H, W) that are flipped.
MIRRORS = ((), (-2,), (-1,), (-2, -1))


@dataclass(frozen=True, eq=False)
class EncodedDataset:
    """The encoded slices of a split, each in V views (see `encode_split`)."""

    encoded: Tensor  # (N, V, ...), codes or components
    positions: Tensor  # (N,), positions of the slices in their volumes, 0 to 1; NaN if unknown
    names: Sequence[SliceName]  # names of the N slices
    spacing: Sequence[float] | None = None  # mm between rows and between columns, if known

    def __len__(self) -> int:
        return len(self.encoded)

    def batches(
        self, groups: Sequence[Tensor], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield encoded slices (B, V, ...) and positions (B,) for each group of indices (B,)."""
        for group in groups:
            yield self.encoded[group].to(device), self.positions[group].to(device)


@torch.no_grad()
def encode_split(
    encode: Callable[[Tensor], Tensor],
    slices: SliceDataset,
    mirrors: Sequence[tuple],
    device: torch.device,
) -> EncodedDataset:
    """Encode all slices of a split, each in several views.

    Images are flipped before they are encoded, because the encoder is not symmetric.

    Args:
        encode: function (images (B, 1, H, W) on the device) -> (B, ...).
        slices: the split.
        mirrors: the views to encode, such as MIRRORS; the first must be the slice itself.
        device: the device to compute on.
    """
    groups = torch.arange(len(slices)).split(16)
    batches = slices.batches(groups, device)
    encoded = []
    for images in tqdm(batches, f"encoding {slices.split}", len(groups), unit=" batches"):
        views = [encode(images.flip(axes)).cpu() for axes in mirrors]
        encoded.append(torch.stack(views, 1))
    return EncodedDataset(
        torch.cat(encoded), slices.positions, slices.names, slices.description["spacing"]
    )


def evenly_spaced(length: int, count: int) -> Tensor:
    """Return `count` indices, (count,) int64, spread evenly from 0 to length - 1; 1: the middle."""
    if count == 1:
        return torch.tensor([length // 2])
    return torch.linspace(0, length - 1, count).round().long()


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
    num_bytes = sum(len(gzip.compress(c.numpy().astype(dtype).tobytes(), 9)) for c in codes)
    return {
        "fixed_length": math.log2(num_embeddings),
        "empirical_entropy": float(bits[codes.flatten()].mean()),
        "gzip": 8 * num_bytes / codes.numel(),
    }
