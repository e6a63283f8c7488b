"""Tests of prior/codes.py: encoding a split is tested with train_prior.py."""

import pytest
import torch

from modules import VQVAE
from prior.codes import EncodedDataset, compressed_bits, hash_codebook


def test_context_free_bits():
    """Two codes in turn: 2 bits of fixed length, 1 bit by frequency, and almost none by gzip."""
    codes = torch.tensor([1, 2]).repeat(4, 64, 16)
    bits = compressed_bits(codes, codes, num_embeddings=4)
    assert bits["fixed_length"] == 2
    assert bits["empirical_entropy"] == pytest.approx(1, abs=1e-3)
    assert 0 < bits["gzip"] < 0.3
    noise = torch.randint(4, (4, 64, 32), generator=torch.Generator().manual_seed(0))
    assert 2 < compressed_bits(noise, noise, num_embeddings=4)["gzip"] < 3


def test_batches_hold_the_slices_of_their_indices():
    codes = torch.arange(5, dtype=torch.int32).view(5, 1, 1, 1)
    data = EncodedDataset(codes, torch.linspace(0, 1, 5), names=[])
    groups = [torch.tensor([3, 0]), torch.tensor([4])]
    (first, first_positions), (second, _) = data.batches(groups, torch.device("cpu"))
    assert len(data) == 5
    assert first.flatten().tolist() == [3, 0]
    assert first_positions.tolist() == [0.75, 0]
    assert second.flatten().tolist() == [4]


def test_the_hash_changes_with_the_codebook_only():
    model = VQVAE(hidden_channels=8, residual_channels=4, embedding_dim=4, num_embeddings=16)
    before = hash_codebook(model)
    torch.nn.init.zeros_(model.encoder.conv1.weight)
    assert hash_codebook(model) == before
    with torch.no_grad():
        model.vector_quantization.embedding.weight[3, 1] += 1e-6
    assert len(before) == 16
    assert hash_codebook(model) != before
