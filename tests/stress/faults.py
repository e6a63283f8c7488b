"""Kill the scripts at random moments, go on by the command that they name, and count what was lost.

    python benchmarks/faults.py                  # 50 kills, about ten minutes on two CPU cores
    python benchmarks/faults.py --kills 5        # one of each kind

A kill is SIGKILL, at a moment drawn from the seed: while the cache is built, while it trains, while a checkpoint or a
plot is being written (as its temporary file tells), and in a prediction. After each, every file with its final name
must be whole, every file that was there must still be there, and no worker may be left. In the end the weights, the
table of epochs and the prediction must equal those of an undisturbed run bit for bit. Writes <out>.json and <out>.md.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import utils
from evaluation import plots
from training.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[1]
KINDS = ("cache", "training", "checkpoint", "plot", "prediction")
FLAGS = ["--epochs=4", "--batch-size=4", "--crop=64", "--plot-every=1", "--device=cpu", "--precision=float32",
         "--hidden-channels=32", "--residual-channels=16"]  # fmt: skip
SLICES = {"train": 12, "validate": 4, "test": 6}
MANY = {"train": 1000, "validate": 2, "test": 2}  # enough for several processes to decode


def write_data(root: Path, counts: dict[str, int]) -> Path:
    """SliceDataset of smooth blobs in HipMRI's 2D form."""
    generator = torch.Generator().manual_seed(0)
    for split, case in (("train", 4), ("validate", 36), ("test", 40)):
        folder = root / f"keras_slices_{split}"
        folder.mkdir(parents=True)
        for i in range(counts[split]):
            coarse = torch.rand(1, 1, 16, 8, generator=generator)
            image = (
                torch.nn.functional.interpolate(coarse, size=(256, 128), mode="bilinear")[0, 0]
                * 1000
            )
            file = folder / f"case_{case:03d}_week_0_slice_{i}.nii.gz"
            file.write_bytes(nib.Nifti1Image(image.short().numpy(), np.eye(4)).to_bytes())
    return root


def start(folder: Path, script: str, *arguments) -> subprocess.Popen:
    """A process of its own group, whose output goes to `folder`/log."""
    with open(folder / "log", "w") as log:
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HIPMRI_CACHE": str(folder / "cache")}
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill_when(process: subprocess.Popen, begun: Callable[[], bool], delay: float) -> bool:
    """SIGKILL `delay` seconds after `begun()`; False where it ended before."""
    while not begun():
        if process.poll() is not None:
            return False
        time.sleep(0.0002)
    end = time.perf_counter() + delay
    while time.perf_counter() < end:
        time.sleep(min(0.001, delay))
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


def broken_files(folder: Path) -> tuple[list[str], int]:
    """Of the files with a final name (hidden and `.tmp-` ones have none), those that are not whole; and how many."""
    readers = {".pt": read_checkpoint, ".json": lambda path: json.loads(path.read_text()), ".csv": read_table,
               ".png": plots.plt.imread, ".npy": np.load, ".npz": lambda path: dict(np.load(path))}  # fmt: skip
    broken, files = [], sorted(path for path in final_files(folder) if path.suffix in readers)
    for path in files:
        try:
            readers[path.suffix](path)
        except Exception as error:
            broken.append(f"{path.name}: {error!r:.200}")
    return broken, len(files)


def read_table(path: Path) -> None:
    lengths = {len(row) for row in csv.reader(path.read_text().splitlines())}
    assert len(lengths) == 1 and path.read_text().endswith("\n")


