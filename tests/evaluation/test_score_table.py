"""scores.csv and the names of outputs: damaged tables, columns, and many files."""

import numpy as np
import pytest

from evaluation import score_table
from utils import DataError


@pytest.fixture
def write_inputs(tmp_path, write_nifti):
    """write_inputs("x", "y"): write slices of a ramp as .nii files of in/; returns in/."""

    def write_inputs(*names):
        for name in names:
            ramp = np.arange(384, dtype=np.int16).reshape(24, 16)
            write_nifti(tmp_path / "in" / f"{name}.nii", ramp)
        return tmp_path / "in"

    return write_inputs


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "its first line lacks the columns file and path"),
        (b"subject,age\r\n1,50\r\n", "its first line lacks the columns file and path"),
        (b"file;path\r\nx;y\r\n", "its first line lacks the columns file and path"),
        (b"file,path,ssim\r\nx,/in/x.nii,0.9\r\ny,/in", "its last line is incomplete"),
        (b"file,path,ssim\r\nx,/in/x.nii\r\n", "row 2 has 2 of 3 cells"),
        (b"file,path\r\nx,/a\r\nx,/b\r\n", "'x' occurs twice in the column file"),
        (b"file,path\r\n../x,/a\r\n", "row 2 has '../x' in the column file"),
        (b"file,path\r\n\xff,/a\r\n", "can't decode byte 0xff"),
    ],
)
def test_damaged_tables_are_an_error_before_anything_is_written(
    tmp_path, write_inputs, reconstruct_path, content, reason
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "scores.csv").write_bytes(content)
    (out / "x_reconstruction.nii.gz").write_bytes(b"earlier")
    with pytest.raises(DataError) as error:
        reconstruct_path(write_inputs("x"))
    assert "scores.csv is damaged or was not written by predict.py" in str(error.value)
    assert reason in str(error.value)
    assert "Move this file away, or choose another folder with -o" in str(error.value)
    names = sorted(path.name for path in out.glob("[!.]*"))
    assert names == ["scores.csv", "x_reconstruction.nii.gz"]
    assert (out / "scores.csv").read_bytes() == content
    assert (out / "x_reconstruction.nii.gz").read_bytes() == b"earlier"


@pytest.mark.parametrize(
    "content", ["\ufefffile,path\nx,/in/x.nii\n", "file,path\nx,/in/x.nii\n\n\n"]
)
def test_tables_saved_by_other_programs_are_read(tmp_path, content):
    (tmp_path / "scores.csv").write_text(content, encoding="utf-8")
    assert score_table.read_table(tmp_path / "scores.csv") == [{"file": "x", "path": "/in/x.nii"}]


def test_columns_of_all_calls_are_kept(tmp_path, write_inputs, reconstruct_path, read_scores):
    inputs = write_inputs("x", "y")
    out = tmp_path / "out"
    out.mkdir()
    # Written by an earlier version, with a relative path and a column of an organ.
    (out / "scores.csv").write_text("file,path,bone_ssim\nold,gone/x.nii,0.5\n")
    reconstruct_path(inputs / "x.nii")
    reconstruct_path(inputs / "y.nii", "--export-codes")
    old, x, y = read_scores(out)
    assert (old["file"], old["path"], old["bone_ssim"], old["ssim"]) == (
        "old", "gone/x.nii", "0.5", "",
    )  # fmt: skip
    assert (x["bone_ssim"], x["npz_bytes"]) == ("", "")
    assert x["ssim"] and y["npz_bytes"]


def test_scores_grow_but_are_not_written_for_every_row(tmp_path, monkeypatch):
    table = score_table.ScoreTable(tmp_path)
    sizes = []
    monkeypatch.setattr(score_table.utils, "write_csv", lambda path, rows: sizes.append(len(rows)))
    clock = iter(range(100_000))
    monkeypatch.setattr(score_table.time, "monotonic", lambda: next(clock) / 1000)
    for i in range(20_000):
        table.add({"file": str(i), "path": f"/{i}"})
    assert sizes[0] == 1
    assert 5 < len(sizes) < 15  # every two seconds of 20
    table.finish([str(i) for i in range(20_000)])
    assert sizes[-1] == 20_000


def test_many_equal_names_are_numbered_quickly(tmp_path):
    paths = [tmp_path / str(i) / "scan.nii.gz" for i in range(2000)]
    names = score_table.output_names([*paths, tmp_path / "SCAN.nii"])
    assert (names[0], names[1], names[1999], names[2000]) == (
        "scan", "scan_2", "scan_2000", "SCAN_2001",
    )  # fmt: skip
