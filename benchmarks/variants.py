"""Define the variants of ablation.py, and rejected alternatives to parts of modules.py.

A variant is a set of flags of train.py. Some variants also replace classes or functions of
modules.py. Models of these variants can only be loaded within `replace_in_modules`.

| class or function | replaces | source |
|---|---|---|
| FSQ | VectorQuantizer | arXiv 2309.15505 |
| RotationTrick | VectorQuantizer | arXiv 2410.06424 |
| CosineCodes | VectorQuantizer | arXiv 2110.04627 |
| SimVQ | VectorQuantizer | arXiv 2411.02038 |
| SubPixelDecoder | Decoder | arXiv 1609.05158 |
| CodeGridEncoder, CodeGridDecoder | Encoder, Decoder | new here |
| NormalisedLayer | ResidualLayer | |
| four_scales_loss | ssim_loss | MS-SSIM, Wang, Simoncelli and Bovik 2003 |
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ms_ssim import MS_SSIM_WEIGHTS

import modules
from modules import (
    Decoder,
    Encoder,
    Quantized,
    ResidualLayer,
    ResidualStack,
    VectorQuantizer,
    ssim_loss,
)

# ---------------------------------------------------------------- quantisers


class FSQ(nn.Module):
    """Finite scalar quantisation (arXiv 2309.15505): 8 levels in each of 3 channels, 512 codes.

    The codes are fixed. Encoder and decoder are the same as in the other variants. Between them,
    1 x 1 convolutions map D channels to 3 channels and back.
    """

    num_codebooks = 1

    def __init__(self, num_embeddings: int, embedding_dim: int, *unused):
        super().__init__()
        if num_embeddings != 8**3:
            raise ValueError(f"num_embeddings is {num_embeddings}; expected 512")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.down = nn.Conv2d(embedding_dim, 3, 1)
        self.up = nn.Conv2d(3, embedding_dim, 1)
        grid = torch.cartesian_prod(*[torch.arange(-4.0, 4)] * 3) / 4  # (512, 3)
        self.embedding = nn.Embedding.from_pretrained(grid, freeze=True)

    def forward(self, z: Tensor) -> Quantized:
        rounded = self.round(self.down(z).float())  # (B, 3, h, w)
        digits = rounded.detach().round().long() + 4  # 0 to 7
        indices = digits[:, 0] * 64 + digits[:, 1] * 8 + digits[:, 2]  # (B, h, w)
        counts = torch.bincount(indices.flatten(), minlength=self.num_embeddings).float()
        no_loss = torch.zeros((), device=z.device)
        vectors = z.detach().float().movedim(1, -1).reshape(-1, self.embedding_dim)
        return Quantized(self.up(rounded / 4), indices, no_loss, no_loss, counts, vectors)

    @staticmethod
    def round(z: Tensor) -> Tensor:
        """Bound the values and round them to -4..3, with a straight-through gradient."""
        half_range = 3.5 * 1.001
        bounded = torch.tanh(z + math.tan(0.5 / half_range)) * half_range - 0.5
        return bounded + (bounded.round() - bounded).detach()

    def init_codebook(self, vectors: Tensor, generator=None) -> None:
        """Do nothing, because the codes are fixed."""

    def update_codebook(self, vectors: Tensor, indices: Tensor) -> None:
        """Do nothing, as the codes are fixed."""

    def embed(self, indices: Tensor) -> Tensor:
        """Return the vectors of indices: (B, h, w) -> (B, D, h, w)."""
        return self.up(self.embedding(indices).movedim(-1, 1))


class RotationTrick(VectorQuantizer):
    """A quantiser that passes gradients through the rotation and scaling of z to its embedding.

    See arXiv 2410.06424. It replaces the straight-through estimator, which copies gradients.
    """

    def forward(self, z: Tensor) -> Quantized:
        result = super().forward(z)
        z = z.float()
        e = result.quantized.detach()  # (B, D, h, w)
        u = F.normalize(z.detach(), dim=1)
        v = F.normalize(e, dim=1)
        r = F.normalize(u + v, dim=1)
        scale = e.norm(dim=1, keepdim=True) / z.detach().norm(dim=1, keepdim=True).clamp_min(1e-6)
        z_along_r = (z * r).sum(1, keepdim=True)
        z_along_u = (z * u).sum(1, keepdim=True)
        # The rotation from u to v, as two reflections instead of a D x D matrix.
        return result._replace(quantized=scale * (z - 2 * z_along_r * r + 2 * z_along_u * v))


class CosineCodes(VectorQuantizer):
    """A quantiser of directions: vectors are scaled to length sqrt(D) (arXiv 2110.04627)."""

    def forward(self, z: Tensor) -> Quantized:
        return super().forward(self.scale_to_sphere(z))

    def init_codebook(self, vectors: Tensor, *arguments, **options) -> None:
        super().init_codebook(self.scale_to_sphere(vectors), *arguments, **options)

    def scale_to_sphere(self, vectors: Tensor) -> Tensor:
        """Scale the vectors along axis 1 to length sqrt(D)."""
        return F.normalize(vectors.float(), dim=1) * math.sqrt(self.embedding_dim)


class SimVQ(VectorQuantizer):
    """A quantiser whose codebook is the product of a fixed table and a trained matrix.

    Each gradient step therefore moves all codes (see arXiv 2411.02038). The flag
    `--codebook gradient` is required. The table is initialised from data, like other codebooks, and
    the matrix is initialised to the identity.
    """

    class Product(nn.Module):
        """An embedding whose weight is `table @ matrix`, (K, D)."""

        def __init__(self, table: Tensor):
            super().__init__()
            self.register_buffer("table", table)  # (K, D)
            self.matrix = nn.Parameter(torch.eye(table.shape[1]))

        @property
        def weight(self) -> Tensor:
            return self.table @ self.matrix

        def forward(self, indices: Tensor) -> Tensor:
            return F.embedding(indices, self.weight)

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.embedding = self.Product(self.embedding.weight.detach().clone())

    @torch.no_grad()
    def init_codebook(self, vectors: Tensor, *arguments, **options) -> None:
        product = self.embedding
        # k-means writes the centres into `self.embedding.weight`.
        self.embedding = nn.Embedding(*product.table.shape, device=vectors.device)
        super().init_codebook(vectors, *arguments, **options)
        product.table.copy_(self.embedding.weight)
        self.embedding = product


# ---------------------------------------------------------------- encoders, decoders, losses


class SubPixelDecoder(Decoder):
    """A decoder that upsamples with 3 x 3 convolutions and pixel shuffles (arXiv 1609.05158).

    The usual decoder upsamples with transposed convolutions.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for name in ("conv1", "conv2"):
            transposed = getattr(self, name)
            conv = nn.Conv2d(
                transposed.in_channels, 4 * transposed.out_channels, kernel_size=3, padding=1
            )
            setattr(self, name, nn.Sequential(conv, nn.PixelShuffle(2)))


