"""The VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937) for single-channel slices.

    model = VQVAE()                          # 256 x 128 slice -> 64 x 32 codes of 9 bits -> slice
    indices = model.encode(images)           # (B, 64, 32) int64
    images = model.decode_codes(indices)     # (B, 1, 256, 128)
    model = VQVAE.from_checkpoint("runs/x/best.pt")

Shapes: B slices, K codes (`num_embeddings`) of D numbers each (`embedding_dim`), N vectors in a batch.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import zipfile
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

CHECKPOINT_FORMAT = 3  # of runs: 1 and 2 can't go on, as they lack what a run counts by now; their models load


class ResidualLayer(nn.Module):
    """x + conv2(relu(conv1(relu(x)))), (B, channels, H, W) in and out."""

    def __init__(self, channels: int, residual_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, residual_channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(residual_channels, channels, kernel_size=3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.conv1(self.relu(x))))


class ResidualStack(nn.Module):
    """`num_layers` residual layers, (B, channels, H, W) in and out."""

    def __init__(self, channels: int, residual_channels: int, num_layers: int):
        super().__init__()
        self.stack = nn.Sequential(*(ResidualLayer(channels, residual_channels) for _ in range(num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x)


class Encoder(nn.Module):
    """Slice (B, 1, H, W) -> one vector a code position, (B, D, H/stride, W/stride).

    Strides over 4 halve further, after the residual stack.
    """

    def __init__(self, channels: int, residual_channels: int, num_layers: int, embedding_dim: int, stride: int = 4):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, kernel_size=4, stride=2, padding=1)
        self.residual_stack = ResidualStack(channels, residual_channels, num_layers)
        if halvings := _halvings_beyond_4(stride):
            self.down = nn.ModuleList(nn.Conv2d(channels, channels, 4, stride=2, padding=1) for _ in range(halvings))
        self.conv2 = nn.Conv2d(channels, embedding_dim, kernel_size=4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, H, W)
        x = F.relu(self.conv1(x))  # (B, C, H/2, W/2)
        x = self.residual_stack(x)
        for conv in getattr(self, "down", ()):
            x = conv(F.relu(x))  # (B, C, H/4, W/4), ...
        return self.conv2(x)  # (B, D, H/stride, W/stride)


class Decoder(nn.Module):
    """Quantised vectors (B, D, h, w) -> slice (B, 1, stride h, stride w), unbounded as z-scores are.

    num_code_layers: residual layers on the code grid, before the first convolution.
    refine_channels: with them, the last convolution is one more, at the slice's own resolution.
    """

    def __init__(
        self, channels: int, residual_channels: int, num_layers: int, embedding_dim: int, stride: int = 4,
        num_code_layers: int = 0, refine_channels: int = 0,
    ):  # fmt: skip
        super().__init__()
        if num_code_layers:
            self.code_stack = ResidualStack(embedding_dim, residual_channels, num_code_layers)
        self.conv1 = nn.ConvTranspose2d(embedding_dim, channels, kernel_size=4, stride=2, padding=1)
        if doublings := _halvings_beyond_4(stride):
            self.up = nn.ModuleList(
                nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1) for _ in range(doublings)
            )
        self.residual_stack = ResidualStack(channels, residual_channels, num_layers)
        self.conv2 = nn.ConvTranspose2d(channels, refine_channels or 1, kernel_size=4, stride=2, padding=1)
        if refine_channels:
            self.conv3 = nn.Conv2d(refine_channels, 1, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, D, h, w)
        if hasattr(self, "code_stack"):
            x = self.code_stack(x)
        x = F.relu(self.conv1(x))  # (B, C, 2h, 2w)
        for conv in getattr(self, "up", ()):
            x = F.relu(conv(x))  # (B, C, 4h, 4w), ...
        x = self.conv2(self.residual_stack(x))  # (B, 1 or refine_channels, stride h, stride w)
        return self.conv3(F.relu(x)) if hasattr(self, "conv3") else x


def _halvings_beyond_4(stride: int) -> int:
    """How many convolutions of stride 2 it takes more than a stride of 4. Raises ValueError where none fit."""
    if stride < 4 or stride & (stride - 1):
        raise ValueError(f"stride is {stride}; expected 4, 8, 16 or another power of two")
    return stride.bit_length() - 3


class Quantized(NamedTuple):
    """What `VectorQuantizer` returns."""

    quantized: Tensor  # (B, D, h, w) float32, nearest embeddings; gradients pass straight to the input
    indices: Tensor  # (B, h, w) int64, which embedding; of several codebooks (B, h, w, num_codebooks)
    codebook_loss: Tensor  # (), ||sg[z] - e||^2: moves the embeddings; 0 when they follow by moving average
    commitment_loss: Tensor  # (), ||z - sg[e]||^2: moves the encoder; not yet times `commitment_cost`
    counts: Tensor  # (num_codebooks K,) float32, how many of the B h w vectors took each embedding


class VectorQuantizer(nn.Module):
    """Replaces each vector by its nearest embedding (arXiv 1711.00937, equations 1-3).

    codebook "gradient": the embeddings are parameters, moved by the codebook loss (equation 3, second term).
    codebook "ema": they follow the mean of the vectors assigned to them (appendix A.1, equations 6-8).
        Over several processes (torch.distributed) the means are over the vectors of all.
    restart_below: with "ema", a code used less than this share of the mean use starts again from a vector of
        the batch, together with its moving averages (else the next update would take it straight back); 0: never.

    num_codebooks: over 1, `rest` quantises what this codebook leaves over, with one codebook fewer (residual
        quantisation, arXiv 2107.03312); losses add up, and so do embeddings.

    A codebook starts at uniform(-1/K, 1/K), the usual default, under which nearly all codes lose to the few
    that happen to lie nearest; `initialize` starts it from data instead. All arithmetic is float32, also under
    autocast: half precision overflows in the squared distances.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, codebook: str = "gradient", decay: float = 0.99,
        restart_below: float = 0.0, num_codebooks: int = 1,
    ):  # fmt: skip
        super().__init__()
        if codebook not in ("gradient", "ema"):
            raise ValueError(f"codebook is {codebook!r}; expected 'gradient' or 'ema'")
        if restart_below and codebook != "ema":
            raise ValueError("restart_below needs codebook 'ema': a gradient codebook keeps no counts of use")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.codebook, self.decay, self.restart_below = codebook, decay, restart_below
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_embeddings, 1 / num_embeddings)
        if codebook == "ema":
            self.embedding.weight.requires_grad_(False)
            # Counts and sums start consistent (sum / count = embedding): with counts at 0, unused codes explode.
            self.register_buffer("ema_count", torch.ones(num_embeddings))  # (K,)
            self.register_buffer("ema_sum", self.embedding.weight.detach().clone())  # (K, D)
        self.num_codebooks = num_codebooks
        if num_codebooks > 1:
            self.rest = VectorQuantizer(
                num_embeddings, embedding_dim, codebook, decay, restart_below, num_codebooks - 1
            )

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, D, h, w), of any float type."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float().movedim(1, -1)  # (B, h, w, D): the channel axis last, else rows would mix positions
            flat = z.reshape(-1, self.embedding_dim)  # (N, D)
            indices = self.nearest(flat.detach())  # (N,)
            quantized = F.embedding(indices, self.embedding.weight)  # (N, D)
            counts = self._count(indices)  # (K,)
            commitment_loss = F.mse_loss(flat, quantized.detach())
            if self.codebook == "gradient":
                codebook_loss = F.mse_loss(quantized, flat.detach())
            else:
                codebook_loss = torch.zeros_like(commitment_loss)
                if self.training:
                    self._update(flat.detach(), indices, counts, quantized.detach())
            indices = indices.view(z.shape[:-1])  # (B, h, w)
            if self.num_codebooks > 1:
                rest = self.rest((flat - quantized.detach()).view_as(z).movedim(-1, 1))
                quantized = quantized + rest.quantized.movedim(1, -1).reshape(-1, self.embedding_dim)
                indices = torch.cat([indices[..., None], rest.indices.view(*indices.shape, -1)], -1)
                codebook_loss = codebook_loss + rest.codebook_loss
                commitment_loss = commitment_loss + rest.commitment_loss
                counts = torch.cat([counts, rest.counts])
            quantized = (flat + (quantized - flat).detach()).view_as(z).movedim(-1, 1)
        return Quantized(quantized, indices, codebook_loss, commitment_loss, counts)

    def embed(self, indices: Tensor) -> Tensor:
        """Indices as in `Quantized` -> the vectors that they stand for, (B, D, h, w)."""
        if self.num_codebooks == 1:
            return self.embedding(indices).movedim(-1, 1)
        rest = indices[..., 1] if self.num_codebooks == 2 else indices[..., 1:]
        return self.embedding(indices[..., 0]).movedim(-1, 1) + self.rest.embed(rest)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the nearest embedding of each vector: (N, D) -> (N,) int64. Blocks bound the (N, K) distances."""
        weight = self.embedding.weight.detach()
        norms = weight.square().sum(1)  # (K,); ||z - e||^2 = ||z||^2 - 2 z.e + ||e||^2, and ||z||^2 ranks nothing
        blocks = [torch.addmm(norms, block, weight.T, alpha=-2).argmin(1) for block in vectors.split(8192)]
        return torch.cat(blocks)

    def _count(self, indices: Tensor) -> Tensor:
        """How many of the indices (N,) are each code, (K,) float32; exact up to 2^24, and no one-hot matrix."""
        ones = torch.ones_like(indices, dtype=torch.float32)
        return ones.new_zeros(self.num_embeddings).index_add_(0, indices, ones)

    def _sum(self, vectors: Tensor, indices: Tensor) -> Tensor:
        """Sum of the vectors (N, D) assigned to each code, (K, D)."""
        return vectors.new_zeros(self.num_embeddings, self.embedding_dim).index_add_(0, indices, vectors)

    # Never compiled: compilers from torch 2.5 to 2.9 read the embeddings again after this has changed them.
    @torch.compiler.disable
    @torch.no_grad()
    def _update(self, vectors: Tensor, indices: Tensor, counts: Tensor, quantized: Tensor) -> None:
        """One step of the moving averages: vectors and their embeddings (N, D), indices (N,), counts (K,)."""
        statistics = torch.cat([counts[:, None], self._sum(vectors, indices)], 1)  # (K, 1 + D)
        if _several_processes():
            dist.all_reduce(statistics)
        # A step whose vectors are not all finite leaves everything as it was, as training skips its gradient.
        finite = statistics.isfinite().all()
        statistics, weight = statistics.nan_to_num(0, 0, 0), (1 - self.decay) * finite
        self.ema_count.lerp_(statistics[:, 0], weight)
        self.ema_sum.lerp_(statistics[:, 1:], weight)
        if self.restart_below:
            mean_count = self.ema_count.mean()
            dead = (self.ema_count < self.restart_below * mean_count) & finite  # (K,)
            candidates = self._candidates(vectors, quantized)
            count = 2 * self.restart_below * mean_count  # low enough to follow its vectors quickly
            self.ema_count.copy_(torch.where(dead, count, self.ema_count))
            self.ema_sum.copy_(torch.where(dead[:, None], candidates * count, self.ema_sum))
        # A code that was never used keeps its place: its count fades, until dividing by it would mean nothing.
        alive = self.ema_count > 1e-10
        means = self.ema_sum / self.ema_count.clamp_min(1e-10)[:, None]
        self.embedding.weight.copy_(torch.where(alive[:, None], means, self.embedding.weight))

    def _candidates(self, vectors: Tensor, quantized: Tensor) -> Tensor:
        """K vectors of a batch for dead codes to start from, (K, D): the first process's, for all processes."""
        candidates = vectors.new_zeros(self.num_embeddings, self.embedding_dim)
        if not _several_processes() or dist.get_rank() == 0:  # others may have no share of a small batch
            # Drawn where the codebook fits worst, as k-means++ draws its centres.
            error = (vectors - quantized).square().sum(1).nan_to_num(0, 0, 0).clamp_min(1e-12)  # (N,)
            candidates = vectors[torch.multinomial(error, self.num_embeddings, replacement=True)]
        if _several_processes():
            dist.all_reduce(candidates)  # the others' are zeros
        return candidates

    @torch.no_grad()
    def initialize(self, vectors: Tensor, iterations: int = 10, generator: torch.Generator | None = None) -> None:
        """Start the codebook from data: k-means++ and `iterations` of Lloyd's k-means.

        vectors: (N, D) encoder outputs, N >= K; at most 32 K of them are used. generator: on the CPU.
        """
        if len(vectors) < self.num_embeddings:
            raise ValueError(
                f"{len(vectors)} vectors can't start {self.num_embeddings} codes; expected as many or more"
            )
        order = torch.randperm(len(vectors), generator=generator)[: 32 * self.num_embeddings]
        vectors = vectors.float()[order.to(vectors.device)]
        weight = self.embedding.weight
        weight[0] = vectors[0]
        distance = (vectors - weight[0]).square().sum(1)  # (N,), to the nearest centre so far
        for k in range(1, self.num_embeddings):
            draw = torch.rand((), generator=generator, dtype=torch.float64).float().to(distance.device)
            total = distance.cumsum(0)
            weight[k] = vectors[torch.searchsorted(total, draw * total[-1]).clamp_max(len(vectors) - 1)]
            distance = torch.minimum(distance, (vectors - weight[k]).square().sum(1))
        for _ in range(iterations):
            indices = self.nearest(vectors)
            counts = self._count(indices)[:, None]
            weight.copy_(torch.where(counts > 0, self._sum(vectors, indices) / counts.clamp_min(1), weight))
        if self.codebook == "ema":
            self.ema_count.fill_(1)
            self.ema_sum.copy_(weight)
        if self.num_codebooks > 1:
            self.rest.initialize(vectors - weight[self.nearest(vectors)], iterations, generator)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized()


