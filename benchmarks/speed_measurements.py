"""Make one measurement for speed.py, in its own process.

    python benchmarks/speed_measurements.py '["first batch", "cpu", "sample_data", {}]'

The argument is a JSON list: a key of MEASUREMENTS, the device, the folder of the data, and the
keyword arguments of the measurement. The last printed line is the result, as JSON.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from other_implementations import OTHER_IMPLEMENTATIONS, typical_epochs
from trainer import Trainer

import dataset
import train
import utils
from dataset import SliceDataset
from evaluation import metrics
from modules import VQVAE
from mri import hipmri
from mri.cache import cores
from training.config import resolve_config
from training.run import epoch_order

IMPORTED = time.perf_counter()
convolution_backward = torch.ops.aten.convolution_backward
ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE = 16

# The rows of speed.py's table that are trained by `own_epochs`, and the options for each row.
OWN_OPTIONS = {
    "this project": {},
    "- in float32": {"precision": "float32"},
    "- not channels-last": {"channels_last": False},
    "- compiled": {"compile": True},
    "- not compiled": {"compile": False},
    "- slices not on the GPU": {"slices_on_device": False},
    "- freed memory returned to the system": {"keep_memory": False},
    "this project, tuned": {"recipe": "tuned"},
}

# ---------------------------------------------------------------- training


def own_epochs(
    slices: SliceDataset,
    device: torch.device,
    recipe: str = "document",
    batch_size: int = BATCH_SIZE,
    slices_on_device: bool = True,
    keep_memory: bool = True,
    channels_last: bool = True,
    **flags,
) -> Iterator[None]:
    """Train as train.py does, without validation, and yield after each epoch.

    Args:
        slices: the training split.
        device: the device to train on.
        recipe, batch_size: as in train.py; flags: any other flags of train.py.
        slices_on_device: whether to copy the slices into a GPU's memory, as train.py does.
        keep_memory: whether to call `utils.keep_freed_memory`, as train.py does.
        channels_last: whether to use the channels-last memory layout, as train.py does.
    """
    if keep_memory:
        utils.keep_freed_memory()
    flags |= {"recipe": recipe, "device": str(device), "batch_size": batch_size}
    config = resolve_config(flags)
    trainer = Trainer(config, device, channels_last)
    if slices_on_device and device.type != "cpu":
        slices.cache_on_device(device)
    with utils.full_float32():  # as in train.py
        train.init_codebook(trainer.model, slices, config, device)
        while True:
            trainer.train_epoch(slices)
            skipped = counters["inductor"]["cudagraph_skips"]
            if trainer.is_compiled and device.type == "cuda" and skipped:
                raise RuntimeError(f"{skipped} CUDA graphs were skipped")
            yield


def measure_training(
    device: torch.device, data: Path, method: str, epochs: int, batch_size: int = BATCH_SIZE
) -> dict:
    """Measure slices per second over several epochs, after a first epoch that includes set-up.

    Args:
        device: the device to train on.
        data: folder of the data.
        method: a key of OTHER_IMPLEMENTATIONS or OWN_OPTIONS.
        epochs: number of epochs that are measured.
        batch_size: slices per step.
    """
    slices = load(data)
    if method in OTHER_IMPLEMENTATIONS:
        training = typical_epochs(OTHER_IMPLEMENTATIONS[method], slices, device, batch_size)
    else:
        training = own_epochs(slices, device, batch_size=batch_size, **OWN_OPTIONS[method])
    start = time.perf_counter()
    next(training)
    synchronize(device)
    first_epoch = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(epochs):
        next(training)
    synchronize(device)
    seconds = time.perf_counter() - start
    return {
        "slices_per_second": epochs * len(slices) / seconds,
        "first_epoch": first_epoch,
        "memory": peak_memory(device),
    }


def measure_processes(device: torch.device, data: Path, count: int, epochs: int) -> dict:
    """Measure slices per second in the last epoch of train.py, with `count` processes.

    The time includes validation. If `count` exceeds 1, torchrun starts the processes.
    """
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", count] if count > 1 else []
    threads = max(1, torch.get_num_threads() // count)
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, *torchrun, ROOT / "train.py"]
        command += ["--data", data, "--recipe", "document", "--epochs", epochs]
        command += ["--runs-dir", runs, "--name", "a"]
        command += ["--device", device.type, "--plot-every", 10**6]
        subprocess.run(
            [str(part) for part in command],
            check=True,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        last_row = (Path(runs) / "a" / "metrics.csv").read_text().splitlines()[-1]
    seconds = float(last_row.split(",")[-1])
    return {"slices_per_second": len(load(data)) / seconds}


# ---------------------------------------------------------------- evaluation and data


def measure_evaluation(device: torch.device, data: Path, names: list[str]) -> dict:
    """Measure slices per second of an evaluation of the document's model, eager and in float32."""
    utils.keep_freed_memory()
    slices = load(data)
    model = utils.to_device(VQVAE(), device)
    metrics.evaluate(model, slices, BATCH_SIZE, device, tuple(names))
    start = time.perf_counter()
    metrics.evaluate(model, slices, BATCH_SIZE, device, tuple(names))
    seconds = time.perf_counter() - start
    return {"slices_per_second": len(slices) / seconds, "memory": peak_memory(device)}


