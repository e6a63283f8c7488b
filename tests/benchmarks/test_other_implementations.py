"""benchmarks/other_implementations.py: other models are comparable with the document's."""

import pytest
import torch
from other_implementations import OTHER_IMPLEMENTATIONS, OneHotQuantizer
from torch.utils.flop_counter import FlopCounterMode

from modules import VectorQuantizer


def test_the_one_hot_quantiser_computes_the_same_as_ours():
    torch.manual_seed(0)
    one_hot, ours = OneHotQuantizer(16, 8), VectorQuantizer(16, 8)
    torch.nn.init.normal_(one_hot.embedding.weight)
    ours.embedding.load_state_dict(one_hot.embedding.state_dict())
    z = torch.randn(2, 8, 4, 4)
    quantized, loss, perplexity = one_hot(z)
    expected = ours(z)
    torch.testing.assert_close(quantized, expected.quantized)
    torch.testing.assert_close(loss, expected.codebook_loss + 0.25 * expected.commitment_loss)
    frequencies = expected.counts / expected.counts.sum()
    expected_perplexity = torch.special.entr(frequencies).sum().exp()
    torch.testing.assert_close(perplexity, expected_perplexity, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "gmac"),
    [
        ("typical script", 0.81 + 0.067),  # with the second product with the embeddings
        ("the same with MONAI's VQVAE", 0.81),
    ],
)
def test_multiply_adds_are_the_documents(name, gmac):
    model = OTHER_IMPLEMENTATIONS[name]().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 256, 128))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=0.01)
