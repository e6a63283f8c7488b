"""Tests of prior/anatomy.py, on label maps made by hand and on phantoms."""

import math

import numpy as np
import pytest
import torch

from prior import anatomy
from prior.anatomy import UNet, dice, implausibility, organ_statistics, segment, train_network

BONE, BLADDER, RECTUM = 2, 3, 4  # labels; organs 1, 2 and 3 of the statistics
CPU = torch.device("cpu")


# ---------------------------------------------------------------- statistics


@pytest.fixture
def labels() -> torch.Tensor:
    """A label map, (1, 32, 16) uint8, with two bones, a fragment of bone, and a bladder."""
    labels = torch.zeros(1, 32, 16, dtype=torch.uint8)
    labels[0, 2:8, 2:10] = BONE  # 48 pixels, whose mirror image is the next bone and more
    labels[0, 26:30, 2:10] = BONE  # 32 pixels
    labels[0, 15, 0:3] = BONE  # 3 pixels
    labels[0, 10:12, 4:10] = BLADDER  # 12 pixels on one side only
    return labels


def test_statistics_of_organs(labels):
    statistics = organ_statistics(labels)
    assert statistics.shape == (1, 5, 5)
    # The mirror image of rows 26 to 29 is rows 2 to 5.
    overlap = 2 * 32 / 83
    np.testing.assert_allclose(statistics[0, BONE - 1], [83, 3, 1, 48 / 83, overlap])
    np.testing.assert_allclose(statistics[0, BLADDER - 1], [12, 1, 0, 1, 0])
    assert not statistics[0, [0, 3, 4]].any()


def test_statistics_do_not_depend_on_the_side(labels):
    np.testing.assert_array_equal(organ_statistics(labels.flip(-2)), organ_statistics(labels))


def test_diagonal_pixels_are_separate_parts():
    labels = (torch.eye(8, 8) * RECTUM).byte()[None]
    np.testing.assert_allclose(organ_statistics(labels)[0, RECTUM - 1], [8, 8, 8, 1 / 8, 0])


def test_dice_is_pooled_over_slices_with_labels(labels):
    prediction = labels.repeat(3, 1, 1)
    prediction[1, 2:8, 2:10] = 0
    reference = labels.repeat(3, 1, 1)
    reference[2] = 0  # no segmentation
    scores = dice(prediction, reference)
    assert scores["bone"] == pytest.approx(2 * (83 + 35) / (83 + 83 + 83 + 35))
    assert scores["bladder"] == 1
    assert list(scores) == ["bone", "bladder"]


# ---------------------------------------------------------------- scores


def test_scores_compare_with_slices_at_a_similar_position():
    """The area of bone is 100 at positions below 0.5, and 500 elsewhere."""
    training_positions = torch.linspace(0, 1, 40)
    training = torch.zeros(40, 5, 5)
    training[:, 1, 0] = torch.where(training_positions < 0.5, 100.0, 500.0)
    statistics = torch.zeros(3, 5, 5)
    statistics[:, 1, 0] = torch.tensor([100.0, 500.0, 140.0])
    low = torch.tensor([0.1, 0.1, 0.1])
    scores = implausibility(statistics, low, training, training_positions)
    np.testing.assert_allclose(scores, [0, 400 / 20 / 25, 40 / 20 / 25])
    high = implausibility(statistics, 1 - low, training, training_positions)
    np.testing.assert_allclose(high, [400 / 20 / 25, 0, 360 / 20 / 25])


@pytest.mark.parametrize("training_position", [0.3, math.nan])
def test_slices_at_an_unknown_position_are_compared_with_all(training_position):
    training = torch.zeros(40, 5, 5)
    training[::2, 1, 0] = 200
    training_positions = torch.full((40,), training_position)
    unknown = torch.tensor([math.nan, math.nan])
    statistics = torch.zeros(2, 5, 5)
    statistics[1, 1, 0] = 300
    scores = implausibility(statistics, unknown, training, training_positions)
    np.testing.assert_allclose(scores, [1 / 25, 2 / 25])
    # Training slices at unknown positions are never near a known position.
    mixed = torch.where(torch.arange(40) % 2 == 0, math.nan, 0.5)
    scores = implausibility(statistics, torch.tensor([0.5, 0.5]), training, mixed)
    np.testing.assert_allclose(scores, [0, 300 / 20 / 25])


# ---------------------------------------------------------------- network


def test_the_network_halves_the_resolution_of_any_size():
    network = UNet()
    assert network(torch.zeros(2, 1, 256, 128)).shape == (2, 6, 128, 64)
    assert network(torch.zeros(1, 1, 72, 40)).shape == (1, 6, 36, 20)


def make_discs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy slices of a bright disc, (count, 1, 32, 32), and their labels."""
    generator = torch.Generator().manual_seed(count)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    centres = torch.randint(10, 22, (count, 2, 1, 1), generator=generator)
    masks = (rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 < 64
    images = masks[:, None] + 0.3 * torch.randn(count, 1, 32, 32, generator=generator)
    return images, (masks[:, ::2, ::2] * BONE).byte()


def test_the_network_learns_to_segment(monkeypatch):
    """Slices without a segmentation would teach it that discs are background."""
    monkeypatch.setattr(anatomy, "STEPS", 40)
    images, labels = make_discs(16)
    state = torch.random.get_rng_state()
    labels[8:] = 0
    network = train_network(images, labels, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    test_images, test_labels = make_discs(5)
    prediction = segment(network, test_images)
    assert prediction.shape == (5, 16, 16)
    assert dice(prediction, test_labels)["bone"] > 0.9
    again = segment(train_network(images, labels, CPU), test_images)
    assert torch.equal(again, prediction)
