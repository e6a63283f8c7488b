"""How far drawn slices are from real ones: that the measures measure it, on phantoms and, where there are, patients."""

import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur

import dataset
import train
from mri import hipmri, phantom
from prior import realism
from prior.realism import (
    FLIPS,
    SHIFT,
    Features,
    frechet_distance,
    kernel_distance,
    nearest_features,
    nearest_pixels,
)
from training.config import with_defaults

CASES = 10


@pytest.fixture(scope="module")
def slices(tmp_path_factory) -> torch.Tensor:
    """(10, 8, 1, 256, 128): eight slices of each of ten phantoms, z-scored."""
    folder = tmp_path_factory.mktemp("phantoms")
    phantom.write_phantom(folder / "data", volumes=(CASES, 1, 1), slices=8, progress=False)
    source = hipmri.find_hipmri(folder / "data")
    split = dataset.load_split(source, "train", cache_dir=folder / "cache", progress=False)
    assert [name.case for name in split.names] == sorted(name.case for name in split.names)
    return split.batch(torch.arange(8 * CASES)).view(CASES, 8, 1, 256, 128)


@pytest.fixture(scope="module")
def reconstruct(slices, tmp_path_factory):
    """A VQ-VAE of the tuned recipe, after sixty steps on the first half of the phantoms."""
    args = with_defaults("tuned", {"device": "cpu", "learning_rate": 2e-3})
    run = train.Run(tmp_path_factory.mktemp("run"), args, "")
    known = slices[: CASES // 2].flatten(0, 1)
    with torch.no_grad():
        vectors = run.model.encoder(known[:16]).movedim(1, -1).flatten(0, 2)
    run.model.vector_quantization.initialize(vectors, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for _ in range(60):
        train.loop.train_step(run, known[torch.randperm(len(known))[:8]], 8)
    run.model.eval()
    return torch.no_grad()(
        lambda images: torch.cat([run.model(some).reconstruction for some in images.split(16)])
    )


def test_features_rank_as_eyes_do(slices, reconstruct):
    """Real slices of other patients, their reconstructions, blurred ones, noise; one patient alone; copies of a few."""
    reference, real = slices[: CASES // 2].flatten(0, 1), slices[CASES // 2 :].flatten(0, 1)
    features = Features().fit(reference)
    known = features(reference)
    found = {
        "real": real, "reconstructed": reconstruct(real), "blurred": gaussian_blur(real, [13, 13], [3.0, 3.0]),
        "noise": torch.randn(real.shape, generator=torch.Generator().manual_seed(0)),
        "one patient": slices[CASES // 2].repeat(5, 1, 1, 1), "copies": real[[0, 9, 18]].repeat(13, 1, 1, 1),
    }  # fmt: skip
    found = {name: kernel_distance(features(images), known) for name, images in found.items()}
    assert found["real"] < found["reconstructed"] < found["blurred"] < found["noise"]
    assert found["real"] < min(found["one patient"], found["copies"])
    assert kernel_distance(known[::2], known[1::2]) < found["real"]  # of the same patients


def test_features_are_the_same_everywhere(slices):
    """Golden values: a figure of today can be compared with one of another version or machine."""
    features = Features()
    x, y = torch.meshgrid(torch.arange(256.0), torch.arange(128.0), indexing="ij")
    found = features(torch.sin(x * y / 500)[None, None])
    assert found.shape == (1, 2080)
    expected = [-1.5799, -1.4029, -0.7393, -0.93, -1.4311, -1.0936]
    torch.testing.assert_close(found[0, ::347], torch.tensor(expected), rtol=1e-3, atol=1e-4)
    assert torch.equal(features(slices[0])[3], features(slices[0][3:4])[0]) or torch.allclose(
        features(slices[0])[3], features(slices[0][3:4])[0], atol=1e-5
    )  # a batch changes nothing
    scaled = features.fit(slices[0])(slices[0])
    torch.testing.assert_close(scaled.mean(0), torch.zeros(2080), atol=1e-3, rtol=0)


def test_kernel_distance_is_unbiased_and_equals_its_definition():
    rng = torch.Generator().manual_seed(0)

    def normal(n, mean=0.0):
        return torch.randn(n, 6, generator=rng) + mean

    x, y = normal(5), normal(4, 1.0)
    pairs = (
        itertools.permutations(range(5), 2),
        itertools.permutations(range(4), 2),
        np.ndindex(5, 4),
    )
    kernel = [[float((a[i] @ b[j] / 6 + 1) ** 3) for i, j in some]
              for a, b, some in zip((x, y, x), (x, y, y), pairs, strict=True)]  # fmt: skip
    expected = np.mean(kernel[0]) + np.mean(kernel[1]) - 2 * np.mean(kernel[2])
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-5)
    values = [kernel_distance(normal(20), normal(20)) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(300) and min(values) < 0
    assert kernel_distance(normal(200), normal(200, 1.0)) > 3 * np.std(values)


def test_frechet_distance_of_normal_distributions():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 3, generator=rng)
    y = x * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([0.0, 0.0, 4.0])
    assert frechet_distance(x, y) == pytest.approx(4**2 + (2 - 1) ** 2 + (3 - 1) ** 2, rel=0.02)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=rng)).Q
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(frechet_distance(x, y), rel=1e-4)
    assert frechet_distance(x[:, :1], y[:, 1:2]) == pytest.approx(1, rel=0.02)


def test_main_directions_are_few_and_hold_the_most():
    x = torch.randn(400, 90, generator=torch.Generator().manual_seed(0)) * torch.linspace(
        10, 0.1, 90
    )
    directions = realism.main_directions(x)
    assert directions.shape == (90, 64) and realism.main_directions(x[:40]).shape == (90, 10)
    torch.testing.assert_close(directions.T @ directions, torch.eye(64).double(), atol=1e-6, rtol=0)
    assert (x.double() @ directions).var(0).sum() > 0.97 * x.double().var(0).sum()


def test_inception_is_left_out_or_asked(monkeypatch, slices, tmp_path):
    """Without its weights: None. With them, here a stand-in: torchmetrics' figure for slices as three grey channels."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert realism.inception_distance(slices[0], slices[1]) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").touch()
    import torchmetrics.image.fid

    seen = []

    class StandIn:
        def __init__(self, normalize):
            assert normalize

        def update(self, images, real):
            assert images.shape[1:] == (3, 256, 128) and images.min() >= 0 and images.max() <= 1
            seen.append((len(images), real))

        def compute(self):
            return torch.tensor(7.0)

    monkeypatch.setattr(torchmetrics.image.fid, "FrechetInceptionDistance", StandIn)
    assert realism.inception_distance(slices[:3].flatten(0, 1), slices[3]) == 7.0
    assert seen == [(16, True), (8, True), (8, False)]


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("axes", FLIPS)
@pytest.mark.parametrize("shift", [(0, 0), (6, -4), (-SHIFT, SHIFT)])
def test_a_moved_and_mirrored_copy_is_found(slices, axes, shift):
    training = slices.flatten(0, 1)
    copy = torch.roll(training[37:38], shift, (2, 3)).flip(axes)
    distance, which = nearest_pixels(torch.cat([copy, copy + 1]), training)
    assert which[0] == 37 and distance[0] < 1e-3
    others = torch.cat([training[:37], training[38:]])
    assert nearest_pixels(copy, others)[0][0] > 10 * max(distance[0], 0.01)


def test_a_copy_is_found_by_features(slices):
    training = slices.flatten(0, 1)
    features = Features().fit(training)
    copies = torch.cat(
        [training[5:6].flip(2), torch.roll(training[60:61], (SHIFT, 0), (2, 3)), training[11:12]]
    )
    distance, which = nearest_features(copies, training, features)
    assert which.tolist() == [5, 60, 11] and distance[2] < 1e-3
    assert nearest_features(copies, training[20:50], features)[0].min() > 2 * distance.max()


def test_distances_are_root_mean_squares(slices):
    training = slices[:2].flatten(0, 1)
    distance, _ = nearest_pixels(training[:4] + 0.3, training)
    torch.testing.assert_close(distance, torch.full((4,), 0.3), rtol=1e-3, atol=0)


def ranks_above(planted: torch.Tensor, others: torch.Tensor) -> float:
    """The area under the ROC curve: how often a planted one is nearer than another."""
    return float((planted[:, None] < others).float().mean())


def check_planted(training, held_out, reconstruct):
    """Reconstructions of training slices, among those of slices that nobody has seen."""
    features = Features().fit(training)
    planted, others = reconstruct(training[::2]), reconstruct(held_out)
    for search, rest in ((nearest_pixels, (training,)), (nearest_features, (training, features))):
        assert ranks_above(search(planted, *rest)[0], search(others, *rest)[0]) >= 0.95


def test_planted_reconstructions_are_ranked_first(slices, reconstruct):
    check_planted(
        slices[: CASES // 2].flatten(0, 1), slices[CASES // 2 :].flatten(0, 1), reconstruct
    )


def test_planted_reconstructions_are_ranked_first_on_patients(real_data, tmp_path, reconstruct):
    """The model has seen phantoms alone: its reconstructions of patients are worse copies than a trained one's."""
    source = hipmri.find_hipmri(real_data / "prostatex")
    splits = [
        dataset.load_split(source, split, cache_dir=tmp_path, progress=False)
        for split in ("train", "test")
    ]
    check_planted(*(split.batch(torch.arange(len(split))) for split in splits), reconstruct)
