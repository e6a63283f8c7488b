"""Kill the scripts at random moments, resume them, and compare with an undisturbed run.

    python tests/stress/faults.py                  # 50 kills, about ten minutes on two CPU cores
    python tests/stress/faults.py --kills 5        # one of each kind

A kill is a SIGKILL at a moment that depends on the seed: while the cache is being built, during
training, while a checkpoint or a plot is being written (recognised by its temporary file), or
during a prediction. After each kill, all files except temporary files must be complete, all earlier
files must still exist, and no worker process may be left. At the end, the weights, metrics.csv and
the prediction must equal those of an undisturbed run, bit for bit. The result files are <out>.json
and <out>.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from outputs import (
    are_equal,
    broken_files,
    cache_content,
    final_files,
    prediction_content,
    run_content,
)
from processes import ROOT, finish, has_workers, kill_when, start, wait

import utils
from training import environment

KINDS = ("cache", "training", "checkpoint", "plot", "prediction")
SMALL_DATA = {"train": 12, "validate": 4, "test": 6}  # slices
LARGE_DATA = {"train": 1000, "validate": 2, "test": 2}  # enough to be decoded by several processes
FLAGS = (
    "--epochs=4",
    "--batch-size=4",
    "--crop=64",
    "--plot-every=1",
    "--cache-dir=cache",
    "--device=cpu",
    "--precision=float32",
    "--hidden-channels=32",
    "--residual-channels=16",
)
MAX_CHAIN = 5  # largest number of kills of one training run


def write_data(root: Path, counts: dict[str, int]) -> Path:
    """Write slices of smooth blobs in HipMRI's 2D layout.

    Args:
        root: folder to create.
        counts: split -> number of slices.
    """
    generator = torch.Generator().manual_seed(0)
    for split, case in (("train", 4), ("validate", 36), ("test", 40)):
        folder = root / f"keras_slices_{split}"
        folder.mkdir(parents=True)
        for i in range(counts[split]):
            coarse = torch.rand(1, 1, 16, 8, generator=generator)
            image = torch.nn.functional.interpolate(coarse, size=(256, 128), mode="bilinear") * 1000
            nifti = nib.Nifti1Image(image[0, 0].short().numpy(), np.eye(4))
            file = folder / f"case_{case:03d}_week_0_slice_{i}.nii.gz"
            file.write_bytes(nifti.to_bytes())
    return root


# ---------------------------------------------------------------- the kills


@dataclasses.dataclass
class Tally:
    """The results of one kind of kill, which are a row of the table."""

    killed: str  # one of KINDS
    kills: int = 0
    within_a_write: int = 0  # kills that left an incomplete temporary file
    resumes: int = 0
    restarts: int = 0  # from the beginning, with the same command
    files_checked: int = 0
    lost_files: list[str] = dataclasses.field(default_factory=list)  # broken or missing
    workers_left: int = 0
    runs_compared: int = 0
    different: int = 0

    def check_kill(
        self,
        process: BaseProcess,
        start_time: float,
        folder: Path,
        files_before: set[Path],
        temporary: str,
    ) -> None:
        """Count a kill, and check the files that it left.

        Args:
            process: the killed process.
            start_time: when it was started; older temporary files are from earlier processes.
            folder: the folder that it wrote to.
            files_before: the files that existed before it was started.
            temporary: glob pattern of the temporary files in the folder.
        """
        self.kills += 1
        new_files = [path for path in folder.glob(temporary) if path.stat().st_mtime >= start_time]
        self.within_a_write += bool(new_files)
        self.workers_left += has_workers(process)
        errors, count = broken_files(folder)
        self.lost_files += errors
        self.lost_files += [f"{path.name}: missing" for path in files_before if not path.exists()]
        self.files_checked += count

    def compare(self, content: dict, expected: dict) -> None:
        self.runs_compared += 1
        self.different += not are_equal(content, expected)

    def row(self) -> dict:
        return {name.replace("_", " "): value for name, value in vars(self).items()}


def kill_cache(tally: Tally, rng: random.Random, work: Path, data: Path, kills: int) -> None:
    """Kill dry runs, which only build the cache, and then run the same command to its end."""
    command = ("train.py", "--data", data, "--dry-run", *FLAGS)

    def is_building(folder: Path) -> bool:
        return any((folder / "cache").glob("train-*.tmp-*"))

    undisturbed = work / "undisturbed"
    undisturbed.mkdir()
    process = start(undisturbed, *command)
    while not is_building(undisturbed):
        time.sleep(0.001)
    start_time = time.perf_counter()
    while is_building(undisturbed):
        time.sleep(0.001)
    seconds = time.perf_counter() - start_time
    assert wait(process) == 0, (undisturbed / "log").read_text()
    expected = cache_content(undisturbed)

    for number in itertools.count():
        if tally.kills == kills:
            return
        folder = work / f"killed_{number}"
        folder.mkdir()
        start_time = time.time()
        process = start(folder, *command)
        delay = rng.uniform(0, seconds)
        if not kill_when(process, lambda folder=folder: is_building(folder), delay):
            continue  # it had already ended
        tally.check_kill(process, start_time, folder / "cache", set(), "*.tmp-*")
        finish(folder, *command)
        tally.restarts += 1
        tally.compare(cache_content(folder), expected)


class Appearances:
    """A condition that becomes true when a matching file appears for the `number`-th time."""

    def __init__(self, folder: Path, pattern: str, number: int):
        self.folder = folder
        self.pattern = pattern
        self.remaining = number
        self.was_visible = False

    def __call__(self) -> bool:
        is_visible = next(self.folder.glob(self.pattern), None) is not None
        if is_visible and not self.was_visible:
            self.remaining -= 1
        self.was_visible = is_visible
        return self.remaining <= 0


# Kind -> pattern of a file in the run's folder; the kill follows one of its first appearances (at
# most this number), after a delay (at most this many seconds).
TRAINING_KILLS = {
    "training": ("config.json", 1, 3.0),
    "checkpoint": (".*.pt.*.tmp", 5, 0.004),
    "plot": ("**/.*.png.*.tmp", 5, 0.03),
}


def kill_run(
    tally: Tally, rng: random.Random, work: Path, data: Path, kills: int, undisturbed: Path
) -> None:
    """Kill and resume training runs, up to five times each, and compare the finished runs.

    Args:
        tally: counts the results; its kind is a key of TRAINING_KILLS.
        rng: determines when to kill.
        work: an empty folder.
        data: folder of the data.
        kills: number of kills.
        undisturbed: folder of the run to compare with.
    """
    expected = run_content(undisturbed)
    for number in itertools.count():
        if tally.kills == kills:
            return
        folder = work / f"chain_{number}"
        folder.mkdir()
        train_until_finished(tally, rng, folder, data, min(MAX_CHAIN, kills - tally.kills))
        tally.compare(run_content(folder / "runs" / "x"), expected)


def train_until_finished(
    tally: Tally, rng: random.Random, folder: Path, data: Path, kills: int
) -> None:
    """Train a run in `folder`, killing it up to `kills` times; it may finish earlier."""
    pattern, appearances, longest_delay = TRAINING_KILLS[tally.killed]
    new_run = ("train.py", "--data", data, "--name", "x", *FLAGS)
    resume = ("train.py", "--resume", "--name", "x")
    command = new_run
    for _ in range(kills):
        files_before = final_files(folder)
        start_time = time.time()
        process = start(folder, *command)
        condition = Appearances(folder / "runs" / "x", pattern, rng.randint(1, appearances))
        if not kill_when(process, condition, rng.uniform(0, longest_delay)):
            break  # it had already ended
        tally.check_kill(process, start_time, folder / "runs", files_before, "x/**/.*.tmp")
        command = resume
    if process.exitcode == -signal.SIGKILL:
        process = start(folder, *resume)
        process.join()
    output = (folder / "log").read_text()
    if "contains no run to resume" in output:  # killed before it wrote config.json
        finish(folder, *new_run)
        tally.restarts += 1
    else:
        assert process.exitcode == 0 or "has finished" in output, output
        tally.resumes += 1


def kill_prediction(tally: Tally, rng: random.Random, kills: int, run: Path) -> None:
    """Kill every other prediction after it begins to write, and the others at any moment."""
    folder = run.parents[1]
    command = ("predict.py", "--run", run, "--device", "cpu")
    start_time = time.perf_counter()
    finish(folder, *command)
    seconds = time.perf_counter() - start_time
    expected = prediction_content(run)
    while tally.kills < kills:
        at_write = tally.kills % 2 == 0
        condition = Appearances(run / "test", ".*.tmp", 1 if at_write else 0)
        files_before = final_files(run)
        start_time = time.time()
        process = start(folder, *command)
        if not kill_when(process, condition, rng.uniform(0, 1.0 if at_write else seconds)):
            continue  # it had already ended
        tally.check_kill(process, start_time, run, files_before, "test/.*.tmp")
        finish(folder, *command)
        tally.restarts += 1
        tally.compare(prediction_content(run), expected)


# ---------------------------------------------------------------- results


def run_kills(kills: dict[str, int], seed: int, work: Path) -> list[dict]:
    """Kill the scripts, and return a row of results for each kind of kill.

    Args:
        kills: kind -> number of kills; kinds with 0 kills have no row.
        seed: random seed of the moments.
        work: an empty folder.
    """
    data = write_data(work / "data", SMALL_DATA)
    undisturbed = work / "undisturbed"
    undisturbed.mkdir()
    finish(undisturbed, "train.py", "--data", data, "--name", "x", *FLAGS)
    run = undisturbed / "runs" / "x"
    rows = []
    for kind, count in kills.items():
        if count == 0:
            continue
        tally = Tally(kind)
        rng = random.Random(f"{seed} {kind}")
        folder = work / kind
        folder.mkdir()
        if kind == "cache":
            kill_cache(tally, rng, folder, write_data(folder / "data", LARGE_DATA), count)
        elif kind == "prediction":
            kill_prediction(tally, rng, count, run)
        else:
            kill_run(tally, rng, folder, data, count, run)
        rows.append(tally.row())
        print(tally.row(), flush=True)
    return rows


def format_table(rows: list[dict]) -> str:
    """Return a Markdown table, with the number of lost files instead of their names."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = row | {"lost files": len(row["lost files"])}
        lines.append("| " + " | ".join(map(str, cells.values())) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=50, help="total number of kills of all kinds (default: 50)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the moments (default: 0)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "faults",
        help="output path without extension (default: benchmarks/results/faults)",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # also in the scripts
    kills = {kind: len(range(i, args.kills, len(KINDS))) for i, kind in enumerate(KINDS)}
    with tempfile.TemporaryDirectory() as work:
        rows = run_kills(kills, args.seed, Path(work))
    result = {"seed": args.seed, "rows": rows, "versions": environment.versions()}
    utils.write_json(args.out.with_suffix(".json"), result)
    table = f"SIGKILL at random moments, seed {args.seed}.\n\n{format_table(rows)}"
    args.out.with_suffix(".md").write_text(table)

    totals = {name: sum(row[name] for row in rows) for name in ("kills", "resumes", "restarts")}
    counts = ", ".join(f"{count} {name}" for name, count in totals.items())
    lost = sum(len(row["lost files"]) for row in rows)
    failures = lost + sum(row["workers left"] + row["different"] for row in rows)
    print(f"{counts}, {lost} lost files; written: {args.out}.json, {args.out}.md")
    return int(failures > 0)


if __name__ == "__main__":
    # Raise an exception on SIGTERM, so that the temporary folder is deleted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
