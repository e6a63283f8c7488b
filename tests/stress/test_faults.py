"""Test faults with real processes: kills, full disks, two runs at once, unwritable folders.

`python tests/stress/faults.py` is the long form of the kills.
"""

import signal
import time
from datetime import datetime
from multiprocessing.process import BaseProcess
from pathlib import Path

import faults
import numpy as np
import outputs
import processes
import pytest

import dataset
import train
import utils
from evaluation import plots
from modules import VQVAE
from mri import cache, hipmri
from training import run_names
from training.checkpoint import read_checkpoint, write_checkpoint
from training.guards import lock_folder

CHECKPOINTS = ("best.pt", "last.pt")


@pytest.fixture
def data(tmp_path) -> Path:
    return faults.write_data(tmp_path / "data", {"train": 8, "validate": 2, "test": 2})


@pytest.fixture
def run_here(tmp_path, data, small, monkeypatch):
    """run_here("--epochs 2 ...") trains in this process; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    return lambda flags: train.main(["--data", str(data), *small, *flags.split()])


@pytest.fixture
def start(tmp_path, data, small):
    """start("--epochs 2 ...") starts train.py in tmp_path; the options are `processes.start`'s."""

    def start(flags: str, **options) -> BaseProcess:
        flags = ["--data", data, *small, *flags.split()]
        return processes.start(tmp_path, "train.py", *flags, **options)

    return start


def wait_for(process: BaseProcess, log: Path) -> tuple[int, str]:
    """Return the exit code and the output of a process, which must not have a traceback."""
    code = processes.wait(process)
    output = log.read_text()
    assert "Traceback" not in output, output
    return code, output


# ---------------------------------------------------------------- kills


def test_kills_lose_nothing(tmp_path, monkeypatch):
    """Kill once while a checkpoint is written; `faults.py` has five kinds of kills."""
    smaller = ("--epochs=2", "--hidden-channels=8", "--residual-channels=4")
    monkeypatch.setattr(faults, "FLAGS", faults.FLAGS + smaller)
    (row,) = faults.run_kills({"checkpoint": 1}, 1, tmp_path)
    assert row["killed"] == "checkpoint"
    assert row["kills"] == 1
    assert row["runs compared"] >= 1
    assert row["files checked"] >= 1
    assert not row["lost files"]
    assert not row["workers left"]
    assert not row["different"]


