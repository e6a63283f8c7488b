"""The comparison of runs by sharpness: its command from end to end."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import sharpness

import utils
from modules import VQVAE
from training.checkpoint import CHECKPOINT_FORMAT, write_checkpoint


def test_runs_stand_side_by_side(tmp_path, write_slices, write_nifti, capsys):
    """Two untrained models; a constant slice is left out."""
    data = write_slices(tmp_path / "data", train=4, validate=1, test=3)
    write_nifti(
        data / "keras_slices_test" / "case_041_week_0_slice_0.nii.gz",
        np.zeros((256, 128), np.int16),
    )
    runs = [tmp_path / name for name in ("plain", "gan")]
    for seed, run in enumerate(runs):
        torch.manual_seed(seed)
        model = VQVAE(hidden_channels=8, residual_channels=4, embedding_dim=4, num_embeddings=16)
        run.mkdir()
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "model_args": model.arguments,
            "model": model.state_dict(),
        }
        write_checkpoint(run / "best.pt", checkpoint)
        arguments = {
            "data": str(data),
            "recipe": "tuned",
            "epochs": 1,
            "seed": seed,
            "gan": bool(seed),
        }
        config = {
            "arguments": arguments,
            "device": "cpu",
            "precision": "float32",
            "versions": {"commit": "abc"},
        }
        utils.write_json(run / "config.json", config)
    out = tmp_path / "results" / "sharp"
    assert sharpness.main(["--runs", *map(str, runs), "--out", str(out), "--device", "cpu"]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert (result["data"], result["split"], result["slices"]) == ("data", "test", 3)
    assert str(tmp_path) not in json.dumps(result)
    for row, run in zip(result["rows"], runs, strict=True):
        assert row["run"] == run.name and row["bits_per_pixel"] == 0.25
        assert row["flags"]["gan"] == (run.name == "gan") and row["trained"]["versions"] == {
            "commit": "abc"
        }
        assert row["scores"]["power_octave_0"]["mean"] == pytest.approx(
            0, abs=0.05
        )  # it is nearly one grey
        assert row["distance_to_originals"] > 1
    text = out.with_suffix(".md").read_text()
    assert text.count("\n| ") == 3 and "power, top octave" in text
    assert "| gan | 0.2500 |" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 5000
