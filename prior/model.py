"""The prior over the codes of a VQ-VAE."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import VectorQuantizer


class CausalBlock(nn.Module):
    """Self-attention over all positions up to each, then a perceptron: (B, T, C) in and out (arXiv 2002.04745)."""

    def __init__(self, channels: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.queries_keys_values, self.project = (
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
        )
        self.perceptron = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int = 0
    ) -> Tensor:
        """With a cache, keys and values (B, heads, T, C/heads), x is position `start` alone, (B, 1, C)."""
        qkv = self.queries_keys_values(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, C/heads) each
        if cache is not None:
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, start : start + 1] = new
            k, v = (kept[:, :, : start + 1] for kept in cache)
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=cache is None
        )  # (B, heads, T, C/heads)
        x = x + self.dropout(self.project(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.perceptron(self.norm2(x)))


class CausalConv2d(nn.Conv2d):
    """Sees, of each position's neighbours, those before it in reading order; itself only where `itself` says so."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int, itself: bool):
        super().__init__(channels, out_channels, kernel_size, padding=kernel_size // 2)
        mask = torch.zeros(kernel_size**2)
        mask[: kernel_size**2 // 2 + itself] = 1
        self.register_buffer("mask", mask.view(kernel_size, kernel_size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)

    def at(self, padded: Tensor, row: int, column: int) -> Tensor:
        """The same at one position: (B, C, h + k//2, w + 2 (k//2)), padded above and beside -> (B, out_channels)."""
        side, rows = self.kernel_size[0], self.kernel_size[0] // 2 + 1
        window = padded[:, :, row : row + rows, column : column + side]
        return F.linear(
            window.flatten(1), (self.weight * self.mask)[:, :, :rows].flatten(1), self.bias
        )


class CodeGrid(nn.Module):
    """A grid of codes as `CodePrior` sees it: what leads into the transformer, and from there to the next codes.

    Masked convolutions (PixelCNN, arXiv 1601.06759) tell of each code what came before it nearby. The transformer's
    positions are segments of SEGMENT codes of a row: it is told what they tell of the first, and tells its codes what
    came before anywhere. CodeDataset are known by their embeddings, on both sides: like codes are alike from the start.

    num_embeddings, embedding_dim, height, width: of the codebook and the grid. before: the shape of the codebook of the
    grid before, each of whose codes stands for 2 x 2 of this one's; None where there is none. by_place: whether what is
    likely at each place is counted, in each of PARTS parts of a volume.
    """

    SEGMENT = 4
    PARTS = 5  # of a volume, by which slices lie

    def __init__(
        self, num_embeddings: int, embedding_dim: int, height: int, width: int, before: tuple[int, int] | None,
        by_place: bool, channels: int, dropout: float, num_layers: int = 3,
    ):  # fmt: skip
        super().__init__()
        self.height, self.width, self.channels = height, width, channels
        self.num_positions = height * width // self.SEGMENT  # T
        self.register_buffer("embedding", torch.zeros(num_embeddings, embedding_dim))
        self.register_buffer("brightness", torch.zeros(num_embeddings))  # of what a code stands for
        self.first = CausalConv2d(embedding_dim, channels, 7, itself=False)
        self.near = nn.ModuleList(
            CausalConv2d(channels, channels, 3, itself=True) for _ in range(num_layers)
        )
        self.mix = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(num_layers))
        if before:
            self.context = nn.Sequential(
                nn.Conv2d(before[1], channels, 3, padding=1), nn.GELU(),
                nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=2, padding=1),
            )  # fmt: skip
        self.rows = nn.Parameter(torch.randn(height, 1, channels) * 0.02)
        self.columns = nn.Parameter(torch.randn(width // self.SEGMENT, channels) * 0.02)
        self.spread = nn.Linear(channels, self.SEGMENT * channels)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels),
            nn.Dropout(dropout),
        )  # fmt: skip
        self.last = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, embedding_dim))
        # Logits to start from: by place, or by the code of the grid before (or one for all) and the place in 2 x 2.
        shape = (self.PARTS + 1, height * width) if by_place else (before[0] if before else 1, 4)
        self.by_place, self.bias = by_place, nn.Parameter(torch.zeros(*shape, num_embeddings))

    @torch.no_grad()
    def take(self, embedding: Tensor, brightness: Tensor) -> None:
        """A codebook, (K, D), and how bright each of its codes is, (K,)."""
        self.embedding.copy_((embedding - embedding.mean(0)) / embedding.std())
        self.brightness.copy_(brightness)

    @torch.no_grad()
    def count(self, codes: Tensor, before: Tensor | None, position: Tensor) -> None:
        """Predict at first how often each code is among these, (N, height, width).

        By place: there and at the eight places around, in slices whose position (N,) is in that part of the volume.
        Else at its place in 2 x 2, and where each code of the grid before, (N, height/2, width/2), stands.
        """
        overall = torch.bincount(codes.flatten(), minlength=len(self.embedding)) + 0.1
        overall = overall / overall.sum()
        counts = torch.zeros_like(self.bias)
        if self.by_place:
            for some, part in zip(codes.split(64), self.part(position).split(64), strict=True):
                ones = F.one_hot(some, len(overall)).movedim(-1, 1).float()  # (B, K, height, width)
                near = (
                    9 * F.avg_pool2d(ones, 3, stride=1, padding=1).flatten(2).mT
                )  # (B, height width, K)
                counts.index_add_(0, part, near)
            counts[-1] = counts.sum(0)
        else:
            before = torch.zeros_like(codes[:, ::2, ::2]) if before is None else before
            for k in range(4):
                pairs = (before * len(overall) + codes[:, k // 2 :: 2, k % 2 :: 2]).flatten()
                counts[:, k] = torch.bincount(pairs, minlength=counts[:, k].numel()).view_as(
                    counts[:, k]
                )
        # Where little was counted, the overall frequencies.
        self.bias.copy_(((counts + 20 * overall) / (counts.sum(-1, keepdim=True) + 20)).log())
        nn.init.zeros_(self.last[1].weight)
        nn.init.zeros_(self.last[1].bias)

    def part(self, position: Tensor) -> Tensor:
        """In which part of its volume a slice lies: (B,) -> (B,) int64, PARTS where that is unknown."""
        part = (position.nan_to_num(0.0) * self.PARTS).long().clamp(0, self.PARTS - 1)
        return part.masked_fill(position.isnan(), self.PARTS)

    @property
    def places(self) -> Tensor:
        """Rows and columns of the positions, (T, C)."""
        return (self.rows + self.columns).flatten(0, 1)

    def features(self, codes: Tensor, seen: Tensor) -> Tensor:
        """(B, C, height, width): what came nearby before each of the codes (B, height, width), and what is `seen`."""
        x = self.first(self.embedding[codes].movedim(-1, 1)) + seen
        for near, mix in zip(self.near, self.mix, strict=True):
            x = x + mix(F.gelu(near(F.gelu(x))))
        return x

    def to_positions(self, features: Tensor) -> Tensor:
        """Of each segment's first code: (B, C, height, width) -> (B, T, C)."""
        return features[..., :: self.SEGMENT].flatten(2).mT

    def logits(self, features: Tensor, told: Tensor, bias: Tensor) -> Tensor:
        """features: (B, C, height, width); told: the transformer's output, (B, T, C) -> (B, height, width, K)."""
        told = self.spread(told).view(-1, self.height, self.width, self.channels)
        return self.likeness(features.movedim(1, -1) + told, bias)

    def start(self, before: Tensor | None, position: Tensor, view: Tensor) -> Tensor:
        """The logits that each code starts from, (B, height, width, K), as `count` made them, or training since.

        before: (B, height/2, width/2), the codes of the grid before. position, view: (B,), as for CodePrior.
        """
        if self.by_place:
            table = F.embedding(self.part(position), self.bias.flatten(1)).view(
                -1, self.height, self.width, len(self.embedding)
            )
            for bit, axis in ((1, 1), (2, 2)):  # a mirrored slice has its places mirrored
                table = torch.where((view & bit > 0).view(-1, 1, 1, 1), table.flip(axis), table)
            return table
        if before is None:
            before = view.new_zeros(len(view), self.height // 2, self.width // 2)
        # Not by indexing, whose gradient adds up in another order each time, so that a resumed run would differ.
        table = F.embedding(before, self.bias.flatten(1))  # (B, height/2, width/2, 4 K)
        return table.unflatten(3, (2, 2, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def likeness(self, x: Tensor, bias: Tensor) -> Tensor:
        """(..., C), what is told of a code -> logits (..., K) float32, by likeness to each embedding."""
        x = x + self.perceptron(x)
        return (self.last(x) @ self.embedding.T).float() + bias


class CodePrior(nn.Module):
    """How likely a slice's codes are, each given those before it: a causal transformer over grids, coarse to fine.

    Before the codes come outlines: a grid of a quarter as many, each the mean brightness of 2 x 2 of the next grid, and
    before that one of a quarter of those. They follow from the codes, and are counted with them: -ln p(outlines) -
    ln p(codes | outlines) is never less than -ln p(codes). What lies where is so decided in few steps, and each grid is
    drawn with the one before in sight, on all sides of a code, as in arXiv 1906.00446.

    num_embeddings, embedding_dim, height, width: of the codebook and the code grid. num_grids: 3 with two outlines, 1
    with none; height divisible by 2 to that power, width by twice that. num_outlines: how many levels of brightness
    they tell. channels, num_layers, num_heads, dropout: of the transformer.
    """

    VIEWS = 4  # as it is, mirrored left-right, up-down, both
    FREQUENCIES = 4  # sines of where a slice lies

    def __init__(
        self, num_embeddings: int, embedding_dim: int, height: int, width: int, channels: int = 128,
        num_layers: int = 4, num_heads: int = 4, dropout: float = 0.0, num_grids: int = 2, num_outlines: int = 32,
    ):  # fmt: skip
        self.arguments = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        super().__init__()
        if channels % num_heads:
            raise ValueError(
                f"channels is {channels}; expected a multiple of num_heads {num_heads}"
            )
        self.block = 2**num_grids  # codes a side of what 2 x 2 of the first grid stand for
        if height % self.block or width % (2 * self.block):
            expected = f"{self.block} and {2 * self.block}"
            raise ValueError(
                f"the code grid is {height} x {width}; expected sides divisible by {expected}"
            )
        self.height, self.width, self.channels, self.num_heads = height, width, channels, num_heads
        self.grids = nn.ModuleList()  # coarse to fine
        for n in reversed(range(num_grids)):
            book = (num_outlines, embedding_dim + 1) if n else (num_embeddings, embedding_dim)
            before = tuple(self.grids[-1].embedding.shape) if self.grids else None
            by_place = num_grids > 1 and not self.grids
            self.grids.append(
                CodeGrid(*book, height // 2**n, width // 2**n, before, by_place, channels, dropout)
            )
        self.views = nn.Parameter(torch.randn(self.VIEWS, channels) * 0.02)
        self.places = nn.Sequential(
            nn.Linear(2 + 2 * self.FREQUENCIES, channels), nn.GELU(), nn.Linear(channels, channels)
        )
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            CausalBlock(channels, num_heads, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(channels)

    @torch.no_grad()
    def initialize(
        self, embedding: Tensor, brightness: Tensor, codes: Tensor, position: Tensor,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        """Take over a codebook, (K, D), and find outlines of training codes (N, h, w), by k-means.

        brightness: (K,), the mean of what each code stands for. position: (N,), as for `forward`.
        """
        self.grids[-1].take(embedding, brightness)
        for coarse, fine in reversed(list(itertools.pairwise(self.grids))):
            levels = VectorQuantizer(len(coarse.brightness), 1)
            levels.init_codebook(self._means(fine, codes).flatten()[:, None], generator=generator)
            coarse.brightness.copy_(levels.embedding.weight[:, 0].sort().values)
            outline = self._nearest(coarse, self._means(fine, codes))
            # As its embedding, the mean of those that it stands for, and how bright it is.
            sums = torch.zeros(len(coarse.brightness), embedding.shape[1])
            counts = torch.full_like(coarse.brightness, 1e-6)
            for some, which in zip(codes.split(64), outline.split(64), strict=True):
                vectors = fine.embedding[some][..., : embedding.shape[1]].movedim(-1, 1)
                means = F.avg_pool2d(vectors, 2).movedim(1, -1).flatten(0, 2)
                sums.index_add_(0, which.flatten(), means)
                counts.index_add_(0, which.flatten(), torch.ones(which.numel()))
            parts = [
                part - part.mean(0) for part in (sums / counts[:, None], coarse.brightness[:, None])
            ]
            coarse.take(
                torch.cat([part / part.std().clamp_min(1e-6) for part in parts], 1),
                coarse.brightness.clone(),
            )
            fine.count(codes, outline, position)
            codes = outline
        self.grids[0].count(codes, None, position)

    def is_of(self, embedding: Tensor) -> bool:
        """Whether it was trained on the codes of this codebook, (K, D)."""
        own = self.grids[-1].embedding
        return own.shape == embedding.shape and torch.allclose(
            own, (embedding - embedding.mean(0)) / embedding.std(), atol=1e-4
        )

    @staticmethod
    def _means(grid: CodeGrid, codes: Tensor) -> Tensor:
        """How bright each 2 x 2 codes are: (B, h, w) -> (B, h/2, w/2)."""
        return F.avg_pool2d(grid.brightness[codes][:, None], 2)[:, 0]

    @staticmethod
    def _nearest(outline: CodeGrid, means: Tensor) -> Tensor:
        """The outline's codes that are as bright, int64, of a shape with the means: codes lie in order."""
        borders = (outline.brightness[1:] + outline.brightness[:-1]) / 2
        return torch.bucketize(means, borders)

    def pyramid(self, codes: Tensor) -> list[Tensor]:
        """The codes (B, h, w) and their outlines, coarse to fine: (B, h/4, w/4), (B, h/2, w/2), (B, h, w)."""
        found = [codes]
        for coarse, fine in reversed(list(itertools.pairwise(self.grids))):
            found.insert(0, self._nearest(coarse, self._means(fine, found[0])))
        return found

    def forward(self, pyramid: list[Tensor], position: Tensor, view: Tensor) -> list[Tensor]:
        """What `pyramid` gives -> for each grid logits (B, h, w, K) float32 of each code, given those before it.

        position: (B,), where each slice lies in its volume, 0 to 1; NaN: unknown. view: (B,) int64, which of VIEWS.
        """
        before = [None, *pyramid[:-1]]
        seen = [self.in_sight(n, codes) for n, codes in enumerate(before)]
        features = [
            grid.features(*pair) for grid, *pair in zip(self.grids, pyramid, seen, strict=True)
        ]
        x = [
            grid.to_positions(found) + grid.places
            for grid, found in zip(self.grids, features, strict=True)
        ]
        x = self.dropout(
            torch.cat(x, 1) + self.condition(position, view)[:, None]
        )  # (B, T of all grids, C)
        for block in self.blocks:
            x = block(x)
        told = self.norm(x).split([grid.num_positions for grid in self.grids], 1)
        bias = [
            grid.start(codes, position, view)
            for grid, codes in zip(self.grids, before, strict=True)
        ]
        return [
            grid.logits(*some) for grid, *some in zip(self.grids, features, told, bias, strict=True)
        ]

    def in_sight(self, number: int, before: Tensor | None) -> Tensor:
        """What each code of a grid sees of the whole grid before it: (B, h, w) -> (B, C, 2 h, 2 w); 0 for the first."""
        if before is None:
            return self.views.new_zeros(1, 1, 1, 1)
        return self.grids[number].context(self.grids[number - 1].embedding[before].movedim(-1, 1))

    def condition(self, position: Tensor, view: Tensor) -> Tensor:
        """(B,) and (B,) -> (B, C)."""
        unknown = position.isnan()
        position = position.nan_to_num(0.0)[:, None]
        angles = position * math.pi * torch.arange(1, 1 + self.FREQUENCIES, device=position.device)
        known = torch.cat([torch.ones_like(position), position, angles.sin(), angles.cos()], 1)
        return self.places(known.masked_fill(unknown[:, None], 0.0)) + F.embedding(view, self.views)

    @torch.no_grad()
    def walk(self, position: Tensor, view: Tensor, choose, progress=iter) -> Tensor:
        """Go through outlines and codes in order, each by `choose`; returns the codes, (B, h, w) int64.

        choose: called with the number of the grid, logits (B, K) and the code's row and column; returns the codes (B,).
        Drawing, completing and entropy coding are all this. Call it in eval mode.
        """
        condition = self.condition(position, view)[:, None]  # (B, 1, C)
        total = sum(grid.num_positions for grid in self.grids)
        size = (len(position), self.num_heads, total, self.channels // self.num_heads)
        caches = [
            tuple(torch.zeros(size, device=position.device) for _ in range(2)) for _ in self.blocks
        ]
        steps, pyramid = iter(progress(range(total))), []
        for n in range(len(self.grids)):
            before = pyramid[-1] if n else None
            bias = self.grids[n].start(before, position, view)
            pyramid.append(
                self._walk_grid(n, self.in_sight(n, before), bias, condition, caches, steps, choose)
            )
        next(steps, None)  # a progress bar closes at its end
        return pyramid[-1]

    def _walk_grid(
        self,
        number: int,
        seen: Tensor,
        bias: Tensor,
        condition: Tensor,
        caches: list,
        steps,
        choose,
    ) -> Tensor:
        """The codes of one grid, (B, height, width); the rest is as in `forward`."""
        grid, count, device = self.grids[number], len(condition), condition.device
        codes = torch.zeros(count, grid.height, grid.width, dtype=torch.long, device=device)
        seen = seen.expand(count, grid.channels, grid.height, grid.width)
        # What each convolution reads, padded as it needs: embeddings, then what the one before it has found.
        vectors = torch.zeros(
            count, grid.embedding.shape[1], grid.height + 3, grid.width + 6, device=device
        )
        found = [
            torch.zeros(count, grid.channels, grid.height + 1, grid.width + 2, device=device)
            for _ in grid.near
        ]
        for row, column in itertools.product(range(grid.height), range(grid.width)):
            x = grid.first.at(vectors, row, column) + seen[:, :, row, column]  # (B, C)
            for near, mix, padded in zip(grid.near, grid.mix, found, strict=True):
                padded[:, :, row + 1, column + 1] = F.gelu(x)
                x = x + F.linear(
                    F.gelu(near.at(padded, row, column)), mix.weight.flatten(1), mix.bias
                )
            segment, k = divmod(column, grid.SEGMENT)
            if k == 0:
                told, step = (
                    x[:, None] + grid.rows[row] + grid.columns[segment] + condition,
                    next(steps),
                )
                for block, cache in zip(self.blocks, caches, strict=True):
                    told = block(told, cache, step)
                told = grid.spread(self.norm(told)).view(count, grid.SEGMENT, grid.channels)
            chosen = choose(
                number, grid.likeness(x + told[:, k], bias[:, row, column]), row, column
            )
            codes[:, row, column] = chosen
            vectors[:, :, row + 3, column + 3] = grid.embedding[chosen]
        return codes

    def sample(
        self, position: Tensor, view: Tensor, generator: torch.Generator, temperature: float = 1.0, top_k: int = 0,
        top_p: float = 1.0, given: Tensor | None = None, given_rows: int = 0, progress=iter,
    ) -> Tensor:  # fmt: skip
        """Draw codes (B, h, w): with equal generator (on the CPU) and arguments, the same.

        temperature: the logits are divided by it; 0 takes the likeliest code. top_k: only of the so many likeliest;
        0: of all. top_p: only of the likeliest whose probabilities first add up to it (arXiv 1904.09751).
        given: (B, h, w); of them the first `given_rows` rows, divisible by `block`, are kept.
        """
        kept = self.pyramid(given) if given_rows else []

        def choose(number: int, logits: Tensor, row: int, column: int) -> Tensor:
            if row * (self.height // self.grids[number].height) < given_rows:
                return kept[number][:, row, column]
            if temperature == 0:
                return logits.argmax(1)
            logits, order = torch.sort(
                logits.cpu().double() / temperature, dim=1, descending=True, stable=True
            )
            probabilities = logits.softmax(1)
            if top_k:
                probabilities[:, top_k:] = 0
            probabilities[probabilities.cumsum(1) - probabilities >= top_p] = 0  # never the first
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            return order.gather(1, drawn)[:, 0].to(position.device)

        return self.walk(position, view, choose, progress)
