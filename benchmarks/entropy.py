"""How many bits a run's codes need, if what is likely given the codes before it costs less: an estimate, no coder.

A small causal network learns to predict each code from those above it and left of it (masked convolutions as in
PixelCNN, arXiv 1601.06759) on the codes of the training split; the mean of -log2 p over the codes of the other split
is the estimate. Its weights are part of the decoder and are not counted, as the model's are not. rate_distortion.py
uses it for --entropy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 1000  # of the context model's training: some minutes of a CPU
POSITIONS = 1024  # of a batch's, drawn at random, that a step predicts: K logits each are most of the work


class CausalConv2d(nn.Conv2d):
    """Sees, of each position's neighbours, those above and to the left; itself only where `itself` says so."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int, itself: bool):
        super().__init__(channels, out_channels, kernel_size, padding=kernel_size // 2)
        mask = torch.zeros(kernel_size**2)
        mask[: kernel_size**2 // 2 + itself] = 1
        self.register_buffer("mask", mask.view(kernel_size, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class ContextModel(nn.Module):
    """Codes (B, h, w) -> logits (B, h, w, K) of each, given those before it in reading order."""

    def __init__(self, embedding: Tensor, frequencies: Tensor, channels: int = 96, num_layers: int = 3):
        """embedding: (K, D), of the run's codebook. frequencies: (K,), of the training codes; predicted at first."""
        super().__init__()
        scaled = (embedding - embedding.mean(0)) / embedding.std()
        self.register_buffer("embedding", scaled)
        self.first = CausalConv2d(scaled.shape[1], channels, 7, itself=False)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.GELU(), CausalConv2d(channels, channels, 3, itself=True), nn.GELU(), nn.Conv2d(channels, channels, 1)
            )
            for _ in range(num_layers)
        )
        self.last = nn.Conv2d(channels, scaled.shape[1], 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.codes = nn.Linear(scaled.shape[1], len(scaled))
        self.codes.weight.data.copy_(scaled)
        self.codes.bias.data.copy_(((frequencies + 0.1) / (frequencies + 0.1).sum()).log())

    def forward(self, codes: Tensor) -> Tensor:
        return self.codes(self.predict(codes))

    def predict(self, codes: Tensor) -> Tensor:
        """What the codes before it tell of each, (B, h, w, D): all but the last layer."""
        x = self.first(self.embedding[codes].movedim(-1, 1))
        for layer in self.layers:
            x = x + layer(x)
        return self.last(F.gelu(x)).movedim(1, -1)

    def bits(self, codes: Tensor) -> Tensor:
        """-log2 p of each code, (B, h, w)."""
        return F.cross_entropy(self(codes).movedim(-1, 1), codes, reduction="none") / math.log(2)


def fit(codes: Tensor, embedding: Tensor, steps: int, batch_size: int = 4, seed: int = 0) -> ContextModel:
    """Train on codes (N, h, w): AdamW 2e-3, warm-up, cosine to 0."""
    torch.manual_seed(seed)
    frequencies = torch.bincount(codes.flatten(), minlength=len(embedding)).float()
    model = ContextModel(embedding, frequencies).to(codes.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = codes[torch.randint(len(codes), (batch_size,))]
        chosen = torch.randperm(batch.numel(), device=codes.device)[:POSITIONS]
        loss = F.cross_entropy(model.codes(model.predict(batch).flatten(0, 2)[chosen]), batch.flatten()[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def encode(model: nn.Module, data) -> Tensor:
    """The codes of a dataset.Slices and of its mirror images: (N, 1, H, W) -> (4 N, h, w)."""
    device = next(model.parameters()).device
    batches = [data.batch(indices).to(device) for indices in torch.arange(len(data)).split(16)]
    return torch.cat([model.encode(images.flip(axes)) for images in batches for axes in ((), (-1,), (-2,), (-1, -2))])


def interleave(codes: Tensor, num_embeddings: int) -> Tensor:
    """Codes (N, h, w, n) of n codebooks as (N, h, w n) of one with n K codes, a position's side by side."""
    offset = torch.arange(codes.shape[-1], device=codes.device) * num_embeddings
    return (codes + offset).flatten(2)


def estimate(model: nn.Module, train, codes: Tensor) -> tuple[float, int]:
    """Bits a position of `codes` (as model.encode gives them), and the parameters of what predicts them.

    It is fitted to the codes of `train`, a dataset.Slices.
    """
    quantizer = model.vector_quantization
    train_codes, table = encode(model, train), quantizer.embedding.weight.detach()
    if (n := quantizer.num_codebooks) > 1:
        tables = [table]
        while quantizer.num_codebooks > 1:
            quantizer = quantizer.rest
            tables.append(quantizer.embedding.weight.detach())
        # A one-hot of the codebook, by which a code says whose turn is next.
        which = torch.eye(n, device=table.device).repeat_interleave(len(table), 0)
        table = torch.cat([torch.cat([each / each.std() for each in tables]), which], 1)
        train_codes, codes = (interleave(each, quantizer.num_embeddings) for each in (train_codes, codes))
    context = fit(train_codes, table, STEPS)
    with torch.no_grad():
        bits = torch.cat([context.bits(batch).flatten() for batch in codes.split(4)]).mean()
    return float(bits) * n, sum(p.numel() for p in context.parameters())
