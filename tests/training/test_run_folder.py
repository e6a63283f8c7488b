"""training/run_folder.py: which run the flags ask for, and what its config.json says."""

import gzip
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

import train
import train_prior
from mri.splits import find_source
from training.checkpoint import read_checkpoint
from training.config import TrainConfig
from training.run_folder import (
    last_checkpoint,
    load_run_data,
    newest_run,
    newest_unfinished_run,
    open_run,
    read_arguments,
    read_config,
    read_manifest,
    read_preprocessing,
    resumed_arguments,
    training_files,
)
from utils import CheckpointError, UserError


def write_config(folder, arguments, **content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"arguments": arguments, **content}))


# ---------------------------------------------------------------- start


def test_a_new_run_is_named_by_its_flag_or_by_time_and_recipe(tmp_path):
    folder, config, checkpoint = open_run({"runs_dir": str(tmp_path), "name": "x"})
    assert folder == tmp_path / "x"
    assert config == TrainConfig(runs_dir=str(tmp_path), name="x")
    assert checkpoint is None
    folder, _, _ = open_run({"recipe": "document"})
    assert folder.parent.name == "runs"
    assert folder.name.endswith("_document")


@pytest.mark.parametrize("file", ["config.json", "last.pt"])
def test_a_run_is_not_overwritten(tmp_path, file):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / file).touch()
    with pytest.raises(UserError, match="exists; add --resume to continue it, or choose another"):
        open_run({"runs_dir": str(tmp_path), "name": "a"})


# ---------------------------------------------------------------- resume


def test_a_resumed_run_has_its_own_arguments(run_copy):
    flags = {"resume": True, "name": "a", "epochs": 5, "num_embeddings": 16, "device": "auto"}
    folder, config, checkpoint = open_run(flags)
    assert folder == run_copy
    assert (config.epochs, config.device, config.hidden_channels) == (5, "auto", 8)
    assert checkpoint["epochs_done"] == 3


def test_a_finished_run_is_not_resumed_without_more_epochs(run_copy):
    with pytest.raises(UserError, match="has finished 3 epochs; raise --epochs"):
        open_run({"resume": True, "name": "a"})
    with pytest.raises(UserError, match=r"runs contains no unfinished run \(1 runs\)"):
        open_run({"resume": True})


def test_the_newest_unfinished_run_is_resumed(run_copy):
    """Unfinished are those with fewer epochs than configured, and those without a checkpoint."""
    for name, age in (("older", 100), ("newer", 50)):
        write_config(run_copy.parent / name, {"epochs": 5})
        shutil.copy(run_copy / "last.pt", run_copy.parent / name)
        modified = os.stat(run_copy / "config.json").st_mtime - age
        os.utime(run_copy.parent / name / "config.json", (modified, modified))
    assert newest_unfinished_run(run_copy.parent).name == "newer"
    write_config(run_copy.parent / "just_started", {"epochs": 5})
    folder, _, checkpoint = open_run({"resume": True})
    assert folder.name == "just_started"
    assert checkpoint is None


def test_resume_rejects_flags_that_would_make_another_run(run_copy):
    message = r"cannot be resumed with --learning-rate 0.5 \(was 0.002\), --seed 1 \(was 0\); omit"
    with pytest.raises(UserError, match=message):
        resumed_arguments(run_copy, TrainConfig, {"seed": 1, "learning_rate": 0.5, "epochs": 9})


