"""Batches of the user's own files: errors, signals, repeated calls, and mixtures of shapes."""

import os
import shutil
import signal
import threading
import zlib

import numpy as np
import pytest
import torch
from processes import finish, start, wait, wait_until

import predict
import utils
from evaluation import batch, codec, plots, reconstruct, reconstruct_group
from evaluation.metrics import SCORE_NAMES
from utils import UserError


@pytest.fixture
def write_inputs(tmp_path, write_nifti):
    """write_inputs("a/x", "b/y", shape=(24, 16)): write different noise as .nii files of in/."""

    def write_inputs(*names, shape=(24, 16)):
        for name in names:
            seed = zlib.crc32(name.encode())
            array = np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)
            write_nifti(tmp_path / "in" / f"{name}.nii", array)
        return tmp_path / "in"

    return write_inputs


def files_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def contents(folder, pattern) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


# ---------------------------------------------------------------- errors


def test_files_that_cannot_be_written_do_not_end_the_batch(
    tmp_path, write_inputs, reconstruct_path, read_scores, monkeypatch
):
    inputs = write_inputs("a", "b", "c")
    (inputs / "bad.nii").write_bytes(b"text")
    write_bytes = reconstruct.utils.write_bytes

    def fail_for_b(path, content):
        if path.name == "b_error.nii.gz":
            raise OSError(f"cannot write {path} (No space left on device)")
        write_bytes(path, content)

    monkeypatch.setattr(reconstruct.utils, "write_bytes", fail_for_b)
    with pytest.raises(UserError) as error:
        reconstruct_path(inputs, "--error-map --figures 0")
    lines = str(error.value).splitlines()
    assert lines[0] == "2 of 4 files cannot be used:"
    assert "bad.nii is not a NIfTI file" in lines[1]
    assert "b_error.nii.gz (No space left on device)" in lines[2]
    out = tmp_path / "out"
    assert [row["file"] for row in read_scores(out)] == ["a", "c"]
    assert files_in(out) == [  # nothing of b is left behind
        "a_error.nii.gz", "a_reconstruction.nii.gz",
        "c_error.nii.gz", "c_reconstruction.nii.gz", "scores.csv",
    ]  # fmt: skip
    # Once there is space, the file has its usual name.
    monkeypatch.setattr(reconstruct.utils, "write_bytes", write_bytes)
    reconstruct_path(inputs / "b.nii")
    assert [row["file"] for row in read_scores(out)] == ["a", "c", "b"]


def test_the_row_of_lost_outputs_is_removed(
    write_inputs, reconstruct_path, read_scores, tmp_path, monkeypatch
):
    inputs = write_inputs("a", "b")
    reconstruct_path(inputs, "--figures 0")
    write_bytes = reconstruct.utils.write_bytes

    def fail(path, content):
        if path.name.endswith("_error.nii.gz"):
            raise OSError("full")
        write_bytes(path, content)

    monkeypatch.setattr(reconstruct.utils, "write_bytes", fail)
    with pytest.raises(UserError, match="1 of 1 files"):
        reconstruct_path(inputs / "a.nii", "--error-map --figures 0")
    assert [row["file"] for row in read_scores(tmp_path / "out")] == ["b"]


def test_figures_that_cannot_be_written_cost_no_scores(
    tmp_path, write_inputs, reconstruct_path, read_scores, monkeypatch
):
    inputs = write_inputs("a", "b")

    def fail(*arguments):
        raise OSError("cannot write the figure")

    monkeypatch.setattr(plots, "save_figure", fail)
    with pytest.raises(UserError, match="cannot write the figure"):
        reconstruct_path(inputs)
    rows = read_scores(tmp_path / "out")
    assert [(row["file"], row["figure"]) for row in rows] == [("a", ""), ("b", "")]


