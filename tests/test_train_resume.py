"""train.py: interruptions, --resume, steps that are not finite, and mistakes."""

import copy
import json
import os
import shutil
import signal
import threading

import processes
import pytest
import torch
from training_runs import assert_same_tensors, read_rows, read_weights, rows_without_seconds

import dataset
import train
from mri import hipmri
from training.checkpoint import read_checkpoint
from training.run import Run
from utils import CheckpointError, UserError

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]


def send(number):
    """Return an action for `at_step` that sends a signal to this process."""
    return lambda images: os.kill(os.getpid(), number)


def assert_same_runs(one, other):
    """Check that two runs have equal weights and equal tables."""
    assert_same_tensors(read_weights(one), read_weights(other))
    assert rows_without_seconds(one) == rows_without_seconds(other)


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_at_the_step_and_resume_gives_the_same_run(
    tmp_path, train_here, at_step, capsys, number
):
    """After two of the three steps of the second epoch."""
    train_here("--epochs 3 --name uninterrupted")
    handler = signal.getsignal(number)
    at_step({5}, send(number))
    assert train_here("--epochs 3 --name a") == 128 + number
    assert signal.getsignal(number) == handler
    assert "--resume --runs-dir runs --name a" in capsys.readouterr().out.splitlines()[-1]
    folder = tmp_path / "runs/a"
    checkpoint = read_checkpoint(folder / "last.pt")
    assert (checkpoint["epochs_done"], checkpoint["steps_done"]) == (1, 2)
    assert checkpoint["sums"][2] == 8  # slices
    assert {float(state["step"]) for state in checkpoint["optimizer"]["state"].values()} == {5.0}
    assert train_here("--resume --name a") == 0
    assert_same_runs(folder, tmp_path / "runs/uninterrupted")


def test_a_killed_process_can_be_resumed_to_the_same_run(tmp_path, train_here, blobs, small):
    train_here("--epochs 12 --name uninterrupted")
    flags = ["--data", blobs, *small, "--epochs", "12", "--plot-every", "100", "--name", "a"]
    process = processes.start(tmp_path, "train.py", *flags)
    folder = tmp_path / "runs/a"
    processes.wait_until(lambda: len(read_rows(folder)) >= 2, process, tmp_path / "log")
    process.kill()
    process.join()
    assert len(read_rows(folder)) < 12
    assert train_here("--resume --name a") == 0
    assert_same_runs(folder, tmp_path / "runs/uninterrupted")


