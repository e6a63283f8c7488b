"""Compress the codes of slices losslessly, with a causal prior and a range coder.

    coder = EntropyCoder(load_prior(run, model))
    arrays = coder.encode(codes, path)        # of about the number of bits that the prior predicts
    codes = coder.decode(arrays, path)        # the same codes, on every machine

The positions of the slices are treated as unknown, because the decoder does not know them.
"""

from __future__ import annotations

import hashlib
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from modules import VQVAE
from mri.nifti import MAX_VOXELS
from prior.integer import IntegerPrior
from prior.model import CodePrior
from training.checkpoint import load_model
from training.run_names import PRIORS
from utils import DataError, UserError, format_command

try:
    import constriction
except ImportError:  # `check_installed` explains how to install it
    constriction = None

BATCH_SIZE = 16  # slices per batch; does not affect results


def check_installed() -> None:
    """Raise UserError if constriction is not installed."""
    if constriction is None:
        raise UserError(
            "constriction, the range coder, is not installed; run pip install constriction"
        )


def load_prior(run: Path | None, model: VQVAE) -> CodePrior:
    """Return the causal prior of a run; `run` is None for the bundled model.

    Raises:
        UserError: if there is no causal prior for this model, or several codebooks.
    """
    if model.vector_quantization.num_codebooks > 1:
        raise UserError("entropy coding needs a model that was trained with --num-codebooks 1")
    path = Path(run or ".") / PRIORS["causal"] / "best.pt"
    if run is None or not path.exists():
        command = format_command("train_prior.py", "--model", "causal", "--run", run or "RUN")
        raise UserError(
            f"{run or 'the bundled model'} has no causal prior, which entropy coding needs; train "
            f"one: {command}"
        )
    prior = load_model(CodePrior, path)
    if not prior.has_codebook(model.vector_quantization.embedding.weight.cpu()):
        raise UserError(f"{path} was trained on the codes of a different model; train it again")
    return prior


class EntropyCoder:
    """Encode and decode codes (N, h, w). Errors name the path of the file of codes.

    Raises:
        UserError: if constriction is not installed, or if `IntegerPrior` cannot use the prior.
    """

    def __init__(self, prior: CodePrior):
        check_installed()
        self.prior = IntegerPrior(prior)
        self.fingerprint = self.prior.fingerprint()
        self._categorical = constriction.stream.model.Categorical(perfect=False)

    def encode(self, codes: np.ndarray, path: Path) -> dict[str, object]:
        """Encode codes.

        Returns:
            "words": the 32-bit words of all slices; "lengths": the number of words per slice;
            "prior": a hash of the prior; "checksum": a hash of the codes.

        Raises:
            DataError: if the prior is for grids of another size.
        """
        if codes.shape[1:] != self.prior.grid:
            found, expected = (" x ".join(map(str, s)) for s in (codes.shape[1:], self.prior.grid))
            raise DataError(
                f"{path} cannot be written: the slices have {found} codes, but the causal prior is "
                f"for {expected}; add --resize, or omit --entropy-coded"
            )
        streams = []
        for slice_codes in torch.from_numpy(codes.astype(np.int64)).split(1):
            encoder = constriction.stream.queue.RangeEncoder()
            symbols = slice_codes.flatten().numpy().astype(np.int32)
            encoder.encode(symbols, self._categorical, _counts(self.prior(slice_codes)))
            streams.append(encoder.get_compressed())
        return {
            "prior": self.fingerprint,
            "words": np.concatenate(streams).astype("<u4"),
            "lengths": np.array(list(map(len, streams)), "<u4"),
            "checksum": _checksum(codes),
        }

    def decode(self, arrays: dict[str, np.ndarray], path: Path) -> np.ndarray:
        """Decode the result of `encode` to codes (N, h, w) uint16.

        Raises:
            DataError: if they were encoded with another prior, or are damaged.
            KeyError: if an array is missing.
        """
        words, lengths = arrays["words"], arrays["lengths"]
        if str(arrays["prior"]) != self.fingerprint:
            raise DataError(
                f"{path} was encoded with causal prior {arrays['prior']}; this run's is "
                f"{self.fingerprint}. Use --run to name the run that made the file"
            )
        damaged = DataError(f"{path} is damaged: its codes cannot be decoded; export it again")
        if (words.dtype, words.ndim, lengths.dtype, lengths.ndim) != ("<u4", 1, "<u4", 1):
            raise damaged
        num_codes = len(lengths) * math.prod(self.prior.grid)
        if lengths.sum() != len(words) or not 0 < num_codes <= MAX_VOXELS:
            raise damaged
        streams = np.split(words.astype(np.uint32), np.cumsum(lengths)[:-1])
        batches = []
        for start in range(0, len(streams), BATCH_SIZE):
            try:
                batches.append(self._decode_batch(streams[start : start + BATCH_SIZE]))
            except AssertionError as error:  # from the range coder
                raise damaged from error
        codes = np.concatenate(batches)
        if _checksum(codes) != str(arrays["checksum"]):
            raise damaged
        return codes

    def _decode_batch(self, streams: list[np.ndarray]) -> np.ndarray:
        """Decode one stream per slice to codes (N, h, w) uint16."""
        decoders = [constriction.stream.queue.RangeDecoder(words) for words in streams]

        def choose(frequencies: Tensor, row: int, column: int) -> Tensor:
            symbols = []
            for decoder, counts in zip(decoders, _counts(frequencies), strict=True):
                symbols.append(decoder.decode(self._categorical, counts[None])[0])
            return torch.tensor(symbols, dtype=torch.long)

        progress = partial(tqdm, desc=f"decoding {len(streams)} slices", unit=" codes", leave=False)
        return self.prior.decode(len(streams), choose, progress).numpy().astype(np.uint16)


def _counts(frequencies: Tensor) -> np.ndarray:
    """Return frequencies (..., K) as (M, K) for constriction's Categorical, without rounding.

    It scales K numbers to a sum of 2^24 - K and adds 1 to each. Frequencies minus 1 have that sum,
    so the scale is 1, and float32 represents all of their sums exactly.
    """
    return (frequencies - 1).flatten(0, -2).numpy().astype(np.float32)


def _checksum(codes: np.ndarray) -> str:
    return hashlib.sha256(codes.astype("<u2").tobytes()).hexdigest()[:16]