def measure_first_batch(device: torch.device, data: Path) -> dict:
    """Measure the seconds from the end of the imports to the first batch on the device.

    The slices must be in the cache.
    """
    slices = load(data)
    order = epoch_order(len(slices), seed=0, epoch=1)
    if device.type != "cpu":
        slices.cache_on_device(device)
    next(slices.batches([order[:BATCH_SIZE]], device)).sum().item()
    seconds = time.perf_counter() - IMPORTED
    return {"seconds": seconds, "slices": len(slices), "memory": peak_memory(device)}


def measure_cache(device: torch.device, data: Path, rounds: int) -> dict:
    """Measure the time to decode a split into a new cache, relative to gzip inflation alone, too.

    Decoding and inflation use the same number of processes.
    """
    source = hipmri.find_hipmri(data)
    files = source.splits["train"]
    for file in files:
        file.read_bytes()  # fills the page cache, so that the disk is not measured
    inflation_times, cache_times = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        with ProcessPoolExecutor(cores()) as pool:
            sum(pool.map(inflated_size, files, chunksize=64))
        inflation_times.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            dataset.load_split(source, "train", cache_dir=folder, progress=False)
            cache_times.append(time.perf_counter() - start)
    inflation = statistics.median(inflation_times)
    seconds = statistics.median(cache_times)
    return {
        "seconds": seconds,
        "inflate": inflation,
        "over_inflate": seconds / inflation,
        "memory": peak_memory(torch.device("cpu")),
    }


def inflated_size(file: Path) -> int:
    """Return the decompressed size of a gzip file, in bytes."""
    return len(gzip.decompress(file.read_bytes()))


# ---------------------------------------------------------------- bound


def measure_bound(device: torch.device, data: Path, precision: str) -> dict:
    """Measure an upper bound on the slices per second of eager training on the device.

    The bound assumes that a step takes the longer of two times: its operations divided by the rate
    of matrix products, or its memory traffic divided by the copy bandwidth. A multiply-add counts
    as two operations. The traffic is the number of bytes that all eager operations read and write,
    without fusion.

    Args:
        device: the device.
        data: folder of the data.
        precision: "float32", "bfloat16", or "tf32", in which GPUs compute float32 by default.
    """
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    matrix_rate = measure_matrix_rate(device, precision)
    bandwidth = measure_bandwidth(device)
    flags = {"recipe": "document", "device": str(device)}
    flags["precision"] = precision.replace("tf32", "float32")
    trainer = Trainer(resolve_config(flags | {"compile": False}), device)
    images = load(data).batch(torch.arange(BATCH_SIZE)).to(device)
    trainer.step(images)  # Adam allocates its state
    with FlopCounterMode(display=False) as counter:
        trainer.step(images)
    with Traffic() as traffic:
        trainer.step(images)
    flops = counter.get_total_flops()
    seconds = max(flops / matrix_rate, traffic.bytes / bandwidth)
    return {
        "matrix_rate": matrix_rate,
        "bandwidth": bandwidth,
        "flops": flops,
        "bytes": traffic.bytes,
        "slices_per_second": BATCH_SIZE / seconds,
    }


