"""Tests of prior/flow.py, prior/pca.py and prior/unet.py: components, velocities, samples."""

import math

import pytest
import torch

from prior.flow import RENEWED, SAMPLING_SHIFT, VARIANCE, FlowPrior, shift_time

UNKNOWN = torch.tensor([math.nan, math.nan])
NONE_GIVEN = torch.tensor([0, 0])


def make_flow(grid: tuple[int, int] = (8, 4), components: int = 2) -> FlowPrior:
    """Return an untrained flow whose U-Net has random outputs instead of 0."""
    torch.manual_seed(0)
    flow = FlowPrior(latent_channels=4, grid=grid, components=components, channels=12)
    torch.nn.init.normal_(flow.unet.last.weight, std=0.2)
    for block in (*flow.unet.down, flow.unet.middle, *flow.unet.up):
        torch.nn.init.normal_(block.conv2.weight, std=0.1)
    return flow


def sample(flow: FlowPrior, seed: int = 0, position=UNKNOWN, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return flow.sample(position, generator, **{"steps": 4, "guidance": 1.8} | options)


# ---------------------------------------------------------------- principal components


def test_latents_are_restored_from_their_components():
    """Latents with 5 channels that have variance in only 3 directions, far from the origin."""
    torch.manual_seed(0)
    latents = 100 + torch.einsum("bchw,dc->bdhw", torch.randn(6, 3, 8, 4), torch.randn(5, 3))
    flow = FlowPrior(latent_channels=5, grid=(8, 4), components=3, channels=12)
    assert flow.pca.fit(latents) == pytest.approx(1, abs=1e-4)
    components = flow.pca.transform(latents)
    vectors = components.movedim(1, 0).flatten(1)  # (3, N)
    torch.testing.assert_close(torch.cov(vectors, correction=0), torch.eye(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(vectors.mean(1), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(flow.pca.inverse_transform(components), latents, atol=1e-3, rtol=0)


def test_the_first_components_have_the_most_variance():
    latents = torch.randn(50, 3, 2, 2) * torch.tensor([1.0, 3.0, 2.0]).view(3, 1, 1)
    flow = FlowPrior(latent_channels=3, grid=(2, 2), components=2, channels=12)
    assert flow.pca.fit(latents) == pytest.approx(13 / 14, abs=0.05)
    stds = flow.pca.directions.norm(dim=0).tolist()
    assert stds == pytest.approx([3, 2], rel=0.2)
    directions = flow.pca.directions.clone()
    flow.pca.fit(-latents)  # the sign of a principal component is arbitrary
    torch.testing.assert_close(flow.pca.directions, directions, atol=1e-4, rtol=0)


@pytest.mark.parametrize("latents", [torch.zeros(2, 3, 4, 4), torch.full((1, 3, 1, 1), 7.0)])
def test_latents_without_variance_have_finite_components(latents):
    flow = FlowPrior(latent_channels=3, grid=latents.shape[2:], components=3, channels=12)
    flow.pca.fit(latents)
    components = flow.pca.transform(latents)
    assert components.abs().max() < 1
    torch.testing.assert_close(flow.pca.inverse_transform(components), latents)


# ---------------------------------------------------------------- velocities


@pytest.mark.parametrize("grid", [(8, 4), (7, 5), (1, 1), (32, 16)])
def test_an_untrained_flow_predicts_the_data_from_each_value_alone(grid):
    """Given x alone, for components with a variance of VARIANCE, on any grid."""
    torch.manual_seed(0)
    flow = FlowPrior(latent_channels=4, grid=grid, components=3, channels=12)
    data, noise = torch.randn(2, 3, 3, *grid)
    time, position = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, math.nan])
    x = noise.lerp(data, time[:, None, None, None])
    velocity = flow.velocity(x, time, position, torch.tensor([0, 0, 0]))
    torch.testing.assert_close(velocity[0], -noise[0])  # nothing is known about the data
    torch.testing.assert_close(velocity[2], data[2])  # nothing is known about the noise
    # The slope of the regression of data - noise on their mean
    expected = (VARIANCE - 1) / (VARIANCE + 1) * 2 * x[1]
    torch.testing.assert_close(velocity[1], expected)


def test_given_rows_are_data_and_do_not_count_in_the_loss():
    flow = make_flow()
    data, noise = torch.randn(2, 2, 2, 8, 4)
    given = torch.tensor([3, 0])
    loss = flow.loss(data, noise, torch.tensor([0.5, 0.5]), UNKNOWN, given)
    other_noise = noise.clone()
    other_noise[:, :, :3] = 9
    other = flow.loss(data, other_noise, torch.tensor([0.5, 0.5]), UNKNOWN, given)
    torch.testing.assert_close(other[0], loss[0])
    assert not torch.allclose(other[1], loss[1])
    other_data = data.clone()
    other_data[:, :, :3] = 9
    other = flow.loss(other_data, noise, torch.tensor([0.5, 0.5]), UNKNOWN, given)
    assert not torch.allclose(other[0], loss[0])  # the other rows are predicted from them


def test_components_with_more_variance_have_more_weight_in_the_loss():
    flow = make_flow()
    flow.pca.fit(torch.randn(9, 4, 8, 4) * torch.tensor([1.0, 3.0, 0.0, 0.0]).view(4, 1, 1))
    data, noise = torch.randn(2, 2, 2, 8, 4)
    noise[:, 1] *= 10  # so that the errors of the two components differ
    time = torch.rand(2)
    x = noise.lerp(data, time[:, None, None, None])
    velocity = flow.velocity(x, time, UNKNOWN, NONE_GIVEN)
    errors = (velocity - (data - noise)).square().mean((2, 3))
    loss = flow.loss(data, noise, time, UNKNOWN, NONE_GIVEN)
    torch.testing.assert_close(loss, errors @ torch.tensor([0.75, 0.25]), rtol=0.1, atol=0)


@pytest.mark.parametrize("grid", [(8, 4), (7, 5)])
def test_velocities_depend_on_all_arguments(grid):
    flow = make_flow(grid)
    x = torch.randn(1, 2, *grid)
    half, given = torch.tensor([0.5]), torch.tensor([0])
    velocity = flow.velocity(x, half, half, given)
    assert velocity.shape == x.shape
    changes = [(x.roll(1, -1), half, half, given), (x, half / 5, half, given)]
    changes += [(x, half, half * 0, given), (x, half, half * math.nan, given)]
    changes += [(x, half, half, given + 3)]
    for changed in changes:
        assert not torch.allclose(flow.velocity(*changed), velocity)


# ---------------------------------------------------------------- samples


def test_samples_depend_on_the_seed_only():
    flow = make_flow()
    samples = sample(flow)
    assert samples.shape == (2, 2, 8, 4)
    assert torch.equal(sample(flow), samples)
    assert not torch.allclose(sample(flow, seed=1), samples)
    assert not torch.allclose(samples[0], samples[1])


def test_steps_of_sampling():
    """The noise of the first step is replaced in part by new noise; the last step ends at data."""
    flow = make_flow()
    generator = torch.Generator().manual_seed(0)
    noise, fresh = torch.randn(2, 2, 2, 8, 4, generator=generator)
    middle = shift_time(0.5, SAMPLING_SHIFT)

    def velocity(x, time):
        with torch.no_grad():
            return flow.velocity(x, torch.full((2,), time), UNKNOWN, NONE_GIVEN)

    data = noise + velocity(noise, 0.0)
    x = (1 - middle) * (math.sqrt(1 - RENEWED**2) * noise + RENEWED * fresh) + middle * data
    expected = x + (1 - middle) * velocity(x, middle)
    torch.testing.assert_close(sample(flow, steps=2, guidance=1.0), expected)


def test_the_first_steps_are_the_smallest():
    times = [shift_time(i / 4, 3) for i in range(5)]
    assert times == pytest.approx([0, 0.1, 0.25, 0.5, 1])


@pytest.mark.parametrize("attends", [True, False])
def test_guidance_exaggerates_the_effects_of_the_position_and_of_attention(attends):
    flow = make_flow()
    for block in (*flow.unet.down, flow.unet.middle, *flow.unet.up):
        if attends and block.attention is not None:
            torch.nn.init.normal_(block.attention.project.weight, std=0.5)
    position = UNKNOWN if attends else torch.tensor([0.2, 0.8])
    samples = {}
    for guidance in (0.0, 1.0, 2.0):
        samples[guidance] = sample(flow, position=position, guidance=guidance, steps=1)
    differences = [samples[value] - samples[0.0] for value in (1.0, 2.0)]
    assert differences[0].abs().mean() > 0.01
    torch.testing.assert_close(differences[1], 2 * differences[0])


def test_guidance_changes_nothing_that_the_weaker_network_knows():
    flow = make_flow()  # without position, and with attention that has no effect yet
    torch.testing.assert_close(sample(flow, guidance=3.0), sample(flow, guidance=1.0))


@pytest.mark.parametrize("grid", [(8, 4), (7, 5)])
def test_the_rows_of_a_prefix_are_kept(grid):
    flow = make_flow(grid)
    prefix = torch.randn(2, 2, 3, grid[1])
    completed = sample(flow, prefix=prefix)
    assert torch.equal(completed[:, :, :3], prefix)
    assert not torch.allclose(completed[:, :, 3:], sample(flow)[:, :, 3:])  # they fit the prefix
    assert torch.equal(sample(flow, prefix=prefix), completed)


def test_a_flow_learns_two_slices_at_their_positions():
    torch.manual_seed(0)
    flow = FlowPrior(latent_channels=2, grid=(8, 4), components=2, channels=12)
    slices = torch.randn(2, 2, 8, 4).clamp(-1, 1)
    position = torch.tensor([0.0, 1.0])
    given = torch.zeros(8, dtype=torch.long)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-2)
    for _ in range(100):
        data = slices.repeat(4, 1, 1, 1)
        time = torch.randn(8).sigmoid()
        loss = flow.loss(data, torch.randn_like(data), time, position.repeat(4), given).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sampled = sample(flow, position=position, steps=10)
    errors = torch.stack([(sampled - slices).square(), (sampled - slices.flip(0)).square()])
    own, other = errors.mean((1, 2, 3, 4)).tolist()
    assert own < 0.3 < 0.9 < other
