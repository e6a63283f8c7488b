"""Evaluate a trained VQ-VAE: how well it reconstructs the slices of the test split.

    python predict.py                          # the newest run, on its data's test split
    python predict.py --run runs/x --split validate
    python predict.py --run runs/x --data /data/other_slices

Writes to <run>/<split>/: metrics.json, slices.csv (a row a slice), and the figures best_median_worst.png,
ssim_histogram.png, code_use.png and code_map.png. The README says how to read the SSIM names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import dataset
import metrics
import utils
from metrics import SCORE_NAMES, SSIM_NAMES
from modules import VQVAE, CheckpointError
from recipes import load_run_data, newest_run
from utils import UserError


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--run", metavar="DIR", help="folder of the run (the newest in --runs-dir that has a best.pt)")
    flag("--runs-dir", metavar="DIR", default="runs", help="where runs are kept (runs)")
    flag("--data", metavar="DIR", help="folder of slices or volumes (the run's own)")
    flag("--split", choices=("train", "validate", "test"), default="test", help="which split to evaluate (test)")
    flag("--batch-size", type=int, default=16, help="slices at a time; changes no figure (16)")
    flag("--skip-bad-files", action="store_true", help="go on without files that can't be used, and count them")
    flag("--cache-dir", metavar="DIR", help="where prepared slices are kept; else $HIPMRI_CACHE; else the user's cache")
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (auto)")
    return parser.parse_args(argv)


def summarize(scores: dict[str, torch.Tensor], counts: torch.Tensor, data: dataset.Slices) -> dict:
    """What metrics.json holds of the figures: each score's mean over slices and over each case's slices."""
    kept = ~data.constant.numpy()
    cases = [name.case for name, keep in zip(data.names, kept, strict=True) if keep]
    summary = {name: metrics.mean_by_case(scores[name].double().numpy()[kept], cases) for name in SCORE_NAMES}
    summary["codes_used"], summary["perplexity"] = metrics.code_use(counts)
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
        print(f"{name + (' (dB)' if name == 'psnr' else ''):14}" + "".join(f"{cell:>18}" for cell in cells))
    print(
        f"\n{summary['bits_per_pixel']:.4f} bits per pixel; {summary['codes_used']} of {num_embeddings} codes used, "
        f"perplexity {summary['perplexity']:.0f}; {summary['slices']} slices, "
        f"{summary['excluded_slices']} constant ones excluded"
    )
    if few:
        print(f"{len(cases)} case(s): too few for a confidence interval; each case's own mean is shown instead")
    else:
        print(f"the interval is of the mean over {len(cases)} cases (bootstrap), if each case is a patient")


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over cases: slices of one patient are not independent, cases are."""
    draws = np.random.default_rng(0).choice(values, size=(10_000, len(values))).mean(1)
    return tuple(np.percentile(draws, [2.5, 97.5]))


def write_slices(path: Path, data: dataset.Slices, scores: dict[str, torch.Tensor]) -> None:
    """slices.csv: a row a slice, constant ones with empty scores."""
    rows = []
    for i, name in enumerate(data.names):
        row = {"case": name.case, "week": name.week, "slice": name.slice}
        row |= {score: "" if data.constant[i] else f"{scores[score][i]:.6f}" for score in SCORE_NAMES}
        rows.append(row)
    utils.save_csv(path, rows)


def code_colours(model: VQVAE) -> torch.Tensor:
    """A colour for each code, (K, 3) in [0, 1]: three main directions of the embeddings: like codes look alike."""
    weight = model.vector_quantization.embedding.weight.detach().cpu()
    directions = torch.linalg.svd(weight - weight.mean(0), full_matrices=False).Vh[:3]  # (3 or fewer, D)
    ranks = (weight @ directions.T).argsort(0).argsort(0)  # ranks spread the colours evenly
    colours = ranks / max(1, len(weight) - 1)
    return torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]))


@torch.no_grad()
def draw(folder: Path, model: VQVAE, data: dataset.Slices, scores: dict, counts: torch.Tensor, title: str) -> None:
    """The figures that a person would rather look at than read."""
    device = next(model.parameters()).device
    ssim = scores["ssim"]
    order = ssim.masked_fill(data.constant, torch.inf).argsort()[: int((~data.constant).sum())]  # worst first
    middle = len(order) // 2
    groups = {"worst": order[:2], "median": order[max(middle - 1, 0) : middle + 1], "best": order[-2:]}
    labels: dict[int, str] = {}
    for label in ("worst", "best", "median"):  # of few slices each is shown once
        for i in groups[label].tolist():
            labels.setdefault(i, label)
    chosen = {i: labels[i] for i in order.tolist() if i in labels}  # worst first
    indices = torch.tensor(list(chosen))
    originals = data.batch(indices)
    output = model(originals.to(device))
    reconstructions = output.reconstruction.cpu()
    titles = [f"{label}: {data.names[i]}\nssim {ssim[i]:.3f}" for i, label in chosen.items()]
    utils.plot_reconstructions(folder / "best_median_worst.png", originals, reconstructions, titles, title)
    utils.plot_score_histogram(
        folder / "ssim_histogram.png", {name: scores[name].numpy() for name in SSIM_NAMES}, title
    )
    used, perplexity = metrics.code_use(counts)
    heading = f"{title}; {used} of {len(counts)} used, perplexity {perplexity:.0f}"
    utils.plot_code_use(folder / "code_use.png", counts, heading)
    first_codes = output.indices.reshape(*output.indices.shape[:3], -1)[..., 0]  # of several codebooks, the first
    one = list(chosen.values()).index("median") if "median" in chosen.values() else 0
    utils.plot_code_map(
        folder / "code_map.png", originals[one], reconstructions[one], first_codes[one], code_colours(model),
        f"{data.names[int(indices[one])]}, ssim {ssim[indices[one]]:.3f}; codes of like embeddings share a colour",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; expected 1 or more")
    utils.keep_freed_memory()
    run = Path(args.run) if args.run else newest_run(Path(args.runs_dir))
    device = utils.pick_device(args.device)
    model = VQVAE.from_checkpoint(run / "best.pt", device)
    print(f"model: {run / 'best.pt'}")
    options = {"cache_dir": args.cache_dir, "skip_bad_files": args.skip_bad_files}
    data, root = load_run_data(run, args.split, args.data, **options)
    if data.constant.all():
        raise UserError(f"all {len(data)} slices of {args.split} are constant; there is nothing to measure")

    def bar(batches):
        return tqdm(batches, desc=args.split, unit=" batches")

    scores, counts, _ = metrics.evaluate(model, data, args.batch_size, device, SCORE_NAMES, progress=bar)
    summary = summarize(scores, counts, data)
    summary |= {"bits_per_pixel": model.bits_per_pixel, "num_embeddings": len(counts), "split": args.split}
    summary |= {"checkpoint": str(run / "best.pt"), "data": root}
    summary |= {"device": utils.describe_device(device), "versions": utils.versions()}
    print_table(summary, len(counts))

    folder = run / args.split
    folder.mkdir(exist_ok=True)
    utils.save_json(folder / "metrics.json", summary)
    write_slices(folder / "slices.csv", data, scores)
    title = f"{run.name}, {args.split}, {model.bits_per_pixel:.4f} bits per pixel"
    draw(folder, model, data, scores, counts, title)
    print(f"written: {', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}")
    return 0


if __name__ == "__main__":
    utils.run_script(main, dataset.DataError, CheckpointError)
