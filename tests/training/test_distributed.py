"""Several processes, by torchrun on this CPU: equal to one, with a share each; what happens when one dies."""

import copy
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import utils
from modules import VectorQuantizer
from training import distributed
from training.checkpoint import read_checkpoint
from training.config import check_arguments, with_defaults

ROOT = Path(__file__).parents[1]


@pytest.fixture
def launch(tmp_path, small, write_slices):
    """launch(2, "--epochs 2 --name a") starts train.py in as many processes, on 9 training and 3 validation slices."""
    data = write_slices(tmp_path / "data", train=9, validate=3)

    def launch(count: int, flags: str):
        several = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            if count > 1
            else []
        )
        command = [
            sys.executable,
            *several,
            ROOT / "train.py",
            "--data",
            data,
            *small,
            *flags.split(),
        ]
        log = open(tmp_path / "log", "w")  # noqa: SIM115  a pipe that nobody reads would fill up
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*map(str, command)], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )

    return launch


def rows(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def finish(process, tmp_path) -> str:
    code, output = process.wait(), (tmp_path / "log").read_text()
    assert code == 0, output
    return output


@pytest.mark.parametrize("more", ["", " --gan --gan-start 0.3"])
def test_two_processes_train_as_one_does(tmp_path, launch, more):
    """Where nothing is drawn at random: equal weights and measures, up to rounding. 9 slices by 4: of the last batch,
    the second process has no slice; of the 3 validation slices, none is counted twice."""
    flags = (
        "--recipe document --codebook ema --epochs 3 --crop 0 --precision float32 --learning-rate 1e-3"
        + more
    )
    for count in (1, 2):
        output = finish(launch(count, f"{flags} --name {count}"), tmp_path)
    assert output.count("9 training and 3 validation slices") == 1  # the first process alone prints
    assert "2 processes, cpu" in output
    one, two = (tmp_path / "runs" / str(count) for count in (1, 2))
    for row, other in zip(rows(one), rows(two), strict=True):
        for name in row.keys() - {"seconds"}:
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4), name
    checkpoints = [read_checkpoint(run / "last.pt") for run in (one, two)]
    for part in ["model"] + ["discriminator"] * bool(more):
        weights, others = (checkpoint[part] for checkpoint in checkpoints)
        for name in weights:
            torch.testing.assert_close(weights[name], others[name], rtol=1e-3, atol=1e-4)


def test_a_process_that_dies_ends_the_run_which_another_number_goes_on_with(tmp_path, launch):
    """The tuned recipe: restarts and moving averages are checked to be equal at each epoch's end."""
    process = launch(2, "--epochs 400 --name a --plot-every 1000 --restart-below 0.5")
    folder = tmp_path / "runs" / "a"
    while not (folder / "last.pt").exists() or len(rows(folder)) < 3:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    os.kill(second_process(process.pid), signal.SIGKILL)
    assert process.wait() != 0
    output = (tmp_path / "log").read_text()
    assert "another process of this run ended" in output and "--resume" in output, output
    done = read_checkpoint(folder / "last.pt")["epochs_done"]
    assert done >= 2 and not list(folder.glob(".*.tmp"))
    output = finish(launch(1, f"--resume --name a --epochs {done + 2}"), tmp_path)
    assert [int(row["epoch"]) for row in rows(folder)] == list(range(1, done + 3))


def second_process(launcher: int) -> int:
    """The process of rank 1 among torchrun's children."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and b"RANK=1" in environment:
            return int(folder.name)
    pytest.skip("no /proc to find the process in")


def test_a_signal_to_the_launcher_saves_at_the_step(tmp_path, launch):
    """As a cluster does it: all processes stop after the same step, whichever heard of it first."""
    process = launch(2, "--epochs 400 --name a --plot-every 1000")
    folder = tmp_path / "runs" / "a"
    while not (folder / "last.pt").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    process.terminate()
    process.wait()
    output = (tmp_path / "log").read_text()
    assert "stopped in epoch" in output and "--resume" in output, output
    checkpoint = read_checkpoint(folder / "last.pt")
    assert checkpoint["sums"][2] == min(
        4 * checkpoint["steps_done"], 9
    )  # of both processes' slices
    finish(launch(2, f"--resume --name a --epochs {checkpoint['epochs_done'] + 2}"), tmp_path)


def test_a_mistake_ends_all_processes(tmp_path, launch):
    """Only the first one looks at the data: the others are told by its end, and say no more than that."""
    process = launch(2, f"--name a --data {tmp_path / 'nowhere'}")
    assert process.wait() != 0
    output = (tmp_path / "log").read_text()
    assert "error: cannot open the data that --data names" in output
    assert (
        'train.py", line' not in output
    )  # torchrun's own traceback is its way to say which process failed


def test_what_several_processes_refuse():
    args = with_defaults("tuned", {"batch_size": 16})
    check_arguments(args, 4)
    with pytest.raises(
        utils.UserError, match="--batch-size is 16; expected a multiple of the 3 processes"
    ):
        check_arguments(args, 3)
    with pytest.raises(utils.UserError, match="--compile is for one process, and here are 2"):
        check_arguments(args | {"compile": True}, 2)


def one_of_two(rank: int, folder: str) -> None:
    """What each of two processes does in the test below."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.manual_seed(
        rank
    )  # each has its own start, its own vectors, and would restart its own codes
    plain, restarting = (
        VectorQuantizer(8, 4, "ema"),
        VectorQuantizer(8, 4, "ema", restart_below=0.9),
    )
    start = plain.state_dict()
    distributed.broadcast_tensors(start)
    distributed.broadcast_tensors(restarting.state_dict())
    start = copy.deepcopy(start)
    z = torch.randn(2, 4, 3, 3)
    plain(z)
    for _ in range(5):
        restarting(torch.randn(2, 4, 3, 3))
    distributed.check_replicas(
        plain.state_dict() | {f"r {k}": v for k, v in restarting.state_dict().items()}
    )
    torch.save((start, plain.state_dict(), restarting.state_dict(), z), f"{folder}/{rank}")
    plain.ema_count[rank] += 1
    with pytest.raises(RuntimeError, match="processes hold different ema_count"):
        distributed.check_replicas(plain.state_dict())
    distributed.cleanup()


def test_codebooks_stay_equal_and_follow_all_vectors(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    (start, plain, restarting, z), (_, other_plain, other_restarting, other_z) = (
        torch.load(tmp_path / str(rank)) for rank in (0, 1)
    )
    assert all(torch.equal(plain[name], other_plain[name]) for name in plain)
    assert all(torch.equal(restarting[name], other_restarting[name]) for name in restarting)
    alone = VectorQuantizer(8, 4, "ema")  # one process with all vectors
    alone.load_state_dict(start)
    alone(torch.cat([z, other_z]))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(plain[name], value)
