"""Model the codes of a VQ-VAE autoregressively, to compute exact code lengths (the causal prior).

    prior = CodePrior(num_embeddings=512, embedding_dim=64, height=64, width=32)
    prior.initialize(embedding, codes)
    logits = prior(codes, position, view)                  # all codes at once
    codes = prior.decode(position, view, choose)           # code by code

Each code is predicted from the codes before it in reading order, by masked convolutions as in
PixelCNN (van den Oord et al. 2016, arXiv 1601.06759). All nonlinearities are ReLUs, and there is
neither normalisation nor attention, so that the network can be evaluated in integer arithmetic
(Balle et al. 2019, Integer Networks for Data Compression with Latent-Variable Models).

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
    """A convolution over earlier positions in reading order, for padded inputs.

    Args:
        channels, out_channels: number of input and of output channels.
        size: width of the kernel, which must be odd; it has size // 2 rows above its centre.
        itself: whether an output depends on the input at its own position (mask B; else mask A).
    """

    def __init__(self, channels: int, out_channels: int, size: int, itself: bool):
        self.margin = size // 2
        super().__init__(channels, out_channels, (self.margin + 1, size))
        mask = torch.ones(self.margin + 1, size)
        mask[-1, self.margin + itself :] = 0
        self.register_buffer("mask", mask, persistent=False)

    def forward(
        self, padded: Tensor
    ) -> Tensor:  # (B, C, h + margin, w + 2 margin) -> (B, C', h, w)
        return F.conv2d(padded, self.weight * self.mask, self.bias)

    def pad(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C, h + margin, w + 2 margin)
        return F.pad(x, (self.margin, self.margin, self.margin, 0))

    def window(self, padded: Tensor, row: int, column: int) -> Tensor:
        """Return the inputs of the output at one position, (B, C, margin + 1, 2 margin + 1)."""
        return padded[:, :, row : row + self.margin + 1, column : column + 2 * self.margin + 1]


class ResidualBlock(nn.Module):
    """Add the features of nearby earlier positions, shifted by the condition."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.near = CausalConv2d(channels, channels, 3, itself=True)
        self.shift = nn.Linear(channels, channels, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor, pad: Callable) -> Tensor:
        """Transform x, (B, C, h, w), given the condition (B, C); `pad` is as for `head`."""
        h = self.near(pad(self.near, F.relu(x))) + self.shift(condition)[:, :, None, None]
        return x + self.mix(self.dropout(F.relu(h)))


class CodePrior(nn.Module):
    """A causal convolutional network over grids of codes.

    Its inputs and its logits are both computed with the codebook's embeddings, so similar codes
    tend to have similar logits.

    Args:
        num_embeddings: K, number of codes of the VQ-VAE.
        embedding_dim: D, length of each embedding.
        height, width: h and w.
        channels: C, width of the network.
        num_layers: number of residual blocks.
        dropout: dropout probability.
    """

    NUM_VIEWS = 4  # the slice and its three mirror images
    FREQUENCIES = 4  # number of sines and of cosines that encode the position in the volume

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
        self.views = nn.Parameter(torch.randn(self.NUM_VIEWS, channels) * 0.02)
        self.position = nn.Sequential(
            nn.Linear(2 + 2 * self.FREQUENCIES, channels), nn.ReLU(), nn.Linear(channels, channels)
        )
        self.first = CausalConv2d(embedding_dim, channels, 7, itself=False)
        self.places = nn.Parameter(torch.randn(1, channels, height, width) * 0.02)
        self.blocks = nn.ModuleList(ResidualBlock(channels, dropout) for _ in range(num_layers))
        self.last = nn.Conv2d(channels, embedding_dim, 1)
        self.bias = nn.Parameter(torch.zeros(num_embeddings))

    @torch.no_grad()
    def initialize(self, embedding: Tensor, codes: Tensor) -> None:
        """Store the codebook (K, D), and predict the frequencies of training codes (N, h, w)."""
        self.embedding.copy_((embedding - embedding.mean(0)) / embedding.std())
        counts = torch.bincount(codes.flatten(), minlength=len(embedding)) + 0.1
        self.bias.copy_((counts / counts.sum()).log())
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def has_codebook(self, embedding: Tensor) -> bool:
        """Return whether the prior was trained on codes of this codebook, (K, D)."""
        if self.embedding.shape != embedding.shape:
            return False
        standardised = (embedding - embedding.mean(0)) / embedding.std()
        return torch.allclose(self.embedding, standardised, atol=1e-4)

    def forward(self, codes: Tensor, position: Tensor, view: Tensor) -> Tensor:
        """Compute the logits of each code, given the codes before it: (B, h, w, K) float32."""
        embedded = self.first.pad(self.embedding[codes].movedim(-1, 1))
        x = self.first(embedded) + self.places
        return self.head(x, self.condition(position, view), CausalConv2d.pad)

    def condition(self, position: Tensor, view: Tensor) -> Tensor:
        """Embed each slice's position in the volume and its view: (B,) and (B,) -> (B, C)."""
        is_unknown = position.isnan()
        position = position.nan_to_num(0.0)[:, None]
        angles = position * math.pi * torch.arange(1, 1 + self.FREQUENCIES, device=position.device)
        encoding = torch.cat([torch.ones_like(position), position, angles.sin(), angles.cos()], 1)
        encoding = encoding.masked_fill(is_unknown[:, None], 0.0)
        # Not self.views[view]: the backward pass of indexing sums in a varying order, so a resumed
        # run would differ from an uninterrupted run.
        return self.position(encoding) + F.embedding(view, self.views)

    def head(self, x: Tensor, condition: Tensor, pad: Callable) -> Tensor:
        """Apply the residual blocks, and compute logits as similarities to the embeddings.

        Args:
            x: output of the first convolution, (B, C, h, w).
            condition: (B, C).
            pad: function (convolution, its inputs (B, C, h, w)) -> its padded inputs.

        Returns:
            The logits, (B, h, w, K) float32.
        """
        for block in self.blocks:
            x = block(x, condition, pad)
        vectors = self.last(F.relu(x)).movedim(1, -1)
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
        batch, (height, width) = len(position), self.grid
        condition = self.condition(position, view)
        # The padded inputs of each convolution so far; a new code changes one position of each.
        inputs = {}
        for conv in (self.first, *(block.near for block in self.blocks)):
            empty = self.embedding.new_zeros(batch, conv.in_channels, height, width)
            inputs[conv] = conv.pad(empty)
        codes = torch.zeros(batch, height, width, dtype=torch.long, device=position.device)
        for index in progress(range(height * width)):
            row, column = divmod(index, width)
            place = self.places[:, :, row, column, None, None]
            x = self.first(self.first.window(inputs[self.first], row, column)) + place
            logits = self.head(x, condition, partial(_extend, inputs, row, column))
            chosen = choose(logits[:, 0, 0], row, column)
            codes[:, row, column] = chosen
            _extend(inputs, row, column, self.first, self.embedding[chosen][..., None, None])
        return codes


def _extend(inputs: dict, row: int, column: int, conv: CausalConv2d, x: Tensor) -> Tensor:
    """Store a convolution's input at one position, (B, C, 1, 1), and return its window."""
    inputs[conv][:, :, row + conv.margin, column + conv.margin] = x[:, :, 0, 0]
    return conv.window(inputs[conv], row, column)
