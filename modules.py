"""The VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937) for single-channel slices.

    model = VQVAE()                          # 256 x 128 slice -> 64 x 32 codes of 9 bits -> slice
    indices = model.encode(images)           # (B, 64, 32) int64
    images = model.decode_codes(indices)     # (B, 1, 256, 128)
    model = VQVAE.from_checkpoint("runs/x/best.pt")

Shapes: B slices, K codes (`num_embeddings`) of D numbers each (`embedding_dim`), N vectors in a batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 4  # pixels of the slice a side of one code: two convolutions of stride 2
CHECKPOINT_FORMAT = 1


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
    """Slice (B, 1, H, W) -> one vector a code position, (B, D, H/4, W/4)."""

    def __init__(self, channels: int, residual_channels: int, num_layers: int, embedding_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, kernel_size=4, stride=2, padding=1)
        self.residual_stack = ResidualStack(channels, residual_channels, num_layers)
        self.conv2 = nn.Conv2d(channels, embedding_dim, kernel_size=4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, H, W)
        x = F.relu(self.conv1(x))  # (B, C, H/2, W/2)
        return self.conv2(self.residual_stack(x))  # (B, D, H/4, W/4)


class Decoder(nn.Module):
    """Quantised vectors (B, D, h, w) -> slice (B, 1, 4h, 4w); no output activation, since z-scores have no bounds."""

    def __init__(self, channels: int, residual_channels: int, num_layers: int, embedding_dim: int):
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(embedding_dim, channels, kernel_size=4, stride=2, padding=1)
        self.residual_stack = ResidualStack(channels, residual_channels, num_layers)
        self.conv2 = nn.ConvTranspose2d(channels, 1, kernel_size=4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, D, h, w)
        x = F.relu(self.conv1(x))  # (B, C, 2h, 2w)
        return self.conv2(self.residual_stack(x))  # (B, 1, 4h, 4w)


class Quantized(NamedTuple):
    """What `VectorQuantizer` returns."""

    quantized: Tensor  # (B, D, h, w) float32, nearest embeddings; gradients pass straight to the input
    indices: Tensor  # (B, h, w) int64, which embedding
    codebook_loss: Tensor  # (), ||sg[z] - e||^2: moves the embeddings; 0 when they follow by moving average
    commitment_loss: Tensor  # (), ||z - sg[e]||^2: moves the encoder; not yet times `commitment_cost`
    counts: Tensor  # (K,) float32, how many of the B h w vectors took each embedding


class VectorQuantizer(nn.Module):
    """Replaces each vector by its nearest embedding (arXiv 1711.00937, equations 1-3).

    codebook "gradient": the embeddings are parameters, moved by the codebook loss (equation 3, second term).
    codebook "ema": they follow the mean of the vectors assigned to them (appendix A.1, equations 6-8).
    restart_below: with "ema", a code used less than this share of the mean use starts again from a vector of
        the batch, together with its moving averages (else the next update would take it straight back); 0: never.

    A codebook starts at uniform(-1/K, 1/K), the usual default, under which nearly all codes lose to the few
    that happen to lie nearest; `initialize` starts it from data instead. All arithmetic is float32, also under
    autocast: half precision overflows in the squared distances.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, codebook: str = "gradient", decay: float = 0.99,
        restart_below: float = 0.0,
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
            quantized = (flat + (quantized - flat).detach()).view_as(z).movedim(-1, 1)
        return Quantized(quantized, indices.view(z.shape[:-1]), codebook_loss, commitment_loss, counts)

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

    @torch.no_grad()
    def _update(self, vectors: Tensor, indices: Tensor, counts: Tensor, quantized: Tensor) -> None:
        """One step of the moving averages: vectors and their embeddings (N, D), indices (N,), counts (K,)."""
        self.ema_count.lerp_(counts, 1 - self.decay)
        self.ema_sum.lerp_(self._sum(vectors, indices), 1 - self.decay)
        if self.restart_below:
            mean_count = self.ema_count.mean()
            dead = self.ema_count < self.restart_below * mean_count  # (K,)
            # Candidates are drawn where the codebook fits worst, as k-means++ draws its centres.
            error = (vectors - quantized).square().sum(1).nan_to_num(0, 0, 0).clamp_min(1e-12)  # (N,)
            candidates = vectors[torch.multinomial(error, self.num_embeddings, replacement=True)]  # (K, D)
            count = 2 * self.restart_below * mean_count  # low enough to follow its vectors quickly
            self.ema_count.copy_(torch.where(dead, count, self.ema_count))
            self.ema_sum.copy_(torch.where(dead[:, None], candidates * count, self.ema_sum))
        # A code that was never used keeps its place: its count fades, until dividing by it would mean nothing.
        alive = self.ema_count > 1e-10
        means = self.ema_sum / self.ema_count.clamp_min(1e-10)[:, None]
        self.embedding.weight.copy_(torch.where(alive[:, None], means, self.embedding.weight))

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


