"""Tests of prior/realism.py, on phantoms and, if $HIPMRI_REAL_DATA has some, on patients."""

import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur

import dataset
from mri import hipmri
from prior import realism
from prior.codes import MIRRORS
from prior.realism import (
    SHIFT,
    Features,
    coverage,
    kernel_distance,
    make_chimeras,
    nearest_features,
    nearest_pixels,
    search_copies,
    split_cases,
)

CASES = 10
FILTERS = 8  # a quarter of the filters, where the quality of the features is not tested


@pytest.fixture(scope="module")
def slices(phantoms) -> torch.Tensor:
    """Eight z-scored slices of each of ten phantoms, (10, 8, 1, 256, 128)."""
    split = phantoms["train"]
    cases = [name.case for name in split.names]
    assert cases == sorted(cases)
    return split.batch(torch.arange(8 * CASES)).view(CASES, 8, 1, 256, 128)


@pytest.fixture(scope="module")
def reference(slices) -> torch.Tensor:
    """The slices of the first five phantoms, (40, 1, 256, 128)."""
    return slices[: CASES // 2].flatten(0, 1)


@pytest.fixture(scope="module")
def others(slices) -> torch.Tensor:
    """The slices of the other five phantoms, (40, 1, 256, 128)."""
    return slices[CASES // 2 :].flatten(0, 1)


@pytest.fixture
def reconstruct(codec):
    """reconstruct(images), by rounding the brightness of 2 x 2 pixels."""
    return lambda images: codec.decode(codec.encode(images))


# ---------------------------------------------------------------- features and distances


def test_distances_grow_with_the_visible_difference(slices, reference, others, reconstruct):
    """Other patients are nearest, then chimeras, reconstructions, blurred slices, and noise.

    Chimeras have real texture, so with few patients they are nearer than reconstructions without
    texture. A set of one patient, or of copies of few slices, is farther than a set of different
    patients.
    """
    features = Features(FILTERS).fit(reference)
    reference_features = features(reference)
    image_sets = {
        "real": others,
        "reconstructed": reconstruct(others),
        "chimeras": make_chimeras(others, torch.Generator().manual_seed(0)),
        "blurred": gaussian_blur(others, [13, 13], [3.0, 3.0]),
        "noise": torch.randn(others.shape, generator=torch.Generator().manual_seed(0)),
        "one patient": slices[CASES // 2].repeat(5, 1, 1, 1),
        "copies": others[[0, 9, 18]].repeat(13, 1, 1, 1),
    }
    distance = {}
    for name, images in image_sets.items():
        distance[name] = kernel_distance(features(images), reference_features)
    order = ["real", "chimeras", "reconstructed", "blurred", "noise"]
    assert sorted(order, key=distance.get) == order
    assert distance["real"] < min(distance["one patient"], distance["copies"])
    same_patients = kernel_distance(reference_features[::2], reference_features[1::2])
    assert same_patients < distance["real"]


def test_features_have_golden_values():
    """Distances can then be compared with those of another version or machine."""
    x, y = torch.meshgrid(torch.arange(256.0), torch.arange(128.0), indexing="ij")
    result = Features()(torch.sin(x * y / 500)[None, None])
    assert result.shape == (1, 2080)
    expected = [-1.5799, -1.4029, -0.7393, -0.93, -1.4311, -1.0936]
    torch.testing.assert_close(result[0, ::347], torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_features_do_not_depend_on_the_batch(slices):
    features = Features(FILTERS)
    in_batch = features(slices[0])[3]
    torch.testing.assert_close(in_batch, features(slices[0][3:4])[0], atol=1e-5, rtol=0)


def test_fitted_features_have_mean_0_and_std_1(slices):
    scaled = Features(FILTERS).fit(slices[0])(slices[0])
    torch.testing.assert_close(scaled.mean(0), torch.zeros(scaled.shape[1]), atol=1e-3, rtol=0)
    assert scaled.std(0).median() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("block", [2, 512])
def test_kernel_distance_equals_its_definition(block, monkeypatch):
    monkeypatch.setattr(realism, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, generator=generator)
    y = torch.randn(4, 6, generator=generator) + 1

    def kernel(a, b) -> float:
        return float((a @ b / 6 + 1) ** 3)

    within_x = [kernel(x[i], x[j]) for i, j in itertools.permutations(range(5), 2)]
    within_y = [kernel(y[i], y[j]) for i, j in itertools.permutations(range(4), 2)]
    between = [kernel(x[i], y[j]) for i, j in itertools.product(range(5), range(4))]
    expected = np.mean(within_x) + np.mean(within_y) - 2 * np.mean(between)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_is_unbiased():
    generator = torch.Generator().manual_seed(0)

    def normal(n: int, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(n, 6, generator=generator) + mean

    values = [kernel_distance(normal(20), normal(20)) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(300)
    assert min(values) < 0
    assert kernel_distance(normal(200), normal(200, 1.0)) > 3 * np.std(values)


@pytest.mark.parametrize("block", [4, 512])
def test_coverage_equals_its_definition(block, monkeypatch):
    """The fifth neighbour is at distance 5 from 0 and 9, 4 from 1 and 8, and 3 from the others."""
    monkeypatch.setattr(realism, "BLOCK", block)
    real = torch.arange(10.0)[:, None]
    assert coverage(real, torch.tensor([[-1.0]])) == pytest.approx(0.3)
    assert coverage(real, torch.tensor([[-1.0], [-1.0], [30.0]])) == pytest.approx(0.3)
    assert coverage(real, torch.tensor([[3.0]])) == pytest.approx(0.7)
    assert coverage(real, torch.tensor([[3.0], [10.0]])) == 1
    assert coverage(real, torch.tensor([[30.0]])) == 0
    assert coverage(real[:3], torch.tensor([[2.0]])) == 1  # fewer than five neighbours


def test_coverage_detects_one_slice_repeated(reference, others):
    """The kernel distance to a good slice is small; the coverage by its copies is small, too."""
    features = Features(FILTERS).fit(reference)
    real = features(others)
    repeated = features(reference[4:5]).expand(len(reference), -1)
    by_patients = coverage(real, features(reference))
    assert coverage(real, repeated) < 0.5 * by_patients
    assert coverage(real, features(torch.randn(4, 1, 256, 128))) == 0
    assert by_patients > 0.5


def test_chimeras_are_blocks_of_several_slices():
    images = torch.arange(50.0).view(50, 1, 1, 1) + torch.rand(1, 1, 256, 128)
    chimeras = make_chimeras(images, torch.Generator().manual_seed(0))
    sources = (chimeras - images[:1]).round()
    blocks = sources.unfold(2, 64, 64).unfold(3, 64, 64).reshape(50, 8, 64 * 64)
    assert (blocks == blocks[..., :1]).all()
    different = [len(set(row)) for row in blocks[..., 0].tolist()]
    assert min(different) >= 5
    assert make_chimeras(images[..., :100, :40], torch.Generator()).shape == (50, 1, 100, 40)


def test_halves_have_no_common_case():
    cases = [f"{i // 4:03d}" for i in range(40)]
    splits = set()
    for seed in range(5):
        in_first = split_cases(cases, torch.Generator().manual_seed(seed))
        assert in_first.sum() == 20
        by_case = in_first.view(10, 4)
        assert torch.equal(by_case, by_case[:, :1].expand(-1, 4))
        splits.add(tuple(in_first.tolist()))
    assert len(splits) > 1


@pytest.mark.parametrize("cases", [["004"] * 9, ["004", *["006"] * 8]])
def test_slices_are_split_if_there_are_too_few_cases(cases):
    in_first = split_cases(cases, torch.Generator())
    assert in_first.shape == (9,)
    assert in_first.sum() == 4


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("axes", MIRRORS)
@pytest.mark.parametrize("shift", [(0, 0), (6, -4), (-SHIFT, SHIFT)])
def test_shifted_and_mirrored_copies_are_recognised_by_pixels(slices, axes, shift):
    training = slices.flatten(0, 1)
    copy = torch.roll(training[37:38], shift, (2, 3)).flip(axes)
    distance, nearest = nearest_pixels(torch.cat([copy, copy + 1]), training)
    assert nearest[0] == 37
    assert distance[0] < 1e-3
    without_original = torch.cat([training[:37], training[38:]])
    assert nearest_pixels(copy, without_original)[0][0] > 10 * max(distance[0], 0.01)


def test_shifted_or_mirrored_copies_are_recognised_by_features(slices):
    training = slices.flatten(0, 1)
    features = Features(FILTERS).fit(training)
    shifted = torch.roll(training[60:61], (SHIFT, 0), (2, 3))
    copies = torch.cat([training[5:6].flip(2), shifted, training[11:12]])
    training_features = features(training)
    distance, nearest = nearest_features(copies, training_features, features)
    assert nearest.tolist() == [5, 60, 11]
    assert distance[2] < 1e-3
    other_distance, _ = nearest_features(copies, training_features[20:50], features)
    assert other_distance.min() > 2 * distance.max()


def test_pixel_distances_are_root_mean_squares(slices):
    training = slices[:2].flatten(0, 1)
    distance, _ = nearest_pixels(training[:4] + 0.3, training)
    torch.testing.assert_close(distance, torch.full((4,), 0.3), rtol=1e-3, atol=0)


def test_copies_are_flagged(slices, reference):
    """Two of four samples are copies of slices of the second and fourth phantom."""
    features = Features(FILTERS).fit(reference)
    sampled = torch.cat([reference[[9, 25]].flip(2), slices[9, :2]])
    cases = [f"{i // 8:03d}" for i in range(len(reference))]
    result = search_copies(sampled, slices[6, ::2], reference, features, cases)
    assert list(result) == ["pixels", "features"]
    for search in result.values():
        flagged = [distance < search["threshold"] for distance in search["distance"]]
        assert flagged[:2] == [True, True]
        assert min(search["distance"][2:]) > 2 * max(search["distance"][:2])
        assert search["flagged"] == sum(flagged) / 4
        assert search["nearest"][:2] == [9, 25]
        assert sum(search["flagged_by_case"].values()) == sum(flagged)
        assert {"001", "003"} <= search["flagged_by_case"].keys()


def check_ranking(training, held_out, reconstruct) -> None:
    """Check that reconstructions of training slices are nearer to them than held-out ones are."""
    features = Features(FILTERS).fit(training)
    training_features = features(training)
    copies = reconstruct(training[::4])
    not_copies = reconstruct(held_out[::4])
    by_pixels = [nearest_pixels(images, training)[0] for images in (copies, not_copies)]
    by_features = [
        nearest_features(images, training_features, features)[0] for images in (copies, not_copies)
    ]
    for copy_distance, other_distance in (by_pixels, by_features):
        area_under_roc = (copy_distance[:, None] < other_distance).float().mean()
        assert area_under_roc >= 0.95


def test_reconstructed_training_slices_are_ranked_first(reference, others, reconstruct):
    check_ranking(reference, others, reconstruct)


def test_reconstructed_training_slices_of_patients_are_ranked_first(
    real_data, tmp_path, reconstruct
):
    source = hipmri.find_hipmri(real_data / "prostatex")
    images = []
    for split in ("train", "test"):
        slices = dataset.load_split(source, split, cache_dir=tmp_path, progress=False)
        images.append(slices.batch(torch.arange(0, len(slices), 4)))
    check_ranking(*images, reconstruct)
