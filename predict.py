"""Evaluate a trained VQ-VAE on a split, or reconstruct your own files.

    python predict.py                               # the newest run, on its data's test split
    python predict.py --run runs/x --split validate
    python predict.py --run runs/x --data /data/other_slices

Writes to <run>/<split>/: metrics.json, slices.csv (a row a slice), and the figures best_median_worst.png,
ssim_histogram.png, code_use.png and code_map.png. The README says how to read the SSIM names.

    python predict.py scan.nii.gz -o out            # by the newest run, or, before any training, by resources/pelvis.pt
    python predict.py /data/scans -o out --axis axial --error-map --export-codes
    python predict.py --from-codes out/scan_codes.npz -o again
    python predict.py --export -o out               # encoder.onnx and decoder.onnx, for other programs

Files and folders, slices and volumes, at their own size. Writes for each a NIfTI file of the same shape, affine and
kind of number, a picture, and a row of scores.csv.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import dataset
import utils
from evaluation import export_onnx, metrics, plots, reconstruct, report
from evaluation.metrics import SCORE_NAMES, SSIM_NAMES
from modules import VQVAE
from mri.files import printable
from training.checkpoint import load_model
from training.run_folder import load_run_data, newest_run
from utils import UserError


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag(
        "paths",
        nargs="*",
        metavar="PATH",
        help="your own NIfTI files, or folders of them; without, a split is evaluated",
    )
    flag(
        "--run",
        metavar="DIR",
        help="folder of the run (the newest in --runs-dir that has a best.pt)",
    )
    flag("--runs-dir", metavar="DIR", default="runs", help="where runs are kept (runs)")
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (auto)")
    flag = parser.add_argument_group("a split").add_argument
    flag("--data", metavar="DIR", help="folder of slices or volumes (the run's own)")
    flag(
        "--split",
        choices=("train", "validate", "test"),
        default="test",
        help="which split to evaluate (test)",
    )
    flag("--html", action="store_true", help="also <run>/report.html, all of the run on one page")
    flag("--batch-size", type=int, default=16, help="slices at a time; changes no figure (16)")
    flag(
        "--skip-bad-files",
        action="store_true",
        help="go on without files that can't be used, and count them",
    )
    flag(
        "--cache-dir",
        metavar="DIR",
        help="where prepared slices are kept; else $HIPMRI_CACHE; else the user's cache",
    )
    flag = parser.add_argument_group("your own files").add_argument
    flag("-o", "--out", metavar="DIR", help="where to write; needed with PATH")
    axes = ("coronal", "sagittal", "axial", "0", "1", "2")
    flag(
        "--axis",
        choices=axes,
        help="which way volumes are cut: by the affine, or as they are stored (the run's)",
    )
    flag(
        "--resize",
        action="store_true",
        help="bring slices to the size of the training slices, and back",
    )
    flag("--error-map", action="store_true", help="also |reconstruction - original|: edges, noise, odd scanners; "
         "no map of anomalies, as lesions may be reproduced faithfully")  # fmt: skip
    flag("--export-codes", action="store_true", help="also the codes, as .npz")
    flag(
        "--from-codes",
        action="store_true",
        help="PATH are .npz files of --export-codes: write what they stand for",
    )
    flag(
        "--export",
        action="store_true",
        help="write encoder.onnx and decoder.onnx to --out; needs onnx, onnxscript",
    )
    args = parser.parse_args(argv)
    of_files = ("axis", "resize", "error_map", "export_codes", "from_codes")
    given = [name for name in of_files if getattr(args, name)] + ["out"] * bool(
        args.out and not args.export
    )
    if given and not args.paths:
        parser.error(f"--{given[0].replace('_', '-')} is for your own files: name them")
    of_splits = ("data", "split", "html", "batch_size", "skip_bad_files", "cache_dir")
    given = [name for name in of_splits if getattr(args, name) != parser.get_default(name)]
    if given and (args.paths or args.export):
        parser.error(
            f"--{given[0].replace('_', '-')} is for a split: leave it out with PATH and --export"
        )
    if (args.paths or args.export) and not args.out:
        parser.error("say with -o where to write")
    if args.paths and args.export:
        parser.error("--export is of a model, without PATH")
    return args


def summarize(
    scores: dict[str, torch.Tensor], counts: torch.Tensor, data: dataset.SliceDataset
) -> dict:
    """What metrics.json holds of the figures: each score's mean over slices and over each case's slices."""
    kept = ~data.constant.numpy()
    cases = [name.case for name, keep in zip(data.names, kept, strict=True) if keep]
    summary = {
        name: metrics.mean_by_case(scores[name].double().numpy()[kept], cases)
        for name in SCORE_NAMES
    }
    summary["codes_used"], summary["perplexity"] = metrics.code_usage(counts)
    return summary | {"slices": int(kept.sum()), "excluded_slices": int((~kept).sum())}


def print_table(summary: dict, num_embeddings: int) -> None:
    """Mean and cases of each score. Under 10 cases there is no interval worth the name: their values stand instead."""
    cases = list(summary["ssim"]["by_case"])
    few = len(cases) < 10
    heads = ["mean", *(f"case {case}" for case in cases)] if few else ["mean", "95 % interval"]
    print(f"\n{'':14}" + "".join(f"{head:>18}" for head in heads))
    for name in SCORE_NAMES:
        mean, by_case = summary[name]["mean"], summary[name]["by_case"]
        digits = 2 if name == "psnr" else 4
        cells = [f"{value:.{digits}f}" for value in [mean, *(by_case.values() if few else [])]]
        if not few:
            cells.append("{:.{d}f} to {:.{d}f}".format(*interval(list(by_case.values())), d=digits))
        print(
            f"{name + (' (dB)' if name == 'psnr' else ''):14}"
            + "".join(f"{cell:>18}" for cell in cells)
        )
    print(
        f"\n{summary['bits_per_pixel']:.4f} bits per pixel; {summary['codes_used']} of {num_embeddings} codes used, "
        f"perplexity {summary['perplexity']:.0f}; {summary['slices']} slices, "
        f"{summary['excluded_slices']} constant ones excluded"
    )
    if few:
        print(
            f"{len(cases)} case(s): too few for a confidence interval; each case's own mean is shown instead"
        )
    else:
        print(
            f"the interval is of the mean over {len(cases)} cases (bootstrap), if each case is a patient"
        )


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over cases: slices of one patient are not independent, cases are."""
    draws = np.random.default_rng(0).choice(values, size=(10_000, len(values))).mean(1)
    return tuple(np.percentile(draws, [2.5, 97.5]))


