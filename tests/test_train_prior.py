"""The prior over codes: order, cache, drawing; its training, by train_prior.py; and coding under it."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import train
import train_prior
from modules import VQVAE
from prior.codes import MIRRORS, CodeDataset, encode_split
from prior.model import CodePrior
from training import run
from training.checkpoint import read_checkpoint
from utils import CheckpointError, UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

ROOT = Path(__file__).parents[1]
COLUMNS = ["epoch", "step", "train_loss", "train_outline_2", "train_codes", "val_loss", "val_bits",
           "val_outline_bits", "lr", "seconds"]  # fmt: skip


def untrained(num_grids: int) -> CodePrior:
    """A prior of 8 x 16 codes out of 20, with outlines out of 6."""
    torch.manual_seed(0)
    shape = {
        "channels": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_outlines": 6,
        "num_grids": num_grids,
    }
    prior = CodePrior(20, 5, 8, 16, **shape).eval()
    prior.initialize(
        torch.randn(20, 5), torch.randn(20), torch.randint(20, (9, 8, 16)), torch.linspace(0, 1, 9)
    )
    return prior


@pytest.fixture(params=[1, 2, 3])
def prior(request) -> CodePrior:
    """With no, one and two outlines; its logits differ widely."""
    prior = untrained(request.param)
    for grid in prior.grids:
        torch.nn.init.normal_(grid.last[1].weight, std=0.5)
    return prior


@pytest.fixture
def inputs() -> tuple:
    """CodeDataset of three slices, where they lie (one unknown), and how they are mirrored."""
    codes = torch.randint(20, (3, 8, 16), generator=torch.Generator().manual_seed(1))
    return codes, torch.tensor([0.1, 0.9, math.nan]), torch.tensor([0, 1, 3])


def order(prior: CodePrior) -> list[tuple[int, int, int]]:
    """Grid, row and column of each code, in which order they come: reading order, grid after grid."""
    return [
        (n, i, j)
        for n, grid in enumerate(prior.grids)
        for i in range(grid.height)
        for j in range(grid.width)
    ]


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("num_grids", [1, 2, 3])
def test_bits_are_of_all_grids_over_the_codes(run, num_grids):
    """val_bits: what a coder would need for outlines and codes, over the number of codes."""
    vqvae = train_prior.load_model(VQVAE, run / "best.pt")
    codes = encode_split(vqvae, train_prior.load_run_data(run, "validate")[0], MIRRORS)
    args = (
        train_prior.DEFAULTS
        | train_prior.FIXED
        | {"device": "cpu", "num_grids": num_grids, "channels": 16}
    )
    prior = train_prior.Run(run / "prior", args, "", vqvae, codes)
    pyramid = prior.model.eval().to_grids(codes.codes[:, 0].long())
    logits = prior.model(pyramid, codes.positions, torch.zeros(3, dtype=torch.long))
    nats = [float(cross_entropy(found.flatten(0, 2), true.flatten(), reduction="sum"))
            for found, true in zip(logits, pyramid, strict=True)]  # fmt: skip
    measured = prior.validate(codes)
    assert measured["val_bits"] == pytest.approx(sum(nats) / math.log(2) / (3 * 2048), rel=1e-4)
    assert measured["val_outline_bits"] == pytest.approx(
        sum(nats[:-1]) / math.log(2) / (3 * 2048), rel=1e-4
    )


@pytest.fixture
def run(tmp_path, small, write_slices, own_signals, monkeypatch) -> Path:
    """A VQ-VAE trained for one epoch, on 6 training and 3 validation slices; the folder of its run."""
    monkeypatch.chdir(tmp_path)
    data = write_slices(tmp_path / "data", train=6, validate=3)
    assert train.main(["--data", str(data), *small, "--epochs", "1", "--name", "a"]) == 0
    return tmp_path / "runs" / "a"


FLAGS = "--device cpu --precision float32 --batch-size 4 --learning-rate 5e-3 --channels 16 --num-layers 1 --num-heads 2 "


def start(run, flags):
    return train_prior.main(["--run", str(run), *(FLAGS + flags).split()])


def rows(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def equal_weights(one: Path, other: Path) -> bool:
    one, other = (read_checkpoint(path)["model"] for path in (one, other))
    return all(torch.equal(one[name], other[name]) for name in one)


def test_training_leaves_what_it_promises(run, capsys):
    assert start(run, "--epochs 3 --plot-every 2 --mirrored 0.75") == 0
    folder = run / "prior"
    history = rows(folder)
    assert [int(row["step"]) for row in history] == [2, 4, 6]
    assert list(history[0]) == COLUMNS
    assert float(history[-1]["val_bits"]) < float(history[0]["val_bits"])
    for row in ({name: float(value) for name, value in row.items()} for row in history):
        assert row["train_loss"] == pytest.approx(sum(row[name] for name in COLUMNS[3:5]), rel=1e-5)
        assert 0 < row["val_outline_bits"] < row["val_bits"] < row["val_loss"] / math.log(2)
    best = read_checkpoint(folder / "best.pt")
    assert best["best"] == min(float(row["val_bits"]) for row in history)
    panels = sorted(path.name for path in folder.glob("plots/*/*.png"))
    assert panels == [f"epoch_{n}_samples.png" for n in (1, 2, 3)]
    assert (folder / "bits_plot.png").stat().st_size > 5000
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["mirrored"] == 0.75 and config["slices"] == {
        "train": 6,
        "validate": 3,
    }

    bits = json.loads((folder / "metrics.json").read_text())["validation"]
    assert set(bits) == {"prior", "fixed_length", "empirical_entropy", "gzip"}
    assert bits["fixed_length"] == {"bits_per_code": 4.0, "bits_per_pixel": 0.25}
    assert bits["prior"]["bits_per_code"] == pytest.approx(best["best"], rel=1e-5)
    assert bits["prior"]["bits_per_pixel"] == pytest.approx(best["best"] / 16, rel=1e-5)
    printed = capsys.readouterr().out
    for line in ("bits per code", "empirical entropy", "gzip", "generate.py --run"):
        assert line in printed


def test_codes_are_of_mirrored_slices_too(run):
    """Each view of the encoded split is the code grid of the flipped slice, and places follow names."""
    vqvae = train_prior.load_model(VQVAE, run / "best.pt")
    slices, _ = train_prior.load_run_data(run, "train")
    codes = encode_split(vqvae, slices, MIRRORS)
    images = slices.batch(torch.arange(6))
    with torch.no_grad():
        for view, axes in enumerate(((), (2,), (3,), (2, 3))):
            assert torch.equal(codes.codes[:, view].long(), vqvae.encode(images.flip(axes)))
    torch.testing.assert_close(codes.positions, torch.linspace(0, 1, 6))
    one = codes.codes[0, 0].flatten().mode().values.long()
    pixels = torch.nn.functional.avg_pool2d(images, 4)[:, 0][codes.codes[:, 0] == one]
    assert codes.brightness[one] == pytest.approx(float(torch.asinh(pixels).mean()), abs=1e-4)


def test_an_empty_share_of_a_batch_is_no_mistake(run):
    """As a process has it of a last, small batch."""
    vqvae = train_prior.load_model(VQVAE, run / "best.pt")
    codes = encode_split(vqvae, train_prior.load_run_data(run, "validate")[0], MIRRORS)
    args = train_prior.DEFAULTS | train_prior.FIXED | {"device": "cpu", "channels": 16}
    prior = train_prior.Run(run / "prior", args, "", vqvae, codes)
    losses, finite = run.train_step(prior, (codes.codes[:0].long(), codes.positions[:0]), 1)
    assert finite and (losses == 0).all()


def test_views_are_drawn_as_asked(run, monkeypatch):
    """The share of mirrored slices, and that the prior is told which view it sees, and at times no place."""
    seen = []

    def watch(self, pyramid, position, view):
        seen.append((pyramid[-1], position, view))
        return [torch.zeros(*one.shape, size) for one, size in zip(pyramid, (32, 16), strict=True)]

    monkeypatch.setattr(CodePrior, "forward", watch)
    vqvae = train_prior.load_model(VQVAE, run / "best.pt")
    codes = (
        torch.arange(4, dtype=torch.int32).view(1, 4, 1, 1).expand(2000, 4, 64, 32)
    )  # a code tells its view
    data = CodeDataset(
        torch.randint(16, (2000, 4, 64, 32), dtype=torch.int32),
        torch.zeros(2000),
        torch.randn(16),
        [],
    )
    for share in (0.0, 0.6):
        args = train_prior.DEFAULTS | train_prior.FIXED | {"mirrored": share, "device": "cpu"}
        torch.manual_seed(0)
        prior = train_prior.Run(run / "prior", args, "", vqvae, data)
        prior.eager_losses((codes.long(), torch.zeros(2000)))
        codes_seen, position, view = seen.pop()
        assert torch.equal(codes_seen[:, 0, 0], view)
        shares = torch.bincount(view, minlength=4) / 2000
        torch.testing.assert_close(
            shares, torch.tensor([1 - share, *[share / 3] * 3]), atol=0.04, rtol=0
        )
        assert position.isnan().float().mean() == pytest.approx(0.1, abs=0.03)


def test_stopped_within_an_epoch_it_goes_on_at_the_step(tmp_path, run, monkeypatch, capsys):
    """In this process, to choose the step: after 1 of 2 steps of epoch 2; the end is the same, bit for bit."""
    assert start(run, "--epochs 3") == 0
    (run / "prior").rename(tmp_path / "whole")
    real, calls = run.train_step, []

    def step_then_signal(*arguments):
        calls.append(1)
        result = real(*arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(loop, "seconds_a_step", lambda *arguments: 1.0)
    monkeypatch.setattr(loop, "train_step", step_then_signal)
    capsys.readouterr()
    assert start(run, "--epochs 3") == 128 + signal.SIGTERM
    assert read_checkpoint(run / "prior" / "last.pt")["steps_done"] == 1
    monkeypatch.setattr(loop, "train_step", real)
    told = capsys.readouterr().out.splitlines()[-1]
    assert f"train_prior.py --resume --run {run}" in told
    assert train_prior.main(["--run", "runs/a", "--resume"]) == 0
    assert equal_weights(run / "prior" / "last.pt", tmp_path / "whole" / "last.pt")
    assert equal_weights(run / "prior" / "best.pt", tmp_path / "whole" / "best.pt")


def test_killed_between_epochs_its_command_goes_on(tmp_path, run):
    """kill -9 of a real process; --resume ends as without it."""
    flags = FLAGS + "--epochs 12 --plot-every 100"
    assert train_prior.main(["--run", str(run), *flags.split()]) == 0
    (run / "prior").rename(tmp_path / "whole")
    command = [sys.executable, str(ROOT / "train_prior.py"), "--run", str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*command, *flags.split()], env=environment, stdout=log, stderr=log
        )
        while not (run / "prior" / "metrics.csv").exists() or len(rows(run / "prior")) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
        process.kill()
        process.wait()
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert equal_weights(run / "prior" / "last.pt", tmp_path / "whole" / "last.pt")


def test_two_processes_train_as_one_does(tmp_path, run):
    """Where nothing is drawn at random: equal measures. 5 slices by 4: of the last, one has none; 3 validation."""
    (tmp_path / "data" / "keras_slices_train" / "case_004_week_0_slice_5.nii.gz").unlink()
    flags = FLAGS + "--epochs 2 --dropout 0 --mirrored 0 --plot-every 9"
    script = tmp_path / "exact.py"  # places are hidden at random, in each process its own
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport train_prior, utils\n"
                      "train_prior.UNKNOWN = 0\nutils.run_script(train_prior.main)\n")  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    found = []
    for count in ("1", "2"):
        done = subprocess.run(
            [*launcher, count, "--", str(script), "--run", str(run), *flags.split()], capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(rows(run / "prior"))
        (run / "prior").rename(tmp_path / count)
    for row, other in zip(*found, strict=True):
        for name in row.keys() - {"seconds"}:
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4), name


def test_a_dry_run_writes_nothing(run, capsys):
    assert start(run, "--dry-run") == 0
    assert "dry run" in capsys.readouterr().out and not (run / "prior").exists()


def test_a_report_that_a_kill_prevented_is_made_up_for(run):
    """All epochs are done, metrics.json is missing; and without --run, the prior that was begun last is meant."""
    start(run, "--epochs 1")
    report = json.loads((run / "prior" / "metrics.json").read_text())
    (run / "prior" / "metrics.json").unlink()
    assert train_prior.main(["--resume"]) == 0
    assert json.loads((run / "prior" / "metrics.json").read_text()) == report
    with pytest.raises(UserError, match="has finished 1 epochs"):
        train_prior.main(["--resume"])
    with pytest.raises(UserError, match="no prior to go on with in nowhere"):
        train_prior.main(["--resume", "--runs-dir", "nowhere"])


# ---------------------------------------------------------------- mistakes


def test_a_prior_is_never_overwritten_nor_made_another(run, monkeypatch):
    start(run, "--epochs 1")
    with pytest.raises(
        UserError, match="prior exists; add --resume to go on with it, or move it away"
    ):
        start(run, "--epochs 1")
    with pytest.raises(UserError, match="has finished 1 epochs"):
        train_prior.main(["--run", str(run), "--resume"])
    with pytest.raises(UserError, match=r"can't go on with --dropout 0.5 \(it has 0.0\)"):
        train_prior.main(["--run", str(run), "--resume", "--epochs", "2", "--dropout", "0.5"])
    checkpoint = read_checkpoint(run / "best.pt")
    checkpoint["model"]["vector_quantization.embedding.weight"] *= -1
    torch.save(checkpoint, run / "best.pt")
    with pytest.raises(
        UserError,
        match=r"prior is of other codes than those of .*best\.pt, which has changed since",
    ):
        train_prior.main(["--run", str(run), "--resume", "--epochs", "2"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 0", "--epochs is 0; expected 1 to"),
        ("--channels 30", "channels is 30; expected a multiple of num_heads 4"),
        ("--dropout 1", "--dropout is 1.0; expected 0 to 0.99"),
        ("--mirrored 2", "--mirrored is 2.0; expected 0 to 1"),
        ("--learning-rate nan", "--learning-rate is nan"),
        ("--batch-size 0", "--batch-size is 0"),
        ("--seed -1", "--seed is -1"),
        ("--data /nowhere", "cannot open the data that --data names"),
    ],
)
def test_values_that_could_only_fail_later(run, flags, message):
    with pytest.raises(Exception, match=message):
        train_prior.main(["--run", str(run), *flags.split()])
    assert not (run / "prior").exists()


def test_runs_that_have_no_prior_to_train(tmp_path, run, small):
    with pytest.raises(UserError, match=r"no run with a best\.pt in"):
        train_prior.main(["--runs-dir", str(tmp_path / "none")])
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        train_prior.main(["--run", str(tmp_path / "none")])
    two = [
        "--data",
        str(tmp_path / "data"),
        *small,
        "--epochs",
        "1",
        "--name",
        "two",
        "--num-codebooks",
        "2",
    ]
    assert train.main(two) == 0
    with pytest.raises(UserError, match="has 2 codebooks; a prior is for one"):
        train_prior.main(["--runs-dir", str(tmp_path / "runs")])  # the newest run
