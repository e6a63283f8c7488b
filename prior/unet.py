"""The network of `prior.flow`: a U-Net that predicts velocities on the grid of latents."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 16  # sines, and cosines, that encode a time or a position


class UNet(nn.Module):
    """Predict velocities (B, C, h, w) from components of the same shape, folded 2 x 2.

    Args:
        components: C.
        grid: h and w.
        channels: width of the network at the folded grid, and at each of the grids below, which
            have half the size of the previous one. All grids but the first have attention.
    """

    def __init__(self, components: int, grid: tuple[int, int], channels: tuple[int, ...]):
        super().__init__()
        width = channels[-1]
        self.condition = nn.Sequential(
            nn.Linear(4 * FREQUENCIES + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.places = nn.Parameter(torch.zeros(channels[0], -(-grid[0] // 2), -(-grid[1] // 2)))
        self.first = nn.Conv2d(4 * components, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        inputs = channels[0]
        for level, outputs in enumerate(channels):
            self.down.append(Block(inputs, outputs, width, attends=level > 0))
            self.up.insert(0, Block(2 * outputs, inputs, width, attends=level > 0))
            inputs = outputs
        self.middle = Block(inputs, inputs, width, attends=True)
        self.norm = nn.GroupNorm(8, channels[0])
        self.last = zero_init(nn.Conv2d(channels[0], 4 * components, 1))

    def forward(self, x: Tensor, time: Tensor, position: Tensor) -> Tensor:
        """Predict velocities at times (B,) and positions (B,), 0 to 1; NaN: unknown position."""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
        x = self.first(F.pixel_unshuffle(x, 2)) + self.places  # (B, channels[0], h/2, w/2)
        known = ~position.isnan()[:, None]
        encodings = [encode_scalar(time), encode_scalar(position.nan_to_num()) * known, known]
        condition = self.condition(torch.cat(encodings, 1))  # (B, channels[-1])
        skips = []
        for level, block in enumerate(self.down):
            if level:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            x = block(x, condition)
            skips.append(x)
        x = self.middle(x, condition)
        for block in self.up:
            skip = skips.pop()
            if x.shape[-2:] != skip.shape[-2:]:
                x = F.interpolate(x, skip.shape[-2:])
            x = block(torch.cat([x, skip], 1), condition)
        x = self.last(F.silu(self.norm(x)))
        return F.pixel_shuffle(x, 2)[..., :height, :width]


class Block(nn.Module):
    """A residual block whose second normalisation is modulated by the condition (arXiv 1709.07871).

    If `attends` is true, self-attention over all positions follows.
    """

    def __init__(self, inputs: int, outputs: int, condition: int, attends: bool):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(condition, 2 * outputs)
        self.norm2, self.conv2 = (
            nn.GroupNorm(8, outputs),
            zero_init(nn.Conv2d(outputs, outputs, 3, padding=1)),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.norm3 = self.qkv = self.project = None
        if attends:
            self.norm3, self.qkv = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, 3 * outputs, 1)
            self.project = zero_init(nn.Conv2d(outputs, outputs, 1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # (B, inputs, h, w), (B, condition)
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        x = self.skip(x) + h  # (B, outputs, h, w)
        if self.qkv is None:
            return x
        heads = x.shape[1] // 32
        qkv = self.qkv(self.norm3(x)).flatten(2).unflatten(1, (3, heads, -1)).mT
        h = F.scaled_dot_product_attention(*qkv.unbind(1))  # (B, heads, h w, 32)
        return x + self.project(h.mT.flatten(1, 2).unflatten(2, x.shape[-2:]))


def encode_scalar(values: Tensor) -> Tensor:
    """Encode numbers from 0 to 1 as sines and cosines: (B,) -> (B, 2 FREQUENCIES)."""
    frequencies = math.pi * 1.5 ** torch.arange(FREQUENCIES, device=values.device)
    angles = values[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """Set weights and bias to 0, so that a residual branch has no effect at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
