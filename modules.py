"""The VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937) for single-channel slices.

    model = VQVAE()                          # 256 x 128 slice -> 64 x 32 codes of 9 bits -> slice
    indices = model.encode(images)           # (B, 64, 32) int64
    images = model.decode_codes(indices)     # (B, 1, 256, 128)
    model = load_model(VQVAE, "runs/x/best.pt")

Shapes: B slices, K codes (`num_embeddings`) of D numbers each (`embedding_dim`), N vectors in a batch.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


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
        self.stack = nn.Sequential(
            *(ResidualLayer(channels, residual_channels) for _ in range(num_layers))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x)


class Encoder(nn.Module):
    """Slice (B, 1, H, W) -> one vector a code position, (B, D, H/stride, W/stride).

    Strides over 4 halve further, after the residual stack.
    """

    def __init__(
        self,
        channels: int,
        residual_channels: int,
        num_layers: int,
        embedding_dim: int,
        stride: int = 4,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, kernel_size=4, stride=2, padding=1)
        self.residual_stack = ResidualStack(channels, residual_channels, num_layers)
        if halvings := _halvings_beyond_4(stride):
            self.down = nn.ModuleList(
                nn.Conv2d(channels, channels, 4, stride=2, padding=1) for _ in range(halvings)
            )
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
                nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
                for _ in range(doublings)
            )
        self.residual_stack = ResidualStack(channels, residual_channels, num_layers)
        self.conv2 = nn.ConvTranspose2d(
            channels, refine_channels or 1, kernel_size=4, stride=2, padding=1
        )
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

    quantized: (
        Tensor  # (B, D, h, w) float32, nearest embeddings; gradients pass straight to the input
    )
    indices: (
        Tensor  # (B, h, w) int64, which embedding; of several codebooks (B, h, w, num_codebooks)
    )
    codebook_loss: (
        Tensor  # (), ||sg[z] - e||^2: moves the embeddings; 0 when they follow by moving average
    )
    commitment_loss: (
        Tensor  # (), ||z - sg[e]||^2: moves the encoder; not yet times `commitment_cost`
    )
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
    that happen to lie nearest; `init_codebook` starts it from data instead. All arithmetic is float32, also under
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
            raise ValueError(
                "restart_below needs codebook 'ema': a gradient codebook keeps no counts of use"
            )
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
            z = z.float().movedim(
                1, -1
            )  # (B, h, w, D): the channel axis last, else rows would mix positions
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
                quantized = quantized + rest.quantized.movedim(1, -1).reshape(
                    -1, self.embedding_dim
                )
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
        norms = weight.square().sum(
            1
        )  # (K,); ||z - e||^2 = ||z||^2 - 2 z.e + ||e||^2, and ||z||^2 ranks nothing
        blocks = [
            torch.addmm(norms, block, weight.T, alpha=-2).argmin(1) for block in vectors.split(8192)
        ]
        return torch.cat(blocks)

    def _count(self, indices: Tensor) -> Tensor:
        """How many of the indices (N,) are each code, (K,) float32; exact up to 2^24, and no one-hot matrix."""
        ones = torch.ones_like(indices, dtype=torch.float32)
        return ones.new_zeros(self.num_embeddings).index_add_(0, indices, ones)

    def _sum(self, vectors: Tensor, indices: Tensor) -> Tensor:
        """Sum of the vectors (N, D) assigned to each code, (K, D)."""
        return vectors.new_zeros(self.num_embeddings, self.embedding_dim).index_add_(
            0, indices, vectors
        )

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
        if (
            not _several_processes() or dist.get_rank() == 0
        ):  # others may have no share of a small batch
            # Drawn where the codebook fits worst, as k-means++ draws its centres.
            error = (
                (vectors - quantized).square().sum(1).nan_to_num(0, 0, 0).clamp_min(1e-12)
            )  # (N,)
            candidates = vectors[torch.multinomial(error, self.num_embeddings, replacement=True)]
        if _several_processes():
            dist.all_reduce(candidates)  # the others' are zeros
        return candidates

    @torch.no_grad()
    def init_codebook(
        self, vectors: Tensor, iterations: int = 10, generator: torch.Generator | None = None
    ) -> None:
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
            draw = (
                torch.rand((), generator=generator, dtype=torch.float64).float().to(distance.device)
            )
            total = distance.cumsum(0)
            weight[k] = vectors[
                torch.searchsorted(total, draw * total[-1]).clamp_max(len(vectors) - 1)
            ]
            distance = torch.minimum(distance, (vectors - weight[k]).square().sum(1))
        for _ in range(iterations):
            indices = self.nearest(vectors)
            counts = self._count(indices)[:, None]
            weight.copy_(
                torch.where(counts > 0, self._sum(vectors, indices) / counts.clamp_min(1), weight)
            )
        if self.codebook == "ema":
            self.ema_count.fill_(1)
            self.ema_sum.copy_(weight)
        if self.num_codebooks > 1:
            self.rest.init_codebook(vectors - weight[self.nearest(vectors)], iterations, generator)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized()


def ssim_loss(reconstructions: Tensor, images: Tensor) -> Tensor:
    """1 - SSIM (Wang et al. 2004), mean over windows inside the slices: (B, 1, H, W) twice, sides of 11 or more -> ().

    Gaussian window 11, sigma 1.5; both scaled as each original fills [0, 1], a cropped slice by its crop's range. The
    blur along an axis is a product with a banded matrix, on a CPU several times as fast as a convolution.
    """
    taps = torch.exp(-((torch.arange(11, device=images.device) - 5.0) ** 2) / (2 * 1.5**2))
    rows, columns = (_band(taps / taps.sum(), size) for size in images.shape[-2:])
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    x, y = (
        (pixels.float() - low) / (high - low).clamp_min(1e-3)
        for pixels in (reconstructions, images)
    )
    with torch.autocast(
        images.device.type, enabled=False
    ):  # variances are differences of nearly equal numbers
        mean_x, mean_y, xx, yy, xy = (
            rows @ torch.stack([x, y, x * x, y * y, x * y]) @ columns.T
        ).unbind()
    c1, c2 = 0.01**2, 0.03**2  # for a data range of 1
    # Rounding can make the variance of a nearly flat window negative, and then the fraction anything.
    variance_x, variance_y = (xx - mean_x**2).clamp_min(0), (yy - mean_y**2).clamp_min(0)
    covariance = xy - mean_x * mean_y
    similar_means = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return 1 - (similar_means * (2 * covariance + c2) / (variance_x + variance_y + c2)).mean()


def _band(taps: Tensor, size: int) -> Tensor:
    """The matrix that slides `taps` (T,) along an axis of `size`, where they fit: (size - T + 1, size)."""
    if size < len(taps):
        raise ValueError(
            f"slices with a side of {size} have no room for SSIM's window of {len(taps)}"
        )
    place = torch.arange(size, device=taps.device)
    offset = place - place[: size - len(taps) + 1, None]  # how far column is right of row
    return torch.where(
        (offset >= 0) & (offset < len(taps)), taps[offset.clamp(0, len(taps) - 1)], 0.0
    )


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
        self.arguments = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        super().__init__()
        self.stride, self.commitment_cost, self.ssim_weight = stride, commitment_cost, ssim_weight
        widths = (hidden_channels // 2, residual_channels, num_residual_layers, embedding_dim)
        self.encoder = Encoder(*widths, stride)
        self.vector_quantization = VectorQuantizer(
            num_embeddings, embedding_dim, codebook, ema_decay, restart_below, num_codebooks
        )
        self.decoder = Decoder(*widths, stride, num_code_layers, refine_channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Return the reconstruction, (B, 1, H, W), and what the quantiser found.

        images: (B, 1, H, W), H and W divisible by the stride.
        """
        quantized = self.vector_quantization(self.encoder(images))
        return self.decoder(quantized.quantized), quantized

    def loss(
        self, images: Tensor, reconstruction: Tensor, quantized: Quantized
    ) -> tuple[Tensor, Tensor]:
        """Return the reconstruction loss and the quantisation loss, both ().

        Their sum is minimised (arXiv 1711.00937, equation 3). The commitment cost beta multiplies
        the term whose gradient reaches the encoder.
        """
        quantization_loss = (
            quantized.codebook_loss + self.commitment_cost * quantized.commitment_loss
        )
        return self.reconstruction_loss(reconstruction, images), quantization_loss

    def reconstruction_loss(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Squared error, and `ssim_weight` times `ssim_loss`: (B, 1, H, W) twice -> ()."""
        loss = F.mse_loss(reconstructions.float(), images)
        return (
            loss + self.ssim_weight * ssim_loss(reconstructions, images)
            if self.ssim_weight
            else loss
        )

    def encode(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, h, w) int64 codes in 0..K-1; of several codebooks (B, h, w, num_codebooks)."""
        return self.vector_quantization(self.encoder(images)).indices

    def decode(self, quantized: Tensor) -> Tensor:
        """(B, D, h, w) embeddings -> (B, 1, stride h, stride w)."""
        return self.decoder(quantized)

    def decode_codes(self, indices: Tensor) -> Tensor:
        """CodeDataset as `encode` returns them -> (B, 1, stride h, stride w)."""
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