def workers_left(process: subprocess.Popen, seconds: float = 5) -> bool:
    """Whether a process of its group is still there after so many seconds."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def finish(folder: Path, script: str, *arguments) -> str:
    """Run it to its end; what it printed. Raises where it fails."""
    code = start(folder, script, *arguments).wait()
    output = (folder / "log").read_text()
    if code:
        raise RuntimeError(f"{script} ended with {code}:\n{output[-3000:]}")
    return output


# ---------------------------------------------------------------- what is compared


def cache_content(folder: Path) -> dict[str, bytes]:
    """Pixels of every finished cache."""
    finished = [
        path for path in (folder / "cache").iterdir() if path.is_dir() and ".tmp-" not in path.name
    ]
    return {path.name.split("-")[0]: (path / "pixels.npy").read_bytes() for path in finished}


def run_content(run: Path) -> dict:
    """Weights of both checkpoints, and metrics.csv without the seconds."""
    content = {f"{name} {key}": value for name in ("best", "last")
               for key, value in read_checkpoint(run / f"{name}.pt")["model"].items()}  # fmt: skip
    rows = [line.rsplit(",", 1)[0] for line in (run / "metrics.csv").read_text().splitlines()]
    return content | {"metrics.csv": rows}


def prediction_content(run: Path) -> dict:
    scores = json.loads((run / "test" / "metrics.json").read_text())
    return {"slices.csv": (run / "test" / "slices.csv").read_text(), "scores": scores}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


# ---------------------------------------------------------------- the kills


class Tally:
    """What a kind of kill comes to, for its row."""

    def __init__(self, kind: str):
        self.row = {"killed": kind, "kills": 0, "within a write": 0, "resumes": 0, "restarts": 0, "files checked": 0,
                    "lost files": [], "workers left": 0, "runs compared": 0, "different": 0}  # fmt: skip
        self.begun = (
            0.0  # when the last process was, which leaves younger files than those before it
        )

    def killed(
        self, process: subprocess.Popen, folder: Path, before: set[Path], temporary: str
    ) -> None:
        """After a kill: are all files whole, and those there that were there before?"""
        row = self.row
        row["kills"] += 1
        unfinished = [path for path in folder.glob(temporary) if path.stat().st_mtime >= self.begun]
        row["within a write"] += bool(unfinished)
        row["workers left"] += workers_left(process)
        broken, count = broken_files(folder)
        row["lost files"] += broken + [f"{path.name}: gone" for path in before if not path.exists()]
        row["files checked"] += count

    def compare(self, same: bool) -> None:
        self.row["runs compared"] += 1
        self.row["different"] += not same


def final_files(folder: Path) -> set[Path]:
    return {
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.name != "log"
    }


def kill_cache(tally: Tally, chance: random.Random, work: Path, data: Path, kills: int) -> None:
    """A dry run builds the cache and trains nothing; the same command again is what goes on."""
    command = ("train.py", "--data", data, "--dry-run", *FLAGS)

    def building(folder: Path) -> bool:
        return any((folder / "cache").glob("train-*.tmp-*"))

    whole = work / "whole"
    whole.mkdir()
    process = start(whole, *command)
    while not building(whole):
        time.sleep(0.001)
    begun = time.perf_counter()
    while building(whole):
        time.sleep(0.001)
    seconds = time.perf_counter() - begun
    assert process.wait() == 0, (whole / "log").read_text()
    for number in itertools.count():
        if tally.row["kills"] == kills:
            return
        folder = work / f"killed_{number}"
        folder.mkdir()
        tally.begun, process = time.time(), start(folder, *command)
        if not kill_when(process, functools.partial(building, folder), chance.uniform(0, seconds)):
            continue  # it had reached its end
        tally.killed(process, folder / "cache", set(), "*.tmp-*")
        finish(folder, *command)
        tally.row["restarts"] += 1
        tally.compare(equal(cache_content(folder), cache_content(whole)))


class Sight:
    """True from the `number`-th time on that a file of this pattern comes into sight."""

    def __init__(self, folder: Path, pattern: str, number: int):
        self.folder, self.pattern, self.left, self.seen = folder, pattern, number, False

    def __call__(self) -> bool:
        here = next(self.folder.glob(self.pattern), None) is not None
        self.left -= here and not self.seen
        self.seen = here
        return self.left <= 0


def kill_run(
    tally: Tally, chance: random.Random, work: Path, data: Path, kills: int, whole: Path
) -> None:
    """Chains of up to five kills, each gone on from."""
    pattern, times, longest = {
        "training": ("config.json", 1, 3.0),  # at any moment of the seconds that it takes
        "checkpoint": (".*.pt.*.tmp", 5, 0.004),
        "plot": ("**/.*.png.*.tmp", 5, 0.03),
    }[tally.row["killed"]]
    fresh = ["--data", data, "--name", "x", *FLAGS]
    for chain in itertools.count():
        if tally.row["kills"] == kills:
            return
        folder, command = work / f"chain_{chain}", fresh
        folder.mkdir()
        for _ in range(min(5, kills - tally.row["kills"])):
            tally.begun, before = time.time(), final_files(folder)
            process = start(folder, "train.py", *command)
            sight = Sight(folder / "runs" / "x", pattern, chance.randint(1, times))
            if not kill_when(process, sight, chance.uniform(0, longest)):
                break  # it reached its end before
            tally.killed(process, folder / "runs", before, "x/**/.*.tmp")
            command = ["--resume", "--name", "x"]
        output = (folder / "log").read_text()
        if process.returncode == -signal.SIGKILL:
            process = start(folder, "train.py", *command)
            process.wait()
            output = (folder / "log").read_text()
        if "start one without --resume" in output:  # it was killed before it had written anything
            finish(folder, "train.py", *fresh)
            tally.row["restarts"] += 1
        else:
            assert process.returncode == 0 or "has finished" in output, output
            tally.row["resumes"] += 1
        tally.compare(equal(run_content(folder / "runs" / "x"), run_content(whole)))


def kill_prediction(tally: Tally, chance: random.Random, kills: int, whole: Path) -> None:
    """Half of the kills from the first file on, the others from the process's start."""
    folder, command = whole.parents[1], ("predict.py", "--run", whole, "--device", "cpu")
    before = time.perf_counter()
    finish(folder, *command)
    seconds, expected = time.perf_counter() - before, prediction_content(whole)
    while tally.row["kills"] < kills:
        first = tally.row["kills"] % 2 == 0
        tally.begun, files = time.time(), final_files(whole)
        process = start(folder, *command)
        begun = (lambda: any((whole / "test").glob(".*.tmp"))) if first else (lambda: True)
        if not kill_when(process, begun, chance.uniform(0, 1.0 if first else seconds)):
            continue  # it had reached its end
        tally.killed(process, whole, files, "test/.*.tmp")
        finish(folder, *command)
        tally.row["restarts"] += 1
        tally.compare(equal(prediction_content(whole), expected))