class Output(NamedTuple):
    """What `VQVAE` returns: the reconstruction (B, 1, H, W), and of `Quantized` all but the vectors."""

    reconstruction: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    counts: Tensor


def ssim_loss(reconstructions: Tensor, images: Tensor) -> Tensor:
    """1 - SSIM (Wang et al. 2004), mean over windows inside the slices: (B, 1, H, W) twice, sides of 11 or more -> ().

    Gaussian window 11, sigma 1.5; both scaled as each original fills [0, 1], a cropped slice by its crop's range. The
    blur along an axis is a product with a banded matrix, on a CPU several times as fast as a convolution.
    """
    taps = torch.exp(-((torch.arange(11, device=images.device) - 5.0) ** 2) / (2 * 1.5**2))
    rows, columns = (_band(taps / taps.sum(), size) for size in images.shape[-2:])
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    x, y = ((pixels.float() - low) / (high - low).clamp_min(1e-3) for pixels in (reconstructions, images))
    with torch.autocast(images.device.type, enabled=False):  # variances are differences of nearly equal numbers
        mean_x, mean_y, xx, yy, xy = (rows @ torch.stack([x, y, x * x, y * y, x * y]) @ columns.T).unbind()
    c1, c2 = 0.01**2, 0.03**2  # for a data range of 1
    # Rounding can make the variance of a nearly flat window negative, and then the fraction anything.
    variance_x, variance_y = (xx - mean_x**2).clamp_min(0), (yy - mean_y**2).clamp_min(0)
    covariance = xy - mean_x * mean_y
    similar_means = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return 1 - (similar_means * (2 * covariance + c2) / (variance_x + variance_y + c2)).mean()


