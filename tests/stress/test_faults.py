"""Faults by real processes: kills, full disks, two runs at once, folders that can't be written. benchmarks/faults.py is
the long form of the first."""

# ruff: noqa: E402 (what is not on every system is looked for first)
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import dataset
import utils
from evaluation import plots
from modules import VQVAE
from mri import hipmri
from training import run
from training.checkpoint import read_checkpoint, write_checkpoint

resource = pytest.importorskip("resource", reason="limits of files and memory are Unix's")

import train

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import faults


@pytest.fixture
def data(tmp_path):
    return faults.write_data(tmp_path / "data", {"train": 8, "validate": 2, "test": 2})


@pytest.fixture
def run_here(tmp_path, data, small, own_signals, monkeypatch):
    """run_here("--epochs 2 ...") trains in this process; returns main's result."""
    monkeypatch.chdir(tmp_path)
    return lambda flags: train.main(["--data", str(data), *small, *flags.split()])


@pytest.fixture
def start(tmp_path, data, small):
    """start("--epochs 2 ...", most=bytes) runs train.py in tmp_path, where no file may become longer than `most`."""

    def start(flags: str, most: int = resource.RLIM_INFINITY, log: str = "log", **environment: str):
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "--data",
            str(data),
            *small,
            *flags.split(),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        with open(tmp_path / log, "w") as file:
            return subprocess.Popen(
                command,
                cwd=tmp_path,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=limit,
            )

    return start


def told(tmp_path, process, log="log") -> tuple[int, str]:
    code = process.wait()
    text = (tmp_path / log).read_text()
    assert "Traceback" not in text, text
    return code, text


def test_kills_lose_nothing(tmp_path):
    """Two kills while a checkpoint is written; below, one while the cache is built; the long form has five kinds."""
    kinds = ["checkpoint"]
    rows = faults.faults({kind: 2 * (kind in kinds) for kind in faults.KINDS}, 1, tmp_path)
    assert [row["killed"] for row in rows] == kinds
    for row in rows:
        assert row["kills"] == 2 and row["runs compared"] >= 1, row
        assert not row["lost files"] and not row["workers left"] and not row["different"], row