def measure_matrix_rate(device: torch.device, precision: str) -> float:
    """Measure the operations per second of a large matrix product.

    On a CPU, a convolution is also measured, and the larger value is returned.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    rate = 2 * size**3 / seconds_of(lambda: a @ b, device)
    if device.type == "cuda":
        return rate
    # On CPUs, convolutions may be computed by another, faster library.
    x = torch.randn(8, 256, 64, 64, dtype=dtype)
    weight = torch.randn(256, 256, 3, 3, dtype=dtype)
    operations = 2 * 9 * 256**2 * 8 * 64**2
    return max(rate, operations / seconds_of(lambda: F.conv2d(x, weight, padding=1), device))


def measure_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second that a large copy reads and writes."""
    num_bytes = 1 << 30 if device.type == "cuda" else 1 << 27
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.randn(num_bytes // 4, device=device)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


class Traffic(TorchDispatchMode):
    """Count the bytes that operations read and write, except views and allocations."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = [argument.alias_info for argument in func._schema.arguments]
        is_view = any(alias and not alias.is_write for alias in aliases)
        if not is_view and "empty" not in func.__name__:
            # copy_ and fill_ do not read their first argument.
            inputs = args[1:] if func.__name__.startswith(("copy_", "fill_")) else args
            for leaf in tree_leaves((inputs, kwargs, out)):
                if isinstance(leaf, Tensor):
                    self.bytes += leaf.nbytes
        return out


def seconds_of(call: Callable, device: torch.device, rounds: int = 10) -> float:
    """Return the median duration of a call in seconds, after two warm-up calls."""
    durations = []
    for _ in range(rounds + 2):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[2:])


@utils.full_float32()
@torch.no_grad()
def measure_convolutions(device: torch.device, data: Path) -> list[dict]:
    """Measure the convolutions of the document's model, and their gradients, in float32.

    Returns:
        A row for each kind of convolution: the name of the first, their number, GFLOP per batch
        (of the forward pass and of each gradient), and the GFLOP/s of all three.
    """
    model = utils.to_device(VQVAE(), device)
    inputs: dict[nn.Module, Tensor] = {}
    with register_module_forward_pre_hook(lambda layer, args: inputs.update({layer: args[0]})):
        model(load(data).batch(torch.arange(BATCH_SIZE)).to(device))
    rows: dict[tuple, dict] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            continue
        x, weight = inputs[layer], layer.weight
        y = layer(x)
        positions = x if layer.transposed else y
        gflop = 2 * weight.numel() * positions[:, 0].numel() / 1e9
        row = rows.setdefault((x.shape, weight.shape), {"layer": name, "number": 0, "gflop": gflop})
        row["number"] += 1
        if row["number"] > 1:
            continue
        options = ([y.shape[1]], layer.stride, layer.padding, (1, 1), layer.transposed, (0, 0), 1)
        gradient = partial(convolution_backward, torch.randn_like(y), x, weight, *options)
        row["forward"] = gflop / seconds_of(partial(layer, x), device)
        row["input gradient"] = gflop / seconds_of(partial(gradient, (True, False, False)), device)
        row["weight gradient"] = gflop / seconds_of(partial(gradient, (False, True, False)), device)
    return list(rows.values())


# ---------------------------------------------------------------- helpers


def load(data: Path) -> SliceDataset:
    """Load the training split of a data set in one of HipMRI's layouts."""
    return dataset.load_split(hipmri.find_hipmri(data), "train", progress=False)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far in GB: of the device if it is CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 1e9


MEASUREMENTS = {
    "training": measure_training,
    "processes": measure_processes,
    "evaluation": measure_evaluation,
    "first batch": measure_first_batch,
    "cache": measure_cache,
    "bound": measure_bound,
    "convolutions": measure_convolutions,
}


def main() -> int:
    name, device, data, options = json.loads(sys.argv[1])
    result = MEASUREMENTS[name](torch.device(device), Path(data), **options)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    utils.run_script(main)
