"""Which file is in which split: fractions, folders, and the splits of a run."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
from layouts import make_files, names_of, subjects_of

import predict
import train
import utils
from mri import splits
from training.run_folder import load_run_data
from utils import DataError


def counts_of(source) -> dict[str, int]:
    """Return the number of files of each split."""
    return {split: len(files) for split, files in source.splits.items()}


# ---------------------------------------------------------------- the data folder


def test_data_comes_from_the_flag_then_the_environment_then_the_sample(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path, line = splits.find_data(None)
    assert path is None
    assert "the sample" in line
    monkeypatch.setenv("HIPMRI_DATA", str(tmp_path / "a"))
    line = f"data: {tmp_path / 'a'}, from $HIPMRI_DATA"
    assert splits.find_data(None) == (tmp_path / "a", line)
    line = f"data: {tmp_path / 'b'}, from --data"
    assert splits.find_data(str(tmp_path / "b")) == (tmp_path / "b", line)
    monkeypatch.setenv("HIPMRI_DATA", "")
    assert splits.find_data(None)[0] is None


def test_missing_data_path_is_an_error_and_not_the_sample(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"--data names, '.*missing': No such file"):
        splits.find_data(tmp_path / "missing")
    with pytest.raises(DataError, match="--data names, ''"):
        splits.find_data("")
    monkeypatch.setenv("HIPMRI_DATA", str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"\$HIPMRI_DATA names"):
        splits.find_data(None)


def test_split_needs_an_axis(study):
    with pytest.raises(DataError, match="given without --axis"):
        splits.find_source(study, None, ["0.8", "0.1", "0.1"])


def test_folder_without_scans_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no \.nii or \.nii\.gz file"):
        splits.find_source(tmp_path, "axial")


def test_segmentations_and_outputs_are_left_out(tmp_path):
    make_files(tmp_path, "sub-0_T1w", "sub-0_dseg", "labelsTr/x", "sub-1_T1w_reconstruction")
    source = splits.find_source(tmp_path, "axial")
    assert list(source.subjects) == [tmp_path / "sub-0_T1w.nii.gz"]
    assert source.notes[1:3] == [
        "2 file(s) are left out because they are named like segmentations; for example, "
        "labelsTr/x.nii.gz",
        "1 file(s) are left out because they are named like outputs of predict.py; for example, "
        "sub-1_T1w_reconstruction.nii.gz",
    ]


def test_files_that_a_run_has_used_are_scans_whatever_their_names(tmp_path):
    """Earlier versions trained on segmentations with unusual names; their runs can be resumed."""
    make_files(tmp_path, "p0", "p0_gt", "p1", "p1_gt")
    manifest = {"train": {"p0": ["p0.nii.gz"], "p0_gt": ["p0_gt.nii.gz"]}}
    source = splits.find_source(tmp_path, "axial", manifest=manifest)
    assert names_of(source)["train"] == {"p0", "p0_gt"}
    assert names_of(source)["test"] == {"p1"}


# ---------------------------------------------------------------- fractions


def test_each_subject_is_in_one_split(study):
    source = splits.find_source(study, "coronal", None, 0)
    assert counts_of(source) == {"train": 6, "validate": 2, "test": 2}
    subjects = subjects_of(source)
    assert set.union(*subjects.values()) == set("ABCDE")
    assert sum(map(len, subjects.values())) == 5


def test_fractions_and_seed_determine_the_splits(study):
    subjects = subjects_of(splits.find_source(study, "axial", None, 0))
    assert subjects_of(splits.find_source(study, "coronal", None, 0)) == subjects
    others = [subjects_of(splits.find_source(study, "axial", None, seed)) for seed in range(1, 5)]
    assert any(other != subjects for other in others)
    large_test = splits.find_source(study, "axial", ["0.4", "0.2", "0.4"])
    assert len(subjects_of(large_test)["test"]) == 2
    assert "test" not in splits.find_source(study, "axial", ["0.8", "0.2", "0"]).splits


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_subjects_are_reported(tmp_path, count):
    for subject in "AB"[:count]:
        make_files(tmp_path, f"sub-{subject}_ses-1", f"sub-{subject}_ses-2")
    source = splits.find_source(tmp_path, "axial")
    warnings = [note for note in source.notes if note.startswith("warning")]
    assert len(warnings) == 1
    assert "do not generalise to other subjects" in warnings[0]
    assert source.splits["validate"] == source.splits["test"]
    assert (source.splits["train"] == source.splits["test"]) == (count == 1)


def test_hipmri_volumes_with_an_axis_do_not_get_hipmri_splits(tmp_path):
    names = [f"semantic_MRs_anon/Case_{case:03d}_Week0_LFOV" for case in (4, 36, 40)]
    make_files(tmp_path, *names)
    source = splits.find_source(tmp_path, "coronal", seed=1)
    assert set.union(*subjects_of(source).values()) == {"004", "036", "040"}
    assert any("HipMRI's own splits are not used" in note for note in source.notes)
    make_files(tmp_path / "other", "sub-1", "sub-2", "sub-3")
    notes = splits.find_source(tmp_path / "other", "coronal").notes
    assert not any("HipMRI" in note for note in notes)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (["0.8", "0.1"], "three fractions"),
        (["0.8", "0.1", "0.2"], "add up to 1"),
        (["a", "b", "c"], "three fractions"),
        (["0", "0.5", "0.5"], "three fractions"),
        (["nowhere.csv"], "cannot read"),
    ],
)
def test_unusable_fractions_are_refused(study, split, message):
    with pytest.raises(DataError, match=message):
        splits.find_source(study, "axial", split)


# ---------------------------------------------------------------- folders


def test_folders_named_after_splits_determine_the_splits(tmp_path):
    make_files(tmp_path, "train/a/1", "train/b/2", "val/3", "test/4", "test/5")
    source = splits.find_source(tmp_path, "axial")
    names = {split: [file.name[0] for file in files] for split, files in source.splits.items()}
    assert names == {"train": ["1", "2"], "validate": ["3"], "test": ["4", "5"]}
    assert any("the names of the folders" in note for note in source.notes)


def test_fractions_take_precedence_over_split_folders(tmp_path):
    make_files(tmp_path, "train/a/1", "train/b/2", "val/3", "test/4", "test/5")
    source = splits.find_source(tmp_path, "axial", ["0.6", "0.2", "0.2"], 0, r"([^/]+)\.nii")
    assert len(source.splits["train"]) == 3


def test_scans_outside_the_split_folders_are_an_error(tmp_path):
    make_files(tmp_path, "train/1", "val/2", "test/3", "6")
    message = r"(?s)1 scan\(s\).*not in a folder that is named after a split.*6.nii.gz"
    with pytest.raises(DataError, match=message):
        splits.find_source(tmp_path, "axial")


@pytest.mark.parametrize("names", [("val/1", "test/2"), ("train/1", "test/2")])
def test_training_needs_both_train_and_validation_scans(tmp_path, names, small):
    make_files(tmp_path / "d", *names)
    with pytest.raises(DataError, match=r"belongs to the (train|validate) split .*with --split"):
        train.main(["--data", str(tmp_path / "d"), "--axis", "axial", *small, "--dry-run"])


# ---------------------------------------------------------------- runs


def write_scan(path: Path, write_nifti) -> None:
    scan = np.random.default_rng(0).integers(50, 950, (20, 24, 28)).astype(np.int16)
    write_nifti(path, scan)


def test_run_with_a_table_can_be_resumed_from_another_folder(study, tmp_path, monkeypatch, small):
    (tmp_path / "splits.csv").write_text("subject,split\nA,train\nB,validate\nC,test\n")
    monkeypatch.chdir(tmp_path)
    command = ["--data", "study", "--axis", "axial", "--split", "splits.csv", *small, "--name", "a"]
    assert train.main([*command, "--epochs", "1"]) == 0
    assert train.main([*command, "--epochs", "2", "--resume"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train.main(["--resume", "--runs-dir", "../runs", "--name", "a", "--epochs", "3"]) == 0


def test_training_subjects_stay_out_of_the_test_split(
    study, tmp_path, monkeypatch, small, write_nifti
):
    """Scans added or removed later move no subject to another split."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "a"
    command = ["--data", str(study), "--axis", "axial", *small, "--epochs", "1", "--name", "a"]
    assert train.main(command) == 0
    assert train.main(["--resume", "--name", "a", "--epochs", "2"]) == 0  # keeps the slice size
    manifest = utils.read_json(run / "config.json")["scans"]
    removed = next(iter(manifest["validate"]))
    for file in (study / f"sub-{removed}").rglob("*.nii.gz"):
        file.unlink()
    for subject in "XYZ":
        write_scan(study / f"sub-{subject}" / f"sub-{subject}_T2w.nii.gz", write_nifti)
    slices, _ = load_run_data(run, "test")
    assert {name.case for name in slices.names} == {*manifest["test"], "X", "Y", "Z"}
    other = tmp_path / "other"
    for subject in ("N", next(iter(manifest["train"]))):
        write_scan(other / f"sub-{subject}_T2w.nii.gz", write_nifti)
    slices, _ = load_run_data(run, "test", data=str(other))
    assert {name.case for name in slices.names} == {"N"}


