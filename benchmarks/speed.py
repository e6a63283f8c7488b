"""Compare the speed of this repository with a typical script and with other libraries.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py              # ten to twenty minutes on two CPU cores
    python benchmarks/speed.py --long       # more steps, batch sizes up to 1,024; for a GPU

Every method trains on the same z-scored slices, 16 per step. Except for "tuned", every model has
the size of the document's model. Measurements run one after the other, each in its own process.
Training is measured in several rounds, and the result is the median. The result files are
<out>.json and <out>.md. They are updated after each group of measurements.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import speed_measurements
from other_implementations import OTHER_IMPLEMENTATIONS
from speed_measurements import BATCH_SIZE, OWN_OPTIONS, load

import utils
from evaluation.metrics import SCORE_NAMES
from mri import phantom
from training import environment
from utils import UserError

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("monai", "vector-quantize-pytorch")
# Methods that differ from "this project" only on a GPU, and those that differ only on a CPU.
GPU_METHODS = {"- slices not on the GPU", "- not compiled"}
CPU_METHODS = {"- freed memory returned to the system", "- compiled"}

# ---------------------------------------------------------------- measurements


def run_all(
    args: argparse.Namespace, on_gpu: bool, folder: Path, write: Callable[[dict], None]
) -> None:
    """Make all measurements.

    Args:
        args: the command's flags.
        on_gpu: whether the device is a GPU.
        folder: an empty folder for the data.
        write: called with the results so far after each group of measurements.
    """
    sample = folder / "phantom"
    phantom.write_phantom(sample)
    epochs = 25 if args.long else 1  # an epoch has 8 steps
    batch_sizes = (16, 64, 256, 1024) if args.long else (16, 64)
    data_sets = {size: link_training_set(sample, folder, 8 * size) for size in batch_sizes}
    for data in data_sets.values():
        load(data)  # writes the slices to the cache

    result = {"training": measure_methods(args, on_gpu, data_sets[BATCH_SIZE], epochs)}
    device = torch.device(args.device)
    precisions = dict.fromkeys(precision_of(name, device) for name in result["training"])
    result["bound"] = {
        precision: measure(args, "bound", data_sets[BATCH_SIZE], precision=precision)
        for precision in precisions
    }
    result["convolutions"] = measure(args, "convolutions", data_sets[BATCH_SIZE])
    write(result)

    others = result["others"] = {}
    for label, names in (("in training", ("ssim", "psnr")), ("by predict.py", SCORE_NAMES)):
        key = f"evaluation {label} ({', '.join(names)})"
        others[key] = measure(args, "evaluation", sample, names=list(names))
    for size, data in data_sets.items():
        options = {"method": "this project", "epochs": max(1, epochs * BATCH_SIZE // size)}
        key = f"training, batch {size}"
        others[key] = measure(args, "training", data, batch_size=size, **options)
    write(result)

    for count, rounds in ((1000, 3), (12660, 1)):
        data = link_training_set(sample, folder, count)
        key = f"{count:,} files into a new cache"
        others[key] = measure(args, "cache", data, rounds=rounds)
        load(data)
        key = f"{count:,} slices in the cache: first batch on the device"
        others[key] = measure(args, "first batch", data)
    write(result)

    for count in (1, 2):
        if not on_gpu or count <= torch.cuda.device_count():
            key = f"train.py by {count} process(es)"
            others[key] = measure(args, "processes", sample, count=count, epochs=2)
    write(result)


def measure_methods(
    args: argparse.Namespace, on_gpu: bool, data: Path, epochs: int, rounds: int = 3
) -> dict[str, dict]:
    """Measure the training speed of each method that applies to the device.

    The methods take turns, so that a temporary slowdown of the machine affects all of them.
    """
    left_out = CPU_METHODS if on_gpu else GPU_METHODS
    names = [name for name in (*OTHER_IMPLEMENTATIONS, *OWN_OPTIONS) if name not in left_out]
    results: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            results[name].append(measure(args, "training", data, method=name, epochs=epochs))
    return {name: medians(rows) for name, rows in results.items()}


def measure(args: argparse.Namespace, name: str, data: Path, **options) -> dict:
    """Make a measurement in a new process.

    Args:
        args: the command's flags, of which only `device` is used.
        name: a key of `speed_measurements.MEASUREMENTS`.
        data: folder of the data.
        options: keyword arguments of the measurement.

    Returns:
        The result, or {"failed": reason}.
    """
    task = json.dumps([name, args.device, str(data), options])
    command = [sys.executable, speed_measurements.__file__, task]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode == 0:
        result = json.loads(process.stdout.splitlines()[-1])
    else:
        errors = [line for line in process.stderr.splitlines() if "rror" in line]
        reason = errors[-1] if errors else f"exit status {process.returncode}"
        result = {"failed": reason[:200]}
    print(name, options, result, flush=True)
    return result


def medians(results: list[dict]) -> dict:
    """Return the median of each number over the rounds that did not fail.

    For `first_epoch`, return the maximum, because later rounds find compiled code in a cache.
    """
    successful = [result for result in results if "failed" not in result]
    if not successful:
        return results[0]
    values = {key: statistics.median(row[key] for row in successful) for key in successful[0]}
    values["first_epoch"] = max(row["first_epoch"] for row in successful)
    return values


def link_training_set(data: Path, folder: Path, count: int) -> Path:
    """Make a data set of `count` training slices in `folder` by hard-linking files of `data`."""
    files = sorted((data / "keras_slices_train").glob("*.nii.gz"))
    train = folder / str(count) / "keras_slices_train"
    train.mkdir(parents=True)
    for i in range(count):
        name = f"case_{4 + i % 32:03d}_week_{i // 32}_slice_0.nii.gz"
        os.link(files[i % len(files)], train / name)
    return train.parent


# ---------------------------------------------------------------- results


def format_row(*cells) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(result: dict, device: torch.device) -> str:
    """Return the results so far as Markdown."""
    lines = training_table(result["training"], result["bound"], device)
    for precision, row in result["bound"].items():
        if "failed" not in row:
            lines += ["", describe_bound(precision, row)]
    lines += ["", *convolutions_table(result["convolutions"])]
    lines.append("")
    lines += others_table(result.get("others", {}))
    return "\n".join(lines) + "\n"


def training_table(training: dict, bound: dict, device: torch.device) -> list[str]:
    """Return the lines of a Markdown table of the training methods."""
    heads = (
        "training, batch size 16",
        "slices per second",
        "relative to the typical script",
        "fraction of the bound",
        "GB",
        "first epoch",
    )
    lines = [format_row(*heads), "|" + "---|" * len(heads)]
    typical = training["typical script"].get("slices_per_second", math.nan)
    for name, row in training.items():
        if "failed" in row:
            lines.append(format_row(f"{name}: failed, {row['failed']}", *[""] * 5))
            continue
        speed = row["slices_per_second"]
        best = bound.get(precision_of(name, device), {}).get("slices_per_second")
        # The bound applies to the document's model only.
        fraction = f"{speed / best:.0%}" if best and "tuned" not in name else ""
        cells = [f"{speed:.1f}", f"{speed / typical:.2f}", fraction]
        cells += [f"{row['memory']:.2f}", f"{row['first_epoch']:.1f} s"]
        lines.append(format_row(name, *cells))
    return lines


def describe_bound(precision: str, row: dict) -> str:
    """Describe the speed bound in one precision, as text for the report."""
    return (
        f"Bound in {precision}: {row['slices_per_second']:.0f} slices per second. It is the slower "
        f"of {row['flops'] / 1e9:.0f} GFLOP per step at {row['matrix_rate'] / 1e12:.2f} TFLOP/s, "
        f"and {row['bytes'] / 1e9:.2f} GB per step (without fusion) at "
        f"{row['bandwidth'] / 1e9:.0f} GB/s."
    )


def convolutions_table(rows: list[dict] | dict) -> list[str]:
    """Return the lines of the table of convolutions; rows: {"failed": reason} after a failure."""
    passes = ("forward", "input gradient", "weight gradient")
    heads = ("convolutions in float32", "number", "GFLOP", *[f"{name}, GFLOP/s" for name in passes])
    lines = [format_row(*heads), "|" + "---|" * len(heads)]
    if "failed" in rows:
        return [*lines, format_row(f"failed, {rows['failed']}", *[""] * 5)]
    for row in rows:
        rates = [f"{row[name]:.0f}" for name in passes]
        lines.append(format_row(row["layer"], row["number"], f"{row['gflop']:.2f}", *rates))
    return lines


def others_table(others: dict) -> list[str]:
    """Return the lines of a Markdown table of the measurements other than training methods."""
    formats = {"slices_per_second": ".1f", "seconds": ".2f", "over_inflate": ".2f", "memory": ".2f"}
    heads = ("other", "slices per second", "seconds", "relative to gzip inflation", "GB")
    lines = [format_row(*heads), "|" + "---|" * len(heads)]
    for name, row in others.items():
        label = f"{name}: failed, {row['failed']}" if "failed" in row else name
        cells = []
        for key, form in formats.items():
            cells.append(format(row[key], form) if key in row else "")
        lines.append(format_row(label, *cells))
    return lines


def precision_of(name: str, device: torch.device) -> str:
    """Return the precision that a training method uses: "float32", "tf32" or "bfloat16".

    The other implementations use torch's default, which is TF32 for convolutions on GPUs.
    """
    if name in OTHER_IMPLEMENTATIONS:
        return "tf32" if device.type == "cuda" else "float32"
    return "float32" if "float32" in name else utils.pick_precision("auto", device)


# ---------------------------------------------------------------- the command


def instruction_sets() -> list[str]:
    """Return the vector and matrix instructions of the CPU, such as avx2, avx512_bf16, amx_bf16."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.5
        return [torch.backends.cpu.get_cpu_capability().lower()]
    capabilities = torch.cpu.get_capabilities()
    names = [name for name, present in capabilities.items() if present is True]
    return sorted(name for name in names if name.startswith(("avx", "amx", "sve", "neon")))