def test_a_signal_during_the_last_validation_changes_nothing(tmp_path, train_here, monkeypatch):
    real = train.validate

    def validate(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(train, "validate", validate)
    assert train_here("--epochs 1 --name a") == 0
    assert read_checkpoint(tmp_path / "runs/a/last.pt")["epochs_done"] == 1


def test_an_epoch_that_lacks_only_its_validation_can_be_resumed(tmp_path, train_here, at_step):
    train_here("--epochs 2 --name uninterrupted")
    at_step({3}, send(signal.SIGTERM))
    assert train_here("--epochs 2 --name a") == 128 + signal.SIGTERM
    folder = tmp_path / "runs/a"
    assert read_checkpoint(folder / "last.pt")["steps_done"] == 3
    assert train_here("--resume --name a --dry-run") == 0
    assert train_here("--resume --name a") == 0
    assert_same_runs(folder, tmp_path / "runs/uninterrupted")


def test_a_run_outside_the_main_thread_leaves_signals_alone(tmp_path, train_here, at_step):
    handlers, codes = [], []
    at_step({1}, lambda images: handlers.append(signal.getsignal(signal.SIGTERM)))
    thread = threading.Thread(target=lambda: codes.append(train_here("--epochs 1 --name a")))
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert codes == [0]
    assert handlers == [before]
    assert read_checkpoint(tmp_path / "runs/a/last.pt")["epochs_done"] == 1


# ---------------------------------------------------------------- resume


def test_a_finished_run_can_be_trained_longer(run_copy, train_here):
    assert train_here("--resume --name a --epochs 4") == 0
    assert [int(row["epoch"]) for row in read_rows(run_copy)] == [1, 2, 3, 4]


def test_resume_accepts_the_same_flags_and_moved_data(run_copy, train_here, blobs, tmp_path):
    moved = shutil.copytree(blobs, tmp_path / "moved")
    flags = f"--precision auto --seed 0 --data {moved}"
    assert train_here(f"--resume --name a --epochs 4 {flags}") == 0


def test_resume_rejects_other_data(run_copy, train_here, write_slices, tmp_path):
    other = write_slices(tmp_path / "other", train=10, validate=3)
    with pytest.raises(UserError, match="was trained on other slices than"):
        train_here(f"--resume --name a --epochs 4 --data {other}")


def test_resume_rejects_another_model(run_copy, train_here):
    """A recipe that changed between two versions makes another model."""
    path = run_copy / "config.json"
    path.write_text(path.read_text().replace('"num_code_layers": 1', '"num_code_layers": 2'))
    with pytest.raises(UserError, match="was created by another version"):
        train_here("--resume --name a --epochs 4 --num-code-layers 2")


def test_resume_rejects_a_checkpoint_of_an_older_format(run_copy, train_here):
    path = run_copy / "last.pt"
    torch.save(read_checkpoint(path) | {"format": 2}, path)
    with pytest.raises(UserError, match=r"created by an older version.*start a new run"):
        train_here("--resume --name a --epochs 4")


def test_resume_rejects_a_checkpoint_that_cannot_be_read(run_copy, train_here):
    (run_copy / "last.pt").write_bytes(b"corrupt")
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        train_here("--resume --name a --epochs 4")


def test_a_config_of_an_earlier_version_can_be_resumed(run_copy, train_here):
    """It had the size of the slices among its arguments, and no preprocessing."""
    path = run_copy / "config.json"
    config = json.loads(path.read_text())
    del config["preprocessing"]
    config["arguments"] |= {"size": [256, 128], "fit": "resize", "an_old_flag": 3}
    path.write_text(json.dumps(config))
    assert train_here("--resume --name a --epochs 4") == 0
    config = json.loads(path.read_text())
    assert config["preprocessing"]["size"] == [256, 128]
    assert "an_old_flag" not in config["arguments"]


def test_a_run_that_another_process_has_trained_meanwhile_is_not_resumed(
    run_copy, train_here, monkeypatch
):
    """Between reading last.pt and taking the lock."""
    real = train.print_plan

    def print_plan(*arguments):
        real(*arguments)
        path = run_copy / "last.pt"
        torch.save(read_checkpoint(path) | {"steps_done": 1}, path)

    monkeypatch.setattr(train, "print_plan", print_plan)
    with pytest.raises(UserError, match="another process has trained runs/a in the meantime"):
        train_here("--resume --name a --epochs 4")


# ---------------------------------------------------------------- steps that are not finite


def test_a_step_with_non_finite_gradients_is_skipped_with_a_warning(
    tmp_path, train_here, monkeypatch, capsys
):
    """The fifth of six: it changes no weight, moment or codebook, and training continues."""
    real_losses, real_record, number, states = train.compute_losses, Run.record_step, 0, []

    def state(run):
        return copy.deepcopy((run.modules["model"].state_dict(), run.optimizer.state_dict()))

    def compute_losses(model, discriminator, images, precision, config):
        nonlocal number
        number += 1
        if number != 5:
            return real_losses(model, discriminator, images, precision, config)
        losses, quantized = real_losses(model, discriminator, images * torch.nan, precision, config)
        return losses.nan_to_num(), quantized  # finite losses, but gradients that are not

    def record_step(run, losses, finite):
        states.append(state(run))
        real_record(run, losses, finite)

    monkeypatch.setattr(train, "compute_losses", compute_losses)
    monkeypatch.setattr(Run, "record_step", record_step)
    assert train_here("--epochs 2 --name a") == 0
    warning = "warning: 1 of 3 steps of epoch 2 were skipped because of non-finite gradients"
    assert f"{warning}, the last at step 5" in capsys.readouterr().out
    (model_4, optimizer_4), (model_5, optimizer_5), (model_6, _) = states[3:]
    assert_same_tensors(model_4, model_5)
    for index, moments in optimizer_4["state"].items():
        assert_same_tensors(moments, optimizer_5["state"][index])
    assert not any(torch.equal(model_5[name], model_6[name]) for name in model_5)
    assert all(float(row["train_loss"]) > 0 for row in read_rows(tmp_path / "runs/a"))


def test_a_non_finite_loss_ends_the_run_and_names_its_slices(tmp_path, train_here, at_step, blobs):
    """Spoil step 5, the second of epoch 2; last.pt is that of the first epoch."""
    batches = []

    def spoil(images):
        batches.append(images)
        return images * torch.nan

    at_step({5}, spoil)
    with pytest.raises(
        UserError, match="the loss is not finite at step 5 of the run, in epoch 2"
    ) as error:
        train_here("--epochs 3 --name a --crop 0 --no-augment")
    slices = dataset.load_split(hipmri.find_hipmri(blobs), "train", progress=False)
    words = str(error.value).replace(",", "").split()
    for i, name in enumerate(slices.names):
        in_batch = any(torch.equal(slices[i], image) for image in batches[0])
        assert (name.stem in words) == in_batch
    assert len(batches[0]) == 4
    assert "runs/a/last.pt has the last saved state" in str(error.value)
    assert read_checkpoint(tmp_path / "runs/a/last.pt")["epochs_done"] == 1


def test_a_signal_does_not_save_a_non_finite_step(run_copy, train_here, at_step):
    def spoil(images):
        os.kill(os.getpid(), signal.SIGTERM)
        return images * torch.nan

    before = (run_copy / "last.pt").read_bytes()
    at_step({1}, spoil)
    with pytest.raises(UserError, match="the loss is not finite at step 10"):
        train_here("--resume --name a --epochs 4")
    assert (run_copy / "last.pt").read_bytes() == before


@pytest.mark.parametrize("recipe", ["document", "tuned"])
def test_a_run_that_diverges_ends_with_an_error(train_here, recipe):
    flags = f"--epochs 30 --name a --recipe {recipe} --learning-rate 1e8 --clip-grad-norm 0"
    with pytest.raises(UserError, match=r"not finite|has diverged"):
        train_here(flags)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 0", "--epochs is 0; expected 1 to"),
        ("--device tpu", "--device tpu is not usable here"),
        ("--num-embeddings 100000", "100000.*lower --num-embeddings, or use more slices"),
    ],
)
def test_values_that_cannot_work_are_errors_before_training(tmp_path, train_here, flags, message):
    with pytest.raises(UserError, match=message):
        train_here(f"--epochs 1 --name a {flags}")
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_keeps_the_last_checkpoint(run_copy, train_here, monkeypatch):
    before = (run_copy / "last.pt").read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.utils.os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device.*previous file is unchanged"):
        train_here("--resume --name a --epochs 4")
    assert (run_copy / "last.pt").read_bytes() == before
    assert not list(run_copy.glob(".*.tmp"))


def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, small):
    process = processes.start(tmp_path, "train.py", "--data", tmp_path / "nowhere", *small)
    assert processes.wait(process) == 2
    output = (tmp_path / "log").read_text()
    assert "error: " in output
    assert "nowhere" in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()
