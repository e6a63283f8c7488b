"""Tests of prior/sampling.py: settings in words, and completions."""

import math

import pytest
import torch
from models import to_vectors

from modules import VQVAE
from prior.flow import FlowPrior
from prior.sampling import Sampler

CPU = torch.device("cpu")


def make_models(**options) -> tuple[VQVAE, FlowPrior]:
    """Return an untrained VQ-VAE and flow for slices of 64 x 32."""
    torch.manual_seed(0)
    sizes = {"hidden_channels": 8, "residual_channels": 4, "embedding_dim": 4}
    vqvae = VQVAE(**sizes, num_embeddings=16, **options).eval()
    flow = FlowPrior(4, (64 // vqvae.stride, 32 // vqvae.stride), components=2, channels=12)
    with torch.no_grad():
        latents = vqvae.encoder(torch.randn(4, 1, 64, 32))
    vqvae.vector_quantization.init_codebook(to_vectors(latents))
    flow.pca.fit(latents)
    torch.nn.init.normal_(flow.unet.last.weight, std=0.5)  # at first, it predicts no difference
    return vqvae, flow


def test_settings_are_described():
    models = make_models()
    assert Sampler(*models, CPU, {}).settings == "40 steps, guidance 1.5, seed 0"
    assert Sampler(*models, CPU, {}, 10, 1.5, 3).settings == "10 steps, guidance 1.5, seed 3"


@pytest.mark.parametrize("options", [{}, {"stride": 16}, {"num_codebooks": 2}])
def test_a_flow_keeps_the_codes_of_the_first_half(options):
    vqvae, flow = make_models(**options)
    sampler = Sampler(vqvae, flow, CPU, {}, steps=2)
    image = torch.randn(1, 64, 32)
    positions = torch.tensor([0.5, math.nan])
    codes = sampler.sample(positions, image)
    expected = sampler.encode(image[None])
    half = expected.shape[1] // 2
    assert torch.equal(codes[:, :half], expected[:, :half].expand_as(codes[:, :half]))
    assert not torch.equal(codes[0, half:], codes[1, half:])
    assert sampler.decode(codes).shape == (2, 1, 64, 32)
    assert torch.equal(sampler.sample(positions, image), codes)
