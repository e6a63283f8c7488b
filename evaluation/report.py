"""Write one HTML page about a run, or a comparison of several runs.

    python -m evaluation.report runs/x                            # writes runs/x/report.html
    python -m evaluation.report runs/x runs/y -o compare.html     # scores, bits per pixel, time

train.py and predict.py --html also write a run's page. A page is a single file that contains its
figures, so it can be sent by e-mail and opened offline.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import string
from pathlib import Path

import utils
from evaluation import plots
from evaluation.metrics import SCORE_NAMES
from training.run_names import resolve_run
from utils import UserError

PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222 }
h1 { font-size: 1.5rem }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4 }
th { font-weight: 600 }
td:first-child, th:first-child { text-align: left }
img { max-width: 100% }
details { margin: .5rem 0 }
.note { color: #666 }
</style>
</head>
<body>
<h1>$title</h1>
$sections
</body>
</html>
""")

MAX_EPOCHS = 12  # maximum number of epochs in the table, besides the last epoch
MAX_CASES = 12  # maximum number of cases in the table of scores
WORST_SLICES = 8  # number of slices in the table of worst slices
EPOCH_COLUMNS = (
    "epoch",
    "train_loss",
    "val_loss",
    "val_ssim",
    "val_psnr",
    "codes_used",
    "perplexity",
    "seconds",
)


# ---------------------------------------------------------------- a run


def write_report(run: Path) -> Path:
    """Write <run>/report.html from the files in the run's folder, and return its path."""
    sections = {
        "Configuration": _configuration_html(utils.read_json(run / "config.json")),
        "Curves": _curves_html(run),
        "Reconstructions": _panels_html(run),
    }
    splits = _evaluated_splits(run)
    for split in splits:
        for name, content in _split_sections(run / split).items():
            sections[f"{name}, {split}"] = content
    if not splits:
        command = utils.format_command("predict.py", "--run", run, "--html")
        content = f"not evaluated yet; to evaluate it: <code>{html.escape(command)}</code>"
        sections["Scores"] = f"<p>{content}</p>\n"
    path = run / "report.html"
    utils.write_bytes(path, _page_html(f"Run {run.resolve().name}", sections).encode())
    return path


def _evaluated_splits(run: Path) -> list[str]:
    """Return the splits that predict.py has evaluated, in the order test, validate, train."""
    splits = ("test", "validate", "train")
    return [split for split in splits if (run / split / "metrics.json").exists()]


def _configuration_html(config: dict) -> str:
    """Return the content of config.json as tables; long tables are collapsed."""
    names = ("bits_per_pixel", "slices", "device", "precision")
    overview = [(name, config[name]) for name in names if name in config]
    arguments = _table_html(["argument", "value"], config.get("arguments", {}).items())
    versions = _table_html(["package", "version"], config.get("versions", {}).items())
    return (
        _table_html(["", "value"], overview)
        + _details_html("all arguments", arguments)
        + _details_html("versions", versions)
    )


