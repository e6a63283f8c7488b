"""Measure the SSIM of a perfect denoiser on the sample data.

    python benchmarks/noise_ceiling.py

The noise of the phantom cannot be predicted. Therefore, even a reconstruction that lacks nothing
but the noise has an SSIM below 1. A model with a score above this ceiling reproduces noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import utils
from evaluation import metrics
from mri import phantom
from utils import UserError


def noise_ceiling(
    scans: list[tuple[int, int]], slices_per_scan: int = 6, seed: int = 0
) -> np.ndarray:
    """Score the noise-free slices of phantom scans as reconstructions of the noisy ones.

    Args:
        scans: (case, week) of each scan.
        slices_per_scan: number of slices per scan, 1 to 60, evenly spaced.
        seed: seed of the phantom.

    Returns:
        `ssim` of each slice, (N,).
    """
    noisy, clean = [], []
    for case, week in scans:
        for volumes, noise in ((noisy, True), (clean, False)):
            image, _ = phantom.make_volume(case, week, slices_per_scan, seed=seed, noise=noise)
            volumes.append(torch.from_numpy(image).float().movedim(2, 0)[:, None])  # (n, 1, H, W)
    scores = metrics.slice_scores(torch.cat(noisy), torch.cat(clean), ("ssim",))
    return scores["ssim"].numpy()


def scans_of_test_split(volumes: int) -> list[tuple[int, int]]:
    """Return (case, week) of each test volume of a phantom with `volumes` test volumes."""
    plans = phantom.plan((1, 1, volumes))
    return [(volume.case, volume.week) for volume in plans if volume.split == "test"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--volumes", type=int, default=2, help="number of test volumes (default: 2)")
    flag("--slices", type=int, default=6, help="number of slices per volume, 1 to 60 (default: 6)")
    flag("--seed", type=int, default=0, help="seed of the phantom (default: 0)")
    args = parser.parse_args(argv)
    if args.volumes < 1 or not 1 <= args.slices <= 60 or args.seed < 0:
        raise UserError(
            f"--volumes is {args.volumes}, --slices is {args.slices} and --seed is {args.seed}; "
            "expected --volumes >= 1, --slices 1 to 60, and --seed >= 0"
        )
    scores = noise_ceiling(scans_of_test_split(args.volumes), args.slices, args.seed)
    print(
        f"noise ceiling: ssim {scores.mean():.4f} (noise-free slices, scored as reconstructions of "
        f"{len(scores)} noisy slices of {args.volumes} test volumes)"
    )
    return 0


if __name__ == "__main__":
    utils.run_script(main)
