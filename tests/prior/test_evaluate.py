"""Tests of prior/evaluate.py, on phantoms, with a codec that needs no training."""

import json

import pytest
import torch
import torch.nn.functional as F

from prior import anatomy, realism
from prior.evaluate import (
    RealSlices,
    evaluate_samples,
    measure_anatomy,
    print_evaluation,
    read_slices,
)
from prior.realism import make_chimeras

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def training(phantoms) -> RealSlices:
    return read_slices(phantoms["train"])


@pytest.fixture(scope="module")
def held_out(phantoms) -> RealSlices:
    return read_slices(phantoms["validate"], phantoms["test"])


class Codec:
    """Stand-in for a `Sampler`: a code is the brightness of 2 x 2 pixels."""

    device = CPU
    seed = 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return ((F.avg_pool2d(images, 2)[:, 0] + 3) * 5).round().clamp(0, 40).long()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return F.interpolate(codes[:, None] / 5 - 3, scale_factor=2.0)


def test_slices_of_several_splits_are_joined(phantoms, held_out):
    assert held_out.images.shape == (16, 1, 256, 128)
    torch.testing.assert_close(held_out.images[8:], phantoms["test"].batch(torch.arange(8)))
    assert torch.equal(held_out.labels[:8], phantoms["validate"].labels()[:, ::2, ::2])
    assert torch.equal(held_out.positions[8:], phantoms["test"].positions)
    assert [name.stem for name in held_out.names[:8]] == [
        name.stem for name in phantoms["validate"].names
    ]


def test_constant_slices_are_left_out_and_missing_segmentations_are_zeros(load_images):
    image = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).numpy()
    real = read_slices(load_images(image, 0 * image + 5, image * 2 + 1))
    assert [name.slice for name in real.names] == [0, 2]
    assert len(real.images) == len(real.positions) == 2
    assert real.labels.shape == (2, 128, 64)
    assert not real.labels.any()


def halve(real: RealSlices) -> RealSlices:
    """Halve the resolution of slices, so that a network is trained in seconds."""
    return real._replace(images=F.avg_pool2d(real.images, 2), labels=real.labels[:, ::2, ::2])


def test_implausible_anatomy_is_detected(training, held_out, monkeypatch):
    """Chimeras have real texture, but their organs do not fit together."""
    monkeypatch.setattr(anatomy, "STEPS", 60)
    codec = Codec()
    generator = torch.Generator().manual_seed(0)
    image_sets = {
        "held-out": held_out.images,
        "reconstructed": codec.decode(codec.encode(held_out.images)),
        "chimeras": make_chimeras(held_out.images, generator),
        "independent codes": torch.randn(held_out.images.shape, generator=generator),
    }
    sets = {}
    for name, images in image_sets.items():
        sets[name] = (F.avg_pool2d(images, 2), held_out.positions)
    rows, dice = measure_anatomy(sets, halve(training), halve(held_out), CPU)
    scores = {name: row["mean_z"] for name, row in rows.items()}
    implausible = {name: row["implausible"] for name, row in rows.items()}
    assert scores["held-out"] == pytest.approx(scores["reconstructed"], rel=0.2)
    assert 1.3 * scores["held-out"] < scores["chimeras"] < scores["independent codes"]
    assert implausible["held-out"] == 1 / 16
    assert implausible["reconstructed"] <= 0.25
    assert implausible["chimeras"] >= 0.5
    assert implausible["independent codes"] == 1
    assert dice["held-out"]["bone"] > 0.5
    assert dice["held-out"].keys() == dice["reconstructed"].keys()


def test_an_evaluation_has_a_row_for_each_set(training, held_out, monkeypatch, capsys):
    """The samples are one good slice, repeated."""
    monkeypatch.setattr(anatomy, "STEPS", 1)
    monkeypatch.setattr(realism, "search_copies", lambda *args, **options: {})  # slow
    sampled = held_out.images[3:4].repeat(16, 1, 1, 1)
    positions = held_out.positions[3].expand(16)
    result = evaluate_samples(Codec(), sampled, positions, training, held_out)
    rows = result["measures"]
    sets = ["held-out", "reconstructed", "sampled", "chimeras", "independent codes"]
    assert list(rows) == ["training", *sets]
    assert all({"implausible", "mean_z"} <= rows[name].keys() for name in sets)
    distance = {name: row["kernel_distance"] for name, row in rows.items()}
    assert distance["reconstructed"] < distance["independent codes"]
    assert distance["chimeras"] < distance["independent codes"]
    assert rows["sampled"]["coverage"] < rows["training"]["coverage"]
    assert rows["independent codes"]["coverage"] == 0
    assert json.loads(json.dumps(result)) == result
    print_evaluation(result)
    lines = capsys.readouterr().out.splitlines()
    for name in rows:
        line = next(line for line in lines if line.startswith(name))
        assert f"{distance[name]:.3f}" in line
    assert any("Dice of the segmentation network, held-out slices: body" in line for line in lines)
    note = f"60 training cases to detect disordered anatomy; there are {result['cases']}"
    assert any(note in line for line in lines)
