"""The VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937) for slices with one channel.

    model = VQVAE()                             # 256 x 128 pixels -> 64 x 32 codes of 9 bits
    reconstruction, quantized = model(images)   # (B, 1, 256, 128) and a Quantized
    indices = model.encode(images)              # (B, 64, 32)
    images = model.decode_codes(indices)        # (B, 1, 256, 128)

Shapes: B slices of H x W pixels; h x w code positions, h = H / stride; N = B h w vectors of D
numbers (`embedding_dim`); codebooks of K embeddings (`num_embeddings`).
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualLayer(nn.Module):
    """x + conv2(relu(conv1(relu(x))))."""

    def __init__(self, channels: int, residual_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, residual_channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(residual_channels, channels, kernel_size=3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        return x + self.conv2(self.relu(self.conv1(self.relu(x))))  # (B, C, H, W)


class ResidualStack(nn.Module):
    """A sequence of residual layers."""

    def __init__(self, channels: int, residual_channels: int, num_layers: int):
        super().__init__()
        layers = [ResidualLayer(channels, residual_channels) for _ in range(num_layers)]
        self.stack = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        return self.stack(x)  # (B, C, H, W)


class Encoder(nn.Module):
    """Encode slices as one vector of D numbers per code position; C is `channels`."""

    def __init__(self, channels, residual_channels, num_layers, embedding_dim, stride=4):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, kernel_size=4, stride=2, padding=1)
        self.residual_stack = ResidualStack(channels, residual_channels, num_layers)
        self.down = _convs_beyond_stride_4(nn.Conv2d, channels, stride)
        self.conv2 = nn.Conv2d(channels, embedding_dim, kernel_size=4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, H, W)
        x = F.relu(self.conv1(x))  # (B, C, H/2, W/2)
        x = self.residual_stack(x)  # (B, C, H/2, W/2)
        for conv in self.down:
            x = conv(F.relu(x))  # (B, C, H/4, W/4), (B, C, H/8, W/8), ...
        return self.conv2(x)  # (B, D, h, w)


class Decoder(nn.Module):
    """Decode quantised vectors to slices; the output is unbounded, like z-scores."""

    def __init__(
        self,
        channels,
        residual_channels,
        num_layers,
        embedding_dim,
        stride=4,
        num_code_layers=0,  # residual layers before conv1
        refine_channels=0,  # channels of conv3's input; 0: no conv3
    ):
        super().__init__()
        self.code_stack = None
        if num_code_layers:
            self.code_stack = ResidualStack(embedding_dim, residual_channels, num_code_layers)
        self.conv1 = nn.ConvTranspose2d(embedding_dim, channels, kernel_size=4, stride=2, padding=1)
        self.up = _convs_beyond_stride_4(nn.ConvTranspose2d, channels, stride)
        self.residual_stack = ResidualStack(channels, residual_channels, num_layers)
        self.conv2 = nn.ConvTranspose2d(channels, refine_channels or 1, 4, stride=2, padding=1)
        self.conv3 = nn.Conv2d(refine_channels, 1, 3, padding=1) if refine_channels else None

    def forward(self, x: Tensor) -> Tensor:  # (B, D, h, w)
        if self.code_stack is not None:
            x = self.code_stack(x)  # (B, D, h, w)
        x = F.relu(self.conv1(x))  # (B, C, 2h, 2w)
        for conv in self.up:
            x = F.relu(conv(x))  # (B, C, 4h, 4w), (B, C, 8h, 8w), ...
        x = self.residual_stack(x)  # (B, C, H/2, W/2)
        x = self.conv2(x)  # (B, 1 or refine_channels, H, W)
        return x if self.conv3 is None else self.conv3(F.relu(x))  # (B, 1, H, W)


def _convs_beyond_stride_4(layer: type[nn.Module], channels: int, stride: int):
    """Return additional stride-2 convolutions, which a total stride above 4 needs."""
    if stride < 4 or stride & (stride - 1):
        raise ValueError(f"stride is {stride}; expected 4, 8, 16 or another power of two")
    extra = range(stride.bit_length() - 3)
    convs = [layer(channels, channels, kernel_size=4, stride=2, padding=1) for _ in extra]
    return nn.ModuleList(convs) if convs else ()  # print() would show an empty ModuleList


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of each vector's nearest embedding: (N, D), (K, D) -> (N,) int64."""
    # argmin ||z - e||^2 = argmin (||e||^2 - 2 z.e). Splitting bounds the memory use.
    norms, size = codebook.square().sum(1), 8192 if vectors.is_cuda else 1024  # for a CPU's cache
    blocks = [vectors] if torch.onnx.is_in_onnx_export() else vectors.split(size)  # N is dynamic
    return torch.cat([torch.addmm(norms, v, codebook.T, alpha=-2).argmin(1) for v in blocks])