def test_long_names_are_shortened_and_unique(
    tmp_path, write_inputs, reconstruct_path, read_scores, capsys
):
    names = ["x" * 233 + "1", "x" * 233 + "2", "é" * 120]
    out = reconstruct_path(write_inputs(*names), "--error-map --export-codes")
    short = [row["file"] for row in read_scores(out)]
    assert len(set(short)) == 3
    assert all(len(os.fsencode(name)) <= 199 for name in short)
    assert sum(name.startswith("x" * 190 + "_") for name in short) == 2
    assert len(list(out.glob("*_codes.npz"))) == 3
    assert "the outputs of 3 files have a numbered or shortened name" in capsys.readouterr().out
    before = contents(out, "*")
    reconstruct_path(tmp_path / "in", "--error-map --export-codes")
    assert contents(out, "*").keys() == before.keys()


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_keep_the_scores_of_complete_files(
    tmp_path, write_inputs, untrained_run, read_scores, number, code
):
    inputs = write_inputs(*[f"v{i:02d}" for i in range(40)], shape=(40, 16, 40))
    flags = ["-o", "out", "--run", untrained_run, "--device", "cpu", "--figures", "0"]
    process = start(tmp_path, "predict.py", inputs, *flags)
    out = tmp_path / "out"
    wait_until(
        lambda: len(list(out.glob("*_reconstruction.nii.gz"))) >= 3, process, tmp_path / "log"
    )
    os.kill(process.pid, number)
    assert wait(process) == code
    rows = read_scores(out)
    complete = sorted(path.name for path in out.glob("*_reconstruction.nii.gz"))
    assert 3 <= len(rows) < 40
    assert complete == [f"{row['file']}_reconstruction.nii.gz" for row in rows]
    assert all(row["ssim"] for row in rows)
    assert f"{len(rows)} of 40 files reconstructed" in (tmp_path / "log").read_text()


def test_after_a_kill_the_same_command_has_the_same_names(
    tmp_path, write_inputs, untrained_run, read_scores
):
    inputs = write_inputs(*[f"v{i}" for i in range(5)], shape=(40, 16, 40))
    flags = ["-o", "out", "--run", untrained_run, "--device", "cpu", "--figures", "0"]
    process = start(tmp_path, "predict.py", inputs, *flags)
    out = tmp_path / "out"
    wait_until(lambda: any(out.glob("*_reconstruction.nii.gz")), process, tmp_path / "log")
    process.kill()
    assert wait(process) == -9
    finish(tmp_path, "predict.py", inputs, *flags)
    names = [f"v{i}" for i in range(5)]
    assert [row["file"] for row in read_scores(out)] == names
    assert files_in(out) == ["scores.csv", *(f"{name}_reconstruction.nii.gz" for name in names)]
    assert not (out / ".unfinished.csv").exists()


def test_a_second_process_waits_for_the_first(tmp_path, write_inputs, untrained_run, read_scores):
    inputs = write_inputs("x")
    out = tmp_path / "out"
    out.mkdir()
    log = tmp_path / "log"
    flags = ["-o", out, "--run", untrained_run, "--device", "cpu", "--figures", "0"]
    with utils.lock(out / ".lock"):
        process = start(tmp_path, "predict.py", inputs, *flags)
        wait_until(lambda: "out; waiting for its end" in log.read_text(), process, log)
        assert files_in(out) == []
    assert wait(process) == 0
    assert [row["file"] for row in read_scores(out)] == ["x"]


# ---------------------------------------------------------------- repeated calls


def test_calls_for_files_of_the_same_name_keep_all_results(
    tmp_path, write_inputs, reconstruct_path, read_scores, monkeypatch
):
    """`for f in case_*/imaging.nii; do predict.py $f -o out; done`, then one of them again."""
    inputs = write_inputs("case_1/imaging", "case_2/imaging", "case_3/imaging")
    for case in (1, 2, 3):
        out = reconstruct_path(inputs / f"case_{case}" / "imaging.nii")
    expected = [
        (name, str(inputs / f"case_{case}" / "imaging.nii"))
        for case, name in ((1, "imaging"), (2, "imaging_2"), (3, "imaging_3"))
    ]
    rows = read_scores(out)
    assert [(row["file"], row["path"]) for row in rows] == expected
    assert [row["figure"] for row in rows] == ["imaging.png", "imaging_2.png", "imaging_3.png"]
    assert len({row["psnr"] for row in rows}) == 3
    before = contents(out, "*")

    monkeypatch.chdir(inputs / "case_2")  # a relative path of the second file, with new content
    write_inputs("case_1/imaging")
    shutil.copy(inputs / "case_3" / "imaging.nii", "imaging.nii")
    reconstruct_path("imaging.nii", "--error-map")
    after = contents(out, "*")
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {
        "imaging_2.png", "imaging_2_error.nii.gz", "imaging_2_reconstruction.nii.gz", "scores.csv",
    }  # fmt: skip
    again = read_scores(out)
    assert sorted(row["path"] for row in again) == [path for _, path in expected]
    assert {row["file"]: row["psnr"] for row in again} == {
        "imaging": rows[0]["psnr"], "imaging_2": rows[2]["psnr"], "imaging_3": rows[2]["psnr"],
    }  # fmt: skip


