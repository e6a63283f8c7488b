"""Devices, commands, files and figures."""

import json
import shlex
import subprocess
from pathlib import Path, PurePosixPath

import pytest
import torch

import utils
from training.checkpoint import write_checkpoint
from utils import UserError


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    write_checkpoint(path, {"epoch": 1})

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        utils.write_atomically(path, fail)
    assert torch.load(path, weights_only=True) == {"epoch": 1}


@pytest.mark.parametrize(
    ("text", "message"), [(None, "No such file"), ("{", "can't be read"), ("[1]", "holds list")]
)
def test_json_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        utils.read_json(path)


def test_json_and_csv_round_trip(tmp_path):
    utils.write_json(tmp_path / "a.json", {"a": [1, 2.5]})
    assert (
        json.loads((tmp_path / "a.json").read_text())
        == utils.read_json(tmp_path / "a.json")
        == {"a": [1, 2.5]}
    )
    utils.write_csv(tmp_path / "a.csv", [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}])
    assert (tmp_path / "a.csv").read_text() == "epoch,loss\n1,0.5\n2,0.25\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.json"]


def test_commands_can_be_pasted(tmp_path, monkeypatch):
    """Quoted, and with a path to the script that holds from the current folder; ours or another."""
    for folder in (tmp_path, Path(utils.__file__).parent):
        monkeypatch.chdir(folder)
        printed = shlex.split(utils.format_command("train.py", "--name", "my run"))
        assert printed[-2:] == ["--name", "my run"]
        assert Path(printed[1]).samefile(Path(utils.__file__).with_name("train.py"))
        assert subprocess.run([printed[0], "-c", "import torch"], check=False).returncode == 0


def test_commands_are_for_the_shell_of_the_system(monkeypatch):
    monkeypatch.setattr(utils.os, "name", "nt")
    monkeypatch.setattr(utils, "Path", PurePosixPath)  # a WindowsPath can't be made here
    monkeypatch.setattr(utils.sys, "executable", r"C:\My Tools\python.exe")
    assert utils.format_command("train.py", "--name", r"runs\a").startswith(
        r'& "C:\My Tools\python.exe" '
    )
    assert utils.format_command("train.py", "--name", r"runs\a").endswith(r" --name runs\a")


def test_device_that_is_not_there():
    assert utils.pick_device("auto").type in ("cuda", "mps", "cpu")
    for name in ("tpu", "cuda:99" if not torch.cuda.is_available() else "nonsense"):
        with pytest.raises(UserError, match=f"--device {name} is not usable here"):
            utils.pick_device(name)


@pytest.mark.parametrize(
    ("feature", "expected"),
    [("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2", "float32")],
)
def test_precision_of_a_cpu(monkeypatch, feature, expected):
    """bfloat16 where the CPU computes in it; elsewhere it would be emulated, and slow."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True}, raising=False)
    assert utils.pick_precision("auto", cpu) == ("bfloat16" if "bf16" in feature else "float32")
    assert utils.pick_precision("float32", cpu) == "float32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert utils.pick_precision("auto", cpu) == "float32"