def sum_by_code(values: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """Sum the values of each code: (N, ...), (N,) -> (K, ...). Values of 1 give counts."""
    return values.new_zeros(num_codes, *values.shape[1:]).index_add_(0, indices, values)


@torch.no_grad()
def kmeans(vectors: Tensor, num_clusters: int, generator=None) -> tuple[Tensor, Tensor]:
    """Cluster M = min(N, 32 K) of N vectors (N, D); return centres (K, D) and residuals (M, D)."""
    if len(vectors) < num_clusters:
        raise ValueError(f"{len(vectors)} vectors cannot initialise {num_clusters} codes")
    order = torch.randperm(len(vectors), generator=generator)[: 32 * num_clusters]
    vectors = vectors[order.to(vectors.device)].float()  # (M, D)
    centres = vectors[:num_clusters].clone()  # the first is final; the loop replaces the others
    distance = (vectors - centres[0]).square().sum(1)  # (M,), squared, to the nearest centre
    draws = torch.rand(num_clusters - 1, generator=generator, dtype=torch.float64).float()
    draws = draws.to(vectors.device)  # all at once, so that the loop does not wait for a GPU
    for k in range(1, num_clusters):  # k-means++: sample in proportion to squared distances
        cumulative = distance.cumsum(0)  # (M,)
        index = torch.searchsorted(cumulative, draws[k - 1 : k] * cumulative[-1])  # (1,)
        centres[k] = vectors[index.clamp_max(len(vectors) - 1)][0]
        distance = torch.minimum(distance, (vectors - centres[k]).square().sum(1))
    for _ in range(10):  # Lloyd's iterations
        indices = nearest_codes(vectors, centres)  # (M,)
        counts = sum_by_code(torch.ones_like(vectors[:, :1]), indices, num_clusters)  # (K, 1)
        means = sum_by_code(vectors, indices, num_clusters) / counts.clamp_min(1)
        centres = torch.where(counts > 0, means, centres)
    return centres, vectors - centres[nearest_codes(vectors, centres)]


class Quantized(NamedTuple):
    """The result of a quantiser. With R codebooks, each loss is summed over the codebooks."""

    quantized: Tensor  # (B, D, h, w) float32; its gradient passes straight through to the input
    indices: Tensor  # (B, h, w) int64, or (B, h, w, R)
    codebook_loss: Tensor  # (), ||sg[z] - e||^2, which trains the codebook; 0 for "ema"
    commitment_loss: Tensor  # (), ||z - sg[e]||^2, which trains the encoder; not multiplied by beta
    counts: Tensor  # (K,) float32, or (R K,): how often each code was used
    vectors: Tensor  # (N, D) float32, or (R, N, D): the detached input, for `update_codebook`


class VectorQuantizer(nn.Module):
    """Replace each vector by its nearest embedding (arXiv 1711.00937, equations 1 and 2).

    Distances are computed in float32, even under autocast: half precision would overflow.
    codebook: with "gradient", the codebook loss trains the embeddings (equation 3, second term);
        with "ema", each is the moving average of its vectors in all processes (appendix A.1).
        `update_codebook` must be called after each training step.
    decay: decay rate of the averages.
    restart_below: with "ema", reinitialise codes below this fraction of the mean usage; 0: never.
    """

    def __init__(
        self, num_embeddings, embedding_dim, codebook="gradient", decay=0.99, restart_below=0.0
    ):
        super().__init__()
        if codebook not in ("gradient", "ema"):
            raise ValueError(f"codebook is {codebook!r}; expected 'gradient' or 'ema'")
        if restart_below and codebook != "ema":
            raise ValueError("restart_below needs codebook 'ema', which counts the uses of codes")
        self.num_codebooks = 1
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.codebook, self.decay, self.restart_below = codebook, decay, restart_below
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)
        # The usual initialisation. Unlike `init_codebook`, it leaves most codes unused.
        nn.init.uniform_(self.embedding.weight, -1 / num_embeddings, 1 / num_embeddings)
        if codebook == "ema":
            self.embedding.weight.requires_grad_(False)
            # Initially sum / count = embedding. With counts of 0, unused codes would explode.
            self.register_buffer("ema_count", torch.ones(num_embeddings))  # (K,)
            self.register_buffer("ema_sum", self.embedding.weight.detach().clone())  # (K, D)

    def forward(self, z: Tensor) -> Quantized:  # (B, D, h, w) of any float dtype
        with torch.autocast(z.device.type, enabled=False):
            z = z.float().movedim(1, -1)  # (B, h, w, D), so that each row is one position
            vectors = z.reshape(-1, self.embedding_dim)  # (N, D)
            result = self.quantize(vectors)
            quantized = vectors + (result.quantized - vectors).detach()  # (N, D)
        quantized = quantized.view_as(z).movedim(-1, 1)  # (B, D, h, w)
        return result._replace(quantized=quantized, indices=result.indices.view(z.shape[:-1]))

    def quantize(self, vectors: Tensor) -> Quantized:  # (N, D) float32
        """Return the result for vectors (N, D): quantized (N, D), indices (N,)."""
        indices = nearest_codes(vectors.detach(), self.embedding.weight.detach())  # (N,)
        quantized = F.embedding(indices, self.embedding.weight)  # (N, D)
        counts = sum_by_code(torch.ones_like(vectors[:, 0]), indices, self.num_embeddings)  # (K,)
        commitment_loss = F.mse_loss(vectors, quantized.detach())
        vectors = vectors.detach()
        codebook_loss = F.mse_loss(quantized, vectors) * (self.codebook == "gradient")
        return Quantized(quantized, indices, codebook_loss, commitment_loss, counts, vectors)

    def embed(self, indices: Tensor) -> Tensor:
        """Return the embeddings of codes: (B, h, w) -> (B, D, h, w)."""
        return self.embedding(indices).movedim(-1, 1)

    @torch.no_grad()
    def init_codebook(self, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Initialise the codebook by running `kmeans` on vectors (N, D); return the residuals."""
        centres, residuals = kmeans(vectors, self.num_embeddings, generator)
        self.embedding.weight.copy_(centres)
        if self.codebook == "ema":
            self.ema_count.fill_(1)
            self.ema_sum.copy_(centres)
        return residuals

    @torch.no_grad()
    def update_codebook(self, vectors: Tensor, indices: Tensor) -> None:
        """Update an "ema" codebook (equations 6 to 8) after a backward pass; restart dead codes."""
        if self.codebook != "ema":
            return
        indices, padded = indices.flatten(), F.pad(vectors, (1, 0), value=1.0)  # (N,), (N, 1 + D)
        statistics = sum_by_code(padded, indices, self.num_embeddings)  # counts and sums
        if _is_distributed():
            dist.all_reduce(statistics)
        # If any process has a non-finite vector, nothing changes. An `if` would wait for the GPU.
        finite = statistics.isfinite().all()  # ()
        statistics = statistics.nan_to_num(0, 0, 0)
        weight = (1 - self.decay) * finite
        self.ema_count.lerp_(statistics[:, 0], weight)
        self.ema_sum.lerp_(statistics[:, 1:], weight)
        if self.restart_below:
            self._restart_dead_codes(vectors, indices, finite)
        # The count of a code that is never used decays to 0; its embedding stays unchanged.
        alive = self.ema_count > 1e-10
        means = self.ema_sum / self.ema_count.clamp_min(1e-10)[:, None]
        self.embedding.weight.copy_(torch.where(alive[:, None], means, self.embedding.weight))

    def _restart_dead_codes(self, vectors: Tensor, indices: Tensor, finite: Tensor) -> None:
        """Move dead codes to vectors of rank 0, sampled in proportion to their squared errors."""
        candidates = torch.zeros_like(self.ema_sum)  # (K, D), a new vector for each code
        if not _is_distributed() or dist.get_rank() == 0:  # other ranks may have no slices
            errors = (vectors - self.embedding(indices)).square().sum(1)  # (N,)
            errors = errors.nan_to_num(0, 0, 0).clamp(1e-12, 1e30)  # the sum must be finite
            candidates = vectors[torch.multinomial(errors, self.num_embeddings, replacement=True)]
        if _is_distributed():
            dist.all_reduce(candidates)  # other ranks add zeros
        mean_count = self.ema_count.mean()
        dead = (self.ema_count < self.restart_below * mean_count) & finite  # (K,)
        # Reset the averages too, or the next update would move the embedding back.
        count = 2 * self.restart_below * mean_count  # alive at first, but new vectors can move it
        self.ema_count.copy_(torch.where(dead, count, self.ema_count))
        self.ema_sum.copy_(torch.where(dead[:, None], candidates * count, self.ema_sum))


class ResidualVectorQuantizer(nn.Module):
    """R codebooks, each of which quantises the residual of the previous ones (arXiv 2107.03312)."""

    def __init__(self, num_codebooks, num_embeddings, embedding_dim, *options):
        super().__init__()
        self.num_codebooks, self.num_embeddings = num_codebooks, num_embeddings
        options = (num_embeddings, embedding_dim, *options)
        self.quantizers = nn.ModuleList(VectorQuantizer(*options) for _ in range(num_codebooks))

    def forward(self, z: Tensor) -> Quantized:  # (B, D, h, w) of any float dtype
        with torch.autocast(z.device.type, enabled=False):
            z = z.float().movedim(1, -1)  # (B, h, w, D)
            residual = z.reshape(-1, z.shape[-1])  # (N, D)
            residuals, results = [], []
            for quantizer in self.quantizers:
                residuals.append(residual)
                results.append(quantizer.quantize(residual))
                residual = residual - results[-1].quantized.detach()
            # Sums run from the last codebook to the first; another order would round differently.
            quantized = torch.zeros_like(residual)
            for vectors, result in zip(reversed(residuals), reversed(results), strict=True):
                quantized = vectors + (result.quantized + quantized - vectors).detach()
            codebook_loss = sum(result.codebook_loss for result in reversed(results))
            commitment_loss = sum(result.commitment_loss for result in reversed(results))
        quantized = quantized.view_as(z).movedim(-1, 1)  # (B, D, h, w)
        indices = torch.stack([result.indices.view(z.shape[:-1]) for result in results], -1)
        counts = torch.cat([result.counts for result in results])  # (R K,)
        vectors = torch.stack([result.vectors for result in results])  # (R, N, D)
        return Quantized(quantized, indices, codebook_loss, commitment_loss, counts, vectors)

    def embed(self, indices: Tensor) -> Tensor:
        """Return the sum of the R embeddings at each position: (B, h, w, R) -> (B, D, h, w)."""
        pairs = zip(self.quantizers, indices.unbind(-1), strict=True)
        return sum(reversed([quantizer.embed(codes) for quantizer, codes in pairs]))

    def update_codebook(self, vectors: Tensor, indices: Tensor) -> None:
        """Update each codebook: vectors (R, N, D), indices (B, h, w, R)."""
        for quantizer, *part in zip(self.quantizers, vectors, indices.unbind(-1), strict=True):
            quantizer.update_codebook(*part)

    def init_codebook(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        """Initialise each codebook from the residuals of the previous ones; vectors: (N, D)."""
        for quantizer in self.quantizers:
            vectors = quantizer.init_codebook(vectors, generator)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def ssim_loss(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Return 1 - SSIM (Wang et al. 2004) with an 11 x 11 Gaussian window of sigma 1.5.

    Both inputs, (B, 1, H, W), are scaled by the range of each slice in `images`, and not clipped.
    """
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"slices of {tuple(images.shape[-2:])} do not fit SSIM's 11 x 11 window")
    low = images.amin((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    span = (images.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-3)
    x = (reconstructions.float() - low) / span
    y = (images.float() - low) / span
    taps = torch.exp(-((torch.arange(11, device=images.device) - 5.0) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    # Variances need float32, because they are differences of nearly equal numbers. On a CPU,
    # products with banded matrices, (H - 10, H) and (W - 10, W), are faster than convolutions.
    with torch.autocast(images.device.type, enabled=False):
        rows, columns = [torch.eye(n, device=x.device).unfold(0, 11, 1) @ taps for n in x.shape[2:]]
        means = rows @ torch.stack([x, y, x * x, y * y, x * y]) @ columns.T
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = means.unbind()  # (B, 1, H - 10, W - 10) each
    c1, c2 = 0.01**2, 0.03**2  # for a data range of 1
    variance_x = (mean_xx - mean_x**2).clamp_min(0)  # rounding could make it negative
    variance_y = (mean_yy - mean_y**2).clamp_min(0)
    covariance = mean_xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return 1 - (luminance * (2 * covariance + c2) / (variance_x + variance_y + c2)).mean()


class VQVAE(nn.Module):
    """Encoder, vector quantiser and decoder; `VQVAE()` is the source document's model.

    `hidden_channels` is twice the width of the residual stacks; `commitment_cost` is beta.
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
        self.arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.stride, self.commitment_cost, self.ssim_weight = stride, commitment_cost, ssim_weight
        widths = (hidden_channels // 2, residual_channels, num_residual_layers, embedding_dim)
        self.encoder = Encoder(*widths, stride)
        options = (num_embeddings, embedding_dim, codebook, ema_decay, restart_below)
        if num_codebooks == 1:
            self.vector_quantization = VectorQuantizer(*options)
        else:
            self.vector_quantization = ResidualVectorQuantizer(num_codebooks, *options)
        self.decoder = Decoder(*widths, stride, num_code_layers, refine_channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:  # (B, 1, H, W)
        quantized = self.vector_quantization(self.encoder(images))  # (B, D, h, w)
        return self.decoder(quantized.quantized), quantized  # (B, 1, H, W)

    def loss(self, images: Tensor, reconstruction: Tensor, quantized: Quantized) -> tuple:
        """Return the reconstruction and the quantisation loss (arXiv 1711.00937, equation 3)."""
        # Beta multiplies the term whose gradient reaches the encoder.
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
        """Encode slices (B, 1, H, W) as codes (B, h, w), or (B, h, w, R), int64 from 0 to K - 1."""
        return self.vector_quantization(self.encoder(images)).indices

    def decode_codes(self, indices: Tensor) -> Tensor:
        """Decode codes, in the shape that `encode` returns, to slices (B, 1, H, W)."""
        return self.decoder(self.vector_quantization.embed(indices))

    @property
    def bits_per_pixel(self) -> float:
        """Bits per pixel, at log2(K) bits per code."""
        quantizer = self.vector_quantization
        return quantizer.num_codebooks * math.log2(quantizer.num_embeddings) / self.stride**2
