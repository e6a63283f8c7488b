"""Read thousands of damaged files: each must be read or refused with the intended error.

    python tests/stress/fuzz.py                    # 24,000 NIfTI files, 2,000 checkpoints and
                                                   # 2,000 config.json
    python tests/stress/fuzz.py --count 300        # fewer than a tenth of them

The damaged files are small slices and volumes and, if $HIPMRI_REAL_DATA is set, slices of its
folder prostatex; checkpoints of small models; and a run's config.json. Every file is read in all
ways in which the scripts read such files. The following count as crashes: any other exception, the
catch-all message "cannot be decoded", reading for more than 5 seconds, and using more than 1 GiB of
memory. The result files are <out>.json and <out>.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from damage import (
    damage_bytes,
    damage_header,
    damage_shape,
    damage_stream,
    damage_values,
    intact_files,
)

import dataset
import train
import utils
from modules import VQVAE
from mri import splits
from mri.encoding import decode_file
from mri.files import Source
from mri.preprocessing import SIZE, Preprocessing, slice_affine
from prior.flow import FlowPrior
from prior.model import CodePrior
from training import environment
from training.checkpoint import load_model
from training.config import TrainConfig, check_config, resolve_config
from training.run import Run
from training.run_folder import (
    last_checkpoint,
    open_run,
    read_arguments,
    read_manifest,
    read_preprocessing,
)
from utils import CheckpointError, DataError, UserError

ROOT = Path(__file__).parents[2]
MAX_SECONDS = 5  # for one file
MAX_MEMORY = 1 << 30  # bytes
SMALL_MODEL = {
    "hidden_channels": 8,
    "residual_channels": 4,
    "num_residual_layers": 1,
    "num_code_layers": 1,
    "refine_channels": 2,
    "embedding_dim": 4,
    "num_embeddings": 16,
}


# ---------------------------------------------------------------- read the files


def read_nifti(path: Path) -> bool:
    """Read a file as a slice and as a volume.

    Returns:
        Whether the file can be used as a slice or as a volume.

    Raises:
        AssertionError: if the error has the catch-all message, or the pixels are not usable.
    """
    is_usable = False
    for form in ("2D", "3D"):
        preprocessing = Preprocessing(form, planes=4)
        slices, reason = decode_file(path, preprocessing)
        assert not reason.startswith("cannot be decoded"), reason
        is_usable |= bool(slices)
        for pixels, record in slices:
            assert pixels.shape == SIZE
            assert np.isfinite([float(number) for number in record]).all(), record
        with contextlib.suppress(DataError):
            assert np.isfinite(slice_affine(path, preprocessing)).all()
    with contextlib.suppress(DataError):
        assert dataset.read_slice(path, Preprocessing("2D")).isfinite().all()
    return is_usable


def read_checkpoint(path: Path, run: Run) -> bool:
    """Load a checkpoint as a VQ-VAE, as a prior of either kind, and to resume a run.

    Returns:
        Whether the checkpoint could be loaded as one of the three models.

    Raises:
        AssertionError: if the checkpoint is refused only because memory ran out.
    """
    is_model = False
    for model_class in (VQVAE, CodePrior, FlowPrior):
        try:
            load_model(model_class, path)
            is_model = True
        except CheckpointError as error:
            assert not re.search("(?i)memory|allocate", str(error)), error
    with contextlib.suppress(UserError):
        checkpoint = last_checkpoint(path.parent)
        if checkpoint:
            run.restore(checkpoint)
    return is_model


def read_config(path: Path) -> bool:
    """Read config.json in the way of --resume and of predict.py; return whether it is accepted."""
    folder = path.parent
    flags = {"resume": True, "name": folder.name, "runs_dir": str(folder.parent), "epochs": 10**6}
    try:
        _, config, _ = open_run(flags)
        check_config(config, world_size=1)
        splits.find_data(read_arguments(folder, TrainConfig).get("data"))
        read_preprocessing(folder, Source(folder, "2D", {}, []))
        read_manifest(folder)
    except UserError:
        return False
    return True


# ---------------------------------------------------------------- limits


class LimitExceeded(BaseException):
    """The error that reading a file takes too long.

    It is not an `Exception`, so `except Exception` in the code under test does not catch it.
    """


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Raise LimitExceeded after MAX_SECONDS, and MemoryError above MAX_MEMORY of new memory."""

    def raise_limit(*_):
        raise LimitExceeded(f"over {MAX_SECONDS} s")

    previous_handler = signal.signal(signal.SIGALRM, raise_limit)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if status.exists():
        size = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MAX_MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read_all(
    name: str, count: int, make: Callable[[], bytes], path: Path, read: Callable[[Path], bool]
) -> dict:
    """Read `count` damaged files and return a row of the results.

    A crash is reported with the file's number; the same seed makes the same file again.

    Args:
        name: name of the kind of damage.
        count: number of files.
        make: returns the content of the next file.
        path: path of the file, which is overwritten each time.
        read: reads the file and returns whether it is usable; any exception is a crash.
    """
    num_read = 0
    slowest = 0.0
    crashes = []
    for number in range(count):
        path.write_bytes(make())
        start = time.perf_counter()
        try:
            with limits():
                num_read += read(path)
        except (Exception, LimitExceeded) as error:
            crashes.append(f"file {number}: {error!r:.300}")
        slowest = max(slowest, time.perf_counter() - start)
    row = {
        "damaged": name,
        "files": count,
        "read": num_read,
        "refused": count - num_read - len(crashes),
        "crashes": crashes,
        "slowest_seconds": round(slowest, 3),
    }
    print(row | {"crashes": len(crashes)}, *crashes[:10], sep="\n    ", flush=True)
    return row


