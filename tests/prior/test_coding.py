"""prior/coding.py: codes survive entropy coding, at about the prior's bits, on every machine."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from models import make_formula_prior, make_prior, make_varied_prior, save_model

from modules import VQVAE
from prior import coding
from prior.causal_training import mean_bits
from prior.coding import EntropyCoder, load_prior
from utils import DataError, UserError

pytestmark = pytest.mark.skipif(coding.constriction is None, reason="constriction is missing")

PATH = Path("scan_codes.vqc")
FORMULA_FINGERPRINT = "e57c02e1b45d1bf1"
FORMULA_WORDS = "e3230400fe73cc090f58e2ee2f0e815487e4069f642614c789dec33b5b6eb3b1"


def formula_codes() -> np.ndarray:
    index = np.arange(2 * 4 * 6)
    return (index * index // 3 % 20).reshape(2, 4, 6)


def test_streams_of_earlier_versions_are_decoded():
    """The stream of a prior with fixed weights stays, on every machine and version of torch."""
    coder = EntropyCoder(make_formula_prior())
    arrays = coder.encode(formula_codes(), PATH)
    assert arrays["words"].tobytes().hex() == FORMULA_WORDS
    assert coder.fingerprint == FORMULA_FINGERPRINT
    words = np.frombuffer(bytes.fromhex(FORMULA_WORDS), "<u4")
    np.testing.assert_array_equal(coder.decode(arrays | {"words": words}, PATH), formula_codes())


def test_codes_are_decoded_from_streams_of_about_the_priors_bits():
    """The first codes are samples of the prior, and the second are noise."""
    prior = make_varied_prior()
    coder = EntropyCoder(prior)
    position, view = torch.full((20,), math.nan), torch.zeros(20, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)

    def sample(logits, row, column):
        return torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]

    likely = prior.decode(position, view, sample)
    noise = torch.randint(20, likely.shape, generator=generator)
    lengths = []
    for codes in (likely, noise):
        arrays = coder.encode(codes.numpy(), PATH)
        assert len(arrays["lengths"]) == 20
        assert np.array_equal(coder.decode(arrays, PATH), codes)
        lengths.append(32 * len(arrays["words"]))
        with torch.no_grad():
            expected = float(mean_bits(prior, codes, position, view)) * codes.numel()
        if codes is likely:  # very small probabilities, which noise has, are raised
            assert expected <= lengths[-1]
        assert lengths[-1] < 1.01 * expected + 64 * 20
    assert lengths[0] < lengths[1]


def test_streams_do_not_depend_on_threads_and_batches(monkeypatch):
    coder = EntropyCoder(make_formula_prior())
    codes = np.random.default_rng(0).integers(0, 20, (5, 4, 6))
    expected = coder.encode(codes, PATH)["words"]
    before = torch.get_num_threads()
    try:
        for threads, size in ((1, 1), (2, 3), (1, 5)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(coding, "BATCH_SIZE", size)
            arrays = coder.encode(codes, PATH)
            assert np.array_equal(arrays["words"], expected)
            assert np.array_equal(coder.decode(arrays, PATH), codes)
    finally:
        torch.set_num_threads(before)


def test_damaged_streams_are_an_error():
    coder = EntropyCoder(make_formula_prior())
    arrays = coder.encode(formula_codes(), PATH)
    words, lengths = arrays["words"], arrays["lengths"]
    changes = [
        {"words": words[::-1].astype("<u4")},
        {"words": words ^ np.uint32(1 << 20)},
        {"words": words[:-1]},
        {"words": words.astype(np.int64)},
        {"words": words[None]},
        {"lengths": lengths + 1},
        {"lengths": lengths[:0], "words": words[:0]},
        {"lengths": np.zeros(10**7, "<u4"), "words": words[:0]},  # decoded, they would be 240 MB
        {"checksum": "0" * 16},
    ]
    for change in changes:
        with pytest.raises(DataError, match=r"scan_codes\.vqc is damaged"):
            coder.decode(arrays | change, PATH)
    with pytest.raises(DataError, match="was encoded with causal prior 0123; this run's is"):
        coder.decode(arrays | {"prior": "0123"}, PATH)


def test_codes_that_do_not_fit_the_prior_are_an_error():
    with pytest.raises(DataError, match="the slices have 4 x 7 codes, but the causal prior is for"):
        EntropyCoder(make_formula_prior()).encode(np.zeros((2, 4, 7), int), PATH)


def test_a_prior_that_is_missing_or_of_another_model_is_an_error(tmp_path):
    torch.manual_seed(0)
    model = VQVAE(hidden_channels=8, residual_channels=4, embedding_dim=4, num_embeddings=16)
    for run in (None, tmp_path):
        with pytest.raises(UserError, match=r"has no causal prior.*train_prior.py --model causal"):
            load_prior(run, model)
    prior = make_prior(16, 4)
    prior.initialize(model.vector_quantization.embedding.weight, torch.randint(16, (9, 8, 16)))
    save_model(tmp_path / "causal_prior" / "best.pt", prior)
    assert load_prior(tmp_path, model).grid == (8, 16)
    torch.nn.init.normal_(model.vector_quantization.embedding.weight)
    with pytest.raises(UserError, match="was trained on the codes of a different model"):
        load_prior(tmp_path, model)
    model = VQVAE(hidden_channels=8, residual_channels=4, embedding_dim=4, num_codebooks=2)
    with pytest.raises(UserError, match="a model that was trained with --num-codebooks 1"):
        load_prior(tmp_path, model)


def test_a_missing_range_coder_is_an_error(monkeypatch):
    monkeypatch.setattr(coding, "constriction", None)
    with pytest.raises(UserError, match="is not installed; run pip install constriction"):
        EntropyCoder(make_prior())