def test_truncated_files_count_as_broken(tmp_path):
    model = VQVAE(hidden_channels=4, residual_channels=2, num_embeddings=4, embedding_dim=2)
    checkpoint = {"format": 3, "model_args": model.arguments, "model": model.state_dict()}
    write_checkpoint(tmp_path / "a.pt", checkpoint)
    utils.write_json(tmp_path / "b.json", {"a": 1})
    utils.write_csv(tmp_path / "c.csv", [{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    history = [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "ssim": 0.5}]
    plots.plot_curves(tmp_path / "d.png", history, "ssim", "x")
    np.save(tmp_path / "e.npy", np.arange(99))
    assert outputs.broken_files(tmp_path) == ([], 5)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    errors, count = outputs.broken_files(tmp_path)
    assert [error[:1] for error in errors] == ["a", "b", "c", "d", "e"]
    assert count == 5


def test_temporary_files_have_no_final_name(tmp_path):
    names = ("last.pt", ".last.pt.7.tmp", ".lock", "log", "train-a.tmp-7/pixels.npy")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert outputs.final_files(tmp_path) == {tmp_path / "last.pt"}


def test_worker_processes_end_with_their_parent(tmp_path):
    """Otherwise they would wait for work forever."""
    root = faults.write_data(tmp_path / "many", faults.LARGE_DATA)
    folder = tmp_path / "a"
    folder.mkdir()
    process = processes.start(
        folder, "train.py", "--data", root, "--dry-run", "--cache-dir", "cache"
    )

    def is_building() -> bool:
        return any((folder / "cache").glob("train-*.tmp-*"))

    assert processes.kill_when(process, is_building, 0.05)
    assert not processes.has_workers(process)
    source = hipmri.find_hipmri(root)
    slices = dataset.load_split(source, "train", cache_dir=folder / "cache", progress=False)
    assert len(slices) == faults.LARGE_DATA["train"]


# ---------------------------------------------------------------- full disks


def test_a_full_disk_leaves_the_previous_checkpoints_unchanged(tmp_path, start, run_here):
    """Limit files to one byte less than a checkpoint, so the second epoch cannot be saved."""
    assert run_here("--epochs 1 --name a") == 0
    folder = tmp_path / "runs" / "a"
    before = {name: (folder / name).read_bytes() for name in CHECKPOINTS}
    max_bytes = min(len(content) for content in before.values()) - 1
    process = start("--epochs 2 --name a --resume --plot-every 9", max_bytes=max_bytes)
    code, output = wait_for(process, tmp_path / "log")
    assert code == 2
    assert "error: cannot write" in output
    assert "File too large" in output
    assert "--resume" in output
    assert "the previous file is unchanged" in output
    assert {name: (folder / name).read_bytes() for name in CHECKPOINTS} == before
    assert not list(folder.rglob("*.tmp"))
    assert run_here("--epochs 2 --name a --resume") == 0
    assert read_checkpoint(folder / "last.pt")["epochs_done"] == 2


def test_a_full_disk_during_a_plot_ends_a_run_that_can_be_resumed(tmp_path, start, run_here):
    assert run_here("--epochs 1 --name a") == 0
    folder = tmp_path / "runs" / "a"
    max_bytes = max((folder / name).stat().st_size for name in CHECKPOINTS) + 5000
    plot = folder / "plots" / "epoch_1" / "epoch_1_images.png"
    assert plot.stat().st_size > max_bytes  # only plots exceed the limit
    process = start("--epochs 2 --name a --resume", max_bytes=max_bytes)
    code, output = wait_for(process, tmp_path / "log")
    assert code == 2
    assert "error: cannot write" in output
    assert "epoch_2_images.png" in output
    assert (folder / "loss_ssim_plot.png").exists()
    assert not list(folder.rglob("*.tmp"))
    assert read_checkpoint(folder / "last.pt")["epochs_done"] == 1
    assert run_here("--epochs 2 --name a --resume") == 0


def test_a_full_disk_during_the_cache_is_an_error_and_leaves_no_files(tmp_path, start):
    cache = tmp_path / "cache"
    process = start("--epochs 1 --name a", max_bytes=100_000, HIPMRI_CACHE=str(cache))
    code, output = wait_for(process, tmp_path / "log")
    assert code == 2
    assert "error: cannot write the cache" in output
    assert "--cache-dir" in output
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- two processes at once


def test_a_second_process_cannot_train_the_same_run(tmp_path, start):
    first = start("--epochs 300 --name a")
    config = tmp_path / "runs" / "a" / "config.json"
    processes.wait_until(config.exists, first, tmp_path / "log")
    before = config.read_bytes()
    second = start("--epochs 400 --name a --resume", log="second")
    code, output = wait_for(second, tmp_path / "second")
    assert code == 2
    assert "another process is training" in output
    assert "start another run" in output
    assert config.read_bytes() == before
    assert first.is_alive()
    first.kill()
    first.join()
    with lock_folder(config.parent):
        pass  # the lock ended with its process


def test_a_run_that_was_trained_since_it_was_read_is_refused(tmp_path, run_here, monkeypatch):
    """Let another process train one more epoch between reading last.pt and the first step."""
    assert run_here("--epochs 1 --name a") == 0
    print_plan = train.print_plan

    def train_meanwhile(*arguments):
        print_plan(*arguments)
        monkeypatch.setattr(train, "print_plan", print_plan)
        assert run_here("--epochs 2 --name a --resume") == 0

    monkeypatch.setattr(train, "print_plan", train_meanwhile)
    with pytest.raises(utils.UserError, match="another process has trained"):
        run_here("--epochs 3 --name a --resume")
    assert read_checkpoint(tmp_path / "runs" / "a" / "last.pt")["epochs_done"] == 2


def wait_before_decoding() -> None:
    """Let a process wait for the file `go` before it decodes its first file."""
    real = cache.decode_file

    def decode_file(*arguments):
        print("building", flush=True)
        cache.decode_file = real
        while not Path("go").exists():
            time.sleep(0.01)
        return real(*arguments)

    cache.decode_file = decode_file


def test_two_processes_build_a_common_cache_once(tmp_path, start):
    """Let the first one continue only after the second has said that it waits."""
    both = []
    lines = ("building", "waiting for another run, which is preparing the train slices")
    for log, line in zip(("first", "second"), lines, strict=True):
        process = start("--dry-run", log=log, before=wait_before_decoding)
        path = tmp_path / log
        processes.wait_until(lambda path=path, line=line: line in path.read_text(), process, path)
        both.append(process)
    (tmp_path / "go").touch()
    assert [processes.wait(process) for process in both] == [0, 0]
    assert "building" not in (tmp_path / "second").read_text()


class OneSecond(datetime):
    """The clock of a process that starts in the same second as another one."""

    @classmethod
    def now(cls) -> datetime:
        return cls(2026, 1, 1)


def stop_clock() -> None:
    run_names.datetime = OneSecond


def test_runs_that_start_in_the_same_second_do_not_collide(tmp_path, start):
    both = [start("--epochs 300", log=log, before=stop_clock) for log in ("a", "b")]
    names = ["2026-01-01_00-00-00_tuned", "2026-01-01_00-00-00_tuned_2"]
    for name in names:
        config = tmp_path / "runs" / name / "config.json"  # written when the training starts
        for process, log in zip(both, ("a", "b"), strict=True):
            processes.wait_until(config.exists, process, tmp_path / log)
    for process in both:
        process.kill()
        process.join()


def test_a_signal_before_training_leaves_no_files(tmp_path, start):
    cache_dir = tmp_path / "cache"
    process = start("--epochs 1", before=wait_before_decoding, HIPMRI_CACHE=str(cache_dir))
    log = tmp_path / "log"
    processes.wait_until(lambda: "building" in log.read_text(), process, log)
    assert len(list((tmp_path / "runs").iterdir())) == 1
    process.terminate()
    code, _ = wait_for(process, log)
    assert code == 128 + signal.SIGTERM
    assert not (tmp_path / "runs").exists()
    assert not [path for path in cache_dir.iterdir() if path.is_dir()]


# ---------------------------------------------------------------- unwritable folders


def test_only_the_cache_needs_a_writable_folder(tmp_path, start, run_here, data, monkeypatch):
    """A read-only data folder can be used; an unwritable home folder needs --cache-dir."""
    for folder in (data, *data.iterdir()):
        folder.chmod(0o555)
    (tmp_path / "home").write_bytes(b"")  # a file: not even root can create a folder in it
    unwritable = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": "", "HIPMRI_CACHE": ""}
    process = start("--epochs 1 --name a", **unwritable)
    code, output = wait_for(process, tmp_path / "log")
    assert code == 2
    assert "cannot write the cache" in output
    assert "--cache-dir" in output
    for name, value in unwritable.items():
        monkeypatch.setenv(name, value)
    assert run_here(f"--epochs 1 --name a --cache-dir {tmp_path / 'elsewhere'}") == 0
    folders = sorted(path.name for path in data.iterdir())
    assert folders == ["keras_slices_test", "keras_slices_train", "keras_slices_validate"]
