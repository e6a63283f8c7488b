"""Train variants for the same number of epochs on the same data, and compare their test scores.

    python benchmarks/ablation.py --data DIR                             # all variants, one seed
    python benchmarks/ablation.py --data DIR --variants document tuned --seeds 0 1 2
    python benchmarks/ablation.py --data DIR --jobs 2                    # two runs at a time

variants.py defines the variants. For each variant and seed, train.py and predict.py make a run in
--runs-dir. Finished runs are not trained again, and interrupted runs are resumed. The result files
are <out>.json and <out>.md. <out>.md has the mean and half the range over seeds. Choose a variant
by its validation score. The test scores are for reporting only.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer import Trainer
from variants import VARIANTS, replace_in_modules

import predict
import train
import utils
from evaluation.metrics import SCORE_NAMES
from modules import VQVAE
from training.checkpoint import load_model
from training.config import RECIPE_GROUP, TrainConfig, parse_train_flags, resolve_config
from training.run_folder import load_training_data
from utils import UserError

RESULTS = Path(__file__).parent / "results"
RECIPE_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(TrainConfig)
    if field.metadata["group"] == RECIPE_GROUP
)

# ---------------------------------------------------------------- runs


def run_variant(args: argparse.Namespace, name: str, seed: int) -> dict:
    """Train and evaluate a variant with one seed, unless this is done; return the run's result."""
    variant = VARIANTS[name]
    flags = [*variant.flags.split(), "--epochs", str(args.epochs), "--seed", str(seed)]
    flags += ["--precision", args.precision]
    run = args.runs_dir / args.data.resolve().name / folder_name(name, args.epochs, seed)
    if finished_epochs(run, args.data, flags) < args.epochs:
        where = ["--data", args.data, "--runs-dir", run.parent, "--name", run.name]
        resume = ["--resume"] if (run / "config.json").exists() else []
        call_script(train.main, [*where, *flags, *resume], run, variant.replacements)
    if not (run / "test" / "metrics.json").exists():
        predict_flags = ["--run", run, "--data", args.data]
        call_script(predict.main, predict_flags, run, variant.replacements)
    return read_result(run, name, seed)


def folder_name(name: str, epochs: int, seed: int) -> str:
    """Return the folder name of a run: "tuned, SimVQ" -> "tuned__SimVQ_epochs_100_seed_0"."""
    text = f"{name} epochs {epochs} seed {seed}"
    return "".join(c if c.isalnum() else "_" for c in text)


def finished_epochs(run: Path, data: Path, flags: list[str]) -> int:
    """Return the number of epochs that a run has finished; 0 if the run does not exist.

    Args:
        run: folder of the run.
        data: folder of the data that the run must have been trained on.
        flags: flags of train.py that the run must have been trained with.

    Raises:
        UserError: if the run was trained on other data or with other flags.
    """
    if not (run / "metrics.csv").exists():
        return 0
    arguments = json.loads((run / "config.json").read_text("utf-8"))["arguments"]
    used = Path(arguments["data"])
    data = data.resolve()
    # train.py may have found the data set in a subfolder of `data`, or in its parent folder.
    if data != used and data not in used.parents and data.parent != used:
        raise UserError(f"{run} was trained on {used}; expected {data}. Choose another --runs-dir")
    expected = resolve_config(parse_train_flags(flags, None))
    changed = []
    for name in (*RECIPE_FIELDS, "seed", "precision"):
        if arguments.get(name) != getattr(expected, name):
            changed.append(f"{name} {arguments.get(name)} (expected {getattr(expected, name)})")
    if changed:
        raise UserError(f"{run} was trained with {', '.join(changed)}. Choose another --runs-dir")
    return len((run / "metrics.csv").read_text("utf-8").splitlines()) - 1


