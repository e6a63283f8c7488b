"""One self-contained HTML page of a run, and a comparison of several.

    python report.py runs/x                          # runs/x/report.html; train.py and predict.py --html write it too
    python report.py runs/x runs/y -o compare.html   # side by side: SSIM, PSNR, bits per pixel, time

Everything is in the file, pictures too: it can be mailed, and opened without a network.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import io
from pathlib import Path

import utils
from evaluation import plots
from evaluation.plots import plt
from utils import UserError

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } img { max-width: 100% }
td, th { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4 } th { font-weight: 600 }
td:first-child, th:first-child { text-align: left } details { margin: .5rem 0 } .note { color: #666 }
"""
SCORES = ("ssim", "ssim_zscore", "ssim_uniform", "ssim_body", "psnr")


def table(head: list[str], rows: list[list]) -> str:
    """Cells are escaped: names of files and of runs may hold anything."""
    cells = [
        [html.escape(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row]
        for row in rows
    ]
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells]
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><tr>{heads}</tr>{''.join(lines)}</table>"


def picture(path: Path, text: str) -> str:
    """A PNG within the page, or a line that says that it isn't there."""
    if not path.exists():
        return f'<p class="note">{html.escape(text)}: not made yet</p>'
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,{content}"></figure>'


def page(title: str, sections: dict[str, str]) -> str:
    title, body = (
        html.escape(title),
        "".join(f"<h2>{html.escape(name)}</h2>{text}" for name, text in sections.items()),
    )
    head = f'<meta charset="utf-8"><title>{title}</title><link rel="icon" href="data:,"><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{title}</h1>{body}</body></html>\n'


