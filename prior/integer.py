"""Compute the frequencies of codes in integers, which are the same on every machine.

    integer_prior = IntegerPrior(prior)                  # from a trained CodePrior
    frequencies = integer_prior(codes)                   # all codes at once, to encode them
    codes = integer_prior.decode(count, choose)          # code by code

A decoder needs exactly the probabilities of the encoder, but floating-point sums depend on the
machine, the number of threads and the batch size. Here, weights and activations are integers (Balle
et al. 2019, Integer Networks for Data Compression with Latent-Variable Models). They are stored as
float64, in which each product and partial sum is an exact integer of at most 2^53, in any order of
summation. The other operations are elementwise and exact: rounding, and scaling by powers of two.
It is always computed on the CPU, because not every accelerator has float64.
"""

from __future__ import annotations

import decimal
import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.model import CausalConv2d, CodePrior
from utils import UserError

EXACT = 2**53  # float64 represents all integers up to this magnitude
FRACTION = 16  # bits: activations are in units of 2^-16
LIMIT = 2**27  # activations are clamped to +- 2^27, which is 2048
WEIGHT_BITS = 20  # weights are in units of 2^-20, or larger units if a sum could exceed EXACT
EXP_STEP = 8  # bits: differences of logits are rounded to units of 2^-8
EXP_BITS = 22  # bits of exp(0); with K <= 2^16, products in `compare` stay below 2^63
TOTAL = 2**24  # sum of the frequencies


class IntegerLayer(nn.Module):
    """Compute floor((W x + b) / 2^bits) in integers, for x (B, in_channels) or padded (B, _, _, _).

    Args:
        weight: (out_channels, in_channels) or (out_channels, in_channels, rows, columns).
        bias: (out_channels,).
    """

    pad = CausalConv2d.pad

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.in_channels, self.margin = weight.shape[1], weight.shape[-1] // 2
        largest_sum, bits = math.inf, WEIGHT_BITS + 1
        while largest_sum > EXACT:  # for the worst input
            bits -= 1
            integers, offsets = to_integers(weight, bits), to_integers(bias, FRACTION + bits)
            largest_sum = (integers.abs().flatten(1).sum(1) * LIMIT + offsets.abs()).max()
        self.register_buffer("weight", integers)
        self.register_buffer("bias", offsets)
        self.register_buffer("bits", torch.tensor(bits))
        self.scale = 2.0**-bits

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(-LIMIT, LIMIT)
        if x.shape[2:] in ((), self.weight.shape[2:]):  # one position, faster than with conv2d
            sums = F.linear(x.flatten(1), self.weight.flatten(1), self.bias)
            sums = sums.view(*sums.shape, *(1,) * (x.ndim - 2))
        else:
            sums = F.conv2d(x, self.weight, self.bias)
        return (sums * self.scale).floor().clamp(-LIMIT, LIMIT)


class IntegerPrior(CodePrior):
    """A trained `CodePrior` in integers, for unmirrored slices of unknown position.

    Raises:
        UserError: if weights are not finite or too large, or if there are more than 65,536 codes.
    """

    def __init__(self, prior: CodePrior):
        super().__init__(**prior.arguments)
        self.load_state_dict(prior.state_dict())
        self.eval().requires_grad_(False)
        if len(self.bias) > 1 << 16:
            raise UserError(f"the model has {len(self.bias):,} codes; expected at most 65,536")
        for name, layer in list(self.named_modules()):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                weight = layer.weight * getattr(layer, "mask", 1)
                bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
                self.set_submodule(name, IntegerLayer(weight, bias))
        self.similarity = IntegerLayer(self.embedding, self.bias)
        self.bias = None
        for tensor in (self.embedding, self.places, self.views):
            tensor.data = to_integers(tensor, FRACTION)
        self.register_buffer("exp", exp_table())

    @torch.no_grad()
    def forward(self, codes: Tensor) -> Tensor:
        """Compute (B, h, w, K) int64 frequencies of codes (B, h, w), with a sum over K of TOTAL."""
        return super().forward(codes, *_unknown(len(codes)))

    def decode(self, count: int, choose: Callable, progress: Callable = iter) -> Tensor:
        """Choose the codes of `count` slices as `CodePrior.decode`, from frequencies (B, K)."""
        return super().decode(*_unknown(count), choose, progress)

    def compare(self, vectors: Tensor) -> Tensor:  # (B, h, w, D) -> (B, h, w, K) int64
        logits = self.similarity(vectors.flatten(0, 2)).view(*vectors.shape[:3], -1)
        steps = ((logits.amax(-1, keepdim=True) - logits) * 2.0 ** (EXP_STEP - FRACTION)).floor()
        cumulative = self.exp[steps.clamp(max=len(self.exp) - 1).long()].cumsum(-1)
        bounds = cumulative * (TOTAL - logits.shape[-1]) // cumulative[..., -1:]
        return F.pad(bounds, (1, 0)).diff(dim=-1) + 1

    def fingerprint(self) -> str:
        """Return a hash of all integers, which determine the frequencies."""
        content = hashlib.sha256()
        for tensor in self.state_dict().values():
            content.update(tensor.long().numpy().astype("<i8").tobytes())
        return content.hexdigest()[:16]


def to_integers(values: Tensor, bits: int) -> Tensor:
    """Round values to integers in units of 2^-bits, as float64; UserError if that is impossible."""
    integers = (values.detach().double() * 2.0**bits).round()
    if not bool((integers.abs() <= EXACT).all()):
        raise UserError("weights of the causal prior are not finite or too large; train it again")
    return integers


def exp_table() -> Tensor:
    """Return 2^EXP_BITS exp(-i / 2^EXP_STEP), rounded to int64, for all i up to the first 0.

    `decimal` rounds correctly on every platform, whereas `math.exp` differs in the last bit.
    """
    context, table = decimal.Context(prec=40), [2**EXP_BITS]
    while table[-1] > 0:
        power = context.divide(decimal.Decimal(-len(table)), decimal.Decimal(2**EXP_STEP))
        table.append(round(context.multiply(context.exp(power), decimal.Decimal(2**EXP_BITS))))
    return torch.tensor(table)


def _unknown(count: int) -> tuple[Tensor, Tensor]:
    """Return unknown positions and unmirrored views. (Known positions would need cosines.)"""
    return torch.full((count,), torch.nan, dtype=torch.float64), torch.zeros(count).long()
