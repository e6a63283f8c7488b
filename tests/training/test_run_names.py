"""training/run_names.py: folders for new runs, and which runs are found."""

import os
import threading
from datetime import datetime
from pathlib import Path

import pytest

import generate
import train
import train_prior
import utils
from evaluation import reconstruct, report
from training import run_names
from training.config import TrainConfig
from training.run_folder import newest_run, newest_unfinished_run, open_run
from training.run_names import find_runs, new_run_folder, reserve_folder, resolve_run
from utils import DataError, UserError


def make_run(folder: Path, file: str = "config.json", modified: float = 0) -> Path:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    os.utime(path, (modified, modified))
    return folder


# ---------------------------------------------------------------- a new run


def test_processes_that_start_in_the_same_second_get_different_folders(tmp_path):
    barrier = threading.Barrier(8)
    folders = []

    def start():
        barrier.wait()
        with reserve_folder(tmp_path / "runs" / "now", numbered=True) as folder:
            folders.append(folder)
            (folder / "config.json").touch()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = ["now", *(f"now_{number}" for number in range(2, 9))]
    assert sorted(folder.name for folder in folders) == names
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names


def test_a_run_that_started_in_the_same_second_is_no_reason_to_refuse_another(
    tmp_path, monkeypatch
):
    class Clock(datetime):
        @classmethod
        def now(cls) -> datetime:
            return cls(2026, 1, 1)

    monkeypatch.setattr(run_names, "datetime", Clock)
    first = make_run(tmp_path / "2026-01-01_00-00-00_tuned")
    folder, _, _ = open_run({"runs_dir": str(tmp_path)})
    with reserve_folder(folder, numbered=True) as folder:
        assert folder == first.with_name(f"{first.name}_2")


@pytest.mark.parametrize("numbered", [True, False])
def test_a_run_that_fails_before_training_leaves_no_folder(tmp_path, numbered):
    for existing in (tmp_path / "runs", tmp_path / "runs/exp"):
        with pytest.raises(ZeroDivisionError), reserve_folder(tmp_path / "runs/exp/a", numbered):
            assert (tmp_path / "runs/exp/a").is_dir()
            raise ZeroDivisionError
        assert not existing.exists()  # was created for this run
        existing.mkdir()
    with reserve_folder(tmp_path / "runs/exp/a", numbered) as folder:
        (folder / "config.json").touch()
    assert (folder / "config.json").exists()


def test_a_folder_that_the_user_has_created_is_used_and_not_deleted(tmp_path):
    (tmp_path / "a").mkdir()
    with reserve_folder(tmp_path / "a", numbered=False) as folder:
        assert folder == tmp_path / "a"
    assert folder.is_dir()


@pytest.mark.parametrize("flags", ["--data nowhere", "--dry-run"])
def test_a_failed_start_and_a_dry_run_write_no_folder(train_here, flags):
    if "nowhere" in flags:
        with pytest.raises(DataError, match="--data names, 'nowhere'"):
            train_here(flags)
    else:
        assert train_here(flags) == 0
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", [".", "..", "../a", "a/../b", "/tmp/a"])
def test_names_outside_of_the_folder_of_all_runs_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"--name is {name}; expected .* folder inside --runs-dir"):
        new_run_folder(TrainConfig(runs_dir=str(tmp_path), name=name))


def test_a_run_inside_another_run_is_refused(tmp_path):
    make_run(tmp_path / "exp" / "a", "best.pt")
    for name, message in (
        ("exp/a/b", "--name exp/a/b is inside the run .*exp/a;"),
        ("exp", "exp contains other runs, such as .*exp/a;"),
        ("new/prior", "choose one without prior, which is reserved for train_prior"),
        ("x/causal_prior", "choose one without causal_prior, which is reserved for train_prior"),
    ):
        with pytest.raises(UserError, match=message):
            new_run_folder(TrainConfig(runs_dir=str(tmp_path), name=name))
    assert new_run_folder(TrainConfig(runs_dir=str(tmp_path), name="exp/b/c/")).name == "c"


# ---------------------------------------------------------------- runs in subfolders