@torch.no_grad()
def score_organs(model: VQVAE, data: dataset.SliceDataset, batch_size: int) -> dict[str, dict]:
    """{organ: {score: mean and each case's mean}}, where segmentations lie beside the slices; {}: they don't."""
    labels, device = data.labels(), next(model.parameters()).device
    if labels is None:
        return {}
    found: list[dict] = []
    groups = torch.arange(len(data)).split(batch_size)
    for indices, images in zip(groups, data.batches(groups, device), strict=True):
        found.append(metrics.organ_scores(images, model(images)[0], labels[indices].to(device)))
    cases, organs = np.array([name.case for name in data.names]), {}
    for organ in found[0]:
        values = {
            score: torch.cat([part[organ][score] for part in found]).cpu().numpy()
            for score in found[0][organ]
        }
        seen = ~np.isnan(values["psnr"])
        if seen.any():
            organs[organ] = {}
            for (
                score,
                x,
            ) in values.items():  # at the very edge an organ has a PSNR, and no window for SSIM
                has = ~np.isnan(x)
                mean = (
                    metrics.mean_by_case(x[has], cases[has].tolist())
                    if has.any()
                    else {"mean": None, "by_case": {}}
                )
                organs[organ][score] = mean
            organs[organ]["slices"] = int(seen.sum())
    return organs


def print_organs(organs: dict[str, dict]) -> None:
    print(f"\n{'inside':14}{'slices':>8}{'ssim':>10}{'psnr (dB)':>12}{'bias (std)':>12}")
    for organ, found in organs.items():
        ssim, psnr, bias = (found[score]["mean"] for score in ("ssim", "psnr", "bias"))
        ssim = "" if ssim is None else f"{ssim:.4f}"
        print(f"{organ:14}{found['slices']:8}{ssim:>10}{psnr:12.2f}{bias:+12.4f}")


def write_slices(
    path: Path, data: dataset.SliceDataset, root: str, scores: dict[str, torch.Tensor]
) -> None:
    """slices.csv: a row a slice, constant ones with empty scores; `file` is within the data's folder, root."""
    rows = []
    for i, (name, file) in enumerate(zip(data.names, data.files, strict=True)):
        place = printable(os.path.relpath(file, root))
        row = {"case": name.case, "week": name.week, "slice": name.slice, "file": place}
        row |= {
            score: "" if data.constant[i] else f"{scores[score][i]:.6f}" for score in SCORE_NAMES
        }
        rows.append(row)
    utils.write_csv(path, rows)


