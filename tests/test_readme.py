"""The README's marked commands run, as they stand there but for a small model, few slices and one epoch."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import generate
import predict
import train
import train_prior
from mri import phantom

ROOT = Path(__file__).parents[1]
MARK = "<!-- tests/test_readme.py runs this -->\n"
SCRIPTS = {
    "train.py": train,
    "predict.py": predict,
    "train_prior.py": train_prior,
    "generate.py": generate,
}


def blocks() -> list[str]:
    return re.findall(MARK + r"(```.*?\n```)", (ROOT / "README.md").read_text("utf-8"), re.S)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with what the commands name: tiny sample data, a slice, scans, and the repository's resources."""
    folder = tmp_path_factory.mktemp("readme")
    phantom.write_phantom(
        folder / "sample_data", volumes=(2, 1, 1), slices=3, workers=1, progress=False
    )
    (folder / "resources").symlink_to(ROOT / "resources")
    one = next((folder / "sample_data" / "keras_slices_test").iterdir())
    for name in ("scan.nii.gz", "slice.nii.gz"):
        shutil.copy(one, folder / name)
    (folder / "scans").mkdir()
    for number in range(3):
        shutil.copy(one, folder / "scans" / f"sub-{number}.nii.gz")
    return folder


def test_the_marked_blocks_are_those_that_are_expected():
    firsts = [block.splitlines()[1].split()[:2] for block in blocks()]
    assert firsts == [
        ["pip", "install"],
        ["python", "predict.py"],
        ["python", "train_prior.py"],
        ["import", "nifti,"],
    ]


@pytest.mark.parametrize("number", range(3))
def test_commands_run(here, monkeypatch, small, own_signals, number):
    monkeypatch.chdir(here)
    added = {"train.py": [*small, "--epochs", "1"], "predict.py": ["--device", "cpu"]}
    added["train_prior.py"] = [
        "--epochs",
        "1",
        "--channels",
        "8",
        "--num-layers",
        "1",
        "--device",
        "cpu",
    ]
    added["generate.py"] = ["--count", "2", "--device", "cpu"]
    commands = [
        line.split("#")[0] for line in blocks()[number].splitlines() if line.startswith("python ")
    ]
    assert len(commands) >= 4
    for command in commands:
        for path, meant in (
            ("/data/keras_slices_data", "sample_data"),
            ("/data/scans", "scans"),
            ("runs/x", newest(here)),
        ):
            command = command.replace(path, str(meant))
        script, *flags = shlex.split(command)[1:]
        if script == "train_prior.py" and (newest(here) / "prior").exists():
            shutil.rmtree(newest(here) / "prior")
        name = ["--name", f"run_{number}_{len(list((here / 'runs').glob('*')))}"] * (
            script == "train.py"
        )
        assert SCRIPTS[script].main([*flags, *added[script], *name]) == 0, command


def newest(here: Path) -> Path:
    """What runs/x stands for: the last run but those of other slices than the sample's."""
    found = [
        path
        for path in (here / "runs").glob("*/best.pt")
        if '"axis": null' in (path.parent / "config.json").read_text()
    ]
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else here


def test_the_lines_of_python_run(here, monkeypatch):
    monkeypatch.chdir(here)
    exec(compile(blocks()[3].strip("`").removeprefix("python\n"), "README.md", "exec"), {})
    assert (here / "again.nii.gz").stat().st_size > 10_000
