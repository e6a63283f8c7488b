"""How fast this project trains, evaluates and decodes, beside the usual script and other libraries, in one run.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py              # short: about ten minutes on two CPU cores
    python benchmarks/speed.py --long       # more steps, batches up to 1,024: for a GPU

Every method trains a model of the document's size on the same z-scored slices, 16 a step. Each is measured in a
process of its own, in several rounds, one after the other; a figure is the median of the rounds. Writes <out>.json and
<out>.md (benchmarks/results/speed_cpu, or _ and the GPU's name), after each part what there is so far.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import math
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dataset
import train
import utils
from evaluation import metrics
from modules import VQVAE, Decoder, Encoder
from mri import cache, hipmri, phantom
from training import run
from training.config import with_defaults

IMPORTED = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (32, 32, 2, 64)  # the document's encoder and decoder: channels, inside a layer, layers, D
BATCH = 16

# ---------------------------------------------------------------- other ways to train the document's model


class UsualQuantizer(nn.Module):
    """As most scripts have it: a one-hot matrix (N, K), multiplied by the embeddings."""

    def __init__(
        self, num_embeddings: int = 512, embedding_dim: int = 64, commitment_cost: float = 0.25
    ):
        super().__init__()
        self.commitment_cost = commitment_cost
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_embeddings, 1 / num_embeddings)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = z.permute(0, 2, 3, 1).contiguous()
        flat = z.view(-1, z.shape[-1])
        weight = self.embedding.weight
        distances = (flat**2).sum(1, keepdim=True) + (weight**2).sum(1) - 2 * flat @ weight.t()
        indices = distances.argmin(1).unsqueeze(1)
        one_hot = torch.zeros(len(indices), len(weight), device=z.device)
        one_hot.scatter_(1, indices, 1)
        quantized = (one_hot @ weight).view(z.shape)
        loss = F.mse_loss(quantized, z.detach()) + self.commitment_cost * F.mse_loss(
            quantized.detach(), z
        )
        quantized = z + (quantized - z).detach()
        average = one_hot.mean(0)
        perplexity = torch.exp(-torch.sum(average * torch.log(average + 1e-10)))
        return quantized.permute(0, 3, 1, 2).contiguous(), loss, perplexity


class Autoencoder(nn.Module):
    """The document's encoder and decoder around another quantiser; (B, 1, H, W) -> reconstruction, loss, perplexity."""

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        self.encoder, self.quantizer, self.decoder = Encoder(*WIDTHS), quantizer, Decoder(*WIDTHS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, loss, perplexity = self.quantizer(self.encoder(x))
        return self.decoder(quantized), loss, perplexity


class LibraryQuantizer(nn.Module):
    """vector-quantize-pytorch's, with its defaults but for the sizes and a commitment cost of 0.25."""

    def __init__(self):
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.quantize = VectorQuantize(
            dim=64, codebook_size=512, commitment_weight=0.25, accept_image_fmap=True
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = self.quantize(z)
        return quantized, loss.sum(), indices.float().mean()


class Monai(nn.Module):
    """MONAI's VQVAE at the nearest equal number of multiply-adds: 0.81 GMAC a slice."""

    def __init__(self):
        super().__init__()
        from monai.networks.nets import VQVAE as MonaiVQVAE

        self.net = MonaiVQVAE(
            spatial_dims=2, in_channels=1, out_channels=1, channels=(32, 64), num_res_layers=1, num_res_channels=32,
            downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)), upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
            num_embeddings=512, embedding_dim=64,
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reconstruction, loss = self.net(x)
        return reconstruction, loss, self.net.quantizer.perplexity


def usual_epochs(
    build: Callable[[], nn.Module], slices: dataset.SliceDataset, device: torch.device
) -> Iterator[None]:
    """The usual loop: decoded slices in memory, a DataLoader, eager float32, and `.item()` at each step."""
    images = slices.batch(torch.arange(len(slices)))
    data = torch.utils.data.TensorDataset(images)
    loader = torch.utils.data.DataLoader(
        data, BATCH, shuffle=True, pin_memory=device.type == "cuda"
    )
    model = build().to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    while True:
        total = perplexities = 0.0
        for (x,) in tqdm(loader, disable=True):
            x = x.to(device)
            optimizer.zero_grad()
            reconstruction, quantisation, perplexity = model(x)
            loss = F.mse_loss(reconstruction, x) + quantisation
            loss.backward()
            optimizer.step()
            total += loss.item()
            perplexities += perplexity.item()
        yield


def own_epochs(
    slices: dataset.SliceDataset, device: torch.device, recipe: str = "document", batch: int = BATCH,
    place: bool = True, memory: bool = True, channels_last: bool = True, **flags,
) -> Iterator[None]:  # fmt: skip
    """train.py's own epochs, without validation; what makes them fast can be left out."""
    if memory:
        utils.keep_freed_memory()
    args = with_defaults(recipe, {"device": str(device), "batch_size": batch, **flags})
    run = train.Run(Path(), args, "")
    if not channels_last:
        run.model.to(memory_format=torch.contiguous_format)
    if place and device.type != "cpu":
        slices.place(device)
    train.start_codebook(run, slices)
    while True:
        run.train_epoch(run, slices, tqdm(disable=True), [])
        run.begin_epoch()
        run.epochs_done += 1
        yield


USUAL = {
    "the usual script": lambda: Autoencoder(UsualQuantizer()),
    "the same with vector-quantize-pytorch": lambda: Autoencoder(LibraryQuantizer()),
    "the same with MONAI's VQVAE": Monai,
}
OWN = {
    "this project": {},
    "- in float32": {"precision": "float32"},
    "- not channels-last": {"channels_last": False},
    "- compiled": {"compile": True},
    "- not compiled": {"compile": False},
    "- slices not on the GPU": {"place": False},
    "- freed memory handed back": {"memory": False},
    "this project, tuned": {"recipe": "tuned"},
}
OF_GPUS = {"- slices not on the GPU", "- not compiled"}  # what makes sense there alone
OF_CPUS = {"- freed memory handed back", "- compiled"}


# ---------------------------------------------------------------- measurements, each in a process of its own


def load(data: Path) -> dataset.SliceDataset:
    """The training split."""
    return dataset.load_split(hipmri.find_hipmri(data), "train", progress=False)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """GB: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure_training(
    device: torch.device, data: Path, method: str, epochs: int, batch: int = BATCH
) -> dict:
    """SliceDataset a second of a method's epochs, after a first one that compiles and fills caches."""
    slices = load(data)
    if method in USUAL:
        training = usual_epochs(USUAL[method], slices, device)
    else:
        training = own_epochs(slices, device, **{"batch": batch} | OWN[method])
    start = time.perf_counter()
    next(training)
    wait(device)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(epochs):
        next(training)
    wait(device)
    seconds = time.perf_counter() - start
    return {
        "slices_per_second": epochs * len(slices) / seconds,
        "first_epoch": first,
        "memory": peak_memory(device),
    }


def measure_evaluation(device: torch.device, data: Path, names: list[str]) -> dict:
    """SliceDataset a second of a split's evaluation: of the document's model, uncompiled, in float32."""
    utils.keep_freed_memory()
    slices, model = load(data), VQVAE().to(device)
    metrics.evaluate(model, slices, BATCH, device, names)
    start = time.perf_counter()
    metrics.evaluate(model, slices, BATCH, device, names)
    return {
        "slices_per_second": len(slices) / (time.perf_counter() - start),
        "memory": peak_memory(device),
    }


def measure_first_batch(device: torch.device, data: Path) -> dict:
    """Seconds from the imports' end to a first batch on the device, out of a warm cache."""
    slices = load(data)
    order = run.epoch_order(slices, 0, 1)
    if device.type != "cpu":
        slices.place(device)
    next(slices.batches([order[:BATCH]], device)).sum().item()
    return {
        "seconds": time.perf_counter() - IMPORTED,
        "slices": len(slices),
        "memory": peak_memory(device),
    }


def measure_cache(device: torch.device, data: Path, rounds: int) -> dict:
    """Seconds to decode a split into a new cache, over those of bare gzip inflation by as many processes."""
    source = hipmri.find_hipmri(data)
    files = source.splits["train"]
    for file in files:
        file.read_bytes()  # the disk is not what is measured
    inflating, building = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        with ProcessPoolExecutor(cache.cores()) as pool:
            sum(pool.map(inflate, files, chunksize=64))
        inflating.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            dataset.load_split(source, "train", cache_dir=cache, progress=False)
            building.append(time.perf_counter() - start)
    inflate_seconds, seconds = statistics.median(inflating), statistics.median(building)
    return {"seconds": seconds, "inflate": inflate_seconds, "over_inflate": seconds / inflate_seconds,
            "memory": peak_memory(torch.device("cpu"))}  # fmt: skip


def inflate(file: Path) -> int:
    return len(gzip.decompress(file.read_bytes()))


def measure_bound(device: torch.device, data: Path, precision: str) -> dict:
    """What the device could do at best: a step's operations at its matrix rate, its bytes at its copy bandwidth.

    Bytes: of what each eager operation reads and writes, none fused; operations: multiply-adds count two.
    """
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 2048
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    rate = 2 * size**3 / seconds_of(lambda: a @ b, device)
    if (
        not on_gpu
    ):  # a matrix product there may come from another library than convolutions do, and be slower
        x, w = torch.randn(8, 256, 64, 64, dtype=kind), torch.randn(256, 256, 3, 3, dtype=kind)
        rate = max(
            rate, 2 * 9 * 256**2 * 8 * 64**2 / seconds_of(lambda: F.conv2d(x, w, padding=1), device)
        )
    block, copy = (
        torch.randn((1 << 30 if on_gpu else 1 << 27) // 4, device=device) for _ in range(2)
    )
    bandwidth = 2 * block.nbytes / seconds_of(lambda: copy.copy_(block), device)

    args = with_defaults(
        "document", {"device": str(device), "precision": precision, "compile": False}
    )
    run = train.Run(Path(), args, "")
    images = load(data).batch(torch.arange(BATCH)).to(device)
    run.train_step(run, images)
    with FlopCounterMode(display=False) as counter:
        run.train_step(run, images)
    with Traffic() as traffic:
        run.train_step(run, images)
    bound = max(counter.get_total_flops() / rate, traffic.bytes / bandwidth)
    return {"matrix_rate": rate, "bandwidth": bandwidth, "flops": counter.get_total_flops(), "bytes": traffic.bytes,
            "slices_per_second": BATCH / bound}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts the bytes that the operations under it read and write; views and allocations are free."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        view = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        if not view and "empty" not in func.__name__:
            read = args[1:] if func.__name__.startswith(("copy_", "fill_")) else args
            self.bytes += sum(
                x.nbytes for x in tree_leaves((read, kwargs, out)) if isinstance(x, Tensor)
            )
        return out


def seconds_of(call: Callable, device: torch.device, rounds: int = 10) -> float:
    """Median of `rounds` calls, after two that warm up."""
    times = []
    for _ in range(rounds + 2):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def measure_processes(device: torch.device, data: Path, count: int, epochs: int) -> dict:
    """SliceDataset a second of train.py's last epoch, its validation included, by `count` processes."""
    several = ["-m", "torch.distributed.run", "--nproc-per-node", count] if count > 1 else []
    threads = max(1, torch.get_num_threads() // count)
    with tempfile.TemporaryDirectory() as runs:
        flags = [
            "--data",
            data,
            "--recipe",
            "document",
            "--epochs",
            epochs,
            "--runs-dir",
            runs,
            "--name",
            "a",
        ]
        command = [
            sys.executable,
            *several,
            ROOT / "train.py",
            *flags,
            "--device",
            device.type,
            "--plot-every",
            10**6,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(
            [str(part) for part in command], check=True, capture_output=True, env=environment
        )
        last = (Path(runs) / "a" / "metrics.csv").read_text().splitlines()[-1]
    return {"slices_per_second": len(load(data)) / float(last.split(",")[-1])}


MEASUREMENTS = {
    "training": measure_training, "evaluation": measure_evaluation, "first batch": measure_first_batch,
    "cache": measure_cache, "bound": measure_bound, "processes": measure_processes,
}  # fmt: skip


def measure(args: argparse.Namespace, what: str, data: Path, **options) -> dict:
    """One of MEASUREMENTS in a new process, or why it gave nothing."""
    task = json.dumps([what, args.device, str(data), options])
    done = subprocess.run(
        [sys.executable, __file__, "--measure", task], capture_output=True, text=True
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or [
            f"exit status {done.returncode}"
        ]
        result = {"failed": lines[-1][:200]}
    else:
        result = json.loads(done.stdout.splitlines()[-1])
    print(what, options, result, flush=True)
    return result


def medians(results: list[dict]) -> dict:
    """Of each figure over those that did not fail; of the first epoch the longest, as later rounds find it compiled."""
    good = [result for result in results if "failed" not in result]
    if not good:
        return results[0]
    middle = {key: statistics.median(result[key] for result in good) for key in good[0]}
    return middle | {"first_epoch": max(result["first_epoch"] for result in good)}


# ---------------------------------------------------------------- the run of them all


def repeated(data: Path, folder: Path, count: int) -> Path:
    """A set of `count` training slices: the files of `data`, linked under as many names."""
    files = sorted((data / "keras_slices_train").glob("*.nii.gz"))
    out = folder / str(count) / "keras_slices_train"
    out.mkdir(parents=True)
    for i in range(count):
        os.link(files[i % len(files)], out / f"case_{4 + i % 32:03d}_week_{i // 32}_slice_0.nii.gz")
    return out.parent


def run_all(
    args: argparse.Namespace, on_gpu: bool, folder: Path, write: Callable[[dict], None]
) -> None:
    """All measurements, `write` after each part."""
    phantom.write_phantom(folder / "phantom")
    epochs, rounds = 25 if args.long else 1, 3  # epochs of 8 steps
    sizes = (16, 64, 256, 1024) if args.long else (16, 64)
    sets = {size: repeated(folder / "phantom", folder, 8 * size) for size in sizes}
    for data in sets.values():
        load(data)  # into the cache
    data = sets[BATCH]
    left_out = OF_CPUS if on_gpu else OF_GPUS
    single: dict[str, list[dict]] = {name: [] for name in (*USUAL, *OWN) if name not in left_out}
    for _ in range(rounds):  # in turn, so that a slow moment of the machine is everyone's
        for name, results in single.items():
            results.append(measure(args, "training", data, method=name, epochs=epochs))
    result = {"training": {name: medians(results) for name, results in single.items()}}
    result["bound"] = {
        kind: measure(args, "bound", data, precision=kind) for kind in ("float32", "bfloat16")
    }
    write(result)

    others = result["others"] = {}
    for what, names in (
        ("in training", ["ssim", "psnr"]),
        ("by predict.py", list(metrics.SCORE_NAMES)),
    ):
        others[f"evaluation {what} ({', '.join(names)})"] = measure(
            args, "evaluation", folder / "phantom", names=names
        )
    for size, several in sets.items():
        options = {
            "method": "this project",
            "epochs": max(1, epochs * BATCH // size),
            "batch": size,
        }
        others[f"training, batch {size}"] = measure(args, "training", several, **options)
    write(result)
    for count in (1000, 12660):
        many = repeated(data, folder, count)
        others[f"{count:,} files into a new cache"] = measure(
            args, "cache", many, rounds=3 if count == 1000 else 1
        )
        load(many)
        others[f"{count:,} slices in the cache: first batch on the device"] = measure(
            args, "first batch", many
        )
    write(result)
    for count in (1, 2):
        if not on_gpu or count <= torch.cuda.device_count():
            others[f"train.py by {count} process(es)"] = measure(
                args, "processes", folder / "phantom", count=count, epochs=2
            )
    write(result)


def table(result: dict, device: torch.device) -> str:
    """Markdown of what there is."""

    def line(*cells) -> str:
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    def cell(row: dict, key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    training, bound = result["training"], result["bound"]
    usual = training["the usual script"].get("slices_per_second", math.nan)
    heads = (
        "training, batch 16",
        "slices a second",
        "over the usual script",
        "share of the bound",
        "GB",
        "first epoch",
    )
    lines = [line(*heads), "|" + "---|" * 6]
    for name, row in training.items():
        if "failed" in row:
            lines.append(line(f"{name}: failed, {row['failed']}", *[""] * 5))
            continue
        speed = row["slices_per_second"]
        best = bound[precision_of(name, device)].get("slices_per_second")
        share = f"{speed / best:.0%}" if best and "tuned" not in name else ""
        cells = (
            f"{speed:.1f}",
            f"{speed / usual:.2f}",
            share,
            f"{row['memory']:.2f}",
            f"{row['first_epoch']:.1f} s",
        )
        lines.append(line(name, *cells))
    for kind, row in bound.items():
        if "failed" not in row:
            work = (
                f"{row['flops'] / 1e9:.0f} GFLOP a step at {row['matrix_rate'] / 1e12:.2f} TFLOP/s"
            )
            moved = f"{row['bytes'] / 1e9:.2f} GB, unfused, at {row['bandwidth'] / 1e9:.0f} GB/s"
            lines += [
                "",
                f"Bound in {kind}: {work}, or {moved}: {row['slices_per_second']:.0f} slices a second.",
            ]
    lines += [
        "",
        line("other", "slices a second", "seconds", "over gzip inflation", "GB"),
        "|" + "---|" * 5,
    ]
    for name, row in result.get("others", {}).items():
        name += f": failed, {row['failed']}" if "failed" in row else ""
        forms = {
            "slices_per_second": ".1f",
            "seconds": ".2f",
            "over_inflate": ".2f",
            "memory": ".2f",
        }
        lines.append(line(name, *(cell(row, key, form) for key, form in forms.items())))
    return "\n".join(lines) + "\n"


def precision_of(name: str, device: torch.device) -> str:
    """In which precision a row of the table computes."""
    return "float32" if name in USUAL or "float32" in name else utils.pick_precision("auto", device)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--device", default="auto", help="auto, cuda or cpu (auto)")
    flag("--long", action="store_true", help="more steps, and batches up to 1,024")
    flag(
        "--out", type=Path, help="result files, without ending (benchmarks/results/speed_<device>)"
    )
    flag("--measure", help=argparse.SUPPRESS)  # what `measure` starts this file with
    args = parser.parse_args()
    if args.measure:
        what, name, data, options = json.loads(args.measure)
        print(json.dumps(MEASUREMENTS[what](torch.device(name), Path(data), **options)))
        return 0

    device = utils.pick_device(args.device)
    args.device = str(device)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    out = (
        args.out
        or ROOT / "benchmarks" / "results" / f"speed_{re.sub('[^a-z0-9]+', '_', kind.lower())}"
    )
    libraries = ("monai", "vector-quantize-pytorch")
    versions = utils.versions() | {name: importlib.metadata.version(name) for name in libraries}
    command = shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]])
    head = {"command": command, "device": utils.describe_device(device), "versions": versions}
    start = time.perf_counter()

    def write(result: dict) -> None:
        whole = head | {"minutes": round((time.perf_counter() - start) / 60, 1)} | result
        out.parent.mkdir(parents=True, exist_ok=True)
        utils.write_json(Path(f"{out}.json"), whole)
        Path(f"{out}.md").write_text(table(whole, device), encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "HIPMRI_CACHE": f"{folder}/cache",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled",
        }  # empty
        run_all(args, device.type == "cuda", Path(folder), write)
    print(Path(f"{out}.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    utils.run_script(main)