def test_resume_ignores_scans_added_since(study, tmp_path, monkeypatch, small, write_nifti):
    monkeypatch.chdir(tmp_path)
    command = ["--data", "study", "--axis", "axial", *small, "--name", "a", "--epochs"]
    assert train.main([*command, "1"]) == 0
    manifest = utils.read_json(tmp_path / "runs" / "a" / "config.json")["scans"]
    for name in "0Z":  # sorted before and after the others
        write_scan(study / f"sub-{name}" / f"sub-{name}_T2w.nii.gz", write_nifti)
    assert train.main([*command, "2", "--resume"]) == 0
    assert utils.read_json(tmp_path / "runs" / "a" / "config.json")["scans"] == manifest


def test_only_the_test_split_may_be_empty(study, tmp_path, monkeypatch, small, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["--data", "study", "--axis", "axial", *small, "--epochs", "1", "--name", "a"]
    with pytest.raises(DataError, match="Only the last one \\(test\\) may be 0"):
        train.main([*command, "--split", "0.8", "0", "0.2"])
    assert train.main([*command, "--split", "0.8", "0.2", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("--run runs/a --split validate")
    with pytest.raises(DataError, match=r"belongs to the test split \(train 8, validate 2\)"):
        predict.main(["--run", "runs/a"])


def test_results_say_which_files_were_trained_on(study, tmp_path, monkeypatch, small, capsys):
    """scores.csv has a column for it, and slices.csv names the file of each slice."""
    monkeypatch.chdir(tmp_path)
    command = ["--data", "study", "--axis", "axial", *small, "--epochs", "1", "--name", "a"]
    assert train.main(command) == 0
    manifest = utils.read_json(tmp_path / "runs" / "a" / "config.json")["scans"]
    files_of = {}
    for split, subjects in manifest.items():
        files_of[split] = {file for files in subjects.values() for file in files}

    copied = next(iter(files_of["train"]))
    (tmp_path / "study" / "copy.nii").write_bytes(gzip.decompress((study / copied).read_bytes()))
    assert predict.main(["study", "-o", "out", "--device", "cpu"]) == 0
    (tmp_path / "study" / "copy.nii").unlink()
    with open(tmp_path / "out" / "scores.csv") as file:
        in_training = {row["path"]: row["in_training"] for row in csv.DictReader(file)}
    assert len(in_training) == 11
    assert set(in_training.values()) == {"yes", "no"}
    trained = {path for path, answer in in_training.items() if answer == "yes"}
    assert trained == {str(study / file) for file in ("copy.nii", *files_of["train"])}
    assert "the model was trained on 7 of 11 files" in capsys.readouterr().out

    assert predict.main(["--run", "runs/a", "--html", "--device", "cpu"]) == 0
    with open("runs/a/test/slices.csv") as file:
        slices = [(row["file"], row["slice"]) for row in csv.DictReader(file)]
    assert len(slices) == 44
    assert len(set(slices)) == 44
    assert {file for file, _ in slices} == files_of["test"]
    assert f"{slices[0][0]}, slice" in (tmp_path / "runs" / "a" / "report.html").read_text()


def test_errors_of_both_splits_are_reported_together(tmp_path, write_slices, small):
    data = write_slices(tmp_path / "d")
    for split, case in (("train", "004"), ("validate", "036")):
        (data / f"keras_slices_{split}" / f"case_{case}_week_0_slice_0.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)of the train split.*of the validate split"):
        train.main(["--data", str(data), *small, "--dry-run"])
