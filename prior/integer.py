"""Compute the frequencies of codes in integers, which are the same on every machine.

    integer_prior = IntegerPrior(prior)                  # from a trained CodePrior
    frequencies = integer_prior(codes)                   # all codes at once, to encode them
    codes = integer_prior.decode(count, choose)          # code by code

An arithmetic decoder needs exactly the probabilities of the encoder, but those of a `CodePrior`
are rounded differently on other machines, with other numbers of threads and other batch sizes.
Here, all weights and activations are integers, as in Balle et al. 2019, Integer Networks for Data
Compression with Latent-Variable Models. They are stored as float64, in which every product and
partial sum is an exact integer below 2^53, so that the order of summation does not matter.
Everything else is elementwise, and exact: clamping, rounding, and scaling by powers of two.

A CPU always computes the frequencies, because not every accelerator has float64.
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

EXACT = 2**53  # float64 is exact for integers up to this magnitude
FRACTION = 16  # bits: activations are integers in units of 2^-16
LIMIT = 2**27  # inputs of layers are clamped to +- this value, which is 2048
WEIGHT_BITS = 20  # weights are integers in units of 2^-20, or more if sums could exceed EXACT
TOTAL = 2**24  # sum of the frequencies, as in the range coder of the package constriction
EXP_STEP = 8  # bits: probabilities are computed from logits in units of 2^-8
EXP_BITS = 22  # of the largest entry of the table of exp; K < 2^16 keeps products below 2^63


class IntegerLayer(nn.Module):
    """Compute floor((W x + b) / 2^bits), clamped, with integers W, x and b.

    Args:
        weight: (out_channels, in_channels) or (out_channels, in_channels, rows, columns).
        bias: (out_channels,), or None.

    The input is (B, in_channels) or (B, in_channels, _, _), and is padded like a `CausalConv2d`'s.
    """

    pad = CausalConv2d.pad

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        bits = WEIGHT_BITS + 1
        largest_sum = math.inf
        while largest_sum > EXACT:
            bits -= 1
            integers = to_integers(weight, bits)
            offsets = to_integers(bias, FRACTION + bits)
            largest_sum = (integers.abs().flatten(1).sum(1) * LIMIT + offsets.abs()).max()
        self.register_buffer("weight", integers)
        self.register_buffer("bias", offsets)
        self.register_buffer("bits", torch.tensor(bits))
        self.scale = 2.0**-bits
        self.in_channels = weight.shape[1]
        self.margin = weight.shape[-1] // 2 if weight.ndim == 4 else 0

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(-LIMIT, LIMIT)
        if x.shape[2:] in ((), self.weight.shape[2:]):  # one position: faster than F.conv2d
            sums = F.linear(x.flatten(1), self.weight.flatten(1), self.bias)
            sums = sums.view(*sums.shape, *(1 for _ in x.shape[2:]))
        else:
            sums = F.conv2d(x, self.weight, self.bias)
        return (sums * self.scale).floor().clamp(-LIMIT, LIMIT)


class IntegerPrior(CodePrior):
    """A trained `CodePrior` in integers, for slices of unknown position that are not mirrored.

    Raises:
        UserError: if weights are not finite or extremely large, or if there are too many codes.
    """

    def __init__(self, prior: CodePrior):
        super().__init__(**prior.arguments)
        self.load_state_dict(prior.state_dict())
        self.eval().requires_grad_(False)
        for name, layer in list(self.named_modules()):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                weight = layer.weight * getattr(layer, "mask", 1)
                self.set_submodule(name, IntegerLayer(weight, layer.bias))
        if len(self.bias) > 1 << 16:
            raise UserError(f"the model has {len(self.bias):,} codes; expected at most 65,536")
        self.similarity = IntegerLayer(self.embedding, self.bias)
        self.bias = None
        for tensor in (self.embedding, self.places, self.views):
            tensor.data = to_integers(tensor, FRACTION)
        self.register_buffer("exp", exp_table())

    @torch.no_grad()
    def forward(self, codes: Tensor) -> Tensor:
        """Compute the frequencies of each code, given the codes before it.

        Args:
            codes: (B, h, w) int64.

        Returns:
            (B, h, w, K) int64, at least 1, with sums of TOTAL.
        """
        return super().forward(codes, *_unknown(len(codes)))

    def decode(self, count: int, choose: Callable, progress: Callable = iter) -> Tensor:
        """Choose the codes (count, h, w) as `CodePrior.decode` does, from frequencies (B, K)."""
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
    """Round values to integers in units of 2^-bits, as float64.

    Raises:
        UserError: if values are not finite or extremely large.
    """
    integers = (values.detach().double() * 2.0**bits).round()
    if not bool((integers.abs() <= EXACT).all()):
        raise UserError("weights of the causal prior are not finite or too large; train it again")
    return integers


def exp_table() -> Tensor:
    """Return round(2^EXP_BITS exp(-i / 2^EXP_STEP)) until it is 0, as int64.

    `math.exp` differs between platforms in the last bit; `decimal` is correctly rounded everywhere.
    """
    context = decimal.Context(prec=40)
    table = []
    while not table or table[-1] > 0:
        power = context.divide(decimal.Decimal(-len(table)), decimal.Decimal(2**EXP_STEP))
        table.append(round(context.multiply(context.exp(power), decimal.Decimal(2**EXP_BITS))))
    return torch.tensor(table)


def _unknown(count: int) -> tuple[Tensor, Tensor]:
    """Return unknown positions and unmirrored views; other positions need cosines, not exact."""
    return torch.full((count,), torch.nan, dtype=torch.float64), torch.zeros(count).long()
