"""benchmarks/sharpness.py: its command compares runs on the slices that are not constant."""

import json

import numpy as np
import pytest
import sharpness
import torch

from evaluation.metrics import SCORE_NAMES


def test_runs_are_compared(tmp_path, write_slices, write_nifti, write_run, capsys):
    data = write_slices(tmp_path / "data", train=4, validate=1, test=3)
    constant = data / "keras_slices_test" / "case_041_week_0_slice_0.nii.gz"
    write_nifti(constant, np.zeros((256, 128), np.int16))
    runs = []
    for seed, name in enumerate(("plain", "gan")):
        runs.append(write_run(tmp_path / name, data, seed, epochs=1, gan=name == "gan"))
    out = tmp_path / "results" / "sharp"
    flags = ["--runs", *map(str, runs), "--out", str(out), "--device", "cpu"]
    assert sharpness.main(flags) == 0

    result = json.loads(out.with_suffix(".json").read_text())
    assert (result["data"], result["split"], result["slices"]) == ("data", "test", 3)
    assert str(tmp_path) not in json.dumps(result)
    for row, run in zip(result["rows"], runs, strict=True):
        assert (row["run"], row["bits_per_pixel"]) == (run.name, 0.25)
        assert row["flags"]["gan"] == (run.name == "gan")
        assert row["trained"]["versions"] == {"commit": "abc"}
        # Reconstructions of an untrained model are almost constant.
        assert row["scores"]["power_octave_0"]["mean"] == pytest.approx(0, abs=0.05)
        assert row["distance_to_originals"] > 1
    text = out.with_suffix(".md").read_text()
    assert text.count("\n| ") == 3
    assert "power, top octave" in text
    assert "| gan | 0.2500 |" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 5000


def test_identical_slices_are_as_sharp_as_the_originals():
    images = torch.randn(17, 1, 256, 128, generator=torch.Generator().manual_seed(0))
    scores = sharpness.score(images, images)
    octaves = [f"power_octave_{octave}" for octave in range(3)]
    assert list(scores) == [*SCORE_NAMES, *octaves]
    for name in octaves:
        torch.testing.assert_close(scores[name], torch.ones(17))