def test_resume_needs_a_run(run_copy):
    with pytest.raises(UserError, match="nowhere contains no run to resume"):
        open_run({"resume": True, "name": "nowhere"})
    (run_copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        open_run({"resume": True, "name": "a"})


def test_a_checkpoint_must_count_its_epochs(run_copy):
    assert last_checkpoint(run_copy.parent) is None
    path = run_copy / "last.pt"
    torch.save(read_checkpoint(path) | {"epochs_done": None}, path)
    with pytest.raises(CheckpointError, match="lacks epochs_done, the number of finished epochs"):
        last_checkpoint(run_copy)
    path.write_bytes(b"corrupt")
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        last_checkpoint(run_copy)


# ---------------------------------------------------------------- config.json


def test_arguments_that_this_version_lacks_are_ignored(tmp_path):
    write_config(tmp_path, {"epochs": 7, "an_old_flag": 3})
    assert read_arguments(tmp_path, TrainConfig) == {"epochs": 7}
    assert read_config(tmp_path) == TrainConfig(epochs=7)


def test_a_config_without_arguments_has_the_defaults(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert read_config(tmp_path) == TrainConfig()


@pytest.mark.parametrize("arguments", [[], "x", {"epochs": "7"}, {"size": 3}, {"augment": 1}])
def test_arguments_of_another_type_are_errors(tmp_path, arguments):
    write_config(tmp_path, arguments)
    with pytest.raises(UserError, match=r"config\.json has .*expected"):
        read_config(tmp_path)


def test_the_newest_run_is_that_of_the_newest_file(tmp_path):
    for name, modified in (("a", 100), ("b", 300), ("c", 200)):
        path = tmp_path / name / "prior" / "best.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (modified, modified))
    assert newest_run(tmp_path, "prior/best.pt") == tmp_path / "b"
    with pytest.raises(UserError, match=r"no run in .* has a best\.pt; train one with train\.py"):
        newest_run(tmp_path)
    with pytest.raises(UserError, match="none at all"):
        newest_run(tmp_path, missing="none at all")


@pytest.mark.parametrize(
    "stored",
    [3, {}, {"size": 3}, {"size": [64]}, {"size": ["a", "b"], "fit": "crop"}, {"depth": 3}],
)
def test_a_preprocessing_that_train_py_would_not_write_is_an_error(run_copy, blobs, stored):
    path = run_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preprocessing": stored}))
    with pytest.raises(UserError, match=r"has invalid preprocessing .*that train\.py wrote"):
        read_preprocessing(run_copy, find_source(blobs))


def test_the_preprocessing_of_a_run_is_read_from_its_config(run_copy, blobs):
    source = find_source(blobs)
    stored = read_preprocessing(run_copy, source)
    assert stored.size == (256, 128)
    path = run_copy / "config.json"
    config = json.loads(path.read_text())
    del config["preprocessing"]  # as in earlier versions
    path.write_text(json.dumps(config))
    assert read_preprocessing(run_copy, source) == stored


def test_the_value_for_nan_is_read_from_the_config(run_copy, blobs):
    source = find_source(blobs)
    path = run_copy / "config.json"
    config = json.loads(path.read_text())
    assert config["preprocessing"].pop("nan_value") is None  # earlier versions do not have it
    del config["arguments"]["nan_value"]
    path.write_text(json.dumps(config))
    assert read_preprocessing(run_copy, source).nan_value is None
    config["preprocessing"]["nan_value"] = -5
    path.write_text(json.dumps(config))
    for other in (source, replace(source, form="3D")):
        assert read_preprocessing(run_copy, other).nan_value == -5
    config["preprocessing"]["nan_value"] = "-5"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has invalid preprocessing .*that train\.py wrote"):
        read_preprocessing(run_copy, source)


@pytest.mark.parametrize(
    "scans", [3, {"trian": {}}, {"train": 3}, {"train": {"A": 3}}, {"train": {"A": [3]}}]
)
def test_a_manifest_that_train_py_would_not_write_is_an_error(tmp_path, scans):
    write_config(tmp_path, {}, scans=scans)
    with pytest.raises(UserError, match=r"has invalid scans .*that train\.py wrote"):
        read_manifest(tmp_path)


def test_a_manifest_has_the_scans_of_each_split(tmp_path):
    write_config(tmp_path, {}, scans={"train": {"A": ["a.nii"]}, "test": {}})
    assert read_manifest(tmp_path) == {"train": {"A": ["a.nii"]}, "test": {}}
    write_config(tmp_path, {})
    assert read_manifest(tmp_path) is None


# ---------------------------------------------------------------- data


def test_the_data_of_a_run_is_found_by_its_config(run_copy, blobs, capsys):
    slices, root = load_run_data(run_copy, "validate")
    assert len(slices) == 3
    assert root == str(blobs)
    assert f"data: {blobs} (from the run's config.json)" in capsys.readouterr().out
    moved = shutil.copytree(blobs, "moved")
    assert load_run_data(run_copy, "train", data=moved)[1].endswith("moved")


def test_the_files_a_run_was_trained_on_are_known_while_its_data_exists(run_copy, blobs, tmp_path):
    expected = {path.resolve() for path in blobs.glob("keras_slices_train/*")}
    assert training_files(run_copy) == expected
    write_config(tmp_path / "gone", {"data": str(tmp_path / "nowhere")})
    assert training_files(tmp_path / "gone") is None


def test_a_run_knows_copies_of_its_training_files(run_copy, blobs, tmp_path):
    trained_on = training_files(run_copy)
    for split, expected in (("train", True), ("validate", False)):
        file = next((blobs / f"keras_slices_{split}").iterdir())
        (tmp_path / "copy.nii").write_bytes(gzip.decompress(file.read_bytes()))
        assert trained_on.has_copy(tmp_path / "copy.nii") == expected


def test_data_that_were_moved_are_named_with_the_flag_for_their_new_folder(
    run_copy, blobs, capsys, monkeypatch
):
    path = run_copy / "config.json"
    config = json.loads(path.read_text())
    config["arguments"]["data"] = "/data/gone"
    path.write_text(json.dumps(config))
    message = r"data that runs/a/config.json names, '/data/gone': No such .*\n.*folder with --data"
    with pytest.raises(UserError, match=message):
        load_run_data(run_copy, "validate")
    with pytest.raises(UserError, match=message):
        train.main(["--resume", "--name", "a", "--epochs", "9"])
    write_config(run_copy / "prior", {"data": "/data/gone", "model": "flow"})
    with pytest.raises(UserError, match=message.replace("runs/a", "runs/a/prior")):
        train_prior.main(["--resume", "--run", "runs/a"])
    with pytest.raises(UserError, match="the data that --data names, 'typo'"):
        train.main(["--resume", "--name", "a", "--epochs", "9", "--data", "typo"])
    config["arguments"]["data"] = None  # as in earlier versions
    path.write_text(json.dumps(config))
    monkeypatch.setenv("HIPMRI_DATA", str(blobs))
    load_run_data(run_copy, "validate")
    assert f"data: {blobs}, from $HIPMRI_DATA" in capsys.readouterr().out


def test_a_run_without_data_asks_for_it(tmp_path):
    write_config(tmp_path, {})
    with pytest.raises(UserError, match="does not name the data folder; give it with --data"):
        load_run_data(tmp_path, "test")
