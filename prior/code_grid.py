"""Model one grid of codes for `prior.model`: causal convolutions and logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv2d(nn.Conv2d):
    """A masked convolution, as in PixelCNN (arXiv 1601.06759, section 3.4).

    The output at a position depends only on earlier positions in reading order and, with mask B, on
    the position itself.

    Args:
        channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: number of rows and columns of the kernel; must be odd.
        itself: whether an output depends on the input at its own position (mask B; else mask A).
    """

    def __init__(self, channels: int, out_channels: int, kernel_size: int, itself: bool):
        super().__init__(channels, out_channels, kernel_size, padding=kernel_size // 2)
        mask = torch.zeros(kernel_size**2)
        mask[: kernel_size**2 // 2 + itself] = 1
        self.register_buffer("mask", mask.view(kernel_size, kernel_size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, h, w) -> (B, out_channels, h, w)
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)

    def at(self, padded: Tensor, row: int, column: int) -> Tensor:
        """Compute the output at one position.

        Args:
            padded: the input, padded with k // 2 zeros above, on the left and on the right, where k
                is the kernel size: (B, channels, h + k // 2, w + 2 (k // 2)).
            row, column: position in the grid without padding.

        Returns:
            The output, (B, out_channels).
        """
        width = self.kernel_size[0]
        height = width // 2 + 1  # the rows below the centre are masked
        window = padded[:, :, row : row + height, column : column + width]
        weight = (self.weight * self.mask)[:, :, :height]
        return F.linear(window.flatten(1), weight.flatten(1), self.bias)


class CodeGrid(nn.Module):
    """The layers of `CodePrior` for one grid of codes, before and after the transformer.

    Causal convolutions compute the local features of each code from nearby earlier codes. The
    transformer has one position per segment, which consists of SEGMENT consecutive codes of a row.
    Its input at a position is the local features of the segment's first code. Its output is the
    context of all codes in the segment. Both the inputs and the logits are computed with the
    codebook's embeddings, so similar codes tend to have similar logits.

    Do not rename attributes that hold parameters or buffers, because checkpoints contain the names.

    Args:
        num_embeddings: K, number of codes.
        embedding_dim: D, length of each embedding.
        height, width: number of rows and columns; the width must be divisible by SEGMENT.
        coarse_shape: (K, D) of the next coarser grid, in which each code covers 2 x 2 codes of this
            grid; None for the coarsest grid.
        bias_per_place: whether the output biases depend on the row, the column and the part of the
            volume. If not, they depend on the code of the coarser grid.
        channels: C, width of the transformer.
        dropout: dropout probability.
        num_layers: number of 3 x 3 convolutions.
    """

    SEGMENT = 4
    PARTS = 5  # number of parts of a volume; each part has its own biases

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        height: int,
        width: int,
        coarse_shape: tuple[int, int] | None,
        bias_per_place: bool,
        channels: int,
        dropout: float,
        num_layers: int = 3,
    ):
        super().__init__()
        self.height = height
        self.width = width
        self.channels = channels
        self.bias_per_place = bias_per_place
        self.num_positions = height * width // self.SEGMENT  # T
        self.register_buffer("embedding", torch.zeros(num_embeddings, embedding_dim))
        self.register_buffer("brightness", torch.zeros(num_embeddings))  # mean brightness per code

        # Input: local features
        self.first = CausalConv2d(embedding_dim, channels, 7, itself=False)
        self.near = nn.ModuleList(
            CausalConv2d(channels, channels, 3, itself=True) for _ in range(num_layers)
        )
        self.mix = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(num_layers))
        if coarse_shape:
            self.context = nn.Sequential(
                nn.Conv2d(coarse_shape[1], channels, 3, padding=1),
                nn.GELU(),
                nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=2, padding=1),
            )
        self.rows = nn.Parameter(torch.randn(height, 1, channels) * 0.02)
        self.columns = nn.Parameter(torch.randn(width // self.SEGMENT, channels) * 0.02)

        # Output: logits
        self.spread = nn.Linear(channels, self.SEGMENT * channels)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, 2 * channels),
            nn.GELU(),
            nn.Linear(2 * channels, channels),
            nn.Dropout(dropout),
        )
        self.last = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, embedding_dim))
        if bias_per_place:
            table = (self.PARTS + 1, height * width)  # the last row is for unknown positions
        else:
            table = (coarse_shape[0] if coarse_shape else 1, 4)  # 4 codes per coarse code
        self.bias = nn.Parameter(torch.zeros(*table, num_embeddings))

    # ------------------------------------------------ initialisation

    @torch.no_grad()
    def set_codebook(self, embedding: Tensor, brightness: Tensor) -> None:
        """Standardise and store the embeddings (K, D); store the codes' brightness (K,)."""
        self.embedding.copy_((embedding - embedding.mean(0)) / embedding.std())
        self.brightness.copy_(brightness)

    @torch.no_grad()
    def init_bias_from_counts(self, codes: Tensor, coarse: Tensor | None, position: Tensor) -> None:
        """Set the output biases so that, before training, predictions are the training frequencies.

        With `bias_per_place`, codes are counted in the 3 x 3 neighbourhood of each grid position,
        separately for each part of the volume. Otherwise, codes are counted for each coarse code
        and each of the four positions that the coarse code covers.

        Args:
            codes: codes of the training slices, (N, height, width).
            coarse: codes of the same slices in the next coarser grid, (N, height/2, width/2); None
                if there is no coarser grid.
            position: positions of the slices, (N,), as for `CodePrior.forward`.
        """
        num_embeddings = len(self.embedding)
        frequencies = torch.bincount(codes.flatten(), minlength=num_embeddings) + 0.1
        frequencies = frequencies / frequencies.sum()
        if self.bias_per_place:
            counts = self._count_per_place(codes, position)
        else:
            counts = self._count_per_coarse_code(codes, coarse)
        # Add 20 pseudo-counts: where few codes were counted, the marginal frequencies dominate.
        smoothed = (counts + 20 * frequencies) / (counts.sum(-1, keepdim=True) + 20)
        self.bias.copy_(smoothed.log())
        nn.init.zeros_(self.last[1].weight)
        nn.init.zeros_(self.last[1].bias)

    def _count_per_place(self, codes: Tensor, position: Tensor) -> Tensor:
        """Count codes per part of the volume and 3 x 3 neighbourhood: (PARTS + 1, h * w, K)."""
        counts = torch.zeros_like(self.bias)
        parts = self.part(position)
        for batch, part in zip(codes.split(64), parts.split(64), strict=True):
            one_hot = F.one_hot(batch, len(self.embedding)).movedim(-1, 1).float()  # (B, K, h, w)
            neighbours = 9 * F.avg_pool2d(one_hot, 3, stride=1, padding=1)
            counts.index_add_(0, part, neighbours.flatten(2).mT)
        counts[-1] = counts.sum(0)
        return counts

    def _count_per_coarse_code(self, codes: Tensor, coarse: Tensor | None) -> Tensor:
        """Count codes per coarse code and position in its 2 x 2 block: (coarse codes, 4, K)."""
        counts = torch.zeros_like(self.bias)
        if coarse is None:
            coarse = torch.zeros_like(codes[:, ::2, ::2])
        for place in range(4):
            fine = codes[:, place // 2 :: 2, place % 2 :: 2]
            pairs = (coarse * len(self.embedding) + fine).flatten()
            table = counts[:, place]
            counts[:, place] = torch.bincount(pairs, minlength=table.numel()).view_as(table)
        return counts

    def part(self, position: Tensor) -> Tensor:
        """Return the index of the part of the volume that contains each position.

        Args:
            position: (B,), as for `CodePrior.forward`.

        Returns:
            (B,) int64, 0 to PARTS - 1, or PARTS for unknown positions.
        """
        part = (position.nan_to_num(0.0) * self.PARTS).long().clamp(0, self.PARTS - 1)
        return part.masked_fill(position.isnan(), self.PARTS)

    # ------------------------------------------------ outlines

    def block_brightness(self, codes: Tensor) -> Tensor:
        """Average the brightness of codes over 2 x 2 blocks: (B, h, w) -> (B, h/2, w/2)."""
        return F.avg_pool2d(self.brightness[codes][:, None], 2)[:, 0]

    def quantise_brightness(self, brightness: Tensor) -> Tensor:
        """Return the index (int64) of the nearest value in `self.brightness`, which is sorted.

        Args:
            brightness: a tensor of any shape, which is also the shape of the result.
        """
        borders = (self.brightness[1:] + self.brightness[:-1]) / 2
        return torch.bucketize(brightness, borders)

    # ------------------------------------------------ input

    @property
    def pos_emb(self) -> Tensor:
        """Position embeddings, (T, C)."""
        return (self.rows + self.columns).flatten(0, 1)

    def features(self, codes: Tensor, context: Tensor) -> Tensor:
        """Compute the local features of each code from nearby earlier codes.

        Args:
            codes: (B, height, width).
            context: context from the coarser grid, (B, C, height, width) or a shape that
                broadcasts to it.

        Returns:
            The local features, (B, C, height, width).
        """
        x = self.first(self.embedding[codes].movedim(-1, 1)) + context
        for near, mix in zip(self.near, self.mix, strict=True):
            x = x + mix(F.gelu(near(F.gelu(x))))
        return x

    def to_positions(self, features: Tensor) -> Tensor:
        """Select the first code of each segment: (B, C, height, width) -> (B, T, C)."""
        return features[..., :: self.SEGMENT].flatten(2).mT

    # ------------------------------------------------ output

    def to_codes(self, h: Tensor) -> Tensor:
        """Split the transformer's output by code: (B, T, C) -> (B, T, SEGMENT, C)."""
        return self.spread(h).unflatten(-1, (self.SEGMENT, self.channels))

    def initial_logits(self, coarse: Tensor | None, position: Tensor, view: Tensor) -> Tensor:
        """Return the output biases of each code, (B, height, width, K).

        Args:
            coarse: codes of the next coarser grid, (B, height/2, width/2); None if there is none.
            position, view: (B,), as for `CodePrior.forward`.
        """
        # Use F.embedding: the backward pass of indexing sums in a varying order, so a resumed run
        # would differ from an uninterrupted run.
        if self.bias_per_place:
            table = F.embedding(self.part(position), self.bias.flatten(1))
            table = table.view(-1, self.height, self.width, len(self.embedding))
            for bit, axis in ((1, 1), (2, 2)):
                is_mirrored = (view & bit > 0).view(-1, 1, 1, 1)
                table = torch.where(is_mirrored, table.flip(axis), table)
            return table
        if coarse is None:
            coarse = view.new_zeros(len(view), self.height // 2, self.width // 2)
        table = F.embedding(coarse, self.bias.flatten(1))  # (B, height/2, width/2, 4 K)
        blocks = table.unflatten(3, (2, 2, -1)).transpose(2, 3)  # (B, h/2, 2, w/2, 2, K)
        return blocks.flatten(3, 4).flatten(1, 2)

    def logits(self, x: Tensor, bias: Tensor) -> Tensor:
        """Compute logits as similarities to the embeddings.

        Args:
            x: local features plus context, (..., C).
            bias: output biases, (..., K) (see `initial_logits`).

        Returns:
            The logits, (..., K) float32.
        """
        x = x + self.perceptron(x)
        return (self.last(x) @ self.embedding.T).float() + bias

    def grid_logits(self, features: Tensor, h: Tensor, bias: Tensor) -> Tensor:
        """Compute the logits of all codes, (B, height, width, K) float32.

        Args:
            features: local features, (B, C, height, width).
            h: output of the transformer, (B, T, C).
            bias: output biases, (B, height, width, K) (see `initial_logits`).
        """
        context = self.to_codes(h).view(-1, self.height, self.width, self.channels)
        return self.logits(features.movedim(1, -1) + context, bias)


def outline_embedding(
    coarse: CodeGrid, fine: CodeGrid, codes: Tensor, outline: Tensor, embedding_dim: int
) -> Tensor:
    """Compute the embeddings of outline codes.

    The embedding of an outline code consists of the mean embedding of the finer codes that the
    outline code covers, and of the outline code's brightness. Both parts are standardised.

    Args:
        coarse: the outline's grid, whose brightness must be set.
        fine: the next finer grid, whose embeddings must be set.
        codes: codes of the finer grid, (N, h, w).
        outline: outline codes of the same slices, (N, h/2, w/2).
        embedding_dim: D, length of the VQ-VAE's embeddings.

    Returns:
        The embeddings, (number of outline codes, D + 1).
    """
    sums = torch.zeros(len(coarse.brightness), embedding_dim)
    counts = torch.full_like(coarse.brightness, 1e-6)
    for batch, indices in zip(codes.split(64), outline.split(64), strict=True):
        vectors = fine.embedding[batch][..., :embedding_dim].movedim(-1, 1)  # (B, D, h, w)
        means = F.avg_pool2d(vectors, 2).movedim(1, -1).flatten(0, 2)
        sums.index_add_(0, indices.flatten(), means)
        counts.index_add_(0, indices.flatten(), torch.ones(indices.numel()))
    parts = []
    for part in (sums / counts[:, None], coarse.brightness[:, None]):
        part = part - part.mean(0)
        parts.append(part / part.std().clamp_min(1e-6))
    return torch.cat(parts, 1)
