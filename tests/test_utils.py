"""utils.py: errors of scripts, devices, commands, versions and files."""

import json
import shlex
import subprocess
from pathlib import Path, PurePosixPath

import filelock
import pytest
import torch

import utils
from utils import CheckpointError, DataError, UserError

# ---------------------------------------------------------------- scripts


def run_script(action) -> int:
    """Return the exit code of a script with this main function."""
    with pytest.raises(SystemExit) as error:
        utils.run_script(action)
    return error.value.code


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (143, 143)])
def test_a_script_exits_with_the_code_of_its_main_function(result, code):
    assert run_script(lambda: result) == code


@pytest.mark.parametrize("kind", [UserError, DataError, CheckpointError, OSError])
def test_a_mistake_is_one_message_and_exit_code_2(capsys, kind):
    def main():
        raise kind("the disk is full")

    assert run_script(main) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: the disk is full\n"
    assert captured.out == ""


def test_ctrl_c_is_exit_code_130():
    def main():
        raise KeyboardInterrupt

    assert run_script(main) == 130


def test_a_defect_keeps_its_traceback():
    def main():
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        utils.run_script(main)


@pytest.mark.parametrize(
    ("message", "line"), [("one\ntwo", "one"), ("\n one\ntwo", "one"), ("", "ValueError")]
)
def test_the_first_line_of_an_error_is_never_empty(message, line):
    assert utils.first_line(ValueError(message)) == line


# ---------------------------------------------------------------- devices


def test_a_device_that_is_not_available_is_an_error():
    assert utils.pick_device("auto").type in ("cuda", "mps", "cpu")
    for name in ("tpu", "cuda:99" if not torch.cuda.is_available() else "nonsense"):
        with pytest.raises(UserError, match=f"--device {name} is not usable here"):
            utils.pick_device(name)


def test_each_of_several_processes_has_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert utils.pick_device("auto", rank=1, world_size=2) == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    assert utils.pick_device("cpu", rank=1, world_size=2) == torch.device("cpu")
    with pytest.raises(UserError, match="3 processes share 2 GPUs; expected one GPU per process"):
        utils.pick_device("cuda", rank=0, world_size=3)
    with pytest.raises(UserError, match="--device is cuda:1 for 2 processes; expected cuda"):
        utils.pick_device("cuda:1", rank=0, world_size=2)


def test_a_gpu_that_does_not_exist_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--device is cuda:7; expected cuda:0 to cuda:1"):
        utils.pick_device("cuda:7")


def test_several_processes_do_not_use_mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert utils.pick_device("auto") == torch.device("mps")
    assert utils.pick_device("auto", rank=0, world_size=2) == torch.device("cpu")
    with pytest.raises(UserError, match="--device is mps for 2 processes; expected cuda"):
        utils.pick_device("mps", rank=0, world_size=2)


@pytest.mark.parametrize("current", [0, 1])
def test_the_precision_is_that_of_the_chosen_gpu(monkeypatch, current):
    """Only the second of two GPUs computes in bfloat16, whichever of them is the current one."""
    gpus = [current]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpus[-1])
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda gpu: gpus.append(torch.device(gpu).index if not isinstance(gpu, int) else gpu),
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: gpus[-1] == 1)
    assert utils.pick_precision("auto", torch.device("cuda:1")) == "bfloat16"
    assert utils.pick_precision("auto", torch.device("cuda:0")) == "float32"
    assert gpus[-1] == current


def tf32_settings() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def test_full_float32_is_a_block_or_a_decorator_and_restores_the_settings():
    before = tf32_settings()
    with utils.full_float32():
        assert tf32_settings() == (False, False)
    assert utils.full_float32()(tf32_settings)() == (False, False)
    assert tf32_settings() == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="older versions of torch")
def test_full_float32_accepts_settings_through_the_newer_api():
    """After `fp32_precision` has been set, torch refuses to return `allow_tf32`."""
    convolutions, recurrent = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    legacy, before = tf32_settings(), convolutions.fp32_precision
    try:
        convolutions.fp32_precision = "ieee"
        with utils.full_float32():
            assert (convolutions.fp32_precision, recurrent.fp32_precision) == ("ieee", "ieee")
        assert convolutions.fp32_precision == "ieee"
    finally:
        convolutions.fp32_precision = before
    assert tf32_settings() == legacy  # and the older API works again


@pytest.mark.parametrize(
    ("feature", "expected"),
    [("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2", "float32")],
)
def test_a_cpu_computes_in_bfloat16_if_it_has_the_instructions(monkeypatch, feature, expected):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True}, raising=False)
    assert utils.pick_precision("auto", cpu) == expected
    assert utils.pick_precision("float32", cpu) == "float32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # older versions of torch
    assert utils.pick_precision("auto", cpu) == "float32"


# ---------------------------------------------------------------- commands


def test_printed_commands_can_be_pasted(tmp_path, monkeypatch):
    """Arguments are quoted, and the path of the script is valid in the working directory."""
    for folder in (tmp_path, Path(utils.__file__).parent):
        monkeypatch.chdir(folder)
        words = shlex.split(utils.format_command("train.py", "--name", "my run"))
        assert words[-2:] == ["--name", "my run"]
        assert Path(words[1]).samefile(Path(utils.__file__).with_name("train.py"))
        assert subprocess.run([words[0], "-c", ""], check=False).returncode == 0


def test_commands_on_windows_are_for_powershell(monkeypatch):
    monkeypatch.setattr(utils.os, "name", "nt")
    monkeypatch.setattr(utils, "Path", PurePosixPath)  # a WindowsPath cannot be made elsewhere
    monkeypatch.setattr(utils.sys, "executable", r"C:\My Tools\python.exe")
    command = utils.format_command("train.py", "--name", r"runs\a")
    assert command.startswith(r'& "C:\My Tools\python.exe" ')
    assert command.endswith(r" --name runs\a")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["file", "file/out", "link"])
def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    with pytest.raises(UserError, match="is a file or a broken link; choose another folder"):
        utils.make_folder(tmp_path / name)
    utils.make_folder(tmp_path / "a/b")
    utils.make_folder(tmp_path / "a/b")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "last.pt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)) as raised:
        utils.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    if isinstance(error, OSError):
        assert "(No space left on device); the previous file is unchanged" in str(raised.value)


def test_files_of_killed_writers_are_removed_after_a_day(tmp_path):
    old, new = tmp_path / ".a.json.1.tmp", tmp_path / ".a.json.2.tmp"
    for path in (old, new):
        path.touch()
    utils.os.utime(old, (0, 0))
    utils.write_json(tmp_path / "a.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "a.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", r"cannot read .*config\.json"),
        ("[" * 100_000, r"cannot read .*config\.json"),
        ("[1]", "contains a list; expected the JSON object that"),
    ],
)
def test_json_that_cannot_be_used_is_an_error(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        utils.read_json(path)


def test_json_and_csv_are_written_and_read(tmp_path):
    content = {"a": [1, 2.5]}
    utils.write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text()) == content
    assert utils.read_json(tmp_path / "a.json") == content
    utils.write_csv(tmp_path / "a.csv", [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}])
    assert (tmp_path / "a.csv").read_text() == "epoch,loss\n1,0.5\n2,0.25\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json"]


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    path = tmp_path / ".lock"
    with utils.lock(path), pytest.raises(filelock.Timeout), utils.lock(path):
        pass
    with utils.lock(path):
        pass


def test_a_file_system_without_locks_is_tolerated(tmp_path, monkeypatch):
    def acquire(*arguments, **options):
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    entered = False
    with utils.lock(tmp_path / ".lock"):
        entered = True
    assert entered