def test_what_the_long_form_counts_as_lost(tmp_path):
    """The check itself: it sees files that were cut."""
    model = VQVAE(hidden_channels=4, residual_channels=2, num_embeddings=4, embedding_dim=2)
    write_checkpoint(
        tmp_path / "a.pt", {"format": 3, "model_args": model.arguments, "model": model.state_dict()}
    )
    utils.write_json(tmp_path / "b.json", {"a": 1})
    utils.write_csv(tmp_path / "c.csv", [{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    plots.plot_curves(
        tmp_path / "d.png",
        [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "ssim": 0.5}],
        "ssim",
        "x",
    )
    np.save(tmp_path / "e.npy", np.arange(99))
    assert faults.broken_files(tmp_path) == ([], 5)
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert [line[:1] for line in faults.broken_files(tmp_path)[0]] == ["a", "b", "c", "d", "e"]


# ---------------------------------------------------------------- full disks


def test_a_disk_that_is_full_keeps_the_checkpoint_before(tmp_path, start, run_here):
    """Files may become no longer than a byte less than checkpoints are: the second epoch can't be saved."""
    assert run_here("--epochs 1 --name a") == 0
    folder = tmp_path / "runs" / "a"
    before = {name: (folder / name).read_bytes() for name in ("best.pt", "last.pt")}
    most = min(map(len, before.values())) - 1
    code, text = told(tmp_path, start("--epochs 2 --name a --resume --plot-every 9", most=most))
    assert (
        code == 2
        and "error: can't write" in text
        and "File too large" in text
        and "--resume" in text
    )
    assert "what was there before is as it was" in text
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert not list(folder.rglob("*.tmp"))
    assert run_here("--epochs 2 --name a --resume") == 0
    assert read_checkpoint(folder / "last.pt")["epochs_done"] == 2


def test_a_plot_that_has_no_room_ends_the_run_and_it_goes_on_later(tmp_path, start, run_here):
    assert run_here("--epochs 1 --name a") == 0
    folder = tmp_path / "runs" / "a"
    most = 5000 + max((folder / name).stat().st_size for name in ("best.pt", "last.pt"))
    assert (
        folder / "plots" / "epoch_1" / "epoch_1_images.png"
    ).stat().st_size > most  # none but plots meets the limit
    code, text = told(tmp_path, start("--epochs 2 --name a --resume", most=most))
    assert code == 2 and "error: can't write" in text and "epoch_2_images.png" in text
    assert (folder / "loss_ssim_plot.png").exists() and not list(folder.rglob("*.tmp"))
    assert read_checkpoint(folder / "last.pt")["epochs_done"] == 1
    assert run_here("--epochs 2 --name a --resume") == 0


def test_a_cache_that_has_no_room_is_an_error_and_leaves_nothing(tmp_path, start):
    code, text = told(
        tmp_path, start("--epochs 1 --name a", most=100_000, HIPMRI_CACHE=str(tmp_path / "cache"))
    )
    assert code == 2 and "error: can't write the cache" in text and "--cache-dir" in text
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- two at once


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, start):
    first = start("--epochs 300 --name a")
    config = tmp_path / "runs" / "a" / "config.json"
    while not config.exists():
        assert first.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    before = config.read_bytes()
    code, text = told(tmp_path, start("--epochs 400 --name a --resume", log="second"), "second")
    assert code == 2 and "another process is training" in text and "train another run" in text
    assert config.read_bytes() == before and first.poll() is None
    first.kill()
    first.wait()
    with utils.lock_folder(config.parent):
        pass  # the lock went with its process


def test_a_run_that_another_has_gone_on_with_is_refused(tmp_path, run_here, monkeypatch):
    """Between reading last.pt and the first step, another process trains an epoch more."""
    assert run_here("--epochs 1 --name a") == 0
    last, announce = tmp_path / "runs" / "a" / "last.pt", run.announce

    def meanwhile(*args):
        announce(*args)
        monkeypatch.setattr(loop, "announce", announce)
        assert run_here("--epochs 2 --name a --resume") == 0

    monkeypatch.setattr(loop, "announce", meanwhile)
    with pytest.raises(utils.UserError, match="another process has trained"):
        run_here("--epochs 3 --name a --resume")
    assert read_checkpoint(last)["epochs_done"] == 2


def test_two_runs_that_need_one_cache_build_it_once(tmp_path):
    """The second waits, and says so; only then the first one is let go on."""
    root = faults.write_data(tmp_path / "many", faults.MANY | {"train": 99})
    code = f"""
import dataset, pathlib, sources, time
build = cache.build
def slow(*args):
    print('building', flush=True)
    while not pathlib.Path({str(tmp_path / "go")!r}).exists():
        time.sleep(0.01)
    build(*args)
cache.build = slow
source = hipmri.find_hipmri({str(root)!r})
print(len(dataset.load_split(source, 'train', cache_dir={str(tmp_path / "cache")!r}, progress=False)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = []
    for said in ("building", "waiting for another run, which is preparing the train slices"):
        command = [sys.executable, "-c", code]
        both.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        assert both[-1].stdout.readline().strip() == said
    (tmp_path / "go").touch()
    assert [process.communicate()[0] for process in both] == ["99\n", "99\n"]


# ---------------------------------------------------------------- folders that can't be written


def test_folders_that_cannot_be_written(tmp_path, start, run_here, data, monkeypatch):
    """A read-only data folder is no matter; a home folder that can't be written is one for the cache, and told."""
    for folder in (data, *data.iterdir()):
        folder.chmod(0o555)
    (tmp_path / "home").write_bytes(b"")  # a file: no one can make a folder in it, root neither
    unwritable = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": "", "HIPMRI_CACHE": ""}
    code, text = told(tmp_path, start("--epochs 1 --name a", **unwritable))
    assert code == 2 and "can't write the cache" in text and "--cache-dir" in text
    for name, value in unwritable.items():
        monkeypatch.setenv(name, value)
    assert run_here(f"--epochs 1 --name a --cache-dir {tmp_path / 'elsewhere'}") == 0
    assert sorted(path.name for path in data.iterdir()) == [
        f"keras_slices_{s}" for s in ("test", "train", "validate")
    ]


def test_workers_end_with_their_parent(tmp_path):
    """They would wait for work forever."""
    root = faults.write_data(tmp_path / "many", faults.MANY)
    (tmp_path / "a").mkdir()
    process = faults.start(
        tmp_path / "a", "train.py", "--data", root, "--dry-run", "--device", "cpu"
    )
    assert faults.kill_when(
        process, lambda: any((tmp_path / "a" / "cache").glob("train-*.tmp-*")), 0.05
    )
    assert not faults.workers_left(process)
    source = hipmri.find_hipmri(root)
    slices = dataset.load_split(source, "train", cache_dir=tmp_path / "a" / "cache", progress=False)
    assert len(slices) == faults.MANY["train"]