def faults(kills: dict[str, int], seed: int, work: Path) -> list[dict]:
    """So many kills of each of KINDS: a row for each."""
    data, rows = write_data(work / "data", SLICES), []
    whole = work / "undisturbed"
    whole.mkdir()
    finish(whole, "train.py", "--data", data, "--name", "x", *FLAGS)
    for kind in KINDS:
        tally, chance, folder = Tally(kind), random.Random(f"{seed} {kind}"), work / kind
        folder.mkdir()
        if not kills[kind]:
            continue
        if kind == "cache":
            kill_cache(tally, chance, folder, write_data(folder / "data", MANY), kills[kind])
        elif kind == "prediction":
            kill_prediction(tally, chance, kills[kind], whole / "runs" / "x")
        else:
            kill_run(tally, chance, folder, data, kills[kind], whole / "runs" / "x")
        rows.append(tally.row)
        print(tally.row, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="of all kinds together (50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "faults",
        help="without ending",
    )
    args = parser.parse_args()
    kills = {kind: len(range(number, args.kills, len(KINDS))) for number, kind in enumerate(KINDS)}
    with tempfile.TemporaryDirectory() as work:
        rows = faults(kills, args.seed, Path(work))
    utils.write_json(
        args.out.with_suffix(".json"),
        {"seed": args.seed, "rows": rows, "versions": utils.versions()},
    )
    names = list(rows[0])
    lines = [
        f"SIGKILL at random moments, seed {args.seed}.\n",
        "| " + " | ".join(names) + " |",
        "|---" * len(names) + "|",
    ]
    for row in rows:
        cells = (len(value) if isinstance(value, list) else value for value in row.values())
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    bad = sum(len(row["lost files"]) + row["workers left"] + row["different"] for row in rows)
    kills, resumes, restarts = (
        sum(row[name] for row in rows) for name in ("kills", "resumes", "restarts")
    )
    lost = sum(len(row["lost files"]) for row in rows)
    print(
        f"{kills} kills, {resumes} resumes, {restarts} restarts, {lost} lost files; written: {args.out}.json, .md"
    )
    return int(bad > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the temporary folder goes also then
    sys.exit(main())