def test_codes_of_the_same_name_are_all_decoded(tmp_path, write_inputs, reconstruct_path):
    inputs = write_inputs("a/x", "b/x")
    for case in "ab":
        reconstruct_path(inputs / case / "x.nii", "--export-codes", case)
    for case in ("a", "b", "a"):
        again = reconstruct_path(tmp_path / case / "x_codes.npz", "--from-codes", "again")
    assert files_in(again) == [
        "scores.csv", "x_2_reconstruction.nii.gz", "x_reconstruction.nii.gz"
    ]  # fmt: skip
    results = contents(again, "*.gz")
    for case, name in (("a", "x"), ("b", "x_2")):
        expected = (tmp_path / case / "x_reconstruction.nii.gz").read_bytes()
        assert results[f"{name}_reconstruction.nii.gz"] == expected


def test_one_file_under_several_paths_is_one_input(
    tmp_path, write_inputs, reconstruct_path, untrained_run, read_scores, monkeypatch
):
    inputs = write_inputs("x", "y")
    monkeypatch.chdir(inputs)
    (tmp_path / "link").symlink_to(inputs)
    (inputs / "content.nii").symlink_to("x.nii")  # as in git-annex: another input
    paths = ["x.nii", str(inputs / "x.nii"), "../in/x.nii", "../link/x.nii", "content.nii", "."]
    command = [*paths, "-o", "../out", "--run", str(untrained_run), "--device", "cpu"]
    assert predict.main(command) == 0
    names = [row["file"] for row in read_scores(tmp_path / "out")]
    assert names == ["x", "content", "y"]


def test_foreign_files_are_not_overwritten(tmp_path, write_inputs, reconstruct_path, read_scores):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a_reconstruction.nii.gz", "B.PNG", "contact_sheet_001.png"):
        (out / name).write_bytes(b"foreign")
    reconstruct_path(write_inputs("a", "b", "contact_sheet_002"))
    assert contents(out, "[aB]*[zG]").keys() >= {"a_reconstruction.nii.gz", "B.PNG"}
    for name in ("a_reconstruction.nii.gz", "B.PNG", "contact_sheet_001.png"):
        assert (out / name).read_bytes() == b"foreign"
    rows = read_scores(out)
    assert [row["file"] for row in rows] == ["a_2", "b_2", "contact_sheet_002_2"]
    assert {row["figure"] for row in rows} == {"contact_sheet_002.png"}


def test_odd_names_keep_their_outputs(tmp_path, write_inputs, write_nifti, reconstruct_path):
    names = ["line\nbreak", '=cmd,"x"', "na\udcffme", "a.b..c", ""]
    for name in names:
        write_nifti(tmp_path / "in" / f"{name}.nii", np.arange(384, dtype=np.int16).reshape(24, 16))
    inputs = [str(tmp_path / "in" / f"{name}.nii") for name in names]
    for _ in range(2):
        for path in inputs:
            out = reconstruct_path(path, "--figures 0")
    expected = ["line\\nbreak", '=cmd,"x"', "na\\udcffme", "a.b..c", "unnamed"]
    assert files_in(out) == sorted(
        ["scores.csv", *(f"{name}_reconstruction.nii.gz" for name in expected)]
    )


def test_contact_sheets_of_other_files_stay(tmp_path, write_inputs, reconstruct_path, read_scores):
    first = write_inputs("a/p", "a/q") / "a"
    second = write_inputs("b/r", "b/s") / "b"
    out = reconstruct_path(first)
    sheet = (out / "contact_sheet_001.png").read_bytes()
    reconstruct_path(second)
    reconstruct_path(second)
    assert sorted(contents(out, "*.png")) == ["contact_sheet_001.png", "contact_sheet_002.png"]
    assert (out / "contact_sheet_001.png").read_bytes() == sheet
    figures = [row["figure"] for row in read_scores(out)]
    assert figures == ["contact_sheet_001.png"] * 2 + ["contact_sheet_002.png"] * 2


def test_outputs_inside_the_input_folder_are_not_inputs(
    write_inputs, reconstruct_path, read_scores
):
    inputs = write_inputs("x", "y")
    for out in ("in/out", "in/out", "in"):
        folder = reconstruct_path(inputs, "--error-map", out)
        assert [row["file"] for row in read_scores(folder)] == ["x", "y"]


