"""training/run.py: steps, epochs, checkpoints and the folder of a run, with a tiny model."""

import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from training.checkpoint import read_checkpoint
from training.config import TrainConfig
from training.run import Run, epoch_order
from utils import UserError


class Model(torch.nn.Linear):
    arguments = {"in_features": 3}  # noqa: RUF012 (as a model's constructor sets it)

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(3, 1)


class Data:
    """Ten examples, which are their own numbers."""

    names = tuple(SimpleNamespace(stem=f"slice_{i}") for i in range(10))

    def batches(self, groups, device):
        return (group.to(device) for group in groups)


def make_run(folder, losses=("train_recon", "train_vq"), fingerprint="data", **values) -> Run:
    model = Model()
    return Run(
        folder=folder / "runs" / "a",
        config=TrainConfig(**{"epochs": 3, "batch_size": 4} | values),
        device=torch.device("cpu"),
        precision="float32",
        modules={"model": model},
        optimizer=torch.optim.Adam(model.parameters(), lr=0.5, fused=True),
        num_examples=10,
        losses=losses,
        num_shown=min(2, len(losses)),
        best_column="val_ssim",
        best=-math.inf,
        fingerprint=fingerprint,
        info={"slices": {"train": 10}},
        extra_state={"slices": "described"},
        resume_command="train.py --resume",
    )


def train(run, losses=lambda step: (0.25, 0.5), finite=lambda step: True, at_step=None):
    """Run the loop of the module's docstring; return a random number drawn in each step."""
    draws, stopped = {}, None
    with run:
        for epoch in run.epochs():
            for step in run.steps(Data()):
                draws[step.number] = torch.rand(1).item()
                run.optimizer.zero_grad()
                run.modules["model"](torch.randn(step.size, 3)).sum().backward()
                run.optimizer.step()
                if step.number == at_step:
                    os.kill(os.getpid(), signal.SIGTERM)
                values = torch.tensor(losses(step.number))
                run.record_step(values, torch.tensor(finite(step.number)))
                if run.should_stop():
                    stopped = run.stop()
                    return draws, stopped
            run.end_epoch({"val_loss": 1.0, "val_ssim": epoch / 10})
            run.write_history()
            run.save("last.pt")
    return draws, stopped


# ---------------------------------------------------------------- steps and epochs


def test_each_epoch_has_its_own_order():
    """Data in the same order in every epoch is a defect of known scripts."""
    first = epoch_order(50, seed=0, epoch=1).tolist()
    assert sorted(first) == list(range(50))
    assert first != list(range(50))
    assert first == epoch_order(50, seed=0, epoch=1).tolist()
    assert first != epoch_order(50, seed=0, epoch=2).tolist()
    assert first != epoch_order(50, seed=1, epoch=1).tolist()


def test_the_steps_of_an_epoch_cover_the_data_once(tmp_path):
    run = make_run(tmp_path, dry_run=True)
    with run:
        steps = list(run.steps(Data()))
    assert [step.number for step in steps] == [0, 1, 2]
    assert [step.progress for step in steps] == [0, 1 / 9, 2 / 9]
    assert [step.size for step in steps] == [4, 4, 2]
    assert [step.is_full for step in steps] == [True, True, False]
    assert [step.weight for step in steps] == [1, 1, 1]
    assert sorted(torch.cat([step.batch for step in steps]).tolist()) == list(range(10))


def test_a_row_has_the_means_of_the_epoch(tmp_path):
    """Weighted by examples: two full steps and one of two examples."""
    run = make_run(tmp_path)
    train(run, losses=lambda step: (float(step % 3), 0.5))
    row = run.history[1]
    mean = (4 * 0 + 4 * 1 + 2 * 2) / 10
    assert row["train_recon"] == pytest.approx(mean)
    assert row["train_loss"] == pytest.approx(mean + 0.5)
    assert list(row) == ["epoch", "step", "train_loss", "train_recon", "train_vq", "val_loss",
                         "val_ssim", "lr", "seconds"]  # fmt: skip
    assert (row["epoch"], row["step"], row["lr"]) == (2, 6, 0.5)


def test_a_single_loss_needs_no_column_of_its_own(tmp_path):
    run = make_run(tmp_path, losses=("train_codes",))
    train(run, losses=lambda step: (1.0,))
    assert "train_codes" not in run.history[0]
    assert run.history[0]["train_loss"] == 1


def test_skipped_steps_are_reported_and_do_not_count(tmp_path, capsys):
    run = make_run(tmp_path, epochs=1)
    train(run, losses=lambda step: (float(step), 0.0), finite=lambda step: step != 1)
    assert run.history[0]["train_recon"] == pytest.approx(2 * 2 / 6)
    warning = "warning: 1 of 3 steps of epoch 1 were skipped"
    assert f"{warning} because of non-finite gradients, the last at step 2" in (
        capsys.readouterr().out
    )


def test_an_epoch_without_a_finite_step_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"diverged in epoch 1 .3 of 3 steps skipped"):
        train(make_run(tmp_path), finite=lambda step: False)


def test_a_validation_loss_that_is_not_finite_is_an_error(tmp_path):
    run = make_run(tmp_path)
    with run:
        for _ in run.steps(Data()):
            run.record_step(torch.tensor([1.0, 1.0]), torch.tensor(True))
        with pytest.raises(UserError, match=r"diverged in epoch 1 .*validation loss nan"):
            run.end_epoch({"val_loss": math.nan, "val_ssim": 0.5})