def library_versions() -> dict[str, str]:
    """Return the versions of the other libraries; raise UserError if one is not installed."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"{name} is not installed; run pip install -r benchmarks/requirements.txt"
            ) from None
    return versions


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--device", default="auto", help="auto, cuda or cpu (default: auto)")
    flag("--long", action="store_true", help="measure more steps, and also batch sizes up to 1,024")
    flag(
        "--out",
        type=Path,
        help="result files, without suffix (default: benchmarks/results/speed_<processor>)",
    )
    args = parser.parse_args(argv)

    device = utils.pick_device(args.device)
    args.device = str(device)
    is_gpu = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if is_gpu else environment.processor_name()
    out = args.out or RESULTS / f"speed_{re.sub('[^a-z0-9]+', '_', processor.lower()).strip('_')}"
    arguments = sys.argv[1:] if argv is None else argv
    head = {
        "command": shlex.join(["python", "benchmarks/speed.py", *arguments]),
        "device": environment.describe_device(device),
        "instruction_sets": instruction_sets(),
        "versions": environment.versions() | library_versions(),
    }
    start = time.perf_counter()

    def write(result: dict) -> None:
        minutes = round((time.perf_counter() - start) / 60, 1)
        out.parent.mkdir(parents=True, exist_ok=True)
        utils.write_json(Path(f"{out}.json"), head | {"minutes": minutes} | result)
        Path(f"{out}.md").write_text(table(result, device), encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        os.environ["HIPMRI_CACHE"] = f"{folder}/cache"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"
        run_all(args, is_gpu, Path(folder), write)
    print(Path(f"{out}.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    utils.run_script(main)
