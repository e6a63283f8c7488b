"""Model the codes of a VQ-VAE autoregressively, and sample from the model (the prior).

prior = CodePrior(num_embeddings=512, embedding_dim=64, height=64, width=32)
prior.initialize(embedding, brightness, codes, position)
logits = prior(prior.to_grids(codes), position, view)      # training
codes = prior.sample(position, view, generator)            # (B, h, w)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import VectorQuantizer
from prior.code_grid import CodeGrid, outline_embedding


class CausalBlock(nn.Module):
    """A pre-norm transformer block with causal self-attention (arXiv 2002.04745)."""

    def __init__(self, channels: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.queries_keys_values = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        self.perceptron = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, step: int = 0
    ) -> Tensor:
        """Transform all positions or, with a cache, only position `step`.

        Args:
            x: (B, T, C); with a cache, (B, 1, C).
            cache: keys and values of the earlier positions, (B, heads, T, C/heads) each; the keys
                and values of position `step` are written into it.
            step: index of the position.

        Returns:
            A tensor of the same shape as x.
        """
        qkv = self.queries_keys_values(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, C/heads) each
        if cache is not None:
            keys, values = cache
            keys[:, :, step : step + 1] = k
            values[:, :, step : step + 1] = v
            k = keys[:, :, : step + 1]
            v = values[:, :, : step + 1]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.dropout(self.project(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.perceptron(self.norm2(x)))


class CodePrior(nn.Module):
    """A causal transformer over grids of codes, coarse to fine.

    The last grid contains the codes. The grids before it are outlines. An outline has half the
    height and width of the next grid, and contains the quantised mean brightness of its 2 x 2
    blocks. It fixes the layout of a slice in few steps. Each grid is conditioned on the whole
    previous grid, as in VQ-VAE-2 (arXiv 1906.00446). Outlines are functions of the codes. Results
    report -ln p(outlines) - ln p(codes | outlines), an upper bound on -ln p(codes).

    Args:
        num_embeddings: K, number of codes of the VQ-VAE.
        embedding_dim: D, length of each embedding.
        height, width: size of the code grid; the height must be divisible by 2^num_grids, and the
            width must be divisible by 2^(num_grids + 1).
        channels: C, width of the transformer; must be divisible by num_heads.
        num_layers: number of transformer blocks.
        num_heads: number of attention heads.
        dropout: dropout probability.
        num_grids: number of grids: 1 for the codes only, 2 for one outline, 3 for two outlines.
        num_outlines: number of brightness levels of an outline.

    Raises:
        ValueError: if the height, the width or the channels are not divisible as required.
    """

    NUM_VIEWS = 4  # the slice and its three mirror images (see `prior.codes.MIRRORS`)
    FREQUENCIES = 4  # number of sines and of cosines that encode the position in the volume

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        height: int,
        width: int,
        channels: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        dropout: float = 0.0,
        num_grids: int = 2,
        num_outlines: int = 32,
    ):
        self.arguments = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        super().__init__()
        if channels % num_heads:
            raise ValueError(
                f"channels is {channels}; expected a multiple of num_heads {num_heads}"
            )
        self.block = 2**num_grids  # the `prefix_rows` of `sample` must be divisible by this
        if height % self.block or width % (2 * self.block):
            expected = f"{self.block} and {2 * self.block}"
            raise ValueError(
                f"the code grid is {height} x {width}; expected sides divisible by {expected}"
            )
        self.height = height
        self.width = width
        self.channels = channels
        self.num_heads = num_heads
        self.grids = nn.ModuleList()
        for halvings in reversed(range(num_grids)):
            if halvings:
                shape = (num_outlines, embedding_dim + 1)  # the last dimension is the brightness
            else:
                shape = (num_embeddings, embedding_dim)
            grid = CodeGrid(
                *shape,
                height=height // 2**halvings,
                width=width // 2**halvings,
                coarse_shape=tuple(self.grids[-1].embedding.shape) if self.grids else None,
                bias_per_place=num_grids > 1 and not self.grids,
                channels=channels,
                dropout=dropout,
            )
            self.grids.append(grid)
        self.views = nn.Parameter(torch.randn(self.NUM_VIEWS, channels) * 0.02)
        self.places = nn.Sequential(
            nn.Linear(2 + 2 * self.FREQUENCIES, channels), nn.GELU(), nn.Linear(channels, channels)
        )
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            CausalBlock(channels, num_heads, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(channels)

    # ------------------------------------------------ codebook and outlines

    @torch.no_grad()
    def initialize(
        self,
        embedding: Tensor,
        brightness: Tensor,
        codes: Tensor,
        position: Tensor,
        generator: torch.Generator | None = None,
    ) -> None:
        """Copy the VQ-VAE's codebook, fit the outlines, and set the biases from code frequencies.

        Args:
            embedding: the codebook, (K, D).
            brightness: mean brightness of the pixels that each code represents, (K,).
            codes: codes of the training slices, (N, h, w).
            position: positions of the slices, (N,), as for `forward`.
            generator: random generator for k-means.
        """
        self.grids[-1].set_codebook(embedding, brightness)
        for coarse, fine in self._pairs_fine_to_coarse():
            means = fine.block_brightness(codes)
            levels = VectorQuantizer(len(coarse.brightness), 1)
            levels.init_codebook(means.flatten()[:, None], generator=generator)
            coarse.brightness.copy_(levels.embedding.weight[:, 0].sort().values)
            outline = coarse.quantise_brightness(means)
            vectors = outline_embedding(coarse, fine, codes, outline, embedding.shape[1])
            coarse.set_codebook(vectors, coarse.brightness.clone())
            fine.init_bias_from_counts(codes, outline, position)
            codes = outline
        self.grids[0].init_bias_from_counts(codes, None, position)

    def has_codebook(self, embedding: Tensor) -> bool:
        """Return whether the prior was trained on codes of this codebook, (K, D)."""
        own = self.grids[-1].embedding
        if own.shape != embedding.shape:
            return False
        standardised = (embedding - embedding.mean(0)) / embedding.std()
        return torch.allclose(own, standardised, atol=1e-4)

    def _pairs_fine_to_coarse(self) -> list[tuple[CodeGrid, CodeGrid]]:
        """Return the pairs (coarse, fine) of successive grids, the finest pair first."""
        return list(itertools.pairwise(self.grids))[::-1]

    def to_grids(self, codes: Tensor) -> list[Tensor]:
        """Compute the outlines of codes (B, h, w), and return all grids, ending with the codes."""
        grids = [codes]
        for coarse, fine in self._pairs_fine_to_coarse():
            brightness = fine.block_brightness(grids[0])
            grids.insert(0, coarse.quantise_brightness(brightness))
        return grids

    # ------------------------------------------------ all codes at once

    def forward(self, grid_codes: list[Tensor], position: Tensor, view: Tensor) -> list[Tensor]:
        """Compute the logits of each code, given the codes before it.

        Args:
            grid_codes: codes of each grid (see `to_grids`).
            position: positions of the slices in their volumes, (B,), 0 to 1; NaN if unknown.
            view: indices into `prior.codes.MIRRORS`, (B,) int64, 0 to 3.

        Returns:
            The logits of each grid, (B, h, w, K) float32.
        """
        features, inputs, biases = [], [], []
        for n, (grid, codes) in enumerate(zip(self.grids, grid_codes, strict=True)):
            coarse = grid_codes[n - 1] if n else None
            local = grid.features(codes, self.cross_grid_context(n, coarse))
            features.append(local)
            inputs.append(grid.to_positions(local) + grid.pos_emb)
            biases.append(grid.initial_logits(coarse, position, view))
        condition = self.condition(position, view)[:, None]
        x = self.dropout(torch.cat(inputs, 1) + condition)  # (B, T of all grids, C)
        for block in self.blocks:
            x = block(x)
        outputs = self.norm(x).split([grid.num_positions for grid in self.grids], 1)
        logits = []
        for grid, local, h, bias in zip(self.grids, features, outputs, biases, strict=True):
            logits.append(grid.grid_logits(local, h, bias))
        return logits

    def cross_grid_context(self, index: int, coarse: Tensor | None) -> Tensor:
        """Compute a grid's context from all codes of the next coarser grid.

        Args:
            index: index of the grid.
            coarse: codes of the coarser grid, (B, h, w); None for the first grid.

        Returns:
            The context, (B, C, 2 h, 2 w); zeros (1, 1, 1, 1) for the first grid.
        """
        if coarse is None:
            return self.views.new_zeros(1, 1, 1, 1)
        embedded = self.grids[index - 1].embedding[coarse].movedim(-1, 1)
        return self.grids[index].context(embedded)

    def condition(self, position: Tensor, view: Tensor) -> Tensor:
        """Embed each slice's position in the volume and its view: (B,) and (B,) -> (B, C)."""
        is_unknown = position.isnan()
        position = position.nan_to_num(0.0)[:, None]
        angles = position * math.pi * torch.arange(1, 1 + self.FREQUENCIES, device=position.device)
        encoding = torch.cat([torch.ones_like(position), position, angles.sin(), angles.cos()], 1)
        encoding = encoding.masked_fill(is_unknown[:, None], 0.0)
        return self.places(encoding) + F.embedding(view, self.views)

    # ------------------------------------------------ code by code

    @torch.no_grad()
    def decode(
        self,
        position: Tensor,
        view: Tensor,
        choose: Callable[[int, Tensor, int, int], Tensor],
        progress: Callable = iter,
    ) -> Tensor:
        """Choose all codes in order, each given the codes before it, in eval mode.

        `sample` calls this method. An entropy coder passes a different `choose`.

        Args:
            position, view: (B,), as for `forward`.
            choose: function (index of the grid, logits (B, K), row, column) -> chosen codes (B,).
            progress: a function such as tqdm, which wraps the range of steps.

        Returns:
            The codes, (B, h, w) int64.
        """
        condition = self.condition(position, view)[:, None]  # (B, 1, C)
        num_positions = sum(grid.num_positions for grid in self.grids)
        size = (len(position), self.num_heads, num_positions, self.channels // self.num_heads)
        caches = []
        for _ in self.blocks:
            keys = torch.zeros(size, device=position.device)
            caches.append((keys, torch.zeros_like(keys)))
        steps = iter(progress(range(num_positions)))
        codes = None
        for n, grid in enumerate(self.grids):
            context = self.cross_grid_context(n, codes)
            bias = grid.initial_logits(codes, position, view)
            codes = self._decode_grid(n, context, bias, condition, caches, steps, choose)
        next(steps, None)  # lets tqdm close its bar
        return codes

    def _decode_grid(
        self,
        index: int,
        context: Tensor,
        bias: Tensor,
        condition: Tensor,
        caches: list[tuple[Tensor, Tensor]],
        steps: Iterator[int],
        choose: Callable[[int, Tensor, int, int], Tensor],
    ) -> Tensor:
        """Choose the codes of one grid, (B, height, width) (see `forward` and `decode`)."""
        grid = self.grids[index]
        batch, device = len(condition), condition.device
        height, width, channels = grid.height, grid.width, grid.channels
        codes = torch.zeros(batch, height, width, dtype=torch.long, device=device)
        context = context.expand(batch, channels, height, width)
        # Padded inputs of the first convolution (7 x 7) and of the 3 x 3 convolutions
        embedded = torch.zeros(batch, grid.embedding.shape[1], height + 3, width + 6, device=device)
        layer_inputs = []
        for _ in grid.near:
            layer_inputs.append(torch.zeros(batch, channels, height + 1, width + 2, device=device))

        for row, column in itertools.product(range(height), range(width)):
            x = grid.first.at(embedded, row, column) + context[:, :, row, column]  # (B, C)
            for near, mix, padded in zip(grid.near, grid.mix, layer_inputs, strict=True):
                padded[:, :, row + 1, column + 1] = F.gelu(x)
                local = F.gelu(near.at(padded, row, column))
                x = x + F.linear(local, mix.weight.flatten(1), mix.bias)
            segment, k = divmod(column, grid.SEGMENT)
            if k == 0:
                step = next(steps)
                h = x[:, None] + grid.rows[row] + grid.columns[segment] + condition
                for block, cache in zip(self.blocks, caches, strict=True):
                    h = block(h, cache, step)
                segment_context = grid.to_codes(self.norm(h))[:, 0]  # (B, SEGMENT, C)
            logits = grid.logits(x + segment_context[:, k], bias[:, row, column])
            chosen = choose(index, logits, row, column)
            codes[:, row, column] = chosen
            embedded[:, :, row + 3, column + 3] = grid.embedding[chosen]
        return codes

    def sample(
        self,
        position: Tensor,
        view: Tensor,
        generator: torch.Generator,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        prefix: Tensor | None = None,
        prefix_rows: int = 0,
        progress: Callable = iter,
    ) -> Tensor:
        """Sample codes, (B, h, w), reproducibly for the same generator state and arguments.

        Args:
            position, view: (B,), as for `forward`.
            generator: random generator on the CPU.
            temperature, top_k, top_p: see `sample_codes`.
            prefix: codes, (B, h, w), whose first rows are kept; the other rows are sampled.
            prefix_rows: number of rows that are kept; must be divisible by `block`.
            progress: as for `decode`.
        """
        prefix_grids = self.to_grids(prefix) if prefix_rows else []
        num_codes = sum(grid.height * grid.width for grid in self.grids)
        # All draws are moved to the device at once, so that the host does not wait at each code.
        draws = iter(torch.rand(num_codes, len(view), generator=generator).to(view.device))

        def choose(index: int, logits: Tensor, row: int, column: int) -> Tensor:
            rows_per_code = self.height // self.grids[index].height
            if row * rows_per_code < prefix_rows:
                return prefix_grids[index][:, row, column]
            return sample_codes(logits, next(draws), temperature, top_k, top_p)

        return self.decode(position, view, choose, progress)


def sample_codes(
    logits: Tensor,
    draws: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Sample one code from each row of logits: (B, K) -> (B,) int64.

    Args:
        logits: the logits.
        draws: (B,) float32, uniformly distributed from 0 to 1, on the same device.
        temperature: number that divides the logits; at 0, the most likely code is always chosen.
        top_k: sample only from the `top_k` most likely codes; 0 means all.
        top_p: sample only from the smallest set of most likely codes whose total probability is at
            least `top_p` (nucleus sampling, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(1)
    scaled = (logits if logits.device.type == "mps" else logits.double()) / temperature
    scaled, order = torch.sort(scaled, dim=1, descending=True, stable=True)
    probabilities = scaled.softmax(1)
    if top_k:
        probabilities[:, top_k:] = 0
    probability_before = probabilities.cumsum(1) - probabilities  # 0 for the most likely code
    cumulative = probabilities.masked_fill_(probability_before >= top_p, 0).cumsum(1)
    ranks = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(1, keepdim=True)
    ranks = ranks.clamp_max((probabilities > 0).sum(1, keepdim=True) - 1)  # a draw may round to 1
    return order.gather(1, ranks)[:, 0]
