"""A run's codes as bits, and back: arithmetic coding under the run's prior (model.CodePrior).

    streams = encode(prior, codes)            # (N, h, w) -> for each slice its own array of 32-bit words
    codes = decode(prior, streams)            # the same codes, on the same machine

The coder is constriction's range coder. Encoder and decoder must compute equal probabilities to the last bit: both go
through the codes in the same order, by the same steps, in batches of the same slices. Another machine, number of
threads or version of torch may round otherwise, and then decodes nonsense.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prior.model import CodePrior
from utils import UserError

try:
    import constriction
except ImportError:  # check_installed() says what to install
    constriction = None

BATCH = 32


def check_installed() -> None:
    if constriction is None:
        raise UserError(
            "constriction, the arithmetic coder, is missing: pip install -r benchmarks/requirements.txt"
        )


def encode(prior: CodePrior, codes: Tensor) -> list[np.ndarray]:
    """Each slice's codes, of (N, h, w), as 32-bit words."""
    family = constriction.stream.model.Categorical(perfect=False)
    streams = []
    for some in codes.split(BATCH):
        pyramid = prior.to_grids(some)
        encoders = [constriction.stream.queue.RangeEncoder() for _ in some]

        def choose(
            number, logits: Tensor, row: int, column: int, pyramid=pyramid, encoders=encoders
        ) -> Tensor:
            known = pyramid[number][:, row, column]
            for encoder, symbol, chance in zip(
                encoders, known.tolist(), _probabilities(logits), strict=True
            ):
                encoder.encode(np.array([symbol], dtype=np.int32), family, chance[None])
            return known

        _walk(prior, len(some), choose, "encoding")
        streams += [encoder.get_compressed() for encoder in encoders]
    return streams


def decode(prior: CodePrior, streams: list[np.ndarray]) -> Tensor:
    """What `encode` was given, (N, h, w) int64 on the prior's device."""
    family = constriction.stream.model.Categorical(perfect=False)
    decoded = []
    for start in range(0, len(streams), BATCH):
        decoders = [
            constriction.stream.queue.RangeDecoder(words)
            for words in streams[start : start + BATCH]
        ]

        def choose(number, logits: Tensor, row: int, column: int, decoders=decoders) -> Tensor:
            chances = _probabilities(logits)
            symbols = [
                d.decode(family, chance[None])[0]
                for d, chance in zip(decoders, chances, strict=True)
            ]
            return torch.tensor(symbols, dtype=torch.long, device=logits.device)

        decoded.append(_walk(prior, len(decoders), choose, "decoding"))
    return torch.cat(decoded)


def _probabilities(logits: Tensor) -> np.ndarray:
    """(B, K) float32."""
    return logits.cpu().double().softmax(1).float().numpy()


def _walk(prior: CodePrior, count: int, choose, what: str) -> Tensor:
    """Through the codes of `count` slices; where in its volume each lies is not told: it would have to be sent."""
    device = prior.grids[-1].embedding.device
    position, view = (
        torch.full((count,), torch.nan, device=device),
        torch.zeros(count, dtype=torch.long, device=device),
    )
    return prior.decode(
        position, view, choose, lambda steps: tqdm(steps, f"{what} {count} slices", unit=" patches")
    )
