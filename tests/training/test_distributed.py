"""Several processes on a CPU: they train as one, stop together and fail together."""

import copy
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from models import train_codebook
from training_runs import read_rows, read_weights

from modules import VectorQuantizer
from training import distributed
from training.checkpoint import read_checkpoint
from utils import UserError

DETERMINISTIC = [
    *("--recipe", "document", "--codebook", "ema", "--epochs", "3", "--crop", "0"),
    *("--precision", "float32", "--learning-rate", "1e-3"),
]


@pytest.fixture
def data(tmp_path, write_slices) -> Path:
    """9 training and 3 validation slices."""
    return write_slices(tmp_path / "data", train=9, validate=3)


@pytest.fixture
def launch(tmp_path, small, data):
    """launch("--name", "a"): start train.py in two processes."""

    def launch(*flags: str):
        flags = ["--data", data, *small, "--plot-every", "1000", *flags]
        return processes.start_ranks(tmp_path, "train.py", *flags)

    return launch


def read_logs(folder: Path) -> str:
    return (folder / "log_0").read_text() + (folder / "log_1").read_text()


@pytest.mark.parametrize("gan", [[], ["--gan", "--gan-start", "0.3"]], ids=["plain", "gan"])
def test_two_processes_train_as_one(tmp_path, train_here, data, launch, gan):
    """Without random draws, up to rounding.

    The last batch has one of the 9 slices, and the second process none. None of the 3 validation
    slices is counted twice.
    """
    flags = [*DETERMINISTIC, *gan]
    train_here(f"--data {data} --name 1 {' '.join(flags)}")
    codes = list(map(processes.wait, launch(*flags, "--name", "2")))
    output = read_logs(tmp_path)
    assert codes == [0, 0], output
    assert output.count("9 training and 3 validation slices") == 1  # only rank 0 prints
    assert "2 processes, cpu" in output
    one, two = tmp_path / "runs/1", tmp_path / "runs/2"
    for row, other in zip(read_rows(one), read_rows(two), strict=True):
        for name in row.keys() - {"seconds"}:
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4), name
    for module in ("model", "discriminator") if gan else ("model",):
        others = read_weights(two, module)
        for name, tensor in read_weights(one, module).items():
            torch.testing.assert_close(tensor, others[name], rtol=1e-3, atol=1e-4)


def test_a_run_whose_process_dies_can_be_resumed_by_another_number_of_processes(
    tmp_path, train_here, launch
):
    """The tuned recipe: EMA statistics and restarts are checked after each epoch."""
    first, second = launch("--epochs", "400", "--name", "a", "--restart-below", "0.5")
    folder = tmp_path / "runs/a"
    processes.wait_until(
        lambda: len(read_rows(folder)) >= 3 and (folder / "last.pt").exists(),
        first,
        tmp_path / "log_0",
    )
    second.kill()
    assert processes.wait(first) != 0
    output = read_logs(tmp_path)
    assert "another process of this run has ended" in output, output
    assert "--resume" in output
    epochs = read_checkpoint(folder / "last.pt")["epochs_done"]
    assert epochs >= 2
    assert not list(folder.glob(".*.tmp"))
    data = tmp_path / "data"
    assert train_here(f"--data {data} --resume --name a --epochs {epochs + 2}") == 0
    assert [int(row["epoch"]) for row in read_rows(folder)] == list(range(1, epochs + 3))


def test_a_signal_to_torchrun_stops_all_processes_after_the_same_step(tmp_path, small, data):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--", str(processes.ROOT / "train.py")]
    command += ["--data", str(data), *small, "--plot-every", "1000", "--epochs", "400"]
    with open(tmp_path / "log", "w") as log:
        torchrun = subprocess.Popen(
            [*command, "--name", "a"], cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT
        )
    folder = tmp_path / "runs/a"
    while not (folder / "last.pt").exists():
        assert torchrun.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    torchrun.terminate()
    torchrun.wait()
    output = (tmp_path / "log").read_text()
    assert "stopped in epoch" in output, output
    assert "--resume" in output
    checkpoint = read_checkpoint(folder / "last.pt")
    slices = min(4 * checkpoint["steps_done"], 9)
    assert checkpoint["sums"][2] == slices  # of both processes


def test_two_processes_resume(tmp_path, train_here, data, launch):
    assert train_here(f"--data {data} --name a --epochs 1") == 0
    codes = list(map(processes.wait, launch("--resume", "--name", "a", "--epochs", "2")))
    assert codes == [0, 0], read_logs(tmp_path)
    assert [int(row["epoch"]) for row in read_rows(tmp_path / "runs/a")] == [1, 2]