def _band(taps: Tensor, size: int) -> Tensor:
    """The matrix that slides `taps` (T,) along an axis of `size`, where they fit: (size - T + 1, size)."""
    if size < len(taps):
        raise ValueError(f"slices with a side of {size} have no room for SSIM's window of {len(taps)}")
    place = torch.arange(size, device=taps.device)
    offset = place - place[: size - len(taps) + 1, None]  # how far column is right of row
    return torch.where((offset >= 0) & (offset < len(taps)), taps[offset.clamp(0, len(taps) - 1)], 0.0)


class VQVAE(nn.Module):
    """Encoder, vector quantiser and decoder. `VQVAE()` is the source document's model, 0.81 GMAC a slice.

    hidden_channels: twice the width of the residual stacks; `residual_channels` is the width inside a layer.
    stride: pixels of the slice a side of one code position: 4, 8, 16. ssim_weight: of `ssim_loss` in the loss.
    The other arguments are `Decoder`'s and `VectorQuantizer`'s.
    """

    def __init__(
        self, hidden_channels: int = 64, residual_channels: int = 32, num_residual_layers: int = 2,
        num_code_layers: int = 0, refine_channels: int = 0, stride: int = 4, embedding_dim: int = 64,
        num_embeddings: int = 512, num_codebooks: int = 1, commitment_cost: float = 0.25, ssim_weight: float = 0.0,
        codebook: str = "gradient", ema_decay: float = 0.99, restart_below: float = 0.0,
    ):  # fmt: skip
        self.arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.stride, self.commitment_cost, self.ssim_weight = stride, commitment_cost, ssim_weight
        widths = (hidden_channels // 2, residual_channels, num_residual_layers, embedding_dim)
        self.encoder = Encoder(*widths, stride)
        self.vector_quantization = VectorQuantizer(
            num_embeddings, embedding_dim, codebook, ema_decay, restart_below, num_codebooks
        )
        self.decoder = Decoder(*widths, stride, num_code_layers, refine_channels)

    def forward(self, images: Tensor) -> Output:
        """images: (B, 1, H, W), H and W divisible by the stride."""
        quantized, *rest = self.vector_quantization(self.encoder(images))
        return Output(self.decoder(quantized), *rest)

    def loss(self, images: Tensor, output: Output) -> tuple[Tensor, Tensor]:
        """Reconstruction and quantisation loss, both (); their sum is trained (arXiv 1711.00937, equation 3).

        The commitment cost beta multiplies the term whose gradient reaches the encoder.
        """
        quantisation = output.codebook_loss + self.commitment_cost * output.commitment_loss
        return self.reconstruction_loss(output.reconstruction, images), quantisation

    def reconstruction_loss(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Squared error, and `ssim_weight` times `ssim_loss`: (B, 1, H, W) twice -> ()."""
        loss = F.mse_loss(reconstructions.float(), images)
        return loss + self.ssim_weight * ssim_loss(reconstructions, images) if self.ssim_weight else loss

    def encode(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, h, w) int64 codes in 0..K-1; of several codebooks (B, h, w, num_codebooks)."""
        return self.vector_quantization(self.encoder(images)).indices

    def decode(self, quantized: Tensor) -> Tensor:
        """(B, D, h, w) embeddings -> (B, 1, stride h, stride w)."""
        return self.decoder(quantized)

    def decode_codes(self, indices: Tensor) -> Tensor:
        """Codes as `encode` returns them -> (B, 1, stride h, stride w)."""
        return self.decode(self.vector_quantization.embed(indices))

    @property
    def bits_per_pixel(self) -> float:
        """log2 K bits a code of fixed length, over the pixels that one code position covers."""
        quantizer = self.vector_quantization
        return quantizer.num_codebooks * math.log2(quantizer.num_embeddings) / self.stride**2

    @property
    def fingerprint(self) -> str:
        """Changes with any weight: what codes belong to."""
        content = hashlib.sha256()
        for tensor in self.state_dict().values():
            content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:16]

    @classmethod
    def from_checkpoint(cls, path, device: str | torch.device = "cpu") -> VQVAE:
        """The model of a run's `best.pt` or `last.pt`, in eval mode. Raises `CheckpointError`."""
        return _from_checkpoint(cls, path, device)


class PatchDiscriminator(nn.Module):
    """Tells patches of slices from patches of reconstructions (arXiv 1611.07004): (B, 1, H, W) -> (B, 1, H/8, W/8).

    Each number is high where its 42 x 42 pixels look real. Beside a slice it is shown what a 3 x 3 mean takes from it,
    enlarged: reconstructions lack the finest detail first, and there it is too faint to be noticed among the rest.
    """

    def __init__(self, channels: int = 16):
        super().__init__()
        # The first convolution has no stride: those with one alone would push reconstructions towards a grid.
        layers: list[nn.Module] = [nn.Conv2d(2, channels, kernel_size=3, padding=1), nn.LeakyReLU(0.2)]
        for inputs, outputs in itertools.pairwise((channels, 2 * channels, 4 * channels, 8 * channels)):
            layers.append(nn.Conv2d(inputs, outputs, kernel_size=4, stride=2, padding=1))
            if inputs > channels:
                layers.append(nn.GroupNorm(8, outputs))  # of each slice by itself, whatever the batch
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * channels, 1, kernel_size=3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        mean = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
        return self.layers(torch.cat([images, 4 * (images - mean)], 1)).float()

    def hinge_loss(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """What the discriminator is trained by (arXiv 1705.02894): (B, 1, H, W) twice -> (); 2: it sees nothing."""
        images = images.to(reconstructions.dtype)  # rounding must not tell one from the other
        return F.relu(1 - self(images)).mean() + F.relu(1 + self(reconstructions)).mean()


class CausalBlock(nn.Module):
    """Self-attention over all positions up to each, then a perceptron: (B, T, C) in and out (arXiv 2002.04745)."""

    def __init__(self, channels: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.queries_keys_values, self.project = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.perceptron = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int = 0) -> Tensor:
        """With a cache, keys and values (B, heads, T, C/heads), x is position `start` alone, (B, 1, C)."""
        qkv = self.queries_keys_values(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, C/heads) each
        if cache is not None:
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, start : start + 1] = new
            k, v = (kept[:, :, : start + 1] for kept in cache)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)  # (B, heads, T, C/heads)
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
        return F.linear(window.flatten(1), (self.weight * self.mask)[:, :, :rows].flatten(1), self.bias)


