"""Other implementations of the document's model, and the training loop of a typical script.

speed.py compares this repository with them. MONAI and vector-quantize-pytorch are imported only
when their model is built.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataset import SliceDataset
from modules import Decoder, Encoder

# Arguments of the document's Encoder and Decoder: channels, residual channels, layers and
# embedding dimension.
WIDTHS = (32, 32, 2, 64)


class OneHotQuantizer(nn.Module):
    """The quantiser of many public scripts, which multiplies one-hot rows (N, K) by embeddings."""

    def __init__(
        self, num_embeddings: int = 512, embedding_dim: int = 64, commitment_cost: float = 0.25
    ):
        super().__init__()
        self.commitment_cost = commitment_cost
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_embeddings, 1 / num_embeddings)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the quantised vectors (B, D, h, w), the loss () and the perplexity ()."""
        z = z.permute(0, 2, 3, 1).contiguous()  # (B, h, w, D)
        flat = z.view(-1, z.shape[-1])  # (N, D)
        weight = self.embedding.weight  # (K, D)
        distances = (flat**2).sum(1, keepdim=True) + (weight**2).sum(1) - 2 * flat @ weight.t()
        indices = distances.argmin(1).unsqueeze(1)
        one_hot = torch.zeros(len(indices), len(weight), device=z.device)
        one_hot.scatter_(1, indices, 1)
        quantized = (one_hot @ weight).view(z.shape)
        codebook_loss = F.mse_loss(quantized, z.detach())
        commitment_loss = F.mse_loss(quantized.detach(), z)
        quantized = z + (quantized - z).detach()
        frequencies = one_hot.mean(0)
        perplexity = torch.exp(-torch.sum(frequencies * torch.log(frequencies + 1e-10)))
        loss = codebook_loss + self.commitment_cost * commitment_loss
        return quantized.permute(0, 3, 1, 2).contiguous(), loss, perplexity


class LibraryQuantizer(nn.Module):
    """The quantiser of vector-quantize-pytorch, with the settings of the document recipe."""

    def __init__(self):
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.quantize = VectorQuantize(
            dim=64, codebook_size=512, commitment_weight=0.25, accept_image_fmap=True
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the quantised vectors, the loss, and a dummy value instead of the perplexity."""
        quantized, indices, loss = self.quantize(z)
        return quantized, loss.sum(), indices.float().mean()


class Autoencoder(nn.Module):
    """The document's encoder and decoder with a different quantiser."""

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        self.encoder = Encoder(*WIDTHS)
        self.quantizer = quantizer
        self.decoder = Decoder(*WIDTHS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return reconstruction (B, 1, H, W), quantisation loss () and perplexity ()."""
        quantized, loss, perplexity = self.quantizer(self.encoder(x))
        return self.decoder(quantized), loss, perplexity


class MonaiVQVAE(nn.Module):
    """MONAI's VQVAE, with as many multiply-adds as the document's model (0.81 GMAC per slice)."""

    def __init__(self):
        super().__init__()
        from monai.networks.nets import VQVAE

        self.net = VQVAE(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            channels=(32, 64),
            num_res_layers=1,
            num_res_channels=32,
            downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)),
            upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
            num_embeddings=512,
            embedding_dim=64,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return reconstruction (B, 1, H, W), quantisation loss () and perplexity ()."""
        reconstruction, loss = self.net(x)
        return reconstruction, loss, self.net.quantizer.perplexity


# The rows of speed.py's table that are trained by `typical_epochs`.
OTHER_IMPLEMENTATIONS = {
    "typical script": lambda: Autoencoder(OneHotQuantizer()),
    "the same with vector-quantize-pytorch": lambda: Autoencoder(LibraryQuantizer()),
    "the same with MONAI's VQVAE": MonaiVQVAE,
}


def typical_epochs(
    build_model: Callable[[], nn.Module],
    slices: SliceDataset,
    device: torch.device,
    batch_size: int,
) -> Iterator[None]:
    """Train as a typical script does, and yield after each epoch.

    The decoded slices are in memory, and a DataLoader makes the batches. The model runs eagerly in
    float32. `.item()` waits for the device at each step.

    Args:
        build_model: a value of OTHER_IMPLEMENTATIONS.
        slices: the training split.
        device: the device to train on.
        batch_size: slices per step.
    """
    images = slices.batch(torch.arange(len(slices)))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images),
        batch_size,
        shuffle=True,
        pin_memory=device.type == "cuda",
    )
    model = build_model().to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    while True:
        total_loss = total_perplexity = 0.0
        for (x,) in loader:
            x = x.to(device)
            optimizer.zero_grad()
            reconstruction, quantization_loss, perplexity = model(x)
            loss = F.mse_loss(reconstruction, x) + quantization_loss
            loss.backward()
            optimizer.step()
            total_loss += loss.item()
            total_perplexity += perplexity.item()
        yield
