"""Compare runs by the sharpness of their reconstructions and their distance from real slices.

    python benchmarks/sharpness.py --runs runs/plain runs/gan

The runs must have the same training data and the same rate. The result files <out>.json and
<out>.md contain the SSIM variants, PSNR, kernel distances (prior/realism.py), and the power of the
reconstructions relative to that of the originals, in each of the three highest octaves of spatial
frequency. <out>.png shows some reconstructions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import utils
from evaluation import metrics, plots
from evaluation.metrics import SCORE_NAMES
from modules import VQVAE
from prior.realism import Features, kernel_distance
from training import environment
from training.checkpoint import load_model
from training.run_folder import load_run_data

RESULTS = Path(__file__).parent / "results"
NUM_OCTAVES = 3  # number of octaves of spatial frequency, from the highest down
NUM_SHOWN = 3  # number of slices in the figure
CROP = (slice(64, 192), slice(32, 96))  # the enlarged part of a slice
FLAGS = ("recipe", "epochs", "seed", "gan", "gan_weight", "gan_start")  # recorded in <out>.json

# ---------------------------------------------------------------- measurements


def measure_run(
    run: Path,
    originals: Tensor,
    cases: list[str],
    features: Features,
    training_features: Tensor,
    device: torch.device,
) -> tuple[dict, Tensor]:
    """Reconstruct slices with a run's best.pt, and score the reconstructions.

    Args:
        run: folder of the run.
        originals: z-scored slices, (N, 1, H, W).
        cases: N names, the case of each slice.
        features: `Features` fitted to the training slices.
        training_features: features of the training slices, (M, F).
        device: the device to compute on.

    Returns:
        The run's row of the result file, and the reconstructions (N, 1, H, W).
    """
    model = load_model(VQVAE, run / "best.pt", device)
    batches = []
    with torch.no_grad():
        for batch in originals.split(16):
            reconstruction, _ = model(batch.to(device))
            batches.append(reconstruction.float().cpu())
    reconstructions = torch.cat(batches)
    scores = {}
    for name, values in score(originals, reconstructions).items():
        scores[name] = metrics.mean_by_case(values.double().numpy(), cases)
    config = utils.read_json(run / "config.json")
    reconstruction_features = features(reconstructions)
    row = {
        "run": run.resolve().name,
        "bits_per_pixel": model.bits_per_pixel,
        "flags": {name: config["arguments"].get(name) for name in FLAGS},
        "scores": scores,
        "distance_to_originals": kernel_distance(reconstruction_features, features(originals)),
        "distance_to_training": kernel_distance(reconstruction_features, training_features),
        "trained": {name: config[name] for name in ("device", "precision", "versions")},
    }
    return row, reconstructions


def score(originals: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
    """Compute all scores, and the power ratio in each octave, of reconstructions (N, 1, H, W).

    Returns:
        {name: (N,)}; "power_octave_0" is the highest octave.
    """
    batch_scores = []
    for pair in zip(originals.split(16), reconstructions.split(16), strict=True):
        values = metrics.slice_scores(*pair)
        for octave in range(NUM_OCTAVES):
            values[f"power_octave_{octave}"] = metrics.power_ratio(*pair, octave)
        batch_scores.append(values)
    names = batch_scores[0]
    return {name: torch.cat([values[name] for values in batch_scores]) for name in names}


# ---------------------------------------------------------------- results


def table(rows: list[dict]) -> str:
    """Return a Markdown table with one row per run."""
    heads = ["run", "bits per pixel"]
    heads += ["PSNR (dB)" if name == "psnr" else f"`{name}`" for name in SCORE_NAMES]
    heads += ["power, top octave", "2nd", "3rd"]
    heads += ["distance to the same slices", "to training slices"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["run"], f"{row['bits_per_pixel']:.4f}"]
        for name, value in row["scores"].items():
            cells.append(f"{value['mean']:.{2 if name == 'psnr' else 3}f}")
        for name in ("distance_to_originals", "distance_to_training"):
            cells.append(f"{row[name]:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(
    path: Path,
    originals: Tensor,
    reconstructions: list[tuple[str, Tensor]],
    names: list[str],
    heading: str,
) -> None:
    """Plot originals and each run's reconstructions, whole and enlarged, with one row per slice.

    Args:
        path: path of the figure.
        originals: original slices, (N, 1, H, W).
        reconstructions: (name, reconstructions (N, 1, H, W)) for each run.
        names: names of the N slices.
        heading: title of the figure.
    """
    images, titles = [], []
    for i, name in enumerate(names):
        images.append(originals[i])
        titles.append(f"original: {name}")
        for run, run_images in reconstructions:
            images.append(run_images[i])
            titles.append(run)
    num_columns = 1 + len(reconstructions)
    plots.plot_slices(path, torch.stack(images), titles, heading, num_columns, CROP)


# ---------------------------------------------------------------- the command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag(
        "--runs",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders of runs, each with a best.pt",
    )
    flag("--data", metavar="DIR", help="folder of the data (default: the data of the first run)")
    flag(
        "--split",
        choices=("validate", "test"),
        default="test",
        help="split to measure on (default: test)",
    )
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    flag(
        "--out",
        type=Path,
        help="result files, without suffix (default: benchmarks/results/sharpness_<data>)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = utils.pick_device(args.device)
    train, _ = load_run_data(args.runs[0], "train", args.data)
    slices, root = load_run_data(args.runs[0], args.split, args.data)
    training_images = train.batch((~train.constant).nonzero().flatten())
    indices = (~slices.constant).nonzero().flatten()
    originals = slices.batch(indices)
    names = [slices.names[i] for i in indices]
    cases = [name.case for name in names]
    features = Features().fit(training_images)
    training_features = features(training_images)
    shown = plots.spread_indices(len(names), NUM_SHOWN)
    rows = []
    shown_reconstructions = []
    for run in args.runs:
        row, reconstructions = measure_run(
            run, originals, cases, features, training_features, device
        )
        rows.append(row)
        shown_reconstructions.append((row["run"], reconstructions[shown]))

    data = Path(root).name
    out = args.out or RESULTS / f"sharpness_{data}"
    out.parent.mkdir(parents=True, exist_ok=True)
    heading = f"{data}, {args.split}, {rows[0]['bits_per_pixel']:.4f} bits per pixel"
    shown_names = [str(names[i]) for i in shown]
    plot(Path(f"{out}.png"), originals[shown], shown_reconstructions, shown_names, heading)
    result = {
        "data": data,
        "split": args.split,
        "slices": len(names),
        "device": environment.describe_device(device),
        "versions": environment.versions(),
        "rows": rows,
    }
    utils.write_json(Path(f"{out}.json"), result)
    page = f"{heading}, {len(names)} slices.\n\n{table(rows)}"
    Path(f"{out}.md").write_text(page, encoding="utf-8")
    print(f"\n{table(rows)}\nwritten: {out}.md, .json and .png")
    return 0


if __name__ == "__main__":
    utils.run_script(main)