def _curves_html(run: Path) -> str:
    """Return the training curves, and a table of up to 12 epochs and the last epoch."""
    history = _read_rows(run / "metrics.csv")
    columns = [name for name in EPOCH_COLUMNS if history and name in history[0]]
    step = -(-len(history) // MAX_EPOCHS) or 1
    rows = []
    for epoch in [*history[:-1:step], *history[-1:]]:
        rows.append([_round_cell(epoch[name]) for name in columns])
    picture = _picture_html(run / "loss_ssim_plot.png", "loss and validation ssim by epoch")
    return picture + _table_html(columns, rows)


def _panels_html(run: Path) -> str:
    """Return the newest figure of reconstructed validation slices."""
    pictures = list((run / "plots").glob("epoch_*/*.png"))
    newest = max(pictures, key=lambda path: int(path.parent.name.split("_")[1]), default=None)
    return _picture_html(newest, "reconstructions of validation slices")


def _split_sections(folder: Path) -> dict[str, str]:
    """Return the sections about a split, {name: HTML}, from the files that predict.py wrote."""
    summary = utils.read_json(folder / "metrics.json")
    sections = {"Scores": _scores_html(summary)}
    if summary.get("organs"):
        sections["By organ"] = _organs_html(summary["organs"])
    usage = f"{summary['codes_used']} codes used, perplexity {summary['perplexity']:.0f}"
    sections["Codebook usage"] = (
        f"<p>{html.escape(usage)}</p>\n"
        + _picture_html(folder / "code_use.png", usage)
        + _picture_html(folder / "code_map.png", "codes of a slice")
    )
    sections["Worst slices"] = _worst_slices_html(folder)
    return sections


def _scores_html(summary: dict) -> str:
    """Return a table of mean scores: over all slices, and over the slices of each case."""
    cases = list(summary["ssim"]["by_case"])[:MAX_CASES]
    rows = []
    for name in SCORE_NAMES:
        by_case = summary[name]["by_case"]
        rows.append([name, summary[name]["mean"], *(by_case[case] for case in cases)])
    note = (
        f"{summary['slices']} slices at {summary['bits_per_pixel']:.4f} bits per pixel; "
        f"{summary['excluded_slices']} constant slices excluded; "
        "evaluation/metrics.py defines the scores"
    )
    head = ["score", "mean", *(f"case {case}" for case in cases)]
    return _table_html(head, rows) + _note_html(note)


def _organs_html(organs: dict[str, dict]) -> str:
    """Return the table of scores inside each organ."""
    rows = []
    for organ, scores in organs.items():
        means = [scores[name]["mean"] for name in ("ssim", "psnr", "bias")]
        rows.append([organ, scores["slices"], *means])
    return _table_html(["inside", "slices", "ssim", "psnr (dB)", "bias (std)"], rows)


def _worst_slices_html(folder: Path) -> str:
    """Return a table of the slices with the lowest ssim, and the figure that shows the worst."""
    slices = [row for row in _read_rows(folder / "slices.csv") if row["ssim"]]
    slices.sort(key=lambda row: float(row["ssim"]))
    rows = []
    for row in slices[:WORST_SLICES]:
        if row["week"]:
            name = f"case {row['case']} week {row['week']} slice {row['slice']}"
        else:  # older runs have no column "file"
            name = f"{row.get('file') or row['case']}, slice {row['slice']}"
        rows.append([name, row["ssim"], row["ssim_body"], row["psnr"]])
    table = _table_html(["slice", "ssim", "ssim_body", "psnr (dB)"], rows)
    return table + _picture_html(folder / "best_median_worst.png", "worst, median and best slices")


# ---------------------------------------------------------------- several runs


def write_comparison(runs: list[Path], path: Path) -> Path:
    """Write a page that compares several runs (a table and curves), and return its path."""
    rows = []
    curves = []
    points = []
    for run in runs:
        name = run.resolve().name
        config = utils.read_json(run / "config.json")
        history = _read_rows(run / "metrics.csv")
        splits = _evaluated_splits(run)
        split = splits[0] if splits else ""
        if split:
            summary = utils.read_json(run / split / "metrics.json")
            scores = [summary[score]["mean"] for score in SCORE_NAMES]
            points.append((name, summary["bits_per_pixel"], summary["ssim"]["mean"]))
        else:
            scores = ["not evaluated"] + [""] * (len(SCORE_NAMES) - 1)
        minutes = sum(float(row["seconds"]) for row in history) / 60
        rate = config.get("bits_per_pixel", "")
        device = config.get("device", "")
        rows.append([name, split, rate, *scores, len(history), f"{minutes:.1f}", device])
        epochs = [int(row["epoch"]) for row in history]
        curves.append((name, epochs, [float(row["val_ssim"]) for row in history]))
    head = ["run", "split", "bits per pixel", *SCORE_NAMES, "epochs", "minutes", "device"]
    sections = {
        "Table": _table_html(head, rows),
        "Curves": _image_html(plots.plot_comparison(curves, points), "curves"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    utils.write_bytes(path, _page_html(f"{len(runs)} runs", sections).encode())
    return path


# ---------------------------------------------------------------- parts of a page

# All text is escaped: names of files and runs may contain any character.


def _page_html(title: str, sections: dict[str, str]) -> str:
    """Return a page with the given sections, {heading: HTML}."""
    parts = [f"<h2>{html.escape(name)}</h2>\n{content}" for name, content in sections.items()]
    return PAGE.substitute(title=html.escape(title), sections="\n".join(parts))


def _table_html(head: list[str], rows) -> str:
    """Return a table with column titles `head`; each row is a sequence of plain values."""
    lines = [_row_html("th", head)]
    for row in rows:
        lines.append(_row_html("td", [_format_cell(cell) for cell in row]))
    return "<table>\n" + "\n".join(lines) + "\n</table>\n"


def _row_html(tag: str, texts: list[str]) -> str:
    """Return a row of a table, with cells of the given tag ("td" or "th")."""
    cells = [f"<{tag}>{html.escape(text)}</{tag}>" for text in texts]
    return "<tr>" + "".join(cells) + "</tr>"


def _note_html(text: str) -> str:
    """Return a paragraph in grey."""
    return f'<p class="note">{html.escape(text)}</p>\n'


def _details_html(summary: str, content: str) -> str:
    """Return a section that the reader can expand; `content` is HTML."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>\n"


def _picture_html(path: Path | None, description: str) -> str:
    """Return a PNG file as a figure, or a note if the file does not exist yet."""
    if path is None or not path.exists():
        return _note_html(f"{description}: not created yet")
    return _image_html(path.read_bytes(), description)


def _image_html(png: bytes, description: str) -> str:
    """Return a PNG as a figure that is embedded in the page."""
    content = base64.b64encode(png).decode()
    address = f"data:image/png;base64,{content}"
    return f'<figure><img alt="{html.escape(description)}" src="{address}"></figure>\n'


def _format_cell(value) -> str:
    """Format a value for a table; floats get four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _round_cell(text: str) -> str:
    """Round a number from metrics.csv to four significant digits; keep integers unchanged."""
    return f"{float(text):.4g}" if "." in text else text


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header, or [] if the file does not exist."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("compare.html"),
        metavar="FILE",
        help="output file of a comparison (default: compare.html)",
    )
    args = parser.parse_args(argv)
    runs = [resolve_run(run) for run in args.runs]
    for run in runs:
        if not (run / "config.json").exists():
            raise UserError(f"{run} has no config.json; expected the folder of a run of train.py")
    path = write_report(runs[0]) if len(runs) == 1 else write_comparison(runs, args.out)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    utils.run_script(main)