def fold(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def read_rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def evaluated(run: Path) -> list[str]:
    """The splits that predict.py has been run on."""
    return [
        split for split in ("test", "validate", "train") if (run / split / "metrics.json").exists()
    ]


def write_report(run: Path) -> Path:
    """<run>/report.html, of what the run's folder holds by now."""
    config, history = utils.read_json(run / "config.json"), read_rows(run / "metrics.csv")
    panels = sorted(
        (run / "plots").glob("epoch_*/*.png"), key=lambda path: int(path.parent.name.split("_")[1])
    )
    about = [
        [name, config[name]]
        for name in ("bits_per_pixel", "slices", "device", "precision")
        if name in config
    ]
    arguments = table(
        ["argument", "value"], [list(item) for item in config.get("arguments", {}).items()]
    )
    versions = table(
        ["package", "version"], [list(item) for item in config.get("versions", {}).items()]
    )
    wanted = (
        "epoch",
        "train_loss",
        "val_loss",
        "val_ssim",
        "val_psnr",
        "codes_used",
        "perplexity",
        "seconds",
    )
    columns = [name for name in wanted if history and name in history[0]]
    every = -(-len(history) // 12) or 1
    epochs = [
        [rounded(row[name]) for name in columns] for row in [*history[:-1:every], *history[-1:]]
    ]
    sections = {
        "Configuration": table(["", "value"], about)
        + fold("all arguments", arguments)
        + fold("versions", versions),
        "Curves": picture(run / "loss_ssim_plot.png", "loss and validation ssim by epoch")
        + table(columns, epochs),
        "Panels": picture(
            panels[-1] if panels else run / "-", "validation slices of the last panel"
        ),
    }
    for split in evaluated(run):
        sections |= {f"{name}, {split}": text for name, text in split_sections(run / split).items()}
    if not evaluated(run):
        command = html.escape(utils.format_command("predict.py", "--run", run, "--html"))
        sections["Scores"] = f"<p>not evaluated yet: <code>{command}</code></p>"
    utils.write_bytes(run / "report.html", page(f"Run {run.resolve().name}", sections).encode())
    return run / "report.html"


def rounded(text: str) -> str:
    return f"{float(text):.4g}" if "." in text else text


def split_sections(folder: Path) -> dict[str, str]:
    """What predict.py has written to <run>/<split>/."""
    found, sections = utils.read_json(folder / "metrics.json"), {}
    cases = list(found["ssim"]["by_case"])[:12]
    scores = [
        [name, found[name]["mean"], *(found[name]["by_case"][case] for case in cases)]
        for name in SCORES
    ]
    told = f"{found['slices']} slices at {found['bits_per_pixel']:.4f} bits per pixel; ssim names as in the README; "
    told = f'<p class="note">{told}{found["excluded_slices"]} constant slices excluded</p>'
    sections["Scores"] = (
        table(["score", "mean", *(f"case {case}" for case in cases)], scores) + told
    )
    if organs := found.get("organs"):
        lines = [[organ, one["slices"], *(one[name]["mean"] for name in ("ssim", "psnr", "bias"))]
                 for organ, one in organs.items()]  # fmt: skip
        sections["By organ"] = table(["inside", "slices", "ssim", "psnr (dB)", "bias (std)"], lines)
    used = f"{found['codes_used']} codes used, perplexity {found['perplexity']:.0f}"
    pictures = picture(folder / "code_use.png", used) + picture(
        folder / "code_map.png", "a slice's codes"
    )
    sections["Code use"] = f"<p>{used}</p>{pictures}"
    slices = sorted(
        (row for row in read_rows(folder / "slices.csv") if row["ssim"]),
        key=lambda row: float(row["ssim"]),
    )
    names = [f"case {one['case']} week {one['week']} slice {one['slice']}" if one["week"] else
             f"{one.get('file') or one['case']}, slice {one['slice']}" for one in slices[:8]]  # fmt: skip
    scores = [[one[name] for name in ("ssim", "ssim_body", "psnr")] for one in slices[:8]]
    lines = [[name, *those] for name, those in zip(names, scores, strict=True)]
    panels = picture(folder / "best_median_worst.png", "worst, median and best slices")
    return sections | {
        "Worst slices": table(["slice", "ssim", "ssim_body", "psnr (dB)"], lines) + panels
    }


def compare(runs: list[Path], path: Path) -> Path:
    """A table, and curves over each other, of several runs."""
    rows, figure = [], plt.figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for run in runs:
        config, history = utils.read_json(run / "config.json"), read_rows(run / "metrics.csv")
        split = next(iter(evaluated(run)), None)
        scores = utils.read_json(run / split / "metrics.json") if split else None
        means = (
            [scores[name]["mean"] for name in SCORES]
            if scores
            else ["not evaluated"] + [""] * (len(SCORES) - 1)
        )
        seconds, name = sum(float(row["seconds"]) for row in history), run.resolve().name
        rate = config.get("bits_per_pixel", "")
        rows.append(
            [
                name,
                split or "",
                rate,
                *means,
                len(history),
                f"{seconds / 60:.1f}",
                config.get("device", ""),
            ]
        )
        epochs = [int(row["epoch"]) for row in history]
        axes[0].plot(
            epochs,
            [float(row["val_ssim"]) for row in history],
            marker=".",
            label=plots.escape_dollars(name),
        )
        if scores:
            axes[1].scatter(
                scores["bits_per_pixel"], scores["ssim"]["mean"], label=plots.escape_dollars(name)
            )
    axes[0].set(xlabel="epoch", ylabel="validation ssim")
    axes[1].set(xlabel="bits per pixel", ylabel="ssim of the split in the table")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    plt.close(figure)
    image = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    head = ["run", "split", "bits per pixel", *SCORES, "epochs", "minutes", "device"]
    sections = {
        "Table": table(head, rows),
        "Curves": f'<figure><img alt="curves" src="{image}"></figure>',
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    utils.write_bytes(path, page(f"{len(runs)} runs", sections).encode())
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("compare.html"),
        help="of several runs (compare.html)",
    )
    args = parser.parse_args(argv)
    for run in args.runs:
        if not (run / "config.json").exists():
            raise UserError(f"{run} is no run of train.py: it has no config.json")
    print(
        f"written: {write_report(args.runs[0]) if len(args.runs) == 1 else compare(args.runs, args.out)}"
    )
    return 0


if __name__ == "__main__":
    utils.run_script(main)
