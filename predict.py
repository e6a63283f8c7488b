"""Evaluate a trained VQ-VAE on a split, or reconstruct your own files.

    python predict.py                               # the newest run, on the test split of its data
    python predict.py --run runs/x --split validate
    python predict.py --run runs/x --data /data/other_slices

An evaluation writes to <run>/<split>/: metrics.json, slices.csv (one row per slice), and the
figures best_median_worst.png, ssim_histogram.png, code_use.png and code_map.png.
evaluation/metrics.py defines the scores.

    python predict.py scan.nii.gz -o out            # reconstruct your own files with the newest run
    python predict.py /data/scans -o out --axis axial --error-map --export-codes
    python predict.py --from-codes out/scan_codes.npz -o again

PATH can be a file or a folder. Slices and volumes are reconstructed at their original size. If
there is no run yet, the bundled model resources/pelvis.pt is used. For each file, predict.py writes
a NIfTI file with the same shape and geometry, and a row in scores.csv. If the original contains
unscaled integers, the NIfTI file has the same data type; otherwise, it is float32. Figures show the
first files. OUT may contain results of earlier calls. Those of other files are never overwritten.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import utils
from dataset import SliceDataset
from evaluation import metrics, plots, report
from evaluation.batch_figures import MAX_FIGURES, SLICES_PER_SHEET
from evaluation.export_onnx import export
from evaluation.metrics import SCORE_NAMES, SSIM_NAMES, Evaluation
from evaluation.organs import evaluate_organs
from evaluation.reconstruct import reconstruct_files
from modules import VQVAE
from mri.files import printable
from mri.preprocessing import parse_axis
from prior.coding import EntropyCoder, load_prior
from training import environment
from training.checkpoint import load_model
from training.guards import preserve_process_state
from training.run_folder import load_run_data, newest_run
from training.run_names import resolve_run
from utils import UserError

MIN_CASES = 10  # with fewer cases, no confidence interval is printed

# ---------------------------------------------------------------- flags

SPLIT_FLAGS = ("data", "split", "html", "batch_size", "skip_bad_files", "cache_dir")
FILE_FLAGS = ("axis", "nan_value", "resize", "error_map", "export_codes", "entropy_coded")
FILE_FLAGS += ("from_codes", "figures")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("paths", nargs="*", metavar="PATH", help="NIfTI file to reconstruct, or a folder of them")
    flag("--run", metavar="DIR", help="folder of the run (default: the newest run in --runs-dir)")
    flag("--runs-dir", metavar="DIR", default="runs", help="folder of all runs (default: runs)")
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")

    flag = parser.add_argument_group("evaluation of a split").add_argument
    flag("--data", metavar="DIR", help="folder of slices or volumes (default: the run's data)")
    splits = ("train", "validate", "test")
    flag("--split", choices=splits, default="test", help="split to evaluate (default: test)")
    flag("--html", action="store_true", help="also write a report to <run>/report.html")
    flag(
        "--batch-size",
        metavar="N",
        type=int,
        default=16,
        help="slices per batch; does not affect results (default: 16)",
    )
    flag("--skip-bad-files", action="store_true", help="skip unusable files and print a note")
    flag(
        "--cache-dir",
        metavar="DIR",
        help="folder for the cache of decoded slices (default: the run's cache folder, else "
        "$HIPMRI_CACHE, else the user's cache folder)",
    )

    flag = parser.add_argument_group("your own files").add_argument
    flag("-o", "--out", metavar="DIR", help="output folder (required with PATH and with --export)")
    flag(
        "--axis",
        type=parse_axis,
        choices=("coronal", "sagittal", "axial", 0, 1, 2),
        help="axis along which volumes are cut into slices: an anatomical name, or the index of an "
        "axis of the stored array (default: the run's axis)",
    )
    flag(
        "--nan-value",
        metavar="X",
        type=float,
        help="value that replaces NaN, for example in a background without data (default: the "
        "run's value; if it has none, files with NaN are unusable)",
    )
    flag(
        "--resize",
        action="store_true",
        help="resize slices to the size of the training slices, and resize the reconstructions "
        "back to the original size",
    )
    flag(
        "--error-map",
        action="store_true",
        help="also write |reconstruction - original| as NIfTI. It shows edges, noise and scanner "
        "differences. It is not an anomaly map, because lesions may be reconstructed well",
    )
    flag("--export-codes", action="store_true", help="also write the codes as an .npz file")
    flag(
        "--entropy-coded",
        action="store_true",
        help="with --export-codes: compress the codes with the run's causal prior, as a .vqc file",
    )
    flag(
        "--from-codes",
        action="store_true",
        help="decode the codes in PATH, an .npz or .vqc file from --export-codes or a folder of "
        "them, and write the reconstructions",
    )
    flag(
        "--figures",
        metavar="N",
        type=int,
        default=MAX_FIGURES,
        help="maximum number of figures. A volume has a figure of its own; 2D files are shown on "
        f"contact sheets of up to {SLICES_PER_SHEET} slices (default: {MAX_FIGURES})",
    )

    flag = parser.add_argument_group("other programs").add_argument
    flag(
        "--export",
        action="store_true",
        help="write encoder.onnx and decoder.onnx to --out "
        "(same as python -m evaluation.export_onnx)",
    )
    args = parser.parse_args(argv)
    check_flags(parser, args)
    return args


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a usage error if flags of different tasks are combined, or if -o is missing."""

    def changed(names: tuple[str, ...]) -> str:
        """Return the first flag whose value is not its default, or "" if there is none."""
        for name in names:
            if getattr(args, name) != parser.get_default(name):
                return "--" + name.replace("_", "-")
        return ""

    split_flag = changed(SPLIT_FLAGS)
    file_flag = changed(FILE_FLAGS)
    if args.paths and args.export:
        parser.error("--export takes no PATH; omit one of them")
    if (args.paths or args.export) and split_flag:
        parser.error(
            f"{split_flag} is for the evaluation of a split; omit it with PATH or --export"
        )
    if (args.paths or args.export) and not args.out:
        parser.error("the output folder is missing; name it with -o")
    if not args.paths and file_flag:
        parser.error(f"{file_flag} is for your own files; name them as PATH")
    if args.entropy_coded and not args.export_codes:
        parser.error("--entropy-coded is for --export-codes; add it")
    if not (args.paths or args.export) and args.out:
        parser.error("--out is for your own files; name them as PATH")


