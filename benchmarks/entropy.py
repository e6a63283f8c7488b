"""Compress the codes of slices losslessly, by arithmetic coding with the run's causal prior.

    streams = encode(prior, codes)            # (N, h, w) -> an array of 32-bit words per slice
    codes = decode(prior, streams)            # the same codes, on the same machine

The coder is the range coder of the package constriction. Encoder and decoder must compute exactly
the same probabilities, so they process the same batches of slices and visit the codes in the same
order. On a different machine, or with a different number of threads or version of torch, the
probabilities may be rounded differently, and the decoded codes would be wrong.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from prior.model import CodePrior
from utils import UserError

try:
    import constriction
except ImportError:  # check_installed() explains how to install it
    constriction = None

BATCH_SIZE = 32  # slices per batch; encoder and decoder must use the same value


def check_installed() -> None:
    """Raise UserError if the arithmetic coder is not installed."""
    if constriction is None:
        raise UserError(
            "constriction, the arithmetic coder, is not installed; run pip install -r "
            "benchmarks/requirements.txt"
        )


def encode(prior: CodePrior, codes: Tensor) -> list[np.ndarray]:
    """Encode codes (N, h, w) as one array of 32-bit words per slice."""
    family = constriction.stream.model.Categorical(perfect=False)
    streams = []
    for batch in codes.split(BATCH_SIZE):
        encoders = [constriction.stream.queue.RangeEncoder() for _ in batch]

        def choose(logits: Tensor, row: int, column: int, batch=batch, encoders=encoders) -> Tensor:
            symbols = batch[:, row, column]
            distributions = probabilities(logits)
            for encoder, symbol, p in zip(encoders, symbols.tolist(), distributions, strict=True):
                encoder.encode(np.array([symbol], dtype=np.int32), family, p[None])
            return symbols

        visit_codes(prior, len(batch), choose, "encoding")
        streams += [encoder.get_compressed() for encoder in encoders]
    return streams


def decode(prior: CodePrior, streams: list[np.ndarray]) -> Tensor:
    """Decode the result of `encode` to codes (N, h, w) int64 on the prior's device."""
    family = constriction.stream.model.Categorical(perfect=False)
    decoded = []
    for start in range(0, len(streams), BATCH_SIZE):
        batch = streams[start : start + BATCH_SIZE]
        decoders = [constriction.stream.queue.RangeDecoder(words) for words in batch]

        def choose(logits: Tensor, row: int, column: int, decoders=decoders) -> Tensor:
            symbols = []
            for decoder, p in zip(decoders, probabilities(logits), strict=True):
                symbols.append(decoder.decode(family, p[None])[0])
            return torch.tensor(symbols, dtype=torch.long, device=logits.device)

        decoded.append(visit_codes(prior, len(batch), choose, "decoding"))
    return torch.cat(decoded)


def probabilities(logits: Tensor) -> np.ndarray:
    """Return the softmax of logits (B, K) as float32, computed in float64 on the CPU."""
    return logits.cpu().double().softmax(1).float().numpy()


def visit_codes(prior: CodePrior, count: int, choose: Callable, verb: str) -> Tensor:
    """Choose each code of `count` slices in reading order, and return the codes.

    The slices' positions in their volumes are treated as unknown, because a decoder would know them
    only if they were transmitted, too.
    """
    device = prior.embedding.device
    position = torch.full((count,), torch.nan, device=device)
    view = torch.zeros(count, dtype=torch.long, device=device)
    progress = functools.partial(tqdm, desc=f"{verb} {count} slices", unit=" codes")
    return prior.decode(position, view, choose, progress)