def test_runs_in_subfolders_are_found(tmp_path):
    runs = tmp_path / "runs"
    assert find_runs(runs) == []
    seed = make_run(runs / "exp" / "seed0", modified=3)
    make_run(seed, "best.pt", modified=3)
    make_run(seed / "prior", modified=9)  # not a run of train.py
    make_run(seed / "prior", "best.pt", modified=9)
    make_run(seed / "causal_prior", "best.pt", modified=9)
    other = make_run(runs / "prior", modified=2)  # a run of this name
    make_run(other, "best.pt", modified=2)
    assert find_runs(runs) == [seed, other]
    assert newest_run(runs) == seed
    assert newest_run(runs, "prior/best.pt") == seed
    assert reconstruct.find_run(None, runs) == seed
    assert generate.find_run(generate.parse_arguments(["--runs-dir", str(runs)])) == seed


def test_links_are_followed_once(tmp_path):
    elsewhere = make_run(tmp_path / "disk" / "a", "best.pt")
    runs = tmp_path / "runs"
    (runs / "exp").mkdir(parents=True)
    (runs / "exp" / "a").symlink_to(elsewhere)
    (runs / "exp" / "loop").symlink_to(runs)
    (runs / "broken").symlink_to(tmp_path / "missing")
    assert find_runs(runs, "best.pt") == [runs / "exp" / "a"]


def test_a_run_in_a_subfolder_is_resumed(run_copy):
    (run_copy / "last.pt").unlink()
    Path("runs/exp").mkdir()
    run_copy.rename("runs/exp/seed0")
    assert newest_unfinished_run(Path("runs")) == Path("runs/exp/seed0")
    for flags in ({}, {"name": "exp/seed0"}):
        assert open_run({"resume": True, **flags})[0] == Path("runs/exp/seed0")


# ---------------------------------------------------------------- --run


@pytest.mark.parametrize(
    "path", ["", "/", "/best.pt", "/last.pt", "/config.json", "/prior", "/causal_prior/best.pt"]
)
def test_a_run_can_be_named_by_its_files(run_copy, path, monkeypatch):
    utils.write_json(make_run(run_copy / "prior") / "config.json", {"arguments": {"model": "flow"}})
    (run_copy / "last.pt").unlink()  # not written yet
    path = f"runs/a{path}"
    assert resolve_run(path) == run_copy
    assert reconstruct.find_run(path, "runs") == run_copy
    assert generate.find_run(generate.parse_arguments(["--run", path])) == run_copy
    assert train_prior.open_prior({"run": path, "resume": True})[0] == run_copy
    assert report.main([path]) == 0
    assert (run_copy / "report.html").exists()
    monkeypatch.setenv("HOME", str(run_copy.resolve().parents[1]))
    assert resolve_run(f"~/{path}") == run_copy.resolve()


def test_the_current_folder_can_be_a_run(run_copy, monkeypatch):
    expected = run_copy.resolve()
    monkeypatch.chdir(run_copy)
    assert resolve_run(".") == resolve_run("best.pt") == expected
    (expected / "plots").mkdir(exist_ok=True)
    monkeypatch.chdir(expected / "plots")
    assert resolve_run("..") == expected


def test_other_files_are_no_runs(run_copy):
    with pytest.raises(UserError, match=r"metrics\.csv, which is a file; expected the folder of"):
        resolve_run(run_copy / "metrics.csv")


# ---------------------------------------------------------------- stored paths


def test_folders_in_config_json_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = train_prior.PriorConfig(data="d", cache_dir="~/cache", run="runs/a/")
    arguments = config.to_json()
    assert arguments["data"] == str(tmp_path / "d")
    assert arguments["cache_dir"] == str(tmp_path / "home/cache")
    assert arguments["run"] == str(tmp_path / "runs/a")
    assert arguments["runs_dir"] == str(tmp_path / "runs")
    assert TrainConfig().to_json()["cache_dir"] is None


def test_a_relative_cache_is_used_again_from_another_folder(train_here, monkeypatch, tmp_path):
    assert train_here("--epochs 1 --name a --cache-dir cache") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = sorted((tmp_path / "cache").iterdir())
    flags = ["--resume", "--epochs", "2", "--runs-dir", str(tmp_path / "runs"), "--name", "a"]
    assert train.main([*flags, "--dry-run"]) == 0
    assert sorted((tmp_path / "cache").iterdir()) == before
    assert not list(Path().iterdir())