class NormalisedLayer(ResidualLayer):
    """A residual layer with batch normalisation before its first activation."""

    def __init__(self, channels: int, residual_channels: int):
        super().__init__(channels, residual_channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.conv1(self.relu(self.norm(x)))))


class CodeGridEncoder(Encoder):
    """An encoder with its residual stack on the code grid, after the last convolution.

    There, a layer costs a quarter of what it costs per channel at twice the resolution.
    """

    def __init__(
        self,
        channels: int,
        residual_channels: int,
        num_layers: int,
        embedding_dim: int,
        stride: int,
    ):
        super().__init__(channels, residual_channels, 0, embedding_dim, stride)
        self.code_stack = ResidualStack(embedding_dim, embedding_dim, num_layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.code_stack(super().forward(x))


class CodeGridDecoder(Decoder):
    """A decoder with its residual stack on the code grid, before the first convolution."""

    def __init__(
        self,
        channels: int,
        residual_channels: int,
        num_layers: int,
        embedding_dim: int,
        *arguments,
    ):
        super().__init__(channels, residual_channels, 0, embedding_dim, *arguments)
        # Decoder.forward applies a stack with this name first.
        self.code_stack = ResidualStack(embedding_dim, embedding_dim, num_layers)


def four_scales_loss(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Return the weighted sum of `ssim_loss` at four scales for two batches (B, 1, H, W).

    MS-SSIM itself is a product over scales, whose gradient is unbounded.
    """
    total = 0
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        small_reconstructions = F.avg_pool2d(reconstructions.float(), 2**scale)
        small_images = F.avg_pool2d(images.float(), 2**scale)
        total = total + weight * ssim_loss(small_reconstructions, small_images)
    return total


# ---------------------------------------------------------------- variants


class Variant(NamedTuple):
    """Flags of train.py, and replacements for parts of modules.py."""

    flags: str  # flags of train.py, separated by spaces
    replacements: Mapping[str, Callable] = MappingProxyType({})  # name in modules.py -> replacement


# All variants have the same bits per pixel, which tests/benchmarks/test_variants.py checks.
VARIANTS = {
    "document": Variant("--recipe document"),
    "document, uniform start": Variant("--recipe document --codebook-init uniform"),
    "tuned": Variant(""),
    "tuned, no restarts": Variant("--restart-below 0"),
    "tuned, no flips or turns": Variant("--no-augment"),
    "tuned, gradient codebook": Variant("--codebook gradient --restart-below 0"),
    "tuned, squared error alone": Variant("--ssim-weight 0"),
    "tuned, SSIM weight 0.25": Variant("--ssim-weight 0.25"),
    "tuned, SSIM weight 1": Variant("--ssim-weight 1"),
    "tuned, SSIM at four scales": Variant("", {"ssim_loss": four_scales_loss}),
    "tuned, no refinement": Variant("--refine-channels 0"),
    "tuned, no code layers": Variant("--num-code-layers 0"),
    "tuned, the document's architecture": Variant(
        "--num-residual-layers 2 --num-code-layers 0 --refine-channels 0"
    ),
    "tuned, whole slices": Variant("--crop 0"),
    "tuned, learning rate 1e-3": Variant("--learning-rate 1e-3"),
    "tuned, learning rate 4e-3": Variant("--learning-rate 4e-3"),
    "tuned, restart below 0.3": Variant("--restart-below 0.3"),
    "tuned, commitment cost 1": Variant("--commitment-cost 1"),
    "tuned, codes of 16 numbers": Variant("--embedding-dim 16"),
    "tuned, stride 8, 4 residual codebooks": Variant("--stride 8 --num-codebooks 4"),
    "tuned, depth at the code grid": Variant(
        "--num-residual-layers 4 --num-code-layers 0",
        {"Encoder": CodeGridEncoder, "Decoder": CodeGridDecoder},
    ),
    "tuned, sub-pixel decoder": Variant("", {"Decoder": SubPixelDecoder}),
    "tuned, batch normalisation": Variant("", {"ResidualLayer": NormalisedLayer}),
    "tuned, FSQ 8 x 8 x 8": Variant("", {"VectorQuantizer": FSQ}),
    "tuned, rotation trick": Variant("", {"VectorQuantizer": RotationTrick}),
    "tuned, cosine codes": Variant("", {"VectorQuantizer": CosineCodes}),
    "tuned, SimVQ": Variant("--codebook gradient --restart-below 0", {"VectorQuantizer": SimVQ}),
}


@contextlib.contextmanager
def replace_in_modules(replacements: Mapping[str, Callable]) -> Iterator[None]:
    """Replace classes and functions of modules.py for the duration of the block."""
    originals = {name: getattr(modules, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(modules, name, replacement)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(modules, name, original)