def test_a_loss_that_is_not_finite_ends_the_epoch_with_the_names_of_its_slices(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(UserError, match="not finite at step 5 of the run, in epoch 2") as error:
        train(run, losses=lambda step: (math.nan if step == 4 else 1.0, 1.0))
    names = [f"slice_{i}" for i in epoch_order(10, seed=0, epoch=2)[4:8]]
    assert f"The slices of the step: {', '.join(names)}\n" in str(error.value)
    assert "last.pt has the last saved state" in str(error.value)
    assert read_checkpoint(run.folder / "last.pt")["epochs_done"] == 1


def test_plots_are_made_after_the_first_and_last_epoch_and_at_intervals(tmp_path):
    run = make_run(tmp_path, epochs=10, plot_every=4)
    assert [epoch for epoch in range(1, 11) if run.is_plot_epoch(epoch)] == [1, 4, 8, 10]


# ---------------------------------------------------------------- stop and resume


def test_a_resumed_run_draws_and_ends_as_an_uninterrupted_one(tmp_path):
    """Stopped in the fifth of nine steps; the generator's state in between does not matter."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    expected, _ = train(make_run(whole))
    first, code = train(make_run(part), at_step=4)
    assert code == 128 + signal.SIGTERM
    run = make_run(part)
    run.restore(read_checkpoint(run.folder / "last.pt"))
    assert (run.epochs_done, run.steps_done) == (1, 2)
    torch.manual_seed(99)
    second, code = train(run)
    assert code is None
    assert first | second == expected
    assert set(first) == {0, 1, 2, 3, 4}
    one, other = (read_checkpoint(path / "runs/a/last.pt") for path in (whole, part))
    assert torch.equal(one["model"]["weight"], other["model"]["weight"])
    for row in [*one["history"], *other["history"]]:
        del row["seconds"]
    assert one["history"] == other["history"]


def test_another_seed_gives_other_draws(tmp_path):
    one, _ = train(make_run(tmp_path / "a", epochs=1))
    other, _ = train(make_run(tmp_path / "b", epochs=1, seed=1))
    assert not set(one.values()) & set(other.values())


def test_a_checkpoint_has_the_documented_entries(tmp_path):
    train(make_run(tmp_path, epochs=1))
    checkpoint = read_checkpoint(tmp_path / "runs/a/last.pt")
    assert checkpoint.keys() == {
        "format", "model_args", "epochs_done", "history", "best", "steps_done", "seconds",
        "optimizer", "sums", "fingerprint", "slices", "model",
    }  # fmt: skip
    assert checkpoint["format"] == 3
    assert checkpoint["model_args"] == {"in_features": 3}
    assert checkpoint["slices"] == "described"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"created by an older version and cannot be resumed; start a new run"),
        ({"fingerprint": "other"}, "was trained on other slices than those in"),
        ({"model_args": {"in_features": 4}}, "was created by another version, whose recipe made"),
        ({"steps_done": "x"}, "is corrupt"),
        ({"steps_done": -3}, "is corrupt"),
        ({"epochs_done": 0}, "is corrupt"),
        ({"history": 3}, "is corrupt"),
        ({"history": [{"epoch": 1}]}, "is corrupt"),
        ({"best": "x"}, "is corrupt"),
        ({"seconds": None}, "is corrupt"),
        ({"optimizer": {}}, "is corrupt"),
        ({"sums": torch.zeros(1)}, "is corrupt"),
        ({"model": {}}, "is corrupt"),
    ],
)
def test_checkpoints_that_cannot_be_resumed_are_errors(tmp_path, changes, message):
    train(make_run(tmp_path, epochs=1))
    run = make_run(tmp_path)
    checkpoint = read_checkpoint(run.folder / "last.pt")
    with pytest.raises(UserError, match=message):
        run.restore(checkpoint | changes)
    run.restore(checkpoint)  # unchanged, it can


# ---------------------------------------------------------------- the folder


def test_config_json_has_arguments_information_and_versions(tmp_path):
    run = make_run(tmp_path)
    with run:
        config = json.loads((run.folder / "config.json").read_text())
    assert config["name"] == "a"
    assert config["arguments"] == run.config.to_json()
    assert TrainConfig(**config["arguments"] | {"runs_dir": run.config.runs_dir}) == run.config
    assert config["slices"] == {"train": 10}
    assert config["precision"] == "float32"
    assert config["device"].startswith("cpu")
    assert "torch" in config["versions"]


def test_a_dry_run_writes_nothing_and_prints_the_expected_time(tmp_path, capsys):
    run = make_run(tmp_path, dry_run=True)
    with run:
        for _ in run.steps(Data()):
            run.record_step(torch.tensor([1.0, 1.0]), torch.tensor(True))
        run.print_expected_time(seconds_per_validation=600)
    printed = capsys.readouterr().out
    assert "takes about 21 min; nothing was written to" in printed  # 2 epochs, and the steps
    assert not list(tmp_path.iterdir())


def test_a_dry_run_stops_after_a_few_steps(tmp_path):
    run = make_run(tmp_path, dry_run=True, batch_size=1)
    with run:
        assert len(list(run.steps(Data()))) == 4


def test_a_folder_has_one_run_at_a_time(tmp_path):
    second = make_run(tmp_path)
    with (
        make_run(tmp_path),
        pytest.raises(UserError, match="another process is training"),
        second,
    ):
        pass
    with second:
        pass


def test_a_run_that_was_trained_by_another_process_is_not_continued(tmp_path):
    run = make_run(tmp_path)
    train(make_run(tmp_path, epochs=1))
    before = (run.folder / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"in the meantime; to resume:\n    train.py --resume"), run:
        pass
    assert (run.folder / "config.json").read_bytes() == before


def test_the_plan_has_epochs_steps_and_device(tmp_path):
    plan = make_run(tmp_path).describe_plan()
    assert plan.startswith("training: 3 epochs of 3 steps of 4 slices, 9 steps left, on cpu")
    assert plan.endswith("in float32")
