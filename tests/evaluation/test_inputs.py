"""The files that predict.py reads: files, folders, patterns, and what is left out."""

from pathlib import Path

import pytest

from evaluation.inputs import find_files
from utils import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    names = ("a.nii", "b.nii.gz", "b_seg.nii.gz", "sub/gt/c.nii", "sub/c.nii", "a_error.nii.gz")
    for name in (*names, "a.npz", "b.VQC", "out/d.nii.gz"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def find(*paths: str, file_type: str = "nifti") -> list[str]:
    return [path.as_posix() for path in find_files(paths, Path("out"), file_type)]


def test_folders_are_searched_for_images(folder, capsys):
    assert find(".") == ["a.nii", "b.nii.gz", "sub/c.nii"]
    assert capsys.readouterr().out.splitlines() == [
        "note: .: 1 file(s) are left out because they are named like outputs of predict.py; for "
        "example, a_error.nii.gz",
        "note: .: 2 file(s) are left out because they are named like segmentations; for example, "
        "b_seg.nii.gz",
    ]
    assert find("out") == ["out/d.nii.gz"]
    assert find(".", file_type="codes") == ["a.npz", "b.VQC"]


def test_named_files_are_always_used(folder):
    assert find("b_seg.nii.gz", "a_error.nii.gz") == ["b_seg.nii.gz", "a_error.nii.gz"]
    assert find("sub/gt") == ["sub/gt/c.nii"]


def test_patterns_are_expanded(folder):
    """PowerShell and cmd.exe pass them on."""
    assert find("*.nii", "sub/*.n?i") == ["a.nii", "sub/c.nii"]
    (folder / "x[1].nii").touch()
    assert find("x[1].nii") == ["x[1].nii"]  # an existing file comes first
    with pytest.raises(UserError, match=r"z\*\.nii does not exist"):
        find("z*.nii")


def test_files_without_content_and_other_formats_are_refused(folder):
    (folder / "e.nii.gz").symlink_to(".git/annex/objects/x/y.nii.gz")
    with pytest.raises(UserError, match=r"e\.nii\.gz is a git-annex link; .*`git annex get`"):
        find("e.nii.gz")
    (folder / "dicom").mkdir()
    (folder / "dicom" / "IM1").write_bytes(bytes(128) + b"DICM")
    (folder / "p.hdr").touch()
    with pytest.raises(UserError, match=r"1 DICOM file\(s\) are not read; .*dcm2niix -z y"):
        find("dicom")
    with pytest.raises(UserError, match=r"no NIfTI file .*1 \.hdr/\.img file.*nibabel\.save"):
        find("p.hdr")


def test_folders_without_images_say_what_they_contain(folder):
    (folder / "only").mkdir()
    (folder / "only" / "x_reconstruction.nii.gz").touch()
    with pytest.raises(
        UserError, match=r"none of the 1 .*(?s:.*)named like outputs of predict\.py"
    ):
        find("only")
    with pytest.raises(UserError, match=r"no \.npz or \.vqc file in only"):
        find("only", file_type="codes")
