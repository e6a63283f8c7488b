"""A person's own files: they come back as they were, at their own size; codes out and in; organs; odd ones."""

import csv
import gzip
import json

import nibabel as nib
import numpy as np
import pytest
import torch

import predict
import train
import utils
from evaluation import reconstruct
from modules import VQVAE
from mri import splits
from training.checkpoint import write_checkpoint
from training.run_folder import load_run_data, read_manifest
from utils import UserError

AFFINE = np.array([[1.7, 0, 0, -20], [0, 1.5, 0, 7], [0, 0, 2, 3], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a best.pt of a small, untrained model, whose training slices had voxels of 1.7 x 2 mm."""
    torch.manual_seed(0)
    model = VQVAE(hidden_channels=8, residual_channels=4, num_embeddings=16, embedding_dim=4)
    folder = tmp_path_factory.mktemp("runs") / "x"
    folder.mkdir()
    slices = {"size": [256, 128], "spacing": [1.7, 2.0], "axis": "coronal"}
    kept = {
        "format": 3,
        "model_args": model.arguments,
        "model": model.state_dict(),
        "slices": slices,
    }
    write_checkpoint(folder / "best.pt", kept)
    return folder


@pytest.fixture
def reconstruct(run, tmp_path):
    """reconstruct(path, "--flags") -> output folder."""

    def reconstruct(path, flags="", out="out"):
        command = [
            str(path),
            "-o",
            str(tmp_path / out),
            "--run",
            str(run),
            "--device",
            "cpu",
            *flags.split(),
        ]
        assert predict.main(command) == 0
        return tmp_path / out

    return reconstruct


def volume(shape=(20, 24, 28), dtype=np.int16):
    return np.random.default_rng(0).integers(0, 900, shape).astype(dtype)


def write(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header["descrip"] = b"DOE^JANE"
    path.write_bytes(gzip.compress(image.to_bytes()))
    return path


def rows_of(folder):
    with open(folder / "scores.csv") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- files as slices, and back


@pytest.fixture
def study(tmp_path):
    """Five subjects as BIDS has them, two scans each of 20 x 24 x 28, the outer planes empty."""
    for subject in "ABCDE":
        for session in (1, 2):
            array = volume() + 50
            array[:4] = array[:, :5] = array[..., :6] = 0
            name = f"sub-{subject}_ses-{session}_T2w.nii.gz"
            write(tmp_path / "study" / f"sub-{subject}" / f"ses-{session}" / "anat" / name, array)
    return tmp_path / "study"


def subjects(source):
    return {
        split: {source.subjects[file] for file in files} for split, files in source.splits.items()
    }


def test_subjects_are_in_one_split_each(study):
    source = splits.find_source(study, "coronal", None, 0)
    assert {split: len(files) for split, files in source.splits.items()} == {
        "train": 6,
        "validate": 2,
        "test": 2,
    }
    parts = subjects(source)
    assert set.union(*parts.values()) == set("ABCDE") and sum(map(len, parts.values())) == 5
    assert subjects(splits.find_source(study, "axial", None, 0)) == parts
    assert any(
        subjects(splits.find_source(study, "axial", None, seed)) != parts for seed in range(1, 5)
    )
    assert len(subjects(splits.find_source(study, "axial", ["0.4", "0.2", "0.4"]))["test"]) == 2
    assert "test" not in splits.find_source(study, "axial", ["0.8", "0.2", "0"]).splits


@pytest.mark.parametrize(("text", "expected"), [
    ("subject,split\nA,train\nsub-B,val\nC,test\n", {"train": {"A"}, "validate": {"B"}, "test": {"C"}}),
    ("split,file\ntrain,sub-A/ses-1/anat/sub-A_ses-1_T2w.nii.gz\nvalidate,sub-A/ses-2/anat/sub-A_ses-2_T2w.nii.gz\n",
     {"train": {"A"}, "validate": {"A"}}),
])  # fmt: skip
def test_splits_from_a_table(study, tmp_path, text, expected):
    (tmp_path / "splits.csv").write_text(text)
    assert subjects(splits.find_source(study, "axial", [str(tmp_path / "splits.csv")])) == expected


@pytest.mark.parametrize(("split", "message"), [
    (["0.8", "0.1"], "three shares"), (["0.8", "0.1", "0.2"], "add up to 1"), (["a", "b", "c"], "three shares"),
    (["0", "0.5", "0.5"], "three shares"), (["nowhere.csv"], "can't be read"),
    ("subject,split\nX,train\n", "line 2"), ("subject,split\nA,training set\n", "line 2"),
    ("subject,split\nA,train\nA,test\n", "twice"), ("a,b\n1,2\n", "line 2"),
])  # fmt: skip
def test_splits_that_cannot_be_used(study, tmp_path, split, message):
    if isinstance(split, str):
        (tmp_path / "splits.csv").write_text(split)
        split = [str(tmp_path / "splits.csv")]
    with pytest.raises(utils.DataError, match=message):
        splits.find_source(study, "axial", split)


def test_split_needs_an_axis_and_scans(tmp_path, study):
    with pytest.raises(utils.DataError, match="which --axis asks for"):
        splits.find_source(study, None, ["0.8", "0.1", "0.1"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(utils.DataError, match=r"no \.nii or \.nii\.gz file"):
        splits.find_source(tmp_path / "empty", "axial")


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_subjects_are_told(study, count):
    for subject in "ABCDE"[count:]:
        for file in (study / f"sub-{subject}").rglob("*.nii.gz"):
            file.unlink()
    source = splits.find_source(study, "axial")
    assert any("scores say nothing about other people" in note for note in source.notes)
    assert source.splits["validate"] == source.splits["test"]
    assert (source.splits["train"] == source.splits["test"]) == (count == 1)


def test_a_run_with_a_table_of_splits_goes_on(study, tmp_path, monkeypatch, small, own_signals):
    (tmp_path / "splits.csv").write_text("subject,split\nA,train\nB,validate\nC,test\n")
    monkeypatch.chdir(tmp_path)
    command = ["--data", "study", "--axis", "axial", "--split", "splits.csv", *small, "--name", "a"]
    assert train.main([*command, "--epochs", "1"]) == 0
    assert train.main([*command, "--epochs", "2", "--resume"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train.main(["--resume", "--runs-dir", "../runs", "--name", "a", "--epochs", "3"]) == 0


def test_who_was_trained_on_stays_out_of_the_test_split(
    study, tmp_path, monkeypatch, small, own_signals, capsys
):
    """The run keeps its splits: scans that come or go move nobody; other folders are tested without its people."""
    monkeypatch.chdir(tmp_path)
    command = ["--data", str(study), "--axis", "axial", *small, "--epochs", "1", "--name", "a"]
    assert train.main(command) == 0
    assert (
        train.main(["--resume", "--name", "a", "--epochs", "2"]) == 0
    )  # of the size that was found
    kept = utils.read_json(tmp_path / "runs" / "a" / "config.json")["scans"]
    gone = next(iter(kept["validate"]))
    for file in (study / f"sub-{gone}").rglob("*.nii.gz"):
        file.unlink()
    for subject in "XYZ":
        write(study / f"sub-{subject}" / f"sub-{subject}_T2w.nii.gz", volume() + 50)
    found, _ = load_run_data(tmp_path / "runs" / "a", "test")
    assert {name.case for name in found.names} == {*kept["test"], "X", "Y", "Z"}
    other = tmp_path / "other"
    for subject in ("N", next(iter(kept["train"]))):
        write(other / f"sub-{subject}_T2w.nii.gz", volume() + 50)
    found, _ = load_run_data(tmp_path / "runs" / "a", "test", data=str(other))
    assert {name.case for name in found.names} == {"N"}


PATIENTS = [f"p{i:02d}" for i in range(4)]
LAYOUTS = {  # paths, whose they are, and --subjects
    "sub-": ([f"sub-{p}/anat/sub-{p}_T1w" for p in PATIENTS], PATIENTS, None),
    "flat sub-": ([f"sub-{p}_ses-{n}_T1w" for p in PATIENTS for n in (1, 2)], PATIENTS, None),
    "HipMRI's names": (
        ["a/Case_004_Week0", "a/Case_004_Week1", "b/Case_005_Week0"],
        ["004", "005"],
        None,
    ),
    "flat": (PATIENTS, PATIENTS, None),
    "flat, below other folders": ([f"a/b/{p}" for p in PATIENTS], PATIENTS, None),
    "a folder with one file each": ([f"images/{p}/T1" for p in PATIENTS], PATIENTS, None),
    "a folder each": (
        [f"{p}/{kind}" for p in PATIENTS for kind in ("T1", "T2")],
        PATIENTS,
        "^([^/]+)/",
    ),
    "a folder a sequence": (
        [f"{kind}/{p}" for p in PATIENTS for kind in ("T1", "T2")],
        PATIENTS,
        r"([^/]+)\.nii",
    ),
    "IXI": (
        [f"IXI-{kind}/{p}-{kind}" for p in PATIENTS for kind in ("T1", "T2")],
        PATIENTS,
        r"p\d+",
    ),
    "sites": ([f"site{p[-1] in '01'}/{p}" for p in PATIENTS], PATIENTS, r"p\d+"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whose_a_file_is(tmp_path, layout):
    """Told by the path, or by --subjects; never guessed where a wrong guess would put one person into two splits."""
    paths, expected, pattern = LAYOUTS[layout]
    for path in paths:
        write(tmp_path / "data" / f"{path}.nii.gz", volume((8, 8, 8)))
    if pattern:
        with pytest.raises(utils.DataError, match="whose scan is whose can't be told") as error:
            splits.find_source(tmp_path / "data", "axial")
        if pattern.startswith(("^", "(")):  # it is what the error proposes
            assert f"--subjects '{pattern}'" in str(error.value)
    source = splits.find_source(tmp_path / "data", "axial", None, 0, pattern)
    assert set(source.subjects.values()) == set(expected)
    assert all(whose in str(file.relative_to(tmp_path)) for file, whose in source.subjects.items())
    assert "is of" in source.notes[0] and ("another person's" in source.notes[0]) == (len(paths) == 4 and not (
        pattern or layout == "sub-"))  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "message"), [("q", r"finds nothing in the path of 2 scan"), ("(", "no regular exp")]
)
def test_patterns_that_cannot_be_used(tmp_path, pattern, message):
    for name in "ab":
        write(tmp_path / f"{name}.nii.gz", volume((8, 8, 8)))
    with pytest.raises(utils.DataError, match=message):
        splits.find_source(tmp_path, "axial", None, 0, pattern)


def test_people_of_training_are_known_in_another_folder(tmp_path):
    """Whatever level it is: by the name of a file or of a folder that it is in."""
    known = {"train": {"p0": ["p0.nii.gz"], "p1": ["p1.nii.gz"]}, "validate": {"p2": ["p2.nii.gz"]}}
    names = ("p0", "p2", "p9", "batch/p1", "batch/p8", "p0/T1", "p7/T1", "p7/T2")
    for name in names:
        write(tmp_path / f"{name}.nii.gz", volume((8, 8, 8)))
    source = splits.find_source(tmp_path, "axial", known=known)
    found = {
        split: {str(file.relative_to(tmp_path))[:-7] for file in files}
        for split, files in source.splits.items()
    }
    strangers = {"p9", "batch/p8", "p7/T1", "p7/T2"}
    assert found == {"train": {"p0"}, "validate": {"p2", *strangers}, "test": strangers}
    alone = splits.find_source(tmp_path, "axial", known=known, others=False)
    assert {split: len(files) for split, files in alone.splits.items()} == {
        "train": 1,
        "validate": 1,
    }


def test_folders_that_are_named_as_splits_are_the_splits(tmp_path):
    for name in ("train/a/1", "train/b/2", "val/3", "test/4", "test/5"):
        write(tmp_path / f"{name}.nii.gz", volume((8, 8, 8)))
    source = splits.find_source(tmp_path, "axial")
    found = {split: [file.name[0] for file in files] for split, files in source.splits.items()}
    assert found == {"train": ["1", "2"], "validate": ["3"], "test": ["4", "5"]}
    assert any("those that the folders name" in note for note in source.notes)
    drawn = splits.find_source(tmp_path, "axial", ["0.6", "0.2", "0.2"], 0, r"([^/]+)\.nii")
    assert len(drawn.splits["train"]) == 3
    (tmp_path / "6.nii.gz").write_bytes((tmp_path / "val" / "3.nii.gz").read_bytes())
    with pytest.raises(utils.DataError, match=r"(?s)1 scan\(s\).*in none of the folders.*6.nii.gz"):
        splits.find_source(tmp_path, "axial")


@pytest.mark.parametrize("names", [("val/1", "test/2"), ("train/1", "test/2")])
def test_splits_that_lack_one(tmp_path, names, small):
    for name in names:
        write(tmp_path / "d" / f"{name}.nii.gz", volume())
    with pytest.raises(utils.DataError, match=r"is in the (train|validate) split .*Give --split"):
        train.main(["--data", str(tmp_path / "d"), "--axis", "axial", *small, "--dry-run"])


def test_one_person_in_two_splits_is_told(tmp_path):
    for name in ("train/sub-1", "val/sub-2", "test/sub-1"):
        write(tmp_path / f"{name}.nii.gz", volume((8, 8, 8)))
    notes = splits.find_source(tmp_path, "axial").notes
    assert any("1 subject(s) in both train and test (1)" in note for note in notes)
    known = {split: {"1": ["train/sub-1.nii.gz"]} for split in ("train", "validate", "test")}
    notes = splits.find_source(tmp_path, "axial", known=known).notes
    assert sum("in both train and" in note for note in notes) == 2


def test_segmentations_and_outputs_are_no_scans(tmp_path):
    for name in ("sub-0_T1w", "sub-0_dseg", "labelsTr/x", "sub-1_T1w_reconstruction"):
        write(tmp_path / f"{name}.nii.gz", volume())
    source = splits.find_source(tmp_path, "axial")
    assert len(source.subjects) == 1
    assert any(
        "3 file(s) that are named as segmentations or as outputs" in note for note in source.notes
    )


@pytest.mark.parametrize(
    "odd", [7, {"train": 7}, {"train": {"A": 7}}, {"train": {"A": [7]}}, {"else": {"A": ["a.nii"]}}]
)
def test_splits_of_a_run_that_are_none(tmp_path, odd):
    (tmp_path / "config.json").write_text(json.dumps({"scans": odd}))
    with pytest.raises(UserError, match="expected what train"):
        read_manifest(tmp_path)


def test_a_run_goes_on_when_scans_have_come(study, tmp_path, monkeypatch, small, own_signals):
    """With the people that it had, each in the split that it was in."""
    monkeypatch.chdir(tmp_path)
    command = ["--data", "study", "--axis", "axial", *small, "--name", "a", "--epochs"]
    assert train.main([*command, "1"]) == 0
    before = utils.read_json(tmp_path / "runs" / "a" / "config.json")["scans"]
    for name in "0Z":  # before and after the others
        write(study / f"sub-{name}" / f"sub-{name}_T2w.nii.gz", volume() + 50)
    assert train.main([*command, "2", "--resume"]) == 0
    assert utils.read_json(tmp_path / "runs" / "a" / "config.json")["scans"] == before


def test_an_empty_test_split_is_said(study, tmp_path, monkeypatch, small, own_signals, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(utils.DataError, match="Only the last, of the test split, may be 0"):
        train.main(["--data", "study", "--axis", "axial", "--split", "0.8", "0", "0.2", *small])
    command = [
        "--data",
        "study",
        "--axis",
        "axial",
        "--split",
        "0.8",
        "0.2",
        "0",
        *small,
        "--epochs",
        "1",
    ]
    assert train.main([*command, "--name", "a"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("--run runs/a --split validate")
    with pytest.raises(
        utils.DataError, match=r"is in the test split \(train 8, validate 2\): its share was 0"
    ):
        predict.main(["--run", "runs/a"])


def test_what_a_run_was_trained_on_is_told(
    study, tmp_path, monkeypatch, small, own_signals, capsys
):
    """In scores.csv, with the paths; and slices.csv has which file a slice is of."""
    monkeypatch.chdir(tmp_path)
    assert (
        train.main(["--data", "study", "--axis", "axial", *small, "--epochs", "1", "--name", "a"])
        == 0
    )
    kept = utils.read_json(tmp_path / "runs" / "a" / "config.json")["scans"]
    assert predict.main(["study", "-o", "out", "--device", "cpu"]) == 0
    rows = {row["path"]: row["in_training"] for row in rows_of(tmp_path / "out")}
    trained = {f"study/{file}" for files in kept["train"].values() for file in files}
    assert {path for path, told in rows.items() if told == "yes"} == trained and len(rows) == 10
    assert set(rows.values()) == {"yes", "no"}
    assert "note: 6 of 10 files are of the run's training" in capsys.readouterr().out
    assert predict.main(["--run", "runs/a", "--html", "--device", "cpu"]) == 0
    with open("runs/a/test/slices.csv") as file:
        slices = [(row["file"], row["slice"]) for row in csv.DictReader(file)]
    assert len(set(slices)) == len(slices) == 44
    assert {file for file, _ in slices} == {
        file for files in kept["test"].values() for file in files
    }
    assert f"{slices[0][0]}, slice" in (tmp_path / "runs" / "a" / "report.html").read_text()


def test_what_is_wrong_with_both_splits_is_told_at_once(tmp_path, write_slices, monkeypatch, small):
    data = write_slices(tmp_path / "d")
    for split, case in (("train", "004"), ("validate", "036")):
        (data / f"keras_slices_{split}" / f"case_{case}_week_0_slice_0.nii.gz").write_bytes(b"")
    with pytest.raises(utils.DataError, match=r"(?s)of the train split.*of the validate split"):
        train.main(["--data", str(data), *small, "--dry-run"])
