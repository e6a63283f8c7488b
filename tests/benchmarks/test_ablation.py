"""benchmarks/ablation.py: it trains and evaluates variants, and its table shows their results."""

import dataclasses
import json
from argparse import Namespace

import ablation
import processes
import pytest
import torch
from trainer import Trainer

from modules import VQVAE
from training.config import TrainConfig, resolve_config
from utils import UserError

NAME = "tuned, FSQ 8 x 8 x 8"  # it replaces a class of modules.py
RUN = "tuned__FSQ_8_x_8_x_8_epochs_1_seed_0"


def test_a_variant_is_trained_and_evaluated_once(tmp_path, write_slices, monkeypatch):
    monkeypatch.setattr(ablation, "relative_step_times", lambda args: {NAME: 1.25})
    monkeypatch.setattr(ablation, "get_context", lambda method: processes.fork_context())
    data = write_slices(tmp_path / "data", train=3, validate=2, test=2)
    out = tmp_path / "results" / "table"
    flags = ["--variants", NAME, "--epochs", "1", "--runs-dir", str(tmp_path / "runs")]
    flags += ["--out", str(out)]
    for _ in range(2):  # the second time, nothing is left to do
        assert ablation.main(["--data", str(data), *flags]) == 0
    log = (tmp_path / "runs" / "data" / f"{RUN}.log").read_text()
    assert log.count("epoch 1: train loss") == 1

    (row,) = json.loads(out.with_suffix(".json").read_text())
    run = tmp_path / "runs" / "data" / RUN
    assert row["test"]["ssim"] == json.loads((run / "test" / "metrics.json").read_text())["ssim"]
    assert row["replaced"] == {"VectorQuantizer": "FSQ"}
    assert (row["epochs"], row["bits_per_pixel"], row["test_slices"]) == (1, 0.5625, 2)
    assert 1.3 < row["gmac"] < 1.5
    assert row["step_time"] == 1.25
    start = f"| {NAME} | 1 | 1 | {row['gmac']:.2f} | {row['step_time']:.2f} | 0.5625 |"
    assert start in out.with_suffix(".md").read_text()

    other = write_slices(tmp_path / "elsewhere" / "data", train=3, validate=2, test=2)
    with pytest.raises(UserError, match=r"was trained on .*Choose another --runs-dir"):
        ablation.main(["--data", str(other), *flags])


def test_step_times_are_relative_to_the_document(tmp_path, write_slices):
    data = write_slices(tmp_path / "data", train=3, validate=1, test=1)
    args = Namespace(variants=["document"], precision="float32", data=data)
    assert ablation.relative_step_times(args, rounds=1) == {"document": 1.0}


def write_run(folder, config: TrainConfig, epochs: int) -> None:
    content = {"arguments": dataclasses.asdict(config)}
    (folder / "config.json").write_text(json.dumps(content))
    rows = "".join(f"{epoch}\n" for epoch in range(1, epochs + 1))
    (folder / "metrics.csv").write_text("epoch\n" + rows)


def test_finished_epochs_are_counted(tmp_path):
    assert ablation.finished_epochs(tmp_path, tmp_path, []) == 0
    write_run(tmp_path, TrainConfig(data=str(tmp_path)), epochs=2)
    assert ablation.finished_epochs(tmp_path, tmp_path, []) == 2


def test_data_may_be_found_below_or_next_to_the_folder(tmp_path):
    write_run(tmp_path, TrainConfig(data=str(tmp_path / "data")), epochs=1)
    for folder in (tmp_path, tmp_path / "data", tmp_path / "data" / "keras_slices_test"):
        assert ablation.finished_epochs(tmp_path, folder, []) == 1
    with pytest.raises(UserError, match="Choose another --runs-dir"):
        ablation.finished_epochs(tmp_path, tmp_path / "other", [])


def test_a_run_with_other_settings_is_rejected(tmp_path):
    write_run(tmp_path, TrainConfig(data=str(tmp_path)), epochs=2)
    expected = r"clip_grad_norm 1.0 \(expected 2.0\), seed 0 \(expected 1\). Choose another"
    with pytest.raises(UserError, match=expected):
        ablation.finished_epochs(tmp_path, tmp_path, ["--clip-grad-norm", "2", "--seed", "1"])


def test_multiply_adds_of_the_documents_model():
    assert ablation.multiply_adds(VQVAE()) / 1e9 == pytest.approx(0.81, abs=0.005)


def test_a_step_is_timed_after_a_warm_up(monkeypatch):
    trainer = Trainer(resolve_config({"hidden_channels": 8}), torch.device("cpu"))
    calls = []
    step = trainer.step
    monkeypatch.setattr(trainer, "step", lambda images: calls.append(1) or step(images))
    assert 0 < ablation.seconds_of_step(trainer, torch.randn(1, 1, 256, 128)) < 60
    assert len(calls) == 2


def test_the_table_shows_half_the_range_over_seeds():
    rows = []
    for seed, value in enumerate((0.80, 0.82, 0.81)):
        row = {"variant": "tuned", "seed": seed, "epochs": 2, "gmac": 1, "bits_per_pixel": 0.5625}
        row |= {"codes_used": 500, "perplexity": 300, "validation_ssim": value}
        row["test"] = {name: {"mean": value} for name in ablation.SCORE_NAMES}
        rows.append(row)
    cells = ablation.table(rows).splitlines()[2].split(" | ")
    assert cells[1] == "3"
    assert cells[5] == "0.5625"
    assert cells[7] == "0.810 ± 0.010"


def test_unknown_variants_are_errors(capsys):
    with pytest.raises(SystemExit) as error:
        ablation.main(["--data", ".", "--variants", "better"])
    assert error.value.code == 2
    assert "invalid choice: 'better'" in capsys.readouterr().err


def test_zero_jobs_are_an_error():
    with pytest.raises(UserError, match="--jobs is 0 and --epochs is 100; expected at least 1"):
        ablation.main(["--data", ".", "--jobs", "0"])
