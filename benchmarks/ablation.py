"""Train named variants of train.py for equal epochs on equal data, and compare them on the test split.

    python benchmarks/ablation.py --data DIR                             # every variant, one seed
    python benchmarks/ablation.py --data DIR --variants document tuned --seeds 0 1 2

Each variant and seed is a run of train.py and predict.py in --runs-dir; a run that is there already is not
trained again, one that was stopped goes on. Writes <out>.json and <out>.md: mean and spread over seeds. Choose by
the validation column; the test columns are for reporting.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "document": "--recipe document",
    "document, uniform start": "--recipe document --codebook-init uniform",
    "tuned": "--recipe tuned",
    "tuned, no restarts": "--recipe tuned --restart-below 0",
    "tuned, no flips": "--recipe tuned --no-augment",
    "tuned, gradient codebook": "--recipe tuned --codebook gradient --restart-below 0",
}
SCORES = ("ssim", "ssim_zscore", "ssim_uniform", "ssim_body", "psnr")


def run_once(args: argparse.Namespace, variant: str, seed: int) -> dict:
    """Train and evaluate one variant with one seed; what the results file holds of it."""
    flags = f"{VARIANTS[variant]} --epochs {args.epochs} --seed {seed}".split()
    name = "_".join(["".join(c if c.isalnum() else "_" for c in variant), *(f.strip("-") for f in flags[-4:])])
    run = args.runs_dir / args.data.resolve().name / name
    command = ["train.py", "--data", args.data, "--runs-dir", run.parent, "--name", name, *flags]
    epochs_done = len((run / "metrics.csv").read_text().splitlines()) - 1 if (run / "metrics.csv").exists() else 0
    if epochs_done:
        trained_on = Path(json.loads((run / "config.json").read_text())["arguments"]["data"])
        data = args.data.resolve()  # train.py may have found the slices below it, or one level above
        if data not in (trained_on, *trained_on.parents) and data.parent != trained_on:
            sys.exit(f"{run} was trained on {trained_on}, not on {args.data}: name another --runs-dir")
    if epochs_done < args.epochs:
        execute(command + (["--resume"] if (run / "config.json").exists() else []))
    if not (run / "test" / "metrics.json").exists():
        execute(["predict.py", "--run", run, "--data", args.data])
    config = json.loads((run / "config.json").read_text())
    metrics = json.loads((run / "test" / "metrics.json").read_text())
    with open(run / "metrics.csv") as file:
        history = list(csv.DictReader(file))
    return {
        "variant": variant, "flags": VARIANTS[variant], "seed": seed, "epochs": len(history),
        "minutes": round(sum(float(row["seconds"]) for row in history) / 60, 2),
        "bits_per_pixel": metrics["bits_per_pixel"], "codes_used": metrics["codes_used"],
        "perplexity": round(metrics["perplexity"], 1),
        "validation_ssim": max(float(row["val_ssim"]) for row in history),
        "test": {name: {k: metrics[name][k] for k in ("mean", "by_case")} for name in SCORES},
        "test_slices": metrics["slices"], "device": config["device"], "versions": config["versions"],
        "evaluated_at_commit": metrics["versions"]["commit"],
    }  # fmt: skip


def execute(command: list) -> None:
    done = subprocess.run([sys.executable, ROOT / command[0], *map(str, command[1:])], check=False)
    if done.returncode:
        sys.exit(done.returncode)  # the script has said why


def table(results: list[dict]) -> str:
    """Markdown: a row a variant, mean over seeds, and half the range over seeds where there are several."""

    def cell(rows: list[dict], value, digits: int) -> str:
        values = [value(row) for row in rows]
        spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    lines = [
        "| variant | seeds | epochs | minutes | bits per pixel | validation `ssim` | `ssim` | `ssim_zscore` "
        "| `ssim_uniform` | `ssim_body` | PSNR (dB) | codes used | perplexity |",
        "|" + "---|" * 13,
    ]
    for variant in dict.fromkeys(row["variant"] for row in results):
        rows = [row for row in results if row["variant"] == variant]
        cells = [variant, str(len(rows)), str(rows[0]["epochs"]), cell(rows, lambda row: row["minutes"], 1)]
        cells += [f"{rows[0]['bits_per_pixel']:.4f}", cell(rows, lambda row: row["validation_ssim"], 3)]
        cells += [cell(rows, lambda row, n=n: row["test"][n]["mean"], 2 if n == "psnr" else 3) for n in SCORES]
        cells += [cell(rows, lambda row: row["codes_used"], 0), cell(rows, lambda row: row["perplexity"], 0)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--data", type=Path, required=True, help="folder of slices, as for train.py")
    flag("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=f"of {list(VARIANTS)}")
    flag("--seeds", type=int, nargs="+", default=[0], help="a run of each variant for each seed (0)")
    flag("--epochs", type=int, default=100, help="of every run (100)")
    flag("--runs-dir", type=Path, default=Path("runs/ablation"), help="where the runs are kept (runs/ablation)")
    flag("--out", type=Path, help="result files, without ending (benchmarks/results/ablation_<data>)")
    args = parser.parse_args()
    out = args.out or ROOT / "benchmarks" / "results" / f"ablation_{args.data.resolve().name}"
    out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in args.seeds:  # seeds outermost: a first table stands after the first seed
        for variant in args.variants:
            results.append(run_once(args, variant, seed))
            results.sort(key=lambda row: (args.variants.index(row["variant"]), row["seed"]))
            Path(f"{out}.json").write_text(json.dumps(results, indent=1) + "\n")
            Path(f"{out}.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
