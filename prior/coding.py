"""Compress the codes of slices losslessly, with a causal prior and the range coder constriction.

    coder = EntropyCoder(load_prior(run, model))
    streams = coder.encode(codes)             # (N, h, w) -> an array of 32-bit words per slice
    codes = coder.decode(streams)             # the same codes, on every machine
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from modules import VQVAE
from prior.integer import IntegerPrior
from prior.model import CodePrior
from training.checkpoint import load_model
from training.run_names import PRIORS
from utils import UserError, format_command

try:
    import constriction
except ImportError:  # EntropyCoder explains how to install it
    constriction = None

ENCODE_SIZE = 4  # slices per batch, which does not affect results
DECODE_SIZE = 16


def load_prior(run: Path | None, model: VQVAE) -> CodePrior:
    """Return the causal prior of a run; `run` is None for the bundled model, which has none.

    Raises:
        UserError: if there is no causal prior, or if it was trained for another model.
    """
    path = run / PRIORS["causal"] / "best.pt" if run else None
    if path is None or not path.exists():
        command = format_command("train_prior.py", "--model", "causal", "--run", run or "RUN")
        raise UserError(
            f"{run or 'the bundled model'} has no causal prior, which entropy coding needs; train "
            f"one with {command}"
        )
    prior = load_model(CodePrior, path)
    quantizer = model.vector_quantization
    if quantizer.num_codebooks > 1 or not prior.has_codebook(quantizer.embedding.weight.cpu()):
        raise UserError(f"{path} was trained on the codes of a different model; train it again")
    return prior


class EntropyCoder:
    """Encode codes (N, h, w) as streams of about the bits that the prior predicts.

    Attributes:
        grid: (h, w), the only size of grids that the prior can encode.
        fingerprint: a hash of the prior in integers; only the same prior can decode the streams.

    Raises:
        UserError: if constriction is not installed, or see `IntegerPrior`.
    """

    def __init__(self, prior: CodePrior):
        if constriction is None:
            raise UserError(
                "constriction, the range coder, is not installed; run pip install constriction"
            )
        self.prior = IntegerPrior(prior)
        self.grid = self.prior.grid
        self.fingerprint = self.prior.fingerprint()
        self._categorical = constriction.stream.model.Categorical(perfect=False)

    def encode(self, codes: np.ndarray) -> list[np.ndarray]:
        """Encode codes (N, h, w) as one array of uint32 words per slice."""
        streams = []
        for batch in torch.from_numpy(codes.astype(np.int64)).split(ENCODE_SIZE):
            for slice_codes, frequencies in zip(batch, self.prior(batch), strict=True):
                encoder = constriction.stream.queue.RangeEncoder()
                symbols = slice_codes.flatten().numpy().astype(np.int32)
                encoder.encode(symbols, self._categorical, _counts(frequencies.flatten(0, 1)))
                streams.append(encoder.get_compressed())
        return streams

    def decode(self, streams: list[np.ndarray]) -> np.ndarray:
        """Decode the result of `encode` to codes (N, h, w) int64.

        Raises:
            ValueError: if a stream is damaged. Not all damage is detected.
        """
        decoded = []
        for start in range(0, len(streams), DECODE_SIZE):
            batch = streams[start : start + DECODE_SIZE]
            decoders = [constriction.stream.queue.RangeDecoder(words) for words in batch]

            def choose(frequencies: Tensor, row: int, column: int, decoders=decoders) -> Tensor:
                symbols = []
                for decoder, counts in zip(decoders, _counts(frequencies), strict=True):
                    try:
                        symbols.append(decoder.decode(self._categorical, counts[None])[0])
                    except AssertionError as error:
                        raise ValueError("a stream of codes is damaged") from error
                return torch.tensor(symbols, dtype=torch.long)

            progress = partial(tqdm, desc=f"decoding {len(batch)} slices", unit=" codes", leave=False)
            decoded.append(self.prior.decode(len(batch), choose, progress).numpy())
            if not all(decoder.maybe_exhausted() for decoder in decoders):
                raise ValueError("a stream of codes is longer than expected")
        return np.concatenate(decoded)


def _counts(frequencies: Tensor) -> np.ndarray:
    """Return frequencies (M, K) as constriction's Categorical expects them, without rounding.

    It adds 1 to each of K numbers whose sum is 2^24 - K, so their scale is 1. All their sums are
    integers up to 2^24, which float32 represents exactly.
    """
    return (frequencies - 1).numpy().astype(np.float32)