class Output(NamedTuple):
    """What `VQVAE` returns: the reconstruction (B, 1, H, W), and of `Quantized` all but the vectors."""

    reconstruction: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    counts: Tensor


class VQVAE(nn.Module):
    """Encoder, vector quantiser and decoder. `VQVAE()` is the source document's model, 0.81 GMAC a slice.

    hidden_channels: twice the width of the residual stacks; `residual_channels` is the width inside a layer.
    The other arguments are `VectorQuantizer`'s.
    """

    def __init__(
        self, hidden_channels: int = 64, residual_channels: int = 32, num_residual_layers: int = 2,
        embedding_dim: int = 64, num_embeddings: int = 512, commitment_cost: float = 0.25,
        codebook: str = "gradient", ema_decay: float = 0.99, restart_below: float = 0.0,
    ):  # fmt: skip
        self.arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.commitment_cost = commitment_cost
        widths = (hidden_channels // 2, residual_channels, num_residual_layers, embedding_dim)
        self.encoder = Encoder(*widths)
        self.vector_quantization = VectorQuantizer(num_embeddings, embedding_dim, codebook, ema_decay, restart_below)
        self.decoder = Decoder(*widths)

    def forward(self, images: Tensor) -> Output:
        """images: (B, 1, H, W), H and W divisible by 4."""
        quantized, *rest = self.vector_quantization(self.encoder(images))
        return Output(self.decoder(quantized), *rest)

    def loss(self, images: Tensor, output: Output) -> tuple[Tensor, Tensor]:
        """Reconstruction and quantisation loss, both (); their sum is trained (arXiv 1711.00937, equation 3).

        The commitment cost beta multiplies the term whose gradient reaches the encoder.
        """
        reconstruction = F.mse_loss(output.reconstruction.float(), images)
        return reconstruction, output.codebook_loss + self.commitment_cost * output.commitment_loss

    def encode(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, H/4, W/4) int64 codes in 0..K-1."""
        return self.vector_quantization(self.encoder(images)).indices

    def decode(self, quantized: Tensor) -> Tensor:
        """(B, D, h, w) embeddings -> (B, 1, 4h, 4w)."""
        return self.decoder(quantized)

    def decode_codes(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 codes -> (B, 1, 4h, 4w)."""
        return self.decode(self.vector_quantization.embedding(indices).movedim(-1, 1))

    @property
    def bits_per_pixel(self) -> float:
        """log2 K bits a code of fixed length, over the pixels that one code covers."""
        return math.log2(self.vector_quantization.num_embeddings) / STRIDE**2

    @classmethod
    def from_checkpoint(cls, path, device: str | torch.device = "cpu") -> VQVAE:
        """The model of a run's `best.pt` or `last.pt`, in eval mode. Raises `CheckpointError`."""
        checkpoint = load_checkpoint(path, device)
        try:
            model = cls(**checkpoint["model_args"])
            model.load_state_dict(checkpoint["model"])
        except (TypeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit this version's VQVAE: {error}") from None
        return model.to(device).eval()


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message says why and what to do."""


def load_checkpoint(path, device: str | torch.device = "cpu") -> dict:
    """A checkpoint's dictionary. Loads tensors and plain types only, never code. Raises `CheckpointError`."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}; train one with train.py") from None
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} can't be read as a checkpoint ({reason}); use another, or train again") from None
    if not isinstance(checkpoint, dict) or not {"format", "model_args", "model"} <= checkpoint.keys():
        raise CheckpointError(f"{path} is not a checkpoint of this project: it lacks format, model_args or model")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        found = checkpoint["format"]
        raise CheckpointError(f"{path} has checkpoint format {found!r}; this version reads {CHECKPOINT_FORMAT}")
    return checkpoint
