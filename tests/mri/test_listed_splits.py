"""Splits that are listed: in tables of users, and in manifests of runs, from any platform."""

import copy
import json
import unicodedata

import pytest
from layouts import make_files, names_of, subjects_of

from mri import splits
from training.run_folder import read_manifest
from utils import DataError, UserError

UMLAUT = "M\N{LATIN SMALL LETTER U WITH DIAERESIS}ller"
DECOMPOSED = unicodedata.normalize("NFD", UMLAUT)  # as on macOS


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (
            "subject,split\nA,train\nsub-B,val\nC,test\n",
            {"train": {"A"}, "validate": {"B"}, "test": {"C"}},
        ),
        (
            "split,file\n"
            "train,sub-A/ses-1/anat/sub-A_ses-1_T2w.nii.gz\n"
            "validate,sub-A/ses-2/anat/sub-A_ses-2_T2w.nii.gz\n",
            {"train": {"A"}, "validate": {"A"}},
        ),
    ],
)
def test_table_determines_the_splits(study, tmp_path, table, expected):
    path = tmp_path / "splits.csv"
    path.write_text(table)
    assert subjects_of(splits.find_source(study, "axial", [str(path)])) == expected


EACH_SUBJECT = {"train": {"A"}, "validate": {"B"}, "test": {"C"}}
ROWS = [("Split", "Subject"), ("train", "A"), ("Val", "sub-B"), ("TEST", "C")]


def join(rows: list[tuple[str, ...]], delimiter: str) -> str:
    return "".join(delimiter.join(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "content",
    [
        *(join(ROWS, delimiter).encode() for delimiter in (",", ", ", ";", "\t", " ; ")),
        join([("split", "participant_id"), *ROWS[1:]], "\t").encode(),
        join([("split", " PATIENT_ID "), *ROWS[1:]], ",").encode("utf-8-sig"),
        join(ROWS, ";").replace("\n", "\r\n").encode("utf-16"),
        (join(ROWS, ";") + ";;\n\n").encode(),
        join([("\xfcber", *ROWS[0]), *(("x", *row) for row in ROWS[1:])], ";").encode("cp1252"),
    ],
)
def test_tables_of_other_programs_are_read(study, tmp_path, content):
    path = tmp_path / "splits.csv"
    path.write_bytes(content)
    assert subjects_of(splits.find_source(study, "axial", [str(path)])) == EACH_SUBJECT


@pytest.mark.parametrize("pattern", [r"sub-\w", r"sub-(\w)", None])
@pytest.mark.parametrize("prefix", ["sub-", ""])
def test_subjects_of_tables_match_with_and_without_their_prefix(study, tmp_path, pattern, prefix):
    path = tmp_path / "splits.csv"
    path.write_text(f"split,subject\ntrain,{prefix}A\nval,{prefix}B\ntest,{prefix}C\n")
    source = splits.find_source(study, "axial", [str(path)], 0, pattern)
    for split, name in (("train", "A"), ("validate", "B"), ("test", "C")):
        assert source.splits[split] == sorted((study / f"sub-{name}").rglob("*.nii.gz"))


@pytest.mark.parametrize(
    "file",
    [f"x\\{UMLAUT}.nii.gz", f"x/{DECOMPOSED}.nii.gz", f"./x/{UMLAUT}.nii.gz", "{root}/x/{name}"],
)
def test_paths_of_tables_may_come_from_other_platforms(tmp_path, file):
    make_files(tmp_path / "d", f"x/{DECOMPOSED}", "x/b", "x/c")
    path = tmp_path / "splits.csv"
    file = file.format(root=tmp_path / "d", name=f"{UMLAUT}.nii.gz")
    path.write_text(f"split,file\ntrain,{file}\nval,x/b.nii.gz\ntest,x/c.nii.gz\n", "utf-8")
    source = splits.find_source(tmp_path / "d", "axial", [str(path)])
    assert names_of(source) == {"train": {f"x/{DECOMPOSED}"}, "validate": {"x/b"}, "test": {"x/c"}}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("subject,split\nX,train\n", "line 2: no scan has the subject 'X'"),
        ("file,split\nX.nii,train\n", "line 2: no scan has the file 'X.nii'"),
        ("subject,split\nA,training set\n", "line 2: the split is 'training set'"),
        ("subject,split\nA,train\nA,test\n", "more than once"),
        ("a,b\n1,2\n", "line 2: there is no split"),
        ("\n\nsubject;split\nX;train\n", "line 4"),
        ("PK\0\x03", "cannot read .*it contains no text"),
    ],
)
def test_unusable_tables_are_refused(study, tmp_path, table, message):
    path = tmp_path / "splits.csv"
    path.write_text(table)
    with pytest.raises(DataError, match=message):
        splits.find_source(study, "axial", [str(path)])


# ---------------------------------------------------------------- splits of a run