class CodeGrid(nn.Module):
    """A grid of codes as `CodePrior` sees it: what leads into the transformer, and from there to the next codes.

    Masked convolutions (PixelCNN, arXiv 1601.06759) tell of each code what came before it nearby. The transformer's
    positions are segments of SEGMENT codes of a row: it is told what they tell of the first, and tells its codes what
    came before anywhere. Codes are known by their embeddings, on both sides: like codes are alike from the start.

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
        self.near = nn.ModuleList(CausalConv2d(channels, channels, 3, itself=True) for _ in range(num_layers))
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
                near = 9 * F.avg_pool2d(ones, 3, stride=1, padding=1).flatten(2).mT  # (B, height width, K)
                counts.index_add_(0, part, near)
            counts[-1] = counts.sum(0)
        else:
            before = torch.zeros_like(codes[:, ::2, ::2]) if before is None else before
            for k in range(4):
                pairs = (before * len(overall) + codes[:, k // 2 :: 2, k % 2 :: 2]).flatten()
                counts[:, k] = torch.bincount(pairs, minlength=counts[:, k].numel()).view_as(counts[:, k])
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
        self.arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"channels is {channels}; expected a multiple of num_heads {num_heads}")
        self.block = 2**num_grids  # codes a side of what 2 x 2 of the first grid stand for
        if height % self.block or width % (2 * self.block):
            expected = f"{self.block} and {2 * self.block}"
            raise ValueError(f"the code grid is {height} x {width}; expected sides divisible by {expected}")
        self.height, self.width, self.channels, self.num_heads = height, width, channels, num_heads
        self.grids = nn.ModuleList()  # coarse to fine
        for n in reversed(range(num_grids)):
            book = (num_outlines, embedding_dim + 1) if n else (num_embeddings, embedding_dim)
            before = tuple(self.grids[-1].embedding.shape) if self.grids else None
            by_place = num_grids > 1 and not self.grids
            self.grids.append(CodeGrid(*book, height // 2**n, width // 2**n, before, by_place, channels, dropout))
        self.views = nn.Parameter(torch.randn(self.VIEWS, channels) * 0.02)
        self.places = nn.Sequential(
            nn.Linear(2 + 2 * self.FREQUENCIES, channels), nn.GELU(), nn.Linear(channels, channels)
        )
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(CausalBlock(channels, num_heads, dropout) for _ in range(num_layers))
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
            levels.initialize(self._means(fine, codes).flatten()[:, None], generator=generator)
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
            parts = [part - part.mean(0) for part in (sums / counts[:, None], coarse.brightness[:, None])]
            coarse.take(torch.cat([part / part.std().clamp_min(1e-6) for part in parts], 1), coarse.brightness.clone())
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
        features = [grid.features(*pair) for grid, *pair in zip(self.grids, pyramid, seen, strict=True)]
        x = [grid.to_positions(found) + grid.places for grid, found in zip(self.grids, features, strict=True)]
        x = self.dropout(torch.cat(x, 1) + self.condition(position, view)[:, None])  # (B, T of all grids, C)
        for block in self.blocks:
            x = block(x)
        told = self.norm(x).split([grid.num_positions for grid in self.grids], 1)
        bias = [grid.start(codes, position, view) for grid, codes in zip(self.grids, before, strict=True)]
        return [grid.logits(*some) for grid, *some in zip(self.grids, features, told, bias, strict=True)]

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
        caches = [tuple(torch.zeros(size, device=position.device) for _ in range(2)) for _ in self.blocks]
        steps, pyramid = iter(progress(range(total))), []
        for n in range(len(self.grids)):
            before = pyramid[-1] if n else None
            bias = self.grids[n].start(before, position, view)
            pyramid.append(self._walk_grid(n, self.in_sight(n, before), bias, condition, caches, steps, choose))
        next(steps, None)  # a progress bar closes at its end
        return pyramid[-1]

    def _walk_grid(
        self, number: int, seen: Tensor, bias: Tensor, condition: Tensor, caches: list, steps, choose
    ) -> Tensor:
        """The codes of one grid, (B, height, width); the rest is as in `forward`."""
        grid, count, device = self.grids[number], len(condition), condition.device
        codes = torch.zeros(count, grid.height, grid.width, dtype=torch.long, device=device)
        seen = seen.expand(count, grid.channels, grid.height, grid.width)
        # What each convolution reads, padded as it needs: embeddings, then what the one before it has found.
        vectors = torch.zeros(count, grid.embedding.shape[1], grid.height + 3, grid.width + 6, device=device)
        found = [torch.zeros(count, grid.channels, grid.height + 1, grid.width + 2, device=device) for _ in grid.near]
        for row, column in itertools.product(range(grid.height), range(grid.width)):
            x = grid.first.at(vectors, row, column) + seen[:, :, row, column]  # (B, C)
            for near, mix, padded in zip(grid.near, grid.mix, found, strict=True):
                padded[:, :, row + 1, column + 1] = F.gelu(x)
                x = x + F.linear(F.gelu(near.at(padded, row, column)), mix.weight.flatten(1), mix.bias)
            segment, k = divmod(column, grid.SEGMENT)
            if k == 0:
                told, step = x[:, None] + grid.rows[row] + grid.columns[segment] + condition, next(steps)
                for block, cache in zip(self.blocks, caches, strict=True):
                    told = block(told, cache, step)
                told = grid.spread(self.norm(told)).view(count, grid.SEGMENT, grid.channels)
            chosen = choose(number, grid.likeness(x + told[:, k], bias[:, row, column]), row, column)
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
            logits, order = torch.sort(logits.cpu().double() / temperature, dim=1, descending=True, stable=True)
            probabilities = logits.softmax(1)
            if top_k:
                probabilities[:, top_k:] = 0
            probabilities[probabilities.cumsum(1) - probabilities >= top_p] = 0  # never the first
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            return order.gather(1, drawn)[:, 0].to(position.device)

        return self.walk(position, view, choose, progress)

    @classmethod
    def from_checkpoint(cls, path, device: str | torch.device = "cpu") -> CodePrior:
        """The prior of a run's `prior/best.pt`, in eval mode. Raises `CheckpointError`."""
        return _from_checkpoint(cls, path, device)


