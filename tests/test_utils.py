"""Devices, commands, files and figures."""

import json
import shlex
import subprocess
from pathlib import Path, PurePosixPath

import pytest
import torch

import utils
from evaluation import plots
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


def test_slices_are_shown_superior_up_in_one_window(monkeypatch, tmp_path):
    """Column 127 (superior) is the picture's top; original and reconstruction share the original's window."""
    shown, real = [], plots.plt.Axes.imshow
    monkeypatch.setattr(
        plots.plt.Axes,
        "imshow",
        lambda axis, image, **k: shown.append((image, k)) or real(axis, image, **k),
    )
    original = torch.linspace(0, 1, 128).expand(1, 1, 256, 128).clone()
    plots.plot_reconstructions(tmp_path / "a.png", original, original * 2, ["title"], "heading")
    (first, one), (_, two), (error, three) = shown
    assert (
        first.shape == (128, 256)
        and first[0].mean() == pytest.approx(1.0)
        and first[-1].mean() == pytest.approx(0.0)
    )
    assert (one["vmin"], one["vmax"]) == (two["vmin"], two["vmax"])
    assert one["vmax"] == pytest.approx(0.995, abs=0.01)
    assert error.min() >= 0 and three["vmin"] == -three["vmax"]
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(("size", "spacing"), [
    ((256, 128), None), ((256, 128), (1.7, 1.5)), ((40, 400), (0.5, 0.5)), ((272, 384), (0.6, 0.6)),
    ((300, 30), (0.5, 5.0)), ((64, 64), (1.0, 0.0)),
])  # fmt: skip
def test_pictures_have_the_bodys_proportions(monkeypatch, tmp_path, size, spacing):
    """Of thick slices, too; and panels fill their figure, whether slices are wide or tall."""
    figures, real = [], plots.save_figure
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: figures.append(figure) or real(figure, path)
    )
    images = torch.rand(3, 1, *size)
    plots.plot_reconstructions(
        tmp_path / "a.png", images, images + 0.1, ["a", "b", "c"], "heading", spacing
    )
    plots.plot_slices(tmp_path / "b.png", images, ["a", "b", "c"], "heading", spacing=spacing)
    codes, colours = torch.zeros(size[0] // 4, size[1] // 4, dtype=torch.long), torch.rand(2, 3)
    plots.plot_code_map(tmp_path / "c.png", images[0], images[0], codes, colours, "title", spacing)
    mm = spacing if spacing and min(spacing) else (1, 1)
    expected = size[1] * mm[1] / (size[0] * mm[0])
    panels = [axis.get_position() for axis in figures[0].axes[:9]]
    width, height = figures[0].get_size_inches()
    for figure, count in zip(figures[1:], (3, 3), strict=True):
        assert len(figure.axes) == count
    for figure in figures:
        for axis in figure.axes[: 9 if figure is figures[0] else 3]:
            panel, (wide, high) = axis.get_position(), figure.get_size_inches()
            assert panel.height * high / (panel.width * wide) == pytest.approx(
                expected, rel=0.08
            )  # codes are 4 x 4
    for panel in panels:
        assert panel.height * height / (panel.width * width) == pytest.approx(expected, rel=0.02)
    assert sum(panel.width * panel.height for panel in panels) > 0.5


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


def test_long_names_stay_within_their_panels():
    assert plots.fit_title("short\nssim 0.9", 2, 8) == "short\nssim 0.9"
    name = "sub-0123456789_ses-20240101_acq-sagittal_run-01_T2w_slice_117"
    found = plots.fit_title(f"{name}\nssim 0.9", 2, 8)
    assert (
        len(found.splitlines()[0]) <= 30
        and found.startswith("sub-01")
        and "slice_117\nssim 0.9" in found
    )
    assert plots.fit_title("$a$", 2, 8) == r"\$a\$"
