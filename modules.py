"""The VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937) for slices with one channel.

    model = VQVAE()                             # 256 x 128 pixels -> 64 x 32 codes of 9 bits
    reconstruction, quantized = model(images)   # (B, 1, 256, 128), Quantized
    losses = model.loss(images, reconstruction, quantized)
    indices = model.encode(images)              # (B, 64, 32)
    images = model.decode_codes(indices)        # (B, 1, 256, 128)

Shapes in this file: B slices of H x W pixels; h x w code positions, h = H / stride; codebooks of
K embeddings (`num_embeddings`) of D numbers (`embedding_dim`); N = B h w vectors.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------- encoder and decoder


class ResidualLayer(nn.Module):
    """x + conv2(relu(conv1(relu(x))))."""

    def __init__(self, channels: int, residual_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, residual_channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(residual_channels, channels, kernel_size=3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, H, W)
        h = self.conv1(self.relu(x))  # (B, residual_channels, H, W)
        return x + self.conv2(self.relu(h))  # (B, channels, H, W)


class ResidualStack(nn.Module):
    """A sequence of residual layers."""

    def __init__(self, channels: int, residual_channels: int, num_layers: int):
        super().__init__()
        layers = [ResidualLayer(channels, residual_channels) for _ in range(num_layers)]
        self.stack = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, H, W)
        return self.stack(x)  # (B, channels, H, W)


class Encoder(nn.Module):
    """Map slices to one vector per code position.

    C is `channels`, the width of the residual stack; `residual_channels` is the width inside its
    layers. With strides above 4, more convolutions with stride 2 follow the stack.
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
        halvings = range(_halvings_beyond_4(stride))
        convs = [nn.Conv2d(channels, channels, 4, stride=2, padding=1) for _ in halvings]
        self.down = nn.ModuleList(convs) if convs else ()
        self.conv2 = nn.Conv2d(channels, embedding_dim, kernel_size=4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, H, W)
        x = F.relu(self.conv1(x))  # (B, C, H/2, W/2)
        x = self.residual_stack(x)  # (B, C, H/2, W/2)
        for conv in self.down:
            x = conv(F.relu(x))  # (B, C, H/4, W/4), (B, C, H/8, W/8), ...
        return self.conv2(x)  # (B, D, h, w)


class Decoder(nn.Module):
    """Map quantised vectors to slices; the output is unbounded, as z-scores are.

    `num_code_layers` residual layers act on the code grid, before the first convolution. If
    `refine_channels` is not 0, a last convolution at full resolution reads so many channels.
    """

    def __init__(
        self,
        channels: int,
        residual_channels: int,
        num_layers: int,
        embedding_dim: int,
        stride: int = 4,
        num_code_layers: int = 0,
        refine_channels: int = 0,
    ):
        super().__init__()
        self.code_stack = self.conv3 = None
        if num_code_layers:
            self.code_stack = ResidualStack(embedding_dim, residual_channels, num_code_layers)
        self.conv1 = nn.ConvTranspose2d(embedding_dim, channels, kernel_size=4, stride=2, padding=1)
        doublings = range(_halvings_beyond_4(stride))
        convs = [nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1) for _ in doublings]
        self.up = nn.ModuleList(convs) if convs else ()
        self.residual_stack = ResidualStack(channels, residual_channels, num_layers)
        outputs = refine_channels or 1
        self.conv2 = nn.ConvTranspose2d(channels, outputs, kernel_size=4, stride=2, padding=1)
        if refine_channels:
            self.conv3 = nn.Conv2d(refine_channels, 1, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, D, h, w)
        if self.code_stack is not None:
            x = self.code_stack(x)  # (B, D, h, w)
        x = F.relu(self.conv1(x))  # (B, C, 2h, 2w)
        for conv in self.up:
            x = F.relu(conv(x))  # (B, C, 4h, 4w), (B, C, 8h, 8w), ...
        x = self.residual_stack(x)  # (B, C, H/2, W/2)
        x = self.conv2(x)  # (B, 1 or refine_channels, H, W)
        return x if self.conv3 is None else self.conv3(F.relu(x))  # (B, 1, H, W)


def _halvings_beyond_4(stride: int) -> int:
    """Return how many convolutions with stride 2 are needed beyond the two of stride 4."""
    if stride < 4 or stride & (stride - 1):
        raise ValueError(f"stride is {stride}; expected 4, 8, 16 or another power of two")
    return stride.bit_length() - 3


