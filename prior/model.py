"""Model the codes of a VQ-VAE autoregressively, to compute exact code lengths (the causal prior).

    prior = CodePrior(num_embeddings=512, embedding_dim=64, height=64, width=32)
    prior.initialize(embedding, codes)
    logits = prior(codes, position, view)                  # all codes at once
    codes = prior.decode(position, view, choose)           # code by code

Masked convolutions predict each code from the codes before it in reading order, as in PixelCNN (van
den Oord et al. 2016, arXiv 1601.06759). There are only ReLUs, no normalisation and no attention, so
that the network can be evaluated in integer arithmetic (`prior.integer.IntegerPrior`).

Shapes: B slices; codes (B, h, w); positions of the slices in their volumes (B,), from 0 to 1, or
NaN if unknown; views (B,) int64, indices into `prior.codes.MIRRORS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv2d(nn.Conv2d):
    """A convolution over earlier positions in reading order; its input must be padded (`pad`).

    Args:
        channels, out_channels: number of input and of output channels.
        size: width of the kernel, which must be odd; it has size // 2 rows above its centre.
        itself: whether an output depends on the input at its own position (mask B; else mask A).
    """

    def __init__(self, channels: int, out_channels: int, size: int, itself: bool):
        super().__init__(channels, out_channels, (size // 2 + 1, size))
        self.margin = size // 2
        mask = torch.ones(self.kernel_size)
        mask[-1, self.margin + itself :] = 0
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, padded: Tensor) -> Tensor:  # (B, C, h + margin, w + 2 margin) -> (B, _, h, w)
        return F.conv2d(padded, self.weight * self.mask, self.bias)

    def pad(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C, h + margin, w + 2 margin)
        return F.pad(x, (self.margin, self.margin, self.margin, 0))


class ResidualBlock(nn.Module):
    """Add features of nearby earlier positions, (B, C, h, w), given a condition (B, C)."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.near = CausalConv2d(channels, channels, 3, itself=True)
        self.shift = nn.Linear(channels, channels, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor, pad: Callable) -> Tensor:
        h = self.near(pad(self.near, F.relu(x))) + self.shift(condition)[:, :, None, None]
        return x + self.mix(self.dropout(F.relu(h)))


