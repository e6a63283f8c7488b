"""Tests of prior/flow_training.py: encoded splits, losses and validation."""

import math

import numpy as np
import pytest
import torch

from modules import VQVAE
from prior import flow_training
from prior.codes import EncodedDataset
from prior.config import PriorConfig

CPU = torch.device("cpu")
CONFIG = PriorConfig(channels=12, batch_size=2, device="cpu")


def make_vqvae(**options) -> VQVAE:
    torch.manual_seed(0)
    sizes = {"hidden_channels": 8, "residual_channels": 4, "embedding_dim": 4}
    return VQVAE(**sizes, num_embeddings=16, **options).eval()


@pytest.fixture
def slices(load_images):
    """Five training slices of 48 x 32."""
    images = np.random.default_rng(0).integers(0, 900, (5, 48, 32)).astype(np.int16)
    return load_images(*images, size=(48, 32))


@pytest.mark.parametrize("options", [{}, {"stride": 16}, {"stride": 8, "num_codebooks": 2}])
def test_mirror_images_are_encoded_and_not_mirrored_latents(slices, options):
    vqvae = make_vqvae(**options)
    flow, train, val = flow_training.prepare(vqvae, slices, slices, CONFIG)
    images = slices.batch(torch.arange(5))
    with torch.no_grad():
        for view, axes in enumerate(((), (2,))):
            expected = flow.pca.transform(vqvae.encoder(images.flip(axes)))
            encoded = train.encoded[:, view].float()
            torch.testing.assert_close(encoded, expected, atol=5e-3, rtol=5e-3)
    assert train.encoded.dtype == torch.float16
    assert train.encoded.shape == (5, 2, 4, 48 // vqvae.stride, 32 // vqvae.stride)
    assert val.encoded.shape[:2] == (5, 1)
    torch.testing.assert_close(train.positions, torch.linspace(0, 1, 5))


def test_components_are_fitted_to_evenly_spread_slices(slices, monkeypatch):
    monkeypatch.setattr(flow_training, "NUM_FITTED", 3)
    vqvae = make_vqvae()
    flow, _, _ = flow_training.prepare(vqvae, slices, slices, CONFIG)
    with torch.no_grad():
        latents = vqvae.encoder(slices.batch(torch.tensor([0, 2, 4])))
    torch.testing.assert_close(flow.pca.mean, latents.mean((0, 2, 3)))


class Recorder(torch.nn.Module):
    """A stub in place of a flow, which records the arguments of `loss`."""

    grid = (8, 4)

    def loss(self, *arguments):
        self.arguments = arguments
        return torch.zeros(len(arguments[0]))


def test_random_choices_are_made_at_their_rates():
    """The components are the numbers of their views."""
    components = torch.arange(2).half().view(1, 2, 1, 1, 1).expand(4000, 2, 1, 2, 2)
    torch.manual_seed(0)
    stub = Recorder()
    loss = flow_training.compute_loss(stub, components, torch.zeros(4000), "float32", CONFIG)
    x, noise, time, position, given = stub.arguments
    assert loss.shape == ()
    assert x.dtype == torch.float32
    assert torch.equal(x[:, 0, 0, 0], x[:, 0, 1, 1])
    assert x.mean() == pytest.approx(0.5, abs=0.03)
    assert noise.std() == pytest.approx(1, abs=0.03)
    assert position.isnan().float().mean() == pytest.approx(0.1, abs=0.02)
    assert (given == 4).float().mean() == pytest.approx(0.2, abs=0.02)  # half of the rows
    assert (given == 0).float().mean() == pytest.approx(0.8, abs=0.02)
    assert time.logit().mean() == pytest.approx(-math.log(3), abs=0.06)  # shifted towards noise
    assert time.logit().std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_process_without_slices_computes_a_gradient(slices, precision):
    """The mean over no slices is NaN, which train_prior.py replaces by 0."""
    flow, train, _ = flow_training.prepare(make_vqvae(), slices, slices, CONFIG)
    batch = (train.encoded[:0], train.positions[:0])
    loss = flow_training.compute_loss(flow, *batch, precision, CONFIG)
    loss.nan_to_num().backward()
    for parameter in flow.parameters():
        assert not parameter.grad.any()


def test_validation_is_the_same_every_time(slices):
    """Other random numbers do not matter."""
    flow, _, val = flow_training.prepare(make_vqvae(), slices, slices, CONFIG)
    velocity = flow_training.validate(flow, val, CONFIG, CPU)
    torch.rand(7)
    assert flow_training.validate(flow, val, CONFIG, CPU) == velocity
    assert 0 < velocity < 5


def test_each_slice_counts_once_in_validation():
    """Also with a last batch of another size: 5 slices in batches of 2."""

    class Stub:
        def loss(self, x, *_):
            return x.mean((1, 2, 3))

    components = torch.arange(5.0).view(5, 1, 1, 1, 1).expand(5, 1, 2, 4, 2)
    val = EncodedDataset(components, torch.rand(5), [])
    assert flow_training.validate(Stub(), val, CONFIG, CPU) == pytest.approx(2)