def code_colours(model: VQVAE) -> torch.Tensor:
    """A colour for each code, (K, 3) in [0, 1]: three main directions of the embeddings: like codes look alike."""
    weight = model.vector_quantization.embedding.weight.detach().cpu()
    directions = torch.linalg.svd(weight - weight.mean(0), full_matrices=False).Vh[
        :3
    ]  # (3 or fewer, D)
    ranks = (weight @ directions.T).argsort(0).argsort(0)  # ranks spread the colours evenly
    colours = ranks / max(1, len(weight) - 1)
    return torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]))


@torch.no_grad()
def draw(
    folder: Path,
    model: VQVAE,
    data: dataset.SliceDataset,
    scores: dict,
    counts: torch.Tensor,
    title: str,
) -> None:
    """The figures that a person would rather look at than read."""
    device = next(model.parameters()).device
    ssim = scores["ssim"]
    order = ssim.masked_fill(data.constant, torch.inf).argsort()[
        : int((~data.constant).sum())
    ]  # worst first
    middle = len(order) // 2
    groups = {
        "worst": order[:2],
        "median": order[max(middle - 1, 0) : middle + 1],
        "best": order[-2:],
    }
    labels: dict[int, str] = {}
    for label in ("worst", "best", "median"):  # of few slices each is shown once
        for i in groups[label].tolist():
            labels.setdefault(i, label)
    chosen = {i: labels[i] for i in order.tolist() if i in labels}  # worst first
    indices = torch.tensor(list(chosen))
    originals = data.batch(indices)
    reconstructions, quantized = model(originals.to(device))
    reconstructions = reconstructions.cpu()
    titles = [f"{label}\n{data.names[i]}\nssim {ssim[i]:.3f}" for i, label in chosen.items()]
    spacing = data.description["spacing"]
    plots.plot_reconstructions(
        folder / "best_median_worst.png", originals, reconstructions, titles, title, spacing
    )
    plots.plot_score_histogram(
        folder / "ssim_histogram.png", {name: scores[name].numpy() for name in SSIM_NAMES}, title
    )
    used, perplexity = metrics.code_usage(counts)
    heading = f"{title}; {used} of {len(counts)} used, perplexity {perplexity:.0f}"
    plots.plot_code_usage(folder / "code_use.png", counts, heading)
    first_codes = quantized.indices.reshape(*quantized.indices.shape[:3], -1)[
        ..., 0
    ]  # of several codebooks, the first
    one = list(chosen.values()).index("median") if "median" in chosen.values() else 0
    plots.plot_code_map(
        folder / "code_map.png", originals[one], reconstructions[one], first_codes[one], code_colours(model),
        f"{data.names[int(indices[one])]}, ssim {ssim[indices[one]]:.3f}; codes of like embeddings share a colour",
        spacing,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    utils.keep_freed_memory()
    if args.paths:
        return reconstruct.reconstruct(args)
    if args.export:
        return export_onnx.export(args)
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; expected 1 or more")
    run = Path(args.run) if args.run else newest_run(Path(args.runs_dir))
    device = utils.pick_device(args.device)
    model = load_model(VQVAE, run / "best.pt", device)
    print(f"model: {run / 'best.pt'}")
    options = {"cache_dir": args.cache_dir, "skip_bad_files": args.skip_bad_files}
    data, root = load_run_data(run, args.split, args.data, **options)
    if data.constant.all():
        raise UserError(
            f"all {len(data)} slices of {args.split} are constant; there is nothing to measure"
        )

    def bar(batches):
        return tqdm(batches, desc=args.split, unit=" batches")

    scores, counts, _ = metrics.evaluate(
        model, data, args.batch_size, device, SCORE_NAMES, progress=bar
    )
    summary = summarize(scores, counts, data)
    summary |= {
        "bits_per_pixel": model.bits_per_pixel,
        "num_embeddings": len(counts),
        "split": args.split,
    }
    summary |= {"checkpoint": str(run / "best.pt"), "data": root}
    summary |= {"device": utils.describe_device(device), "versions": utils.versions()}
    print_table(summary, len(counts))
    if organs := score_organs(model, data, args.batch_size):
        summary["organs"] = organs
        print_organs(organs)

    folder = run / args.split
    folder.mkdir(exist_ok=True)
    utils.write_json(folder / "metrics.json", summary)
    write_slices(folder / "slices.csv", data, root, scores)
    title = f"{run.name}, {args.split}, {model.bits_per_pixel:.4f} bits per pixel"
    draw(folder, model, data, scores, counts, title)
    print(f"written: {', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}")
    if args.html:
        print(f"written: {report.write_report(run)}")
    return 0


if __name__ == "__main__":
    utils.run_script(main)