def test_a_mistake_ends_all_processes(tmp_path, launch):
    """Only rank 0 looks at the data; the other ends with it and prints no traceback."""
    first, second = launch("--name", "a", "--data", str(tmp_path / "nowhere"))
    assert processes.wait(first) != 0
    assert processes.wait(second) != 0
    output = read_logs(tmp_path)
    assert "error: cannot open the data that --data names" in output
    assert "Traceback" not in output


# ---------------------------------------------------------------- functions


def run_one_of_two(rank: int, folder: str) -> None:
    """Exchange tensors, train codebooks, and save the results, as one of two processes."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    assert (distributed.get_rank(), distributed.get_world_size()) == (rank, 2)
    assert distributed.all_reduce_sum(torch.tensor([1.0 + rank])) == 3
    assert distributed.broadcast_object(Path(f"run_{rank}")) == Path("run_0")
    modules = [torch.nn.Linear(2, 1) for _ in range(2)]
    modules[0].weight.grad = torch.tensor([[2.0 * rank, 5.0]])
    modules[1].bias.grad = torch.tensor([-4.0 * rank])
    distributed.average_gradients(modules)
    assert modules[0].weight.grad.tolist() == [[1.0, 5.0]]
    assert modules[1].bias.grad.tolist() == [-2.0]
    with distributed.rank_zero_first():
        path = Path(folder, "made_by_rank_0")
        assert path.exists() == (rank == 1)
        path.touch()

    torch.manual_seed(rank)  # each would start and restart from its own codes
    plain = VectorQuantizer(8, 4, "ema")
    restarting = VectorQuantizer(8, 4, "ema", restart_below=0.9)
    distributed.broadcast_tensors(plain.state_dict())
    distributed.broadcast_tensors(restarting.state_dict())
    start = copy.deepcopy(plain.state_dict())
    z = torch.randn(2, 4, 3, 3)
    train_codebook(plain, z)
    for _ in range(5):
        train_codebook(restarting, torch.randn(2, 4, 3, 3))
    distributed.check_replicas(plain.state_dict())
    distributed.check_replicas(restarting.state_dict())
    torch.save((start, plain.state_dict(), restarting.state_dict(), z), f"{folder}/{rank}")
    plain.ema_count[rank] += 1
    with pytest.raises(RuntimeError, match="processes hold different ema_count"):
        distributed.check_replicas(plain.state_dict())
    torch.distributed.destroy_process_group()


def test_processes_exchange_tensors_and_codebooks_stay_equal(tmp_path):
    torch.multiprocessing.spawn(run_one_of_two, (str(tmp_path),), nprocs=2)
    start, plain, restarting, z = torch.load(tmp_path / "0")
    _, other_plain, other_restarting, other_z = torch.load(tmp_path / "1")
    for name in plain:
        assert torch.equal(plain[name], other_plain[name])
        assert torch.equal(restarting[name], other_restarting[name])
    alone = VectorQuantizer(8, 4, "ema")  # one process with the vectors of both
    alone.load_state_dict(start)
    train_codebook(alone, torch.cat([z, other_z]))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(plain[name], value)


def test_a_single_process_needs_no_session():
    module = torch.nn.Linear(1, 1)
    with distributed.session(), distributed.rank_zero_first():
        assert (distributed.get_rank(), distributed.get_world_size()) == (0, 1)
        assert distributed.all_reduce_sum(torch.tensor(3)) == 3
        assert distributed.broadcast_object("x") == "x"
        distributed.check_replicas(module.state_dict())


@pytest.mark.parametrize(
    ("has_gpu", "has_nccl", "backend"),
    [(True, True, "cpu:gloo,cuda:nccl"), (True, False, "gloo"), (False, False, "gloo")],
)
def test_gpu_tensors_are_exchanged_through_nccl_if_it_exists(
    monkeypatch, has_gpu, has_nccl, backend
):
    """torch for Windows has no NCCL; gloo can exchange tensors of GPUs, too."""
    backends = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(torch.distributed, "init_process_group", backends.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with distributed.session():
        assert backends == [backend]


def test_several_machines_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with (
        pytest.raises(UserError, match="several machines; expected one: omit --nnodes"),
        distributed.session(),
    ):
        pass


def test_errors_of_one_process_are_not_blamed_on_others():
    """The word gloo alone does not make an error that of a lost process."""
    with pytest.raises(RuntimeError, match="gloo"), distributed.session():
        raise RuntimeError("gloo")