def test_training_subjects_are_recognised_in_another_folder(tmp_path):
    """By the name of a file or of any folder that it is in."""
    manifest = {
        "train": {"p0": ["p0.nii.gz"], "p1": ["p1.nii.gz"]},
        "validate": {"p2": ["p2.nii.gz"]},
    }
    names = ("p0", "p2", "p9", "batch/p1", "batch/p8", "p0/T1", "p7/T1", "p7/T2")
    make_files(tmp_path, *names)
    source = splits.find_source(tmp_path, "axial", manifest=manifest)
    new = {"p9", "batch/p8", "p7/T1", "p7/T2"}
    assert names_of(source) == {"train": {"p0"}, "validate": {"p2", *new}, "test": new}
    source = splits.find_source(tmp_path, "axial", manifest=manifest, include_new_subjects=False)
    assert names_of(source) == {"train": {"p0"}, "validate": {"p2"}}


def test_manifest_restores_splits_and_subjects(tmp_path):
    make_files(tmp_path, *(f"{site}/p{i}" for site in ("x", "y") for i in range(4)))
    source = splits.find_source(tmp_path, "axial", None, 3, r"p\d")
    manifest = splits.to_manifest(source)
    unchanged = copy.deepcopy(manifest)
    restored = splits.find_source(tmp_path, "axial", manifest=manifest)
    assert restored.splits == source.splits
    assert restored.subjects == source.subjects
    assert manifest == unchanged


@pytest.mark.parametrize(
    "manifest",
    [
        7,
        {"train": 7},
        {"train": {"A": 7}},
        {"train": {"A": [7]}},
        {"else": {"A": ["a.nii"]}},
    ],
)
def test_malformed_manifests_are_refused(tmp_path, manifest):
    (tmp_path / "config.json").write_text(json.dumps({"scans": manifest}))
    with pytest.raises(UserError, match="has invalid scans"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("separator", ["/", "\\"])
@pytest.mark.parametrize("recorded", [UMLAUT, DECOMPOSED])
@pytest.mark.parametrize("stored", [UMLAUT, DECOMPOSED])
def test_a_run_of_another_platform_has_the_same_splits(tmp_path, separator, recorded, stored):
    subjects = {"train": recorded, "validate": "B", "test": "C"}
    manifest = {}
    for split, subject in subjects.items():
        manifest[split] = {subject: [separator.join(("d", f"sub-{subject}", "T1.nii.gz"))]}
    make_files(tmp_path, *(f"d/sub-{name}/T1" for name in (stored, "B", "C", "D")))
    source = splits.find_source(tmp_path, "axial", manifest=manifest)
    assert subjects_of(source) == {
        "train": {UMLAUT}, "validate": {"B", "D"}, "test": {"C", "D"}
    }  # fmt: skip
    assert not any("warning" in note for note in source.notes)
    new = splits.to_manifest(source)["train"]
    assert new == {UMLAUT: [f"d/sub-{UMLAUT}/T1.nii.gz"]}
    # New scans of the training subject are not used, in this folder or in another one.
    make_files(tmp_path, f"d/sub-{stored}/T2", f"e/sub-{stored}_T1")
    assert splits.find_source(tmp_path, "axial", manifest=manifest).splits == source.splits
    assert names_of(splits.find_source(tmp_path / "d", "axial", manifest=manifest)) == {
        "validate": {"sub-B/T1", "sub-C/T1", "sub-D/T1"},
        "test": {"sub-B/T1", "sub-C/T1", "sub-D/T1"},
    }


def test_missing_scans_of_a_run_are_reported(tmp_path):
    make_files(tmp_path, "sub-1", "sub-2", "sub-3", "other/sub-4")
    manifest = splits.to_manifest(splits.find_source(tmp_path, "axial"))
    (tmp_path / "sub-2.nii.gz").unlink()
    notes = splits.find_source(tmp_path, "axial", manifest=manifest).notes
    warning = (
        f"warning: 1 of the 4 scan(s) that the run recorded are not in {tmp_path}; for example"
    )
    assert [note for note in notes if "warning" in note] == [f"{warning}, sub-2.nii.gz"]
    notes = splits.find_source(tmp_path / "other", "axial", manifest=manifest).notes
    assert any("none of the 4 scan(s) that the run recorded" in note for note in notes)


def test_subjects_that_earlier_versions_recorded_stay_out_of_the_test_split(tmp_path):
    """They took each session of sub-A, each channel of X and each week of B006 for a subject."""
    old = {
        "A_ses-1": "sub-A_ses-1/T1",
        "X_0000": "imagesTr/X_0000",
        "B006_Week0": "B006_Week0_LFOV",
    }
    manifest = {
        "train": {subject: [f"{path}.nii.gz"] for subject, path in old.items()},
        "validate": {"C": ["sub-C/T1.nii.gz"]},
    }
    new = ["sub-A_ses-2/T1", "imagesTr/X_0001", "B006_Week5_LFOV"]
    make_files(tmp_path, *old.values(), *new, "sub-C/T1", "sub-D/T1")
    source = splits.find_source(tmp_path, "axial", manifest=manifest)
    assert names_of(source) == {
        "train": set(old.values()), "validate": {"sub-C/T1", "sub-D/T1"}, "test": {"sub-D/T1"}
    }  # fmt: skip
    for path in old.values():
        (tmp_path / f"{path}.nii.gz").unlink()
    source = splits.find_source(tmp_path, "axial", manifest=manifest)
    assert names_of(source) == {"validate": {"sub-C/T1", "sub-D/T1"}, "test": {"sub-D/T1"}}