# ---------------------------------------------------------------- results


def summarise(evaluation: Evaluation, data: SliceDataset) -> dict:
    """Return the content of metrics.json: mean scores, codebook usage and numbers of slices."""
    has_score = ~data.constant.numpy()
    cases = [name.case for name, scored in zip(data.names, has_score, strict=True) if scored]
    summary = {}
    for name in SCORE_NAMES:
        scores = evaluation.scores[name].double().numpy()
        summary[name] = metrics.mean_by_case(scores[has_score], cases)
    summary["codes_used"], summary["perplexity"] = metrics.code_usage(evaluation.counts)
    summary["slices"] = int(has_score.sum())
    summary["excluded_slices"] = int((~has_score).sum())
    return summary


def print_table(summary: dict) -> None:
    """Print the mean of each score with its confidence interval or, for few cases, case means."""
    cases = list(summary["ssim"]["by_case"])
    has_interval = len(cases) >= MIN_CASES
    columns = ["95 % interval"] if has_interval else [f"case {case}" for case in cases]
    columns = ["mean", *columns]
    table = [("", columns)]
    for name in SCORE_NAMES:
        digits = 2 if name == "psnr" else 4
        by_case = summary[name]["by_case"].values()
        cells = [f"{summary[name]['mean']:.{digits}f}"]
        if has_interval:
            low, high = metrics.bootstrap_interval(list(by_case))
            cells.append(f"{low:.{digits}f} to {high:.{digits}f}")
        else:
            cells += [f"{mean:.{digits}f}" for mean in by_case]
        table.append(("psnr (dB)" if name == "psnr" else name, cells))
    widths = [max(18, len(column) + 2) for column in columns]
    print()
    for label, cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        print(label.ljust(14) + "".join(padded))
    print(
        f"\n{summary['bits_per_pixel']:.4f} bits per pixel; "
        f"{summary['codes_used']} of {summary['num_embeddings']} codes used, "
        f"perplexity {summary['perplexity']:.0f}; "
        f"{summary['slices']} slices, {summary['excluded_slices']} constant slices excluded"
    )
    if has_interval:
        print(
            f"the interval is a bootstrap interval of the mean over {len(cases)} cases; "
            "it assumes that each case is a different patient"
        )
    else:
        print(f"{len(cases)} case(s) are too few for a confidence interval")


def print_organs(organs: dict[str, dict]) -> None:
    """Print the scores inside each organ; bias is in standard deviations of the slice."""
    print(f"\n{'inside':14}{'slices':>8}{'ssim':>10}{'psnr (dB)':>12}{'bias (std)':>12}")
    for organ, scores in organs.items():
        ssim, psnr, bias = (scores[name]["mean"] for name in ("ssim", "psnr", "bias"))
        ssim_cell = "" if ssim is None else f"{ssim:.4f}"
        print(f"{organ:14}{scores['slices']:8}{ssim_cell:>10}{psnr:12.2f}{bias:+12.4f}")


def write_slices(path: Path, data: SliceDataset, root: str, scores: dict[str, Tensor]) -> None:
    """Write slices.csv with one row per slice; the scores of constant slices are empty.

    The column `file` contains paths relative to the data folder `root`.
    """
    rows = []
    for index, (name, file) in enumerate(zip(data.names, data.files, strict=True)):
        row = {"case": name.case, "week": name.week, "slice": name.slice}
        row["file"] = printable(os.path.relpath(file, root))
        for score in SCORE_NAMES:
            row[score] = "" if data.constant[index] else f"{scores[score][index]:.6f}"
        rows.append(row)
    utils.write_csv(path, rows)


# ---------------------------------------------------------------- figures