# ---------------------------------------------------------------- groups


def test_a_mixture_has_the_results_of_one_file_at_a_time(
    write_inputs, write_nifti, reconstruct_path, read_scores, monkeypatch
):
    """Slices of two shapes, a volume, a constant slice; codes are equal, scores to 1e-6."""
    inputs = write_inputs(*[f"a{i}" for i in range(18)])
    write_inputs("b1", "b2", shape=(30, 40))
    write_inputs("v", shape=(20, 5, 20))
    write_inputs("a_tiny", shape=(9, 9))
    dim = np.full((24, 16), 7, np.int16)
    dim[0, 0] = 8  # its standard deviation is far below 5 % of the others'
    write_nifti(inputs / "a_dim.nii", dim)
    write_nifti(inputs / "a_empty.nii", dim * 0)
    together = reconstruct_path(inputs, "--export-codes")
    rows = {row["file"]: row for row in read_scores(together)}
    assert list(rows) == sorted(rows)
    monkeypatch.setattr(codec, "BATCH_SIZE", 1)
    monkeypatch.setattr(reconstruct_group, "BATCH_SIZE", 1)
    single = reconstruct_path(inputs, "--export-codes --figures 0", "single")
    for expected in read_scores(single):
        row = rows[expected["file"]]
        for name in expected.keys() - {"figure", *SCORE_NAMES}:
            assert row[name] == expected[name]
        for name in SCORE_NAMES:
            assert (row[name] == "") == (expected[name] == "")
            if row[name]:
                assert float(row[name]) == pytest.approx(float(expected[name]), abs=2e-6)
        name = f"{expected['file']}_codes.npz"
        with np.load(together / name) as one, np.load(single / name) as other:
            for key in one.files:
                np.testing.assert_array_equal(one[key], other[key])
    assert contents(together, "*.gz") == contents(single, "*.gz")
    assert not list(single.glob("*.png"))


def test_figures_are_limited(tmp_path, write_inputs, reconstruct_path, read_scores, capsys):
    inputs = write_inputs("a", "b", "e", "f")
    write_inputs("c", "d", shape=(12, 3, 12))
    out = reconstruct_path(inputs, "--figures 2 --axis coronal")
    figures = [row["figure"] for row in read_scores(out)]
    assert figures == ["", "", "c.png", "d.png", "", ""]  # slices wait for others of their shape
    assert sorted(contents(out, "*.png")) == ["c.png", "d.png"]
    assert "4 files have no figure, because the limit is 2 figures" in capsys.readouterr().out
    with pytest.raises(UserError, match="--figures is -1; expected 0 or more"):
        reconstruct_path(inputs, "--figures -1")


def test_the_python_interface_needs_no_flags(tmp_path, write_inputs, untrained_run, read_scores):
    inputs = write_inputs("x")
    reconstruct.reconstruct_files(
        [inputs], tmp_path / "o", run=untrained_run, runs_dir="runs", device=torch.device("cpu")
    )
    assert files_in(tmp_path / "o") == ["scores.csv", "x.png", "x_reconstruction.nii.gz"]
    assert [row["file"] for row in read_scores(tmp_path / "o")] == ["x"]


# ---------------------------------------------------------------- several groups at the same time


def test_groups_at_the_same_time_give_the_same_results(
    tmp_path, write_inputs, reconstruct_path, monkeypatch
):
    """A CPU reconstructs several groups at the same time if there are many files."""
    inputs = write_inputs(*[f"{n:02}" for n in range(20)])
    write_inputs("other", "another", shape=(16, 24))
    alone = reconstruct_path(inputs, "--figures 0", "alone")
    threads = torch.get_num_threads()
    monkeypatch.setattr(batch, "MANY_FILES", 2)
    names = set()
    real = batch.reconstruct_group

    def record(*arguments):
        names.add((threading.current_thread().name, torch.get_num_threads()))
        return real(*arguments)

    monkeypatch.setattr(batch, "reconstruct_group", record)
    try:
        torch.set_num_threads(2)
        together = reconstruct_path(inputs, "--figures 0", "together")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert threading.main_thread().name not in {name for name, _ in names}
    assert {count for _, count in names} == {1}
    pattern = "*_reconstruction.nii.gz"
    assert contents(together, pattern) == contents(alone, pattern)
    assert (together / "scores.csv").read_bytes() == (alone / "scores.csv").read_bytes()
