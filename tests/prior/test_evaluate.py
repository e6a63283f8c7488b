"""Tests of prior/evaluate.py, on phantoms, with a codec that needs no training."""

import json
from functools import partial

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
    sample_independently,
)
from prior.realism import make_chimeras

CPU = torch.device("cpu")
BONE = 2  # label


@pytest.fixture(scope="module")
def training(phantoms) -> RealSlices:
    return read_slices(phantoms["train"])


@pytest.fixture(scope="module")
def held_out(phantoms) -> RealSlices:
    return read_slices(phantoms["validate"], phantoms["test"])


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


def test_the_anatomy_of_sets_is_ranked(training, held_out, monkeypatch):
    """The images are segmentations, which replace those by a network.

    Reconstructions differ from originals only at the edges of organs. Chimeras have parts of real
    organs, which do not fit together. Anatomy does not detect one good slice repeated; the coverage
    does (see below).
    """
    monkeypatch.setattr(anatomy, "train_network", lambda *args: None)
    monkeypatch.setattr(anatomy, "segment", lambda network, images: images[:, 0, ::2, ::2].byte())
    training, held_out = use_labels(training), use_labels(held_out)
    generator = torch.Generator().manual_seed(0)
    codes = sample_independently(held_out.images[:, 0, ::4, ::4], 16, generator)
    sets = {
        "held-out": (held_out.images, held_out.positions),
        "reconstructed": (held_out.images.roll(2, -1), held_out.positions),
        "sampled": (held_out.images[[2] * 16], held_out.positions[[2] * 16]),
        "chimeras": (make_chimeras(held_out.images, generator), held_out.positions),
        "independent codes": (F.interpolate(codes[:, None], scale_factor=4.0), held_out.positions),
    }
    rows, dice = measure_anatomy(sets, training, held_out, CPU)

    order = ["held-out", "reconstructed", "chimeras", "independent codes"]
    scores = [rows[name]["mean_z"] for name in order]
    assert scores == sorted(scores)
    assert 1.3 * scores[1] < scores[2] < 0.7 * scores[3]
    implausible = {name: row["implausible"] for name, row in rows.items()}
    assert implausible["held-out"] == 1 / 16
    assert implausible["reconstructed"] <= 4 / 16
    assert implausible["sampled"] == 0
    assert implausible["chimeras"] >= 0.75
    assert implausible["independent codes"] == 1

    symmetry = [rows[name]["symmetry"] for name in order]
    assert symmetry[:2] == pytest.approx([symmetry[0]] * 2, abs=0.01)
    assert symmetry[1] > symmetry[2] + 0.1 > symmetry[3] + 0.2
    fragments = [rows[name]["fragments"] for name in order]
    assert fragments[0] < fragments[2] < fragments[3]
    bone = (held_out.labels == BONE).float().mean().item()
    assert rows["held-out"]["bone"] == pytest.approx(bone)
    assert set(dice["held-out"].values()) == {1}
    assert dice["held-out"].keys() == dice["reconstructed"].keys()
    assert dice["reconstructed"]["bone"] < 1


def use_labels(real: RealSlices) -> RealSlices:
    """Replace the images by their segmentations, upsampled to the same size."""
    return real._replace(images=F.interpolate(real.labels[:, None].float(), scale_factor=2.0))


def test_an_evaluation_has_a_row_for_each_set(training, held_out, codec, monkeypatch, capsys):
    """The samples are one good slice, repeated, so their coverage is low.

    Chimeras consist of real texture, so the kernel distance does not rank them after reconstructed
    slices.
    """
    monkeypatch.setattr(anatomy, "STEPS", 1)
    monkeypatch.setattr(realism, "Features", partial(realism.Features, filters=8))  # faster
    monkeypatch.setattr(realism, "search_copies", lambda *args: {})  # slow
    sampled = held_out.images[3:4].repeat(16, 1, 1, 1)
    positions = held_out.positions[3].expand(16)
    result = evaluate_samples(codec, sampled, positions, training, held_out)
    rows = result["measures"]
    sets = ["held-out", "reconstructed", "sampled", "chimeras", "independent codes"]
    assert list(rows) == ["training", *sets]
    names = {"implausible", "mean_z", "bone", "symmetry", "fragments"}
    assert all(names <= rows[name].keys() for name in sets)
    distance = {name: row["kernel_distance"] for name, row in rows.items()}
    assert distance["held-out"] < distance["reconstructed"] < distance["independent codes"]
    assert distance["held-out"] < distance["chimeras"] < distance["independent codes"]
    assert distance["held-out"] < distance["sampled"]
    coverage = {name: rows[name]["coverage"] for name in ("training", *sets[2:])}
    assert coverage["sampled"] < 0.5 * coverage["training"]
    assert coverage["independent codes"] == 0
    assert json.loads(json.dumps(result)) == result
    print_evaluation(result)
    lines = capsys.readouterr().out.splitlines()
    for name, row in rows.items():
        line = next(line for line in lines if line.startswith(name))
        assert f"{distance[name]:.3f}" in line
        assert name == "training" or f"{row['bone']:.1%}" in line
    assert any("Dice of the segmentation network, held-out slices: body" in line for line in lines)
    note = f"60 training cases to detect disordered anatomy; there are {result['cases']}"
    assert any(note in line for line in lines)
