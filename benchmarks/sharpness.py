"""Runs side by side: how sharp their reconstructions are, and how far from the distribution of real slices.

    python benchmarks/sharpness.py --runs runs/plain runs/gan

For runs of one data set and rate. Writes <out>.json, <out>.md and <out>.png: the SSIM names, PSNR, the power of
reconstructions over that of the originals in the three highest octaves, and kernel distances (distances.py).
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
from training.checkpoint import load_model
from training.run_folder import load_run_data

OCTAVES = 3
SHOWN = 3  # slices in the figure
CROP = (slice(64, 192), slice(32, 96))  # of each, enlarged


def measure(
    run: Path, originals: Tensor, features: Features, known: Tensor, cases: list[str], device
) -> dict:
    """The row of a run; its reconstructions stand under "images". known: the training slices' features."""
    model = load_model(VQVAE, run / "best.pt", device)
    with torch.no_grad():
        images = torch.cat(
            [model(some.to(device)).reconstruction.float().cpu() for some in originals.split(16)]
        )
    pairs = list(zip(originals.split(16), images.split(16), strict=True))
    scored = [metrics.slice_scores(*pair) for pair in pairs]
    scores = {name: torch.cat([part[name] for part in scored]) for name in SCORE_NAMES}
    for octave in range(OCTAVES):
        scores[f"power_octave_{octave}"] = torch.cat(
            [metrics.power_ratio(*pair, octave) for pair in pairs]
        )
    seen = features(images)
    config = utils.read_json(run / "config.json")
    arguments = config["arguments"]
    return {
        "run": run.resolve().name, "bits_per_pixel": model.bits_per_pixel, "images": images,
        "flags": {name: arguments.get(name) for name in ("recipe", "epochs", "seed", "gan", "gan_weight", "gan_start")},
        "scores": {name: metrics.mean_by_case(values.double().numpy(), cases) for name, values in scores.items()},
        "distance_to_originals": kernel_distance(seen, features(originals)),
        "distance_to_training": kernel_distance(seen, known),
        "trained": {name: config[name] for name in ("device", "precision", "versions")},
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """Markdown, a row a run."""
    heads = [
        *(f"`{name}`" for name in SCORE_NAMES[:-1]),
        "PSNR (dB)",
        "power, top octave",
        "2nd",
        "3rd",
    ]
    heads += ["distance to the same slices", "to training slices"]
    lines = [
        "| run | bits per pixel | " + " | ".join(heads) + " |",
        "|" + "---|" * (len(heads) + 2),
    ]
    for row in rows:
        cells = [row["run"], f"{row['bits_per_pixel']:.4f}"]
        cells += [
            f"{value['mean']:.{2 if name == 'psnr' else 3}f}"
            for name, value in row["scores"].items()
        ]
        cells += [f"{row[name]:.3f}" for name in ("distance_to_originals", "distance_to_training")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(path: Path, originals: Tensor, rows: list[dict], names: list[str], heading: str) -> None:
    """Originals and each run's reconstructions, whole and enlarged, a row a slice."""
    columns = [("original", originals), *((row["run"], row["images"]) for row in rows)]
    images, titles = [], []
    for i, name in enumerate(names):
        for what, some in columns:
            images.append(some[i])
            titles.append(f"{what}: {name}" if what == "original" else what)
    plots.plot_slices(path, torch.stack(images), titles, heading, len(columns), CROP)


def main(argv: list[str] | None = None) -> int:
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
    flag("--data", metavar="DIR", help="folder of slices or volumes (the first run's own)")
    flag(
        "--split",
        choices=("validate", "test"),
        default="test",
        help="which split to measure on (test)",
    )
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (auto)")
    flag(
        "--out",
        type=Path,
        help="result files, without ending (benchmarks/results/sharpness_<data>)",
    )
    args = parser.parse_args(argv)
    device = utils.pick_device(args.device)
    splits = [load_run_data(args.runs[0], split, args.data) for split in ("train", args.split)]
    kept = [(~split.constant).nonzero().flatten() for split, _ in splits]
    train, originals = (
        split.batch(indices) for (split, _), indices in zip(splits, kept, strict=True)
    )
    names = [splits[1][0].names[i] for i in kept[1]]
    features = Features().fit(train)
    known, cases = features(train), [name.case for name in names]
    rows = [measure(run, originals, features, known, cases, device) for run in args.runs]

    data = Path(splits[1][1]).name
    out = args.out or Path(__file__).parent / "results" / f"sharpness_{data}"
    out.parent.mkdir(parents=True, exist_ok=True)
    chosen = (
        torch.linspace(0, len(names) - 1, SHOWN + 2).round().long()[1:-1]
    )  # a volume's ends show little
    shown = [row | {"images": row["images"][chosen]} for row in rows]
    heading = f"{data}, {args.split}, {rows[0]['bits_per_pixel']:.4f} bits per pixel"
    plot(Path(f"{out}.png"), originals[chosen], shown, [str(names[i]) for i in chosen], heading)
    result = {
        "data": data,
        "split": args.split,
        "slices": len(names),
        "device": utils.describe_device(device),
    }
    rows = [{name: value for name, value in row.items() if name != "images"} for row in rows]
    utils.write_json(Path(f"{out}.json"), result | {"versions": utils.versions(), "rows": rows})
    Path(f"{out}.md").write_text(
        f"{heading}, {len(names)} slices.\n\n{table(rows)}", encoding="utf-8"
    )
    print(f"\n{table(rows)}\nwritten: {out}.md, .json and .png")
    return 0


if __name__ == "__main__":
    utils.run_script(main)
