"""The comparison of variants: its command runs, its table says what the runs' files say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ablation


def test_a_variant_is_trained_evaluated_and_tabled(tmp_path, write_slices):
    data = write_slices(tmp_path / "data", train=3, validate=2, test=2)
    out = tmp_path / "results" / "table"
    command = [sys.executable, ablation.__file__, "--data", data, "--variants", "document", "--epochs", "1"]
    command += ["--runs-dir", tmp_path / "runs", "--out", out]
    for _ in range(2):  # the second time nothing is left to do
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "epoch 1" not in done.stdout
    other = write_slices(tmp_path / "elsewhere" / "data", train=3, validate=2, test=2)
    done = subprocess.run([str(other if word is data else word) for word in command], capture_output=True, text=True)
    assert done.returncode == 1 and "name another --runs-dir" in done.stderr
    (row,) = json.loads(out.with_suffix(".json").read_text())
    run = tmp_path / "runs" / "data" / "document_epochs_1_seed_0"
    assert row["test"]["ssim"] == json.loads((run / "test" / "metrics.json").read_text())["ssim"]
    assert row["flags"] == "--recipe document" and row["epochs"] == 1 and row["bits_per_pixel"] == 0.5625
    assert f"| document | 1 | 1 | {row['minutes']:.1f} | 0.5625 |" in out.with_suffix(".md").read_text()


def test_the_spread_is_half_the_range_over_seeds():
    def row(seed, value):
        test = {name: {"mean": value} for name in ablation.SCORES}
        return {"variant": "tuned", "seed": seed, "epochs": 2, "minutes": 1, "bits_per_pixel": 0.5625,
                "codes_used": 500, "perplexity": 300, "validation_ssim": value, "test": test}  # fmt: skip

    cells = ablation.table([row(0, 0.80), row(1, 0.82), row(2, 0.81)]).splitlines()[-1].split(" | ")
    assert cells[6] == "0.810 ± 0.010" and cells[1] == "3"


def test_unknown_variants_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--data", ".", "--variants", "better"])
    with pytest.raises(SystemExit) as stop:
        ablation.main()
    assert stop.value.code == 2