# ---------------------------------------------------------------- all kinds of damage


def fuzz(count: int, seed: int, folder: Path) -> list[dict]:
    """Read all kinds of damaged files and return a row of results for each.

    Args:
        count: number of files with damaged headers, with damaged gzip streams and with damaged
            shapes; each of the other four kinds has an eighth of this number.
        seed: random seed of the damage.
        folder: the folder that files are written to.
    """
    rng = random.Random(seed)
    return fuzz_nifti(count, rng, folder) + fuzz_runs(math.ceil(count / 8), seed, rng, folder)


def fuzz_nifti(count: int, rng: random.Random, folder: Path) -> list[dict]:
    files = intact_files()
    path = folder / "case_004_week_0_slice_0.nii.gz"
    rows = []
    for name, damage in (
        ("header", damage_header),
        ("gzip stream", damage_stream),
        ("shape", damage_shape),
    ):

        def make(damage=damage) -> bytes:
            return damage(rng, rng.choice(files))

        rows.append(read_all(name, count, make, path, read_nifti))
    return rows


def fuzz_runs(count: int, seed: int, rng: random.Random, folder: Path) -> list[dict]:
    """Read damaged checkpoints and config.json of a run in `folder`."""
    run = make_run(folder, seed)
    run.save("last.pt")
    checkpoint_path = folder / "last.pt"
    content = checkpoint_path.read_bytes()
    checkpoint = torch.load(checkpoint_path, weights_only=True)
    checkpoints = [checkpoint]
    causal = CodePrior(16, 4, 8, 8, channels=16, num_layers=1)
    for prior in (causal, FlowPrior(4, (8, 8), components=2, channels=12)):
        checkpoints.append(
            {"format": 3, "model_args": prior.arguments, "model": prior.state_dict()}
        )
    read = functools.partial(read_checkpoint, run=run)

    def damaged_checkpoint() -> bytes:
        torch.save(damage_values(rng, rng.choice(checkpoints)), checkpoint_path)
        return checkpoint_path.read_bytes()

    rows = [
        read_all(
            "checkpoint, bytes", count, lambda: damage_bytes(rng, content), checkpoint_path, read
        ),
        read_all("checkpoint, values", count, damaged_checkpoint, checkpoint_path, read),
    ]

    checkpoint_path.write_bytes(content)  # --resume reads it along with config.json
    config_path = folder / "config.json"
    config = {
        "name": "x",
        "arguments": vars(run.config),
        "preprocessing": vars(Preprocessing("2D")),
        "scans": {"train": {"subject": ["a.nii.gz"]}},
    }
    text = json.dumps(config).encode()
    rows += [
        read_all(
            "config.json, bytes", count, lambda: damage_bytes(rng, text), config_path, read_config
        ),
        read_all(
            "config.json, values",
            count,
            lambda: json.dumps(damage_values(rng, config)).encode(),
            config_path,
            read_config,
        ),
    ]
    return rows


def make_run(folder: Path, seed: int) -> Run:
    """Return a run of a small, untrained model."""
    flags = {"data": ".", "device": "cpu", "precision": "float32", **SMALL_MODEL}
    config = resolve_config(flags)
    torch.manual_seed(seed)
    model = VQVAE(**SMALL_MODEL)
    return Run(
        folder=folder,
        config=config,
        device=torch.device("cpu"),
        precision="float32",
        modules={"model": model},
        optimizer=train.make_optimizer(model, None, config),
        num_examples=4,
        losses=train.LOSSES,
        num_shown=2,
        best_column="val_ssim",
        best=-math.inf,
        fingerprint="fingerprint",
        info={},
        resume_command="",
    )


# ---------------------------------------------------------------- results


def format_table(rows: list[dict]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| damaged | files | read | refused with an error | crashes | slowest (s) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["damaged"], row["files"], row["read"], row["refused"], len(row["crashes"])]
        cells.append(f"{row['slowest_seconds']:.2f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--count",
        type=int,
        default=8000,
        help="number of files for each of three kinds of damage (default: 8000)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the damage (default: 0)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "fuzz",
        help="output path without extension (default: benchmarks/results/fuzz)",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = fuzz(args.count, args.seed, Path(folder))
    real = "and real slices" if os.environ.get("HIPMRI_REAL_DATA") else "slices, no real ones"
    files = f"synthetic {real}"
    result = {"seed": args.seed, "files": files, "rows": rows, "versions": environment.versions()}
    utils.write_json(args.out.with_suffix(".json"), result)
    heading = (
        f"Seed {args.seed}, {files}; limits per file: {MAX_SECONDS} s and {MAX_MEMORY >> 30} GiB."
    )
    args.out.with_suffix(".md").write_text(f"{heading}\n\n{format_table(rows)}")
    crashes = sum(len(row["crashes"]) for row in rows)
    total = sum(row["files"] for row in rows)
    print(f"{total:,} files, {crashes} crashes; written: {args.out}.json, {args.out}.md")
    return int(crashes > 0)


if __name__ == "__main__":
    sys.exit(main())