def _from_checkpoint(cls, path, device):
    checkpoint = load_checkpoint(path, device)
    try:
        arguments, state = checkpoint["model_args"], checkpoint["model"]
        most = {True: len(state), False: sum(tensor.numel() for tensor in state.values())}
        if any(tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes() for tensor in state.values()):
            raise ValueError("its tensors claim more numbers than it holds")
        for name, value in arguments.items():
            if isinstance(value, int | float) and not -1 <= value <= most["layers" in name]:
                raise ValueError(f"it asks for {value} {name}, and holds {most[False]:,} numbers")
        # First without memory: what it asks for must be what it holds.
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in cls(**arguments).state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in state.items()}:
            raise ValueError("its tensors are not those of its arguments")
        model = cls(**arguments)
        model.load_state_dict(state)
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError, ArithmeticError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} does not fit this version's {cls.__name__}: {reason}") from None
    return model.to(device).eval()


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message says why and what to do."""


def load_checkpoint(path, device: str | torch.device = "cpu") -> dict:
    """A checkpoint's dictionary. Loads tensors and plain types only, never code. Raises `CheckpointError`."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch's older forms, and compressed ones, aren't written here
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise CheckpointError(f"{path} is compressed, which no checkpoint of this project is")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}; train one with train.py") from None
    except CheckpointError:
        raise
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        if found := re.search(r"(?i)unsupported (?:global|class|operand):?\s+(?:global )?(\S+)", str(error)):
            raise CheckpointError(
                f"{path} names {found[1]:.80}, which is more than tensors and plain values and could be code; nothing "
                "of it was run. Use a checkpoint of this project"
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} can't be read as a checkpoint ({reason}); use another, or train again") from None
    if not isinstance(checkpoint, dict) or not {"format", "model_args", "model"} <= checkpoint.keys():
        raise CheckpointError(f"{path} is not a checkpoint of this project: it lacks format, model_args or model")
    if checkpoint["format"] not in range(1, CHECKPOINT_FORMAT + 1):
        found = checkpoint["format"]
        raise CheckpointError(f"{path} has checkpoint format {found!r}; this version reads 1 to {CHECKPOINT_FORMAT}")
    return checkpoint