def call_script(
    main: Callable, flags: list, run: Path, replacements: Mapping[str, Callable]
) -> None:
    """Call the main function of a script, and append its output to <run>.log.

    If the script fails, this process exits at once, so that the pool does not start another run.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(run.parent / f"{run.name}.log", "a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        stack.enter_context(replace_in_modules(replacements))
        code = main([str(flag) for flag in flags])
    if code:
        os._exit(code)


def read_result(run: Path, name: str, seed: int) -> dict:
    """Return the entry of a finished run for the result file."""
    variant = VARIANTS[name]
    config = json.loads((run / "config.json").read_text("utf-8"))
    summary = json.loads((run / "test" / "metrics.json").read_text("utf-8"))
    with open(run / "metrics.csv", encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    with replace_in_modules(variant.replacements):
        model = load_model(VQVAE, run / "best.pt")
    scores = {}
    for score in SCORE_NAMES:
        scores[score] = {key: summary[score][key] for key in ("mean", "by_case")}
    return {
        "variant": name,
        "flags": variant.flags,
        "replaced": {key: value.__name__ for key, value in variant.replacements.items()},
        "seed": seed,
        "epochs": len(history),
        "minutes": round(sum(float(row["seconds"]) for row in history) / 60, 2),
        "gmac": round(multiply_adds(model) / 1e9, 3),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_pixel": summary["bits_per_pixel"],
        "codes_used": summary["codes_used"],
        "perplexity": round(summary["perplexity"], 1),
        "validation_ssim": max(float(row["val_ssim"]) for row in history),
        "test": scores,
        "test_slices": summary["slices"],
        "device": config["device"],
        "precision": config["precision"],
        "versions": config["versions"],  # including the commit at training time
    }


def multiply_adds(model: nn.Module) -> int:
    """Count the multiply-adds of a forward pass of one slice, including the nearest-code search."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 256, 128))
    return counter.get_total_flops() // 2


# ---------------------------------------------------------------- time of a step


def relative_step_times(args: argparse.Namespace, rounds: int = 3) -> dict[str, float]:
    """Measure the duration of each variant's training step relative to the variant "document".

    The variants take turns, so that a temporary slowdown of the machine affects all of them. The
    result is a ratio of medians. Nothing else should run on the machine at the same time.
    """
    utils.keep_freed_memory()  # as train.py does
    configs = {}
    for name in {"document", *args.variants}:
        flags = parse_train_flags(VARIANTS[name].flags.split(), None)
        configs[name] = resolve_config(flags | {"precision": args.precision})
    slices = load_training_split(args.data)
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(rounds):
        for name, config in configs.items():
            with replace_in_modules(VARIANTS[name].replacements):
                trainer = Trainer(config, utils.pick_device(config.device))
                batch = torch.arange(config.batch_size) % len(slices)
                images = slices.batch(batch).to(trainer.device)
                seconds[name].append(seconds_of_step(trainer, images))
    document = statistics.median(seconds["document"])
    return {name: statistics.median(values) / document for name, values in seconds.items()}


def load_training_split(data: Path):
    """Load the training split as train.py does, without printing."""
    config = resolve_config({"data": str(data)})
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        config, source, _ = train.resolve_data(config, {"epochs": 1}, Path())
        slices, _ = load_training_data(config, source, Path())
    return slices


def seconds_of_step(trainer: Trainer, images: Tensor) -> float:
    """Return the seconds of a training step on a batch (B, 1, H, W), after warm-up steps."""
    for _ in range(3 if trainer.is_compiled else 1):  # CUDA graphs are recorded in the second step
        trainer.step(images)[1].item()  # waits for the device
    start = time.perf_counter()
    trainer.step(images)[1].item()
    return time.perf_counter() - start


# ---------------------------------------------------------------- results