# ---------------------------------------------------------------- codes and k-means


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of each vector's nearest embedding: (N, D), (K, D) -> (N,) int64."""
    # argmin ||z - e||^2 = argmin ||e||^2 - 2 z.e; blocks bound the memory of the distances.
    norms = codebook.square().sum(1)  # (K,)
    blocks = vectors.split(8192)
    indices = [torch.addmm(norms, block, codebook.T, alpha=-2).argmin(1) for block in blocks]
    return torch.cat(indices)


def count_codes(indices: Tensor, num_codes: int) -> Tensor:
    """Return how often each code occurs: (N,) -> (K,) float32, exact up to 2^24."""
    return sum_by_code(torch.ones_like(indices, dtype=torch.float32), indices, num_codes)


def sum_by_code(values: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """Return the sum of the values of each code: (N, ...), (N,) -> (K, ...)."""
    return values.new_zeros(num_codes, *values.shape[1:]).index_add_(0, indices, values)


@torch.no_grad()
def kmeans(
    vectors: Tensor, num_clusters: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster (N, D) vectors, N >= K, by k-means++ and ten of Lloyd's iterations.

    At most 32 K vectors are used, drawn by the generator, which must be on the CPU.

    Returns:
        The centres, (K, D), and the residuals of the M vectors used, (M, D).
    """
    if len(vectors) < num_clusters:
        raise ValueError(
            f"{len(vectors)} vectors can't start {num_clusters} codes; expected as many or more"
        )
    order = torch.randperm(len(vectors), generator=generator)[: 32 * num_clusters]
    vectors = vectors[order.to(vectors.device)].float()  # (M, D)
    centres = vectors[:num_clusters].clone()  # the first is kept, the others are drawn again
    distance = (vectors - centres[0]).square().sum(1)  # (M,), squared, to the nearest centre
    for k in range(1, num_clusters):  # draw with probabilities proportional to the distance
        draw = torch.rand((), generator=generator, dtype=torch.float64).float()
        cumulative = distance.cumsum(0)  # (M,)
        index = torch.searchsorted(cumulative, draw.to(vectors.device) * cumulative[-1])
        centres[k] = vectors[index.clamp_max(len(vectors) - 1)]
        distance = torch.minimum(distance, (vectors - centres[k]).square().sum(1))
    for _ in range(10):
        indices = nearest_codes(vectors, centres)  # (M,)
        counts = count_codes(indices, num_clusters)[:, None]  # (K, 1)
        means = sum_by_code(vectors, indices, num_clusters) / counts.clamp_min(1)
        centres = torch.where(counts > 0, means, centres)
    return centres, vectors - centres[nearest_codes(vectors, centres)]


# ---------------------------------------------------------------- quantisers


class Quantized(NamedTuple):
    """The result of a quantiser; of R codebooks, the losses are sums."""

    quantized: Tensor  # (B, D, h, w) float32; its gradient passes straight through to the input
    indices: Tensor  # (B, h, w) int64, or (B, h, w, R)
    codebook_loss: Tensor  # (), ||sg[z] - e||^2, which trains the codebook; 0 for "ema"
    commitment_loss: Tensor  # (), ||z - sg[e]||^2, which trains the encoder; not yet times beta
    counts: Tensor  # (K,) float32, or (R K,): how often each code was used


class VectorQuantizer(nn.Module):
    """Replace each vector by its nearest embedding (arXiv 1711.00937, equations 1 and 2).

    All arithmetic is in float32, also under autocast: half precision overflows in the distances.
    The embeddings start at uniform(-1/K, 1/K), the usual default, from which few codes are ever
    used; `init_codebook` starts them from data.

    Args:
        codebook: "gradient": the codebook loss trains the embeddings (equation 3, second term).
            "ema": each embedding follows the moving average of its vectors, over all processes
            (appendix A.1, equations 6 to 8).
        decay: of the moving averages.
        restart_below: with "ema", a code used less than this fraction of the mean use restarts at
            a vector of the batch; 0: never.
    """

    num_codebooks = 1

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        codebook: str = "gradient",
        decay: float = 0.99,
        restart_below: float = 0.0,
    ):
        super().__init__()
        if codebook not in ("gradient", "ema"):
            raise ValueError(f"codebook is {codebook!r}; expected 'gradient' or 'ema'")
        if restart_below and codebook != "ema":
            raise ValueError("restart_below needs codebook 'ema', as only it counts uses")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.codebook = codebook
        self.decay = decay
        self.restart_below = restart_below
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_embeddings, 1 / num_embeddings)
        if codebook == "ema":
            self.embedding.weight.requires_grad_(False)
            # Start with sum / count = embedding: with counts of 0, unused codes would explode.
            self.register_buffer("ema_count", torch.ones(num_embeddings))  # (K,)
            self.register_buffer("ema_sum", self.embedding.weight.detach().clone())  # (K, D)

    def forward(self, z: Tensor) -> Quantized:  # (B, D, h, w) of any float dtype
        with torch.autocast(z.device.type, enabled=False):
            z = z.float().movedim(1, -1)  # (B, h, w, D); with D before h, w rows would mix positions
            vectors = z.reshape(-1, self.embedding_dim)  # (N, D)
            result = self.quantize(vectors)
            quantized = straight_through(vectors, result.quantized).view_as(z).movedim(-1, 1)
        return result._replace(quantized=quantized, indices=result.indices.view(z.shape[:-1]))

    def quantize(self, vectors: Tensor) -> Quantized:  # (N, D) float32
        """Return embeddings (N, D) and indices (N,); in training, update an "ema" codebook."""
        indices = nearest_codes(vectors.detach(), self.embedding.weight.detach())  # (N,)
        quantized = F.embedding(indices, self.embedding.weight)  # (N, D)
        counts = count_codes(indices, self.num_embeddings)  # (K,)
        commitment_loss = F.mse_loss(vectors, quantized.detach())
        if self.codebook == "gradient":
            codebook_loss = F.mse_loss(quantized, vectors.detach())
        else:
            codebook_loss = torch.zeros_like(commitment_loss)
            if self.training:
                self.update_codebook(vectors.detach(), indices, counts, quantized.detach())
        return Quantized(quantized, indices, codebook_loss, commitment_loss, counts)

    def embed(self, indices: Tensor) -> Tensor:
        """Return the embeddings of codes: (B, h, w) -> (B, D, h, w)."""
        return self.embedding(indices).movedim(-1, 1)

    def init_codebook(self, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Start the codebook from (N, D) encoder outputs; return `kmeans`'s residuals, (M, D)."""
        centres, residuals = kmeans(vectors, self.num_embeddings, generator)
        with torch.no_grad():
            self.embedding.weight.copy_(centres)
        if self.codebook == "ema":
            self.ema_count.fill_(1)
            self.ema_sum.copy_(centres)
        return residuals

    # Not compiled: compiled by torch 2.5 to 2.9, `quantize` would read the embeddings again after
    # this method has changed them.
    @torch.compiler.disable
    @torch.no_grad()
    def update_codebook(
        self, vectors: Tensor, indices: Tensor, counts: Tensor, quantized: Tensor
    ) -> None:
        """Move the codebook towards the vectors (N, D) of its codes (equations 6 to 8).

        If a vector of any process is not finite, nothing changes; the step's gradients are skipped
        as well. indices: (N,); counts: (K,); quantized: (N, D), the embeddings of the indices.
        """
        sums = sum_by_code(vectors, indices, self.num_embeddings)
        statistics = torch.cat([counts[:, None], sums], 1)  # (K, 1 + D)
        if _is_distributed():
            dist.all_reduce(statistics)
        finite = statistics.isfinite().all()  # (); a Python `if` would wait for the GPU
        statistics = statistics.nan_to_num(0, 0, 0)
        weight = (1 - self.decay) * finite
        self.ema_count.lerp_(statistics[:, 0], weight)
        self.ema_sum.lerp_(statistics[:, 1:], weight)
        if self.restart_below:
            mean_count = self.ema_count.mean()
            dead = (self.ema_count < self.restart_below * mean_count) & finite  # (K,)
            candidates = self._draw_candidates(vectors, quantized)  # (K, D)
            # Reset the averages too, or the next update would undo the restart. The count is low,
            # so that the code follows its vectors quickly.
            count = 2 * self.restart_below * mean_count
            self.ema_count.copy_(torch.where(dead, count, self.ema_count))
            self.ema_sum.copy_(torch.where(dead[:, None], candidates * count, self.ema_sum))
        # The count of a code that is never used decays to 0; its embedding stays where it is.
        alive = self.ema_count > 1e-10
        means = self.ema_sum / self.ema_count.clamp_min(1e-10)[:, None]
        self.embedding.weight.copy_(torch.where(alive[:, None], means, self.embedding.weight))

    def _draw_candidates(self, vectors: Tensor, quantized: Tensor) -> Tensor:
        """Draw K of rank 0's vectors, favouring large errors as k-means++ does, for all processes."""
        candidates = vectors.new_zeros(self.num_embeddings, self.embedding_dim)
        if not _is_distributed() or dist.get_rank() == 0:  # others may have no slice of the batch
            error = (vectors - quantized).square().sum(1)  # (N,)
            error = error.nan_to_num(0, 0, 0).clamp_min(1e-12)
            candidates = vectors[torch.multinomial(error, self.num_embeddings, replacement=True)]
        if _is_distributed():
            dist.all_reduce(candidates)  # the others add zeros
        return candidates


class ResidualVectorQuantizer(nn.Module):
    """Quantise with R codebooks, each on the residual of those before (arXiv 2107.03312)."""

    def __init__(self, num_codebooks: int, num_embeddings: int, embedding_dim: int, *options):
        super().__init__()
        self.num_codebooks = num_codebooks
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.quantizers = nn.ModuleList(
            VectorQuantizer(num_embeddings, embedding_dim, *options) for _ in range(num_codebooks)
        )

    def forward(self, z: Tensor) -> Quantized:  # (B, D, h, w) of any float dtype
        with torch.autocast(z.device.type, enabled=False):
            z = z.float().movedim(1, -1)  # (B, h, w, D)
            residual = z.reshape(-1, self.embedding_dim)  # (N, D)
            residuals, results = [], []
            for quantizer in self.quantizers:
                results.append(quantizer.quantize(residual))
                residuals.append(residual)
                residual = residual - results[-1].quantized.detach()
            # Sums run from the last codebook to the first; another order would round differently.
            results.reverse()
            quantized = torch.zeros_like(residual)
            for vectors, result in zip(reversed(residuals), results, strict=True):
                quantized = straight_through(vectors, result.quantized + quantized)  # (N, D)
            codebook_loss = sum(result.codebook_loss for result in results)
            commitment_loss = sum(result.commitment_loss for result in results)
        indices = torch.stack([result.indices for result in reversed(results)], -1)  # (N, R)
        counts = torch.cat([result.counts for result in reversed(results)])  # (R K,)
        indices = indices.view(*z.shape[:-1], self.num_codebooks)  # (B, h, w, R)
        quantized = quantized.view_as(z).movedim(-1, 1)  # (B, D, h, w)
        return Quantized(quantized, indices, codebook_loss, commitment_loss, counts)

    def embed(self, indices: Tensor) -> Tensor:
        """Return the sums of the embeddings of codes: (B, h, w, R) -> (B, D, h, w)."""
        pairs = zip(self.quantizers, indices.unbind(-1), strict=True)
        return sum(reversed([quantizer.embed(codes) for quantizer, codes in pairs]))

    def init_codebook(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        """Start each codebook from the residuals of those before; vectors: (N, D)."""
        for quantizer in self.quantizers:
            vectors = quantizer.init_codebook(vectors, generator)


def straight_through(vectors: Tensor, quantized: Tensor) -> Tensor:
    """Return `quantized` with the gradient of `vectors`."""
    return vectors + (quantized - vectors).detach()


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


# ---------------------------------------------------------------- loss and model


def ssim_loss(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Return 1 - SSIM (Wang et al. 2004): (B, 1, H, W) twice, H and W at least 11 -> ().

    The mean is over the windows inside the slices: Gaussian, 11 x 11, sigma 1.5. Both slices are
    scaled by the original's minimum and maximum; a random crop counts as a slice.
    """
    taps = torch.exp(-((torch.arange(11, device=images.device) - 5.0) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    # On a CPU, products with banded matrices are several times faster than convolutions.
    filter_rows = _filter_matrix(taps, images.shape[-2])  # (H - 10, H)
    filter_columns = _filter_matrix(taps, images.shape[-1])  # (W - 10, W)
    low = images.amin((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    span = (images.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-3)
    x = (reconstructions.float() - low) / span
    y = (images.float() - low) / span
    # In float32, as variances are differences of nearly equal numbers.
    with torch.autocast(images.device.type, enabled=False):
        products = torch.stack([x, y, x * x, y * y, x * y])  # (5, B, 1, H, W)
        means = filter_rows @ products @ filter_columns.T  # (5, B, 1, H - 10, W - 10)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = means.unbind()
    c1, c2 = 0.01**2, 0.03**2  # for a data range of 1
    # Rounding can make the variance of a nearly constant window negative.
    variance_x = (mean_xx - mean_x**2).clamp_min(0)
    variance_y = (mean_yy - mean_y**2).clamp_min(0)
    covariance = mean_xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return 1 - (luminance * (2 * covariance + c2) / (variance_x + variance_y + c2)).mean()


def _filter_matrix(taps: Tensor, size: int) -> Tensor:
    """Return the matrix that filters an axis without padding: (T,) -> (size - T + 1, size)."""
    if size < len(taps):
        raise ValueError(f"a side of {size} is too short for SSIM's window of {len(taps)}")
    columns = torch.arange(size, device=taps.device)
    offset = columns - columns[: size - len(taps) + 1, None]  # of the column from the row
    inside = (offset >= 0) & (offset < len(taps))
    return torch.where(inside, taps[offset.clamp(0, len(taps) - 1)], 0.0)


class VQVAE(nn.Module):
    """Encoder, vector quantiser and decoder; `VQVAE()` is the source document's model.

    Args:
        hidden_channels: twice the width of the residual stacks.
        commitment_cost: beta in equation 3.
        ssim_weight: weight of `ssim_loss` in the reconstruction loss.
        num_codebooks: with several, a `ResidualVectorQuantizer` is used.
        others: see `Encoder`, `Decoder` and `VectorQuantizer`.
    """

    def __init__(
        self,
        hidden_channels: int = 64,
        residual_channels: int = 32,
        num_residual_layers: int = 2,
        num_code_layers: int = 0,
        refine_channels: int = 0,
        stride: int = 4,
        embedding_dim: int = 64,
        num_embeddings: int = 512,
        num_codebooks: int = 1,
        commitment_cost: float = 0.25,
        ssim_weight: float = 0.0,
        codebook: str = "gradient",
        ema_decay: float = 0.99,
        restart_below: float = 0.0,
    ):
        arguments = {**locals()}
        super().__init__()
        del arguments["self"], arguments["__class__"]
        self.arguments = arguments  # saved in checkpoints
        if num_codebooks < 1:
            raise ValueError(f"num_codebooks is {num_codebooks}; expected at least 1")
        self.stride = stride
        self.commitment_cost = commitment_cost
        self.ssim_weight = ssim_weight
        widths = (hidden_channels // 2, residual_channels, num_residual_layers, embedding_dim)
        self.encoder = Encoder(*widths, stride)
        options = (num_embeddings, embedding_dim, codebook, ema_decay, restart_below)
        if num_codebooks == 1:
            self.vector_quantization = VectorQuantizer(*options)
        else:
            self.vector_quantization = ResidualVectorQuantizer(num_codebooks, *options)
        self.decoder = Decoder(*widths, stride, num_code_layers, refine_channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:  # (B, 1, H, W)
        z = self.encoder(images)  # (B, D, h, w); H and W must be divisible by the stride
        quantized = self.vector_quantization(z)
        return self.decoder(quantized.quantized), quantized  # (B, 1, H, W)

    def loss(self, images: Tensor, reconstruction: Tensor, quantized: Quantized) -> tuple:
        """Return the reconstruction loss and the quantisation loss, both ().

        Their sum is minimised (arXiv 1711.00937, equation 3). Beta, the commitment cost, multiplies
        the term whose gradient reaches the encoder.
        """
        beta = self.commitment_cost
        quantization_loss = quantized.codebook_loss + beta * quantized.commitment_loss
        return self.reconstruction_loss(reconstruction, images), quantization_loss

    def reconstruction_loss(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Return mean squared error + `ssim_weight` x `ssim_loss` of (B, 1, H, W) slices."""
        loss = F.mse_loss(reconstructions.float(), images)
        if self.ssim_weight:
            loss = loss + self.ssim_weight * ssim_loss(reconstructions, images)
        return loss

    def encode(self, images: Tensor) -> Tensor:
        """Return codes in 0..K-1: (B, 1, H, W) -> (B, h, w) int64; of R codebooks (B, h, w, R)."""
        return self.vector_quantization(self.encoder(images)).indices

    def decode(self, quantized: Tensor) -> Tensor:
        """Return the slices of embeddings: (B, D, h, w) -> (B, 1, H, W)."""
        return self.decoder(quantized)

    def decode_codes(self, indices: Tensor) -> Tensor:
        """Return the slices of codes in the shape of `encode`: (B, h, w) -> (B, 1, H, W)."""
        return self.decode(self.vector_quantization.embed(indices))

    @property
    def bits_per_pixel(self) -> float:
        """The rate of fixed-length codes."""
        quantizer = self.vector_quantization
        return quantizer.num_codebooks * math.log2(quantizer.num_embeddings) / self.stride**2

    @property
    def fingerprint(self) -> str:
        """A hash of all weights; code files name it, as codes only mean something to one model."""
        content = hashlib.sha256()
        for tensor in self.state_dict().values():
            content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:16]
