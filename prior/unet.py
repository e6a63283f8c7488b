"""The network of `prior.flow`: a U-Net on the grid of latents."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 8  # number of sines, and of cosines, that encode a time or a position
NUM_GROUPS = 4  # groups of channels that GroupNorm normalises separately
NUM_HEADS = 4  # attention heads


class UNet(nn.Module):
    """Map noisy components (B, C, h, w) to an output (B, D, h, w); h and w may be odd.

    Each grid has half the height and width of the previous one. All but the two finest have
    attention, so that distant parts of a slice fit together; on those two, it would be too slow.

    Args:
        inputs: C, number of input channels.
        outputs: D, number of output channels.
        grid: h and w.
        widths: number of channels at each grid, from fine to coarse; multiples of NUM_GROUPS.
    """

    def __init__(self, inputs: int, outputs: int, grid: tuple[int, int], widths: tuple[int, ...]):
        super().__init__()
        coarsest = widths[-1]
        self.condition = nn.Sequential(
            nn.Linear(4 * FREQUENCIES + 1, coarsest),
            nn.SiLU(),
            nn.Linear(coarsest, coarsest),
            nn.SiLU(),
        )
        self.first = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.places = nn.Parameter(torch.zeros(widths[0], *grid))  # offsets by location
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        previous = widths[0]
        for level, width in enumerate(widths):
            self.down.append(Block(previous, width, coarsest, attends=level > 1))
            self.up.insert(0, Block(2 * width, previous, coarsest, attends=level > 1))
            previous = width
        self.middle = Block(coarsest, coarsest, coarsest, attends=True)
        self.norm = nn.GroupNorm(NUM_GROUPS, widths[0])
        self.last = zero_init(nn.Conv2d(widths[0], outputs, 1))

    def forward(self, x: Tensor, time: Tensor, position: Tensor, attend: bool = True) -> Tensor:
        """Compute the output, (B, D, h, w).

        Args:
            x: noisy components, (B, C, h, w).
            time: times, (B,), 0 to 1.
            position: positions of the slices, (B,), 0 to 1; NaN if unknown.
            attend: False: without the effect of attention between places, for guidance.
        """
        x = self.first(x) + self.places  # (B, widths[0], h, w)
        is_known = (~position.isnan()).float()[:, None]
        encodings = [encode_scalar(time), encode_scalar(position.nan_to_num()) * is_known, is_known]
        condition = self.condition(torch.cat(encodings, 1))  # (B, widths[-1])
        skips = []
        for level, block in enumerate(self.down):
            if level:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            x = block(x, condition, attend)  # (B, widths[level], ...)
            skips.append(x)
        x = self.middle(x, condition, attend)
        for block in self.up:
            skip = skips.pop()
            if x.shape[-2:] != skip.shape[-2:]:
                x = F.interpolate(x, skip.shape[-2:])
            x = block(torch.cat([x, skip], 1), condition, attend)
        return self.last(F.silu(self.norm(x)))  # (B, D, h, w)


class Block(nn.Module):
    """A residual block, modulated by the condition (FiLM, arXiv 1709.07871), then attention."""

    def __init__(self, inputs: int, outputs: int, condition: int, attends: bool):
        super().__init__()
        self.norm1 = nn.GroupNorm(NUM_GROUPS, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(condition, 2 * outputs)
        self.norm2 = nn.GroupNorm(NUM_GROUPS, outputs)
        self.conv2 = zero_init(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs) if attends else None

    def forward(self, x: Tensor, condition: Tensor, attend: bool) -> Tensor:
        # x: (B, inputs, h, w); condition: (B, condition)
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        x = self.skip(x) + h  # (B, outputs, h, w)
        return x if self.attention is None else self.attention(x, attend)


class Attention(nn.Module):
    """Residual self-attention over all positions of a grid."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(NUM_GROUPS, channels)
        self.queries_keys_values = nn.Conv2d(channels, 3 * channels, 1)
        self.project = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, attend: bool) -> Tensor:  # (B, channels, h, w)
        qkv = self.queries_keys_values(self.norm(x)).flatten(2)  # (B, 3 channels, h w)
        qkv = qkv.unflatten(1, (3, NUM_HEADS, -1)).mT  # (B, 3, heads, h w, channels / heads)
        queries, keys, values = qkv.unbind(1)
        attended = F.scaled_dot_product_attention(queries, keys, values) if attend else values
        return x + self.project(attended.mT.flatten(1, 2).unflatten(2, x.shape[-2:]))


def encode_scalar(values: Tensor) -> Tensor:
    """Encode numbers from 0 to 1 as sines and cosines: (B,) -> (B, 2 FREQUENCIES).

    The shortest period, about 0.1, spans several slices of most volumes, as neighbours are similar.
    """
    frequencies = math.pi * 1.5 ** torch.arange(FREQUENCIES, device=values.device)
    angles = values[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """Set weights and biases to 0, so that a residual branch has no effect at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