def table(results: list[dict]) -> str:
    """Return a Markdown table with one row per variant: mean and half the range over seeds."""

    def cell(values: list[float], digits: int) -> str:
        spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    lines = [
        "| variant | seeds | epochs | GMAC | step time | bits per pixel | validation `ssim` | "
        "`ssim` | `ssim_zscore` | `ssim_uniform` | `ssim_body` | PSNR (dB) | codes used | "
        "perplexity |",
        "|" + "---|" * 14,
    ]
    for name in dict.fromkeys(row["variant"] for row in results):
        rows = [row for row in results if row["variant"] == name]
        first = rows[0]
        step_time = f"{first['step_time']:.2f}" if "step_time" in first else ""
        cells = [name, str(len(rows)), str(first["epochs"]), f"{first['gmac']:.2f}", step_time]
        cells.append(f"{first['bits_per_pixel']:.4f}")
        cells.append(cell([row["validation_ssim"] for row in rows], 3))
        for score in SCORE_NAMES:
            digits = 2 if score == "psnr" else 3
            cells.append(cell([row["test"][score]["mean"] for row in rows], digits))
        cells.append(cell([row["codes_used"] for row in rows], 0))
        cells.append(cell([row["perplexity"] for row in rows], 0))
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "GMAC: 10^9 multiply-adds in the forward pass of one whole slice, including the",
        "nearest-code search. Step time: duration of a training step on 16 slices, cropped as the",
        "variant crops them, relative to `document`. Codes used and perplexity: over all codebooks",
        "together.",
    ]
    return "\n".join(lines) + "\n"


def write(out: Path, results: list[dict]) -> None:
    """Write <out>.json and <out>.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    Path(f"{out}.md").write_text(table(results), encoding="utf-8")


# ---------------------------------------------------------------- the command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--data", type=Path, required=True, help="folder of the data, as for train.py")
    flag(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=f"variants to train, from {list(VARIANTS)} (default: all)",
    )
    flag("--seeds", type=int, nargs="+", default=[0], help="seeds for each variant (default: 0)")
    flag("--epochs", type=int, default=100, help="number of epochs of every run (default: 100)")
    flag(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="precision, as for train.py (default: auto)",
    )
    flag("--jobs", type=int, default=1, help="number of parallel runs (default: 1)")
    flag(
        "--runs-dir",
        type=Path,
        default=Path("runs/ablation"),
        help="folder of the runs (default: runs/ablation)",
    )
    flag(
        "--out",
        type=Path,
        help="result files, without suffix (default: benchmarks/results/ablation_<data>)",
    )
    args = parser.parse_args(argv)
    args.variants = list(dict.fromkeys(args.variants))
    if args.jobs < 1 or args.epochs < 1:
        raise UserError(
            f"--jobs is {args.jobs} and --epochs is {args.epochs}; expected at least 1 for each"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    out = args.out or RESULTS / f"ablation_{args.data.resolve().name}"
    # On SIGTERM, raise SystemExit, on which `run_all` stops the workers.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        results = run_all(args, out)
    finally:
        signal.signal(signal.SIGTERM, previous)
    step_times = relative_step_times(args)
    for row in results:
        row["step_time"] = round(step_times[row["variant"]], 3)
    write(out, results)
    print(Path(f"{out}.md").read_text(encoding="utf-8"))
    return 0


def run_all(args: argparse.Namespace, out: Path) -> list[dict]:
    """Train and evaluate all variants and seeds; write the results after each run."""
    # Run all variants with the first seed first, so that a complete table exists early.
    jobs = [(args, name, seed) for seed in args.seeds for name in args.variants]
    threads = max(1, torch.get_num_threads() // args.jobs)
    pool = ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (threads,))
    results: list[dict] = []
    try:
        for row in pool.map(run_variant, *zip(*jobs, strict=True)):
            results.append(row)
            results.sort(key=lambda row: (args.variants.index(row["variant"]), row["seed"]))
            write(out, results)
            print(
                f"{row['variant']}, seed {row['seed']}: validation ssim "
                f"{row['validation_ssim']:.4f}, {row['bits_per_pixel']:.4f} bits per pixel",
                flush=True,
            )
    except BaseException as error:
        for worker in active_children():
            worker.terminate()  # train.py saves a checkpoint before it exits
        if isinstance(error, BrokenProcessPool):
            raise UserError("a run was interrupted; repeat the command to resume it") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return results


if __name__ == "__main__":
    utils.run_script(main)
