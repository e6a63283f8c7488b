"""Tests of prior/sampling.py: options of both models, and completions with a flow."""

import math

import pytest
import torch
from models import make_prior, to_vectors

from modules import VQVAE
from prior.flow import FlowPrior
from prior.sampling import CausalOptions, FlowOptions, make_sampler
from utils import UserError

CPU = torch.device("cpu")


def make_models(**options) -> tuple[VQVAE, FlowPrior]:
    """Return an untrained VQ-VAE and flow for slices of 64 x 32."""
    torch.manual_seed(0)
    sizes = {"hidden_channels": 8, "residual_channels": 4, "embedding_dim": 4}
    vqvae = VQVAE(**sizes, num_embeddings=16, **options).eval()
    flow = FlowPrior(4, (64 // vqvae.stride, 32 // vqvae.stride), components=2, channels=16)
    with torch.no_grad():
        latents = vqvae.encoder(torch.randn(4, 1, 64, 32))
    vqvae.vector_quantization.init_codebook(to_vectors(latents))
    flow.fit_components(latents)
    return vqvae, flow


def test_settings_are_described():
    assert str(CausalOptions()) == "temperature 1, seed 0"
    options = CausalOptions(temperature=0.8, top_k=5, top_p=0.9, seed=3)
    assert str(options) == "temperature 0.8, top-k 5, top-p 0.9, seed 3"
    assert str(FlowOptions()) == "25 steps, seed 0"
    assert str(FlowOptions(10, 1.5, 3)) == "10 steps, guidance 1.5, seed 3"


def test_options_of_the_other_model_are_errors():
    vqvae, flow = make_models()
    options = {"steps": None, "guidance": None, "temperature": 0.5}
    with pytest.raises(UserError, match=r"--temperature does not apply .* is a flow; .*: --guidan"):
        make_sampler(vqvae, flow, CPU, seed=0, **options)
    options = {"temperature": None, "steps": 5}
    with pytest.raises(UserError, match=r"--steps does not apply .* is a causal prior; omit it"):
        make_sampler(vqvae, make_prior(1), CPU, seed=0, **options)
    options = {"steps": 5, "temperature": None}
    assert make_sampler(vqvae, flow, CPU, seed=2, **options).options == FlowOptions(5, 1.0, 2)


@pytest.mark.parametrize("options", [{}, {"stride": 16}, {"num_codebooks": 2}])
def test_a_flow_keeps_the_codes_of_the_first_half(options):
    vqvae, flow = make_models(**options)
    sampler = make_sampler(vqvae, flow, CPU, seed=0, steps=2)
    image = torch.randn(1, 64, 32)
    positions = torch.tensor([0.5, math.nan])
    codes = sampler.sample(positions, image)
    expected = sampler.encode(image[None])
    half = expected.shape[1] // 2
    assert torch.equal(codes[:, :half], expected[:, :half].expand_as(codes[:, :half]))
    assert not torch.equal(codes[0, half:], codes[1, half:])
    assert sampler.decode(codes).shape == (2, 1, 64, 32)
    assert torch.equal(sampler.sample(positions, image), codes)