def pick_slices(ssim: Tensor, constant: Tensor) -> dict[int, str]:
    """Pick the two worst, two median and two best slices.

    Args:
        ssim: (N,), the score of each slice.
        constant: (N,) bool, slices to skip.

    Returns:
        {index: "worst", "median" or "best"}, in ascending order of ssim. No slice is picked twice,
        so there may be fewer than six.
    """
    count = int((~constant).sum())
    order = ssim.masked_fill(constant, torch.inf).argsort()[:count].tolist()
    middle = len(order) // 2
    median = order[max(middle - 1, 0) : middle + 1]
    labels: dict[int, str] = {}
    for label, indices in (("worst", order[:2]), ("best", order[-2:]), ("median", median)):
        for index in indices:
            labels.setdefault(index, label)
    return {index: labels[index] for index in order if index in labels}


@torch.no_grad()
def write_figures(
    folder: Path, model: VQVAE, data: SliceDataset, evaluation: Evaluation, heading: str
) -> None:
    """Write the four figures of an evaluation (see the top of this file)."""
    scores, counts, _ = evaluation
    ssim = scores["ssim"]
    labels = pick_slices(ssim, data.constant)
    indices = list(labels)
    originals = data.batch(torch.tensor(indices))
    reconstructions, quantized = model(originals.to(next(model.parameters()).device))
    reconstructions = reconstructions.cpu()
    spacing = data.description["spacing"]
    titles = [f"{labels[i]}\n{data.names[i]}\nssim {ssim[i]:.3f}" for i in indices]
    path = folder / "best_median_worst.png"
    plots.plot_reconstructions(path, originals, reconstructions, titles, heading, spacing)

    ssim_scores = {name: scores[name].numpy() for name in SSIM_NAMES}
    plots.plot_score_histogram(folder / "ssim_histogram.png", ssim_scores, heading)

    used, perplexity = metrics.code_usage(counts)
    usage = f"{used} of {len(counts)} used, perplexity {perplexity:.0f}"
    plots.plot_code_usage(folder / "code_use.png", counts, f"{heading}; {usage}")

    shown = list(labels.values()).index("median") if "median" in labels.values() else 0
    quantizer = model.vector_quantization
    codes = quantized.indices[shown]
    if quantizer.num_codebooks > 1:  # show the codes of the first codebook
        quantizer = quantizer.quantizers[0]
        codes = codes[..., 0]
    embeddings = quantizer.embedding.weight.detach().cpu()
    name = data.names[indices[shown]]
    plots.plot_code_map(
        folder / "code_map.png",
        originals[shown],
        reconstructions[shown],
        codes,
        plots.code_colours(embeddings),
        f"{name}, ssim {ssim[indices[shown]]:.3f}; similar embeddings have similar colours",
        spacing,
    )


# ---------------------------------------------------------------- the script


@preserve_process_state()
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = utils.pick_device(args.device)
    if args.paths:
        if args.figures < 0:
            raise UserError(f"--figures is {args.figures}; expected 0 or more")
        reconstruct_files(
            args.paths,
            Path(args.out),
            run=args.run,
            runs_dir=args.runs_dir,
            device=device,
            axis=args.axis,
            nan_value=args.nan_value,
            resize=args.resize,
            error_map=args.error_map,
            export_codes=args.export_codes,
            from_codes=args.from_codes,
            entropy_coded=args.entropy_coded,
            load_coder=lambda run, model: EntropyCoder(load_prior(run, model)),
            figures=args.figures,
        )
        return 0
    if args.export:
        export(args.run, args.runs_dir, Path(args.out))
        return 0

    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; expected 1 or more")
    run = resolve_run(args.run) if args.run else newest_run(Path(args.runs_dir))
    model = utils.to_device(load_model(VQVAE, run / "best.pt"), device)
    print(f"model: {run / 'best.pt'}")
    data, root = load_run_data(run, args.split, args.data, args.cache_dir, args.skip_bad_files)
    if data.constant.all():
        raise UserError(
            f"all {len(data)} slices of the {args.split} split are constant; there is nothing to "
            "measure. Evaluate another split or other data"
        )

    def progress(batches):
        return tqdm(batches, desc=args.split, unit=" batches")

    evaluation = metrics.evaluate(model, data, args.batch_size, device, SCORE_NAMES, progress)
    organs = evaluate_organs(model, data, args.batch_size)
    summary = summarise(evaluation, data) | {
        "bits_per_pixel": model.bits_per_pixel,
        "num_embeddings": len(evaluation.counts),
        "split": args.split,
        "checkpoint": str(run / "best.pt"),
        "data": root,
        "device": environment.describe_device(device),
        "versions": environment.versions(),
    }
    print_table(summary)
    if organs:
        summary["organs"] = organs
        print_organs(organs)

    folder = run / args.split
    folder.mkdir(exist_ok=True)
    utils.write_json(folder / "metrics.json", summary)
    write_slices(folder / "slices.csv", data, root, evaluation.scores)
    heading = f"{run.name}, {args.split}, {model.bits_per_pixel:.4f} bits per pixel"
    write_figures(folder, model, data, evaluation, heading)
    print(f"written: {', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}")
    if args.html:
        print(f"written: {report.write_report(run)}")
    return 0


if __name__ == "__main__":
    utils.run_script(main)