class CodePrior(nn.Module):
    """A causal convolutional network, whose inputs and outputs are embeddings of codes.

    Args:
        num_embeddings: K, number of codes of the VQ-VAE.
        embedding_dim: D, length of each embedding.
        height, width: h and w.
        channels: C, width of the network.
        num_layers: number of residual blocks.
        dropout: dropout probability.
    """

    FREQUENCIES = 8  # number of cosines that encode the position in the volume

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        height: int,
        width: int,
        channels: int = 128,
        num_layers: int = 6,
        dropout: float = 0.0,
    ):
        self.arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.grid = (height, width)
        self.register_buffer("embedding", torch.zeros(num_embeddings, embedding_dim))
        self.first = CausalConv2d(embedding_dim, channels, 7, itself=False)
        self.places = nn.Parameter(torch.randn(1, channels, height, width) * 0.02)
        self.positions = nn.Sequential(
            nn.Linear(self.FREQUENCIES, channels), nn.ReLU(), nn.Linear(channels, channels)
        )
        self.views = nn.Parameter(torch.randn(4, channels) * 0.02)
        self.blocks = nn.ModuleList(ResidualBlock(channels, dropout) for _ in range(num_layers))
        self.last = nn.Conv2d(channels, embedding_dim, 1)
        self.bias = nn.Parameter(torch.zeros(num_embeddings))

    @torch.no_grad()
    def initialize(self, embedding: Tensor, codes: Tensor) -> None:
        """Store the codebook (K, D), and predict the frequencies of training codes (N, h, w)."""
        self.embedding.copy_(standardise(embedding))
        counts = torch.bincount(codes.flatten(), minlength=len(embedding)) + 0.1
        self.bias.copy_((counts / counts.sum()).log())
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def has_codebook(self, embedding: Tensor) -> bool:
        """Return whether the prior was trained on codes of this codebook, (K, D)."""
        if self.embedding.shape != embedding.shape:
            return False
        return torch.allclose(self.embedding, standardise(embedding), atol=1e-4)

    def forward(self, codes: Tensor, position: Tensor, view: Tensor) -> Tensor:
        """Compute the logits of each code, given the codes before it: (B, h, w, K) float32."""
        embedded = self.embedding[codes].movedim(-1, 1)  # (B, D, h, w)
        x = self.first(self.first.pad(embedded)) + self.places
        return self.logits(x, self.condition(position, view), CausalConv2d.pad)

    def condition(self, position: Tensor, view: Tensor) -> Tensor:
        """Embed each slice's position in the volume and its view: (B,) and (B,) -> (B, C)."""
        angles = math.pi * torch.arange(self.FREQUENCIES, device=position.device)
        encoding = (position[:, None] * angles).cos().nan_to_num(0.0)  # zeros if unknown
        # Not self.views[view]: the backward pass of indexing sums in a varying order, so a resumed
        # run would differ from an uninterrupted run.
        return self.positions(encoding) + F.embedding(view, self.views)

    def logits(self, x: Tensor, condition: Tensor, pad: Callable) -> Tensor:
        """Compute the logits, (B, h, w, K) float32, as similarities to the embeddings.

        Args:
            x: output of the first convolution, (B, C, h, w).
            condition: (B, C).
            pad: function (convolution, its input (B, C, h, w)) -> its padded input.
        """
        for block in self.blocks:
            x = block(x, condition, pad)
        return self.compare(self.last(F.relu(x)).movedim(1, -1))

    def compare(self, vectors: Tensor) -> Tensor:  # (B, h, w, D) -> (B, h, w, K) float32
        return (vectors @ self.embedding.T).float() + self.bias

    @torch.no_grad()
    def decode(
        self, position: Tensor, view: Tensor, choose: Callable, progress: Callable = iter
    ) -> Tensor:
        """Choose all codes in reading order, each given the codes before it, in eval mode.

        Args:
            position, view: (B,), as for `forward`.
            choose: function (logits (B, K), row, column) -> chosen codes (B,).
            progress: a function such as tqdm, which wraps the range of codes.

        Returns:
            The codes, (B, h, w) int64.
        """
        count, (height, width) = len(position), self.grid
        condition = self.condition(position, view)
        padded = {}  # the input of each convolution, to which each code adds one position
        for conv in (self.first, *(block.near for block in self.blocks)):
            padded[conv] = conv.pad(self.embedding.new_zeros(count, conv.in_channels, *self.grid))

        def window(row: int, column: int, conv: CausalConv2d, x: Tensor) -> Tensor:
            """Store a convolution's input at one position; return the part of it that is needed."""
            margin = conv.margin
            padded[conv][:, :, row + margin, column + margin] = x[:, :, 0, 0]
            return padded[conv][:, :, row : row + margin + 1, column : column + 2 * margin + 1]

        unknown = self.embedding.new_zeros(count, self.embedding.shape[1], 1, 1)
        codes = torch.zeros(count, height, width, dtype=torch.long, device=position.device)
        for index in progress(range(height * width)):
            row, column = divmod(index, width)
            place = self.places[:, :, row, column, None, None]
            x = self.first(window(row, column, self.first, unknown)) + place
            logits = self.logits(x, condition, partial(window, row, column))[:, 0, 0]
            codes[:, row, column] = choose(logits, row, column)
            window(row, column, self.first, self.embedding[codes[:, row, column]][..., None, None])
        return codes


def standardise(embedding: Tensor) -> Tensor:
    """Return embeddings (K, D) with a mean of 0 and an overall standard deviation of 1."""
    return (embedding - embedding.mean(0)) / embedding.std()
