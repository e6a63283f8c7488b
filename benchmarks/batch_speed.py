"""Measure the speed and memory use of predict.py on a folder of single-slice files.

    python benchmarks/batch_speed.py                        # 160 and 640 slices of the phantom
    python benchmarks/batch_speed.py --counts 640 12660

The bundled model reconstructs slices of 256 x 128 pixels on the CPU, with all outputs that
predict.py writes by default. Each number of files is measured in a new process. The time to import
packages is not included. The peak memory should not depend on the number of files. A second table
gives the CPU time of each step. The results are written to <out>.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from evaluation import metrics, reconstruct  # noqa: E402
from evaluation.batch_figures import MAX_FIGURES, SLICES_PER_SHEET  # noqa: E402
from evaluation.codec import BATCH_SIZE, decode_planes, encode_planes  # noqa: E402
from mri import nifti, phantom  # noqa: E402
from training import environment  # noqa: E402

TARGET = 25  # target speed on two cores, in files per second
SLICES_PER_VOLUME = 20  # slices of each phantom volume
DEVICE = torch.device("cpu")


def write_slices(folder: Path, count: int) -> list[Path]:
    """Write `count` single-slice files of the phantom; after 80 files, copy the earlier ones."""
    folder.mkdir()
    files = []
    for index in range(count):
        path = folder / f"case_004_week_0_slice_{index}.nii.gz"
        if index < 4 * SLICES_PER_VOLUME:
            case, plane = divmod(index, SLICES_PER_VOLUME)
            if plane == 0:
                volume, _ = phantom.make_volume(case + 4, 0, slices=SLICES_PER_VOLUME)
            path.write_bytes(nifti.nifti_bytes(volume[:, :, plane].astype(np.int16), np.eye(4)))
        else:
            shutil.copy(files[index - 4 * SLICES_PER_VOLUME], path)
        files.append(path)
    return files


def measure_batch(count: int, threads: int) -> dict:
    """Reconstruct `count` files; return files per second, CPU time per file and peak memory."""
    torch.set_num_threads(threads)
    utils.keep_freed_memory()
    with tempfile.TemporaryDirectory() as work:
        write_slices(Path(work) / "slices", count)
        load = os.getloadavg()[0]
        start, cpu_start = time.perf_counter(), time.process_time()
        reconstruct.reconstruct_files(
            [Path(work) / "slices"],
            Path(work) / "out",
            run=None,
            runs_dir=Path(work) / "runs",
            device=DEVICE,
        )
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "files": count,
        "seconds": round(seconds, 2),
        "files_per_second": round(count / seconds, 2),
        "cpu_ms_per_file": round(1000 * cpu / count, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "load_before": round(load, 2),  # load average; a high load makes the measurement slow
    }


def measure_steps(threads: int) -> dict[str, float]:
    """Return the CPU time in ms per slice of each step, for a batch of 16 slices."""
    torch.set_num_threads(threads)
    utils.keep_freed_memory()
    model, _ = reconstruct.load_run_model(None, DEVICE)
    with tempfile.TemporaryDirectory() as work:
        files = write_slices(Path(work) / "slices", BATCH_SIZE)
        scans = [nifti.read_scan(file) for file in files]
        planes = np.concatenate([scan.planes for scan in scans])
        coded = encode_planes(model, planes)
        decoded = decode_planes(model, coded)
        originals = torch.from_numpy(planes.astype(np.float32))[:, None]
        reconstructions = torch.from_numpy(decoded)[:, None]
        contents = [scan.to_bytes(plane[None]) for scan, plane in zip(scans, decoded, strict=True)]

        def score(name: str) -> Callable[[], object]:
            return lambda: metrics.slice_scores(originals, reconstructions, (name,))

        steps = {
            "read": lambda: [nifti.read_scan(file) for file in files],
            "encode": lambda: encode_planes(model, planes),
            "decode": lambda: decode_planes(model, coded),
            **{name: score(name) for name in metrics.SCORE_NAMES},
            "gzip": lambda: [scan.to_bytes(decoded[:1]) for scan in scans],
            "write": lambda: [utils.write_bytes(Path(work) / "x", c) for c in contents],
        }
        results = {}
        for name, step in steps.items():
            step()
            start = time.process_time()
            for _ in range(3):
                step()
            results[name] = round(1000 * (time.process_time() - start) / 3 / BATCH_SIZE, 2)
    return results


def in_new_process(function: Callable, *arguments: object):
    """Call a function in a new process, so that memory and settings of this one do not matter."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag(
        "--counts",
        type=int,
        nargs="+",
        default=[160, 640],
        help="numbers of files to measure (default: 160 640)",
    )
    flag("--threads", type=int, default=2, help="number of torch threads (default: 2)")
    flag(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "batch_speed_cpu",
        help="result file, without suffix (default: benchmarks/results/batch_speed_cpu)",
    )
    args = parser.parse_args(argv)
    batches = [in_new_process(measure_batch, count, args.threads) for count in args.counts]
    result = {
        "command": shlex.join(["python", "benchmarks/batch_speed.py", *(argv or sys.argv[1:])]),
        "processor": f"{environment.processor_name()}, {len(os.sched_getaffinity(0))} cores",
        "threads": args.threads,
        "slices": "256 x 128 pixels, int16, .nii.gz",
        "model": "resources/pelvis.pt",
        "figures": f"up to {MAX_FIGURES} contact sheets of {SLICES_PER_SHEET} slices",
        "target_files_per_second": TARGET,
        "batches": batches,
        "cpu_ms_per_slice": in_new_process(measure_steps, args.threads),
        "versions": environment.versions(),
    }
    utils.write_json(args.out.with_suffix(".json"), result)
    for batch in batches:
        print(
            f"{batch['files']:6} files: {batch['files_per_second']:6.1f} files per second, "
            f"{batch['cpu_ms_per_file']:6.1f} ms of CPU time per file, "
            f"peak memory {batch['peak_memory_mb']} MB (target: {TARGET} files per second)"
        )
    for name, milliseconds in result["cpu_ms_per_slice"].items():
        print(f"{name:14}{milliseconds:8.2f} ms of CPU time per slice")
    return 0


if __name__ == "__main__":
    utils.run_script(main)
