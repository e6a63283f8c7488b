"""Draw new slices from a trained prior, complete slices that are half given, and measure how real they are.

    python generate.py                               # 16 slices from the newest run that has a prior
    python generate.py --count 64 --temperature 0.9 --position 0.5 --seed 1
    python generate.py --complete slice.nii.gz       # its left half is kept; four ways to go on
    python generate.py --evaluate                    # beside real slices: distances, and the search for copies

Writes to <run>/generated/ or --out. Drawing: slices.png and drawn_<n>.nii.gz, with the training data's voxel size and
typical intensities. --complete: completion.png and completion_<n>.nii.gz. --evaluate: evaluation.json, closest.png and
slices.png. Equal flags on an equal machine give equal slices. What is drawn shows nobody, but may show what training
slices showed: --evaluate says how near it comes.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import dataset
import utils
from evaluation import plots
from modules import VQVAE
from mri import nifti, preprocessing
from prior import realism
from prior.model import CodePrior
from training.checkpoint import load_model
from training.config import check_bounds
from training.run_folder import load_run_data, newest_run, read_arguments
from utils import UserError

COUNTS = {"draw": 16, "complete": 4}
BATCH = 40  # slices drawn at a time: more take longer each, and more memory
SUBSETS = 5
KEEP = {
    "left": 0,
    "right": 1,
}  # which half is given: in which of CodePrior's views that is the first one


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument_group("which run").add_argument
    flag(
        "--run",
        metavar="DIR",
        help="folder of the run (the one in --runs-dir whose prior is newest)",
    )
    flag("--runs-dir", metavar="DIR", default="runs", help="where runs are kept (runs)")
    flag(
        "--prior",
        metavar="FILE",
        help="its checkpoint: last.pt is of the last epoch (<run>/prior/best.pt)",
    )
    flag("--data", metavar="DIR", help="folder of slices or volumes (the run's own)")
    flag(
        "--cache-dir",
        metavar="DIR",
        help="where prepared slices are kept; else $HIPMRI_CACHE; else the user's cache",
    )
    flag = parser.add_argument_group("drawing").add_argument
    flag(
        "--count",
        type=int,
        metavar="N",
        help="how many slices (16; 4 completions; to evaluate, half the training's)",
    )
    flag(
        "--temperature",
        type=float,
        default=1.0,
        help="under 1: likelier and plainer codes; 0: the likeliest (1)",
    )
    flag(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="only of the K likeliest codes; 0: of all (0)",
    )
    flag(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only of the likeliest that add up to P (1)",
    )
    flag(
        "--position",
        type=float,
        metavar="X",
        help="place in the volume, 0 (first slice) to 1 (last) (as in training)",
    )
    flag("--seed", type=int, default=0, help="start of everything random (0)")
    flag("--complete", metavar="FILE", help="a 2D NIfTI slice, half of which is given")
    flag("--keep", choices=KEEP, help="which half, as pictures show it (left)")
    flag(
        "--evaluate",
        action="store_true",
        help="measure the slices that are drawn, beside real ones",
    )
    flag("--out", metavar="DIR", help="where to write (<run>/generated)")
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (auto)")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse, before any work, the values that could only fail later."""
    bounds = {
        "temperature": (0, 100),
        "top_k": (0, 1e9),
        "top_p": (1e-9, 1),
        "seed": (0, 2**40),
        "position": (0, 1),
    }
    check_bounds(vars(args), bounds | {"count": (2 if args.evaluate else 1, 1e6)})
    if args.keep and not args.complete:
        raise UserError("--keep says which half of a slice is given: it needs --complete FILE")
    if args.evaluate and args.complete:
        raise UserError("--evaluate and --complete are two different things to do; give one")


# ---------------------------------------------------------------- drawing


class Drawer:
    """A run's VQ-VAE and its prior, and how to draw from them."""

    def __init__(self, run: Path, args: argparse.Namespace):
        self.args, self.run, self.device = args, run, utils.pick_device(args.device)
        self.vqvae = load_model(VQVAE, run / "best.pt", self.device)
        prior = Path(args.prior) if args.prior else run / "prior" / "best.pt"
        self.prior = load_model(CodePrior, prior, self.device)
        embedding = self.vqvae.vector_quantization.embedding.weight
        if not self.prior.is_of(embedding):
            raise UserError(
                f"{prior} was trained on other codes than those of {run / 'best.pt'}; train it again"
            )
        print(f"models: {run / 'best.pt'}, {prior}")

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> images (B, 1, H, W) on the CPU."""
        return torch.cat(
            [
                self.vqvae.decode_codes(some.to(self.device)).float().cpu()
                for some in codes.split(16)
            ]
        )

    def draw(
        self, position: Tensor, view: int = 0, given: Tensor | None = None, given_rows: int = 0
    ) -> Tensor:
        """A slice's codes for each position (B,), NaN where it does not matter: (B, h, w).

        given: (h, w), of which the first `given_rows` rows are kept.
        """
        args, prior, drawn = self.args, self.prior, []
        generator = torch.Generator().manual_seed(args.seed)
        for some in position.to(self.device).split(BATCH):
            views = torch.full((len(some),), view, device=self.device)
            kept = None if given is None else given.expand(len(some), -1, -1)
            drawn.append(
                prior.sample(
                    some, views, generator, args.temperature, args.top_k, args.top_p, kept, given_rows,
                    progress=functools.partial(tqdm, desc=f"drawing {len(some)} of {len(position)}", unit=" patches"),
                ).cpu()
            )  # fmt: skip
        return torch.cat(drawn)


def positions(args: argparse.Namespace, train: dataset.SliceDataset, count: int) -> Tensor:
    """Where in the volume to draw `count` slices: --position, else spread as the training slices are, (count,)."""
    if args.position is not None:
        return torch.full((count,), args.position)
    known = train.positions.sort().values
    return known[torch.linspace(0, len(known) - 1, count).round().long()]


def write_slices(
    folder: Path, name: str, images: Tensor, train: dataset.SliceDataset, affine: np.ndarray
) -> None:
    """As NIfTI files, in the intensities of a typical training slice."""
    mean, std = train.mean.median(), train.std.median()
    for old in folder.glob(f"{name}_*.nii.gz"):
        old.unlink()
    for number, image in enumerate(images):
        voxels = (image[0] * std + mean).float().cpu().numpy()[..., None]  # (256, 128, 1)
        utils.write_bytes(folder / f"{name}_{number:03d}.nii.gz", nifti.nifti_bytes(voxels, affine))


def draw_slices(
    args: argparse.Namespace, drawer: Drawer, train: dataset.SliceDataset, folder: Path
) -> None:
    place = positions(args, train, args.count or COUNTS["draw"])
    images = drawer.decode(drawer.draw(place))
    write_slices(folder, "drawn", images, train, train.affine)
    titles = ["" if place.isnan() else f"position {place:.2f}" for place in place]
    heading = f"drawn from {folder.parent.name}'s prior: {how(args)}"
    plots.plot_slices(
        folder / "slices.png",
        images[:64],
        titles[:64],
        heading,
        spacing=train.description["spacing"],
    )


def how(args: argparse.Namespace) -> str:
    """The settings of a drawing, for headings and tables."""
    top = f", top-k {args.top_k}" * bool(args.top_k) + f", top-p {args.top_p}" * (args.top_p < 1)
    return f"temperature {args.temperature:g}{top}, seed {args.seed}"


def shown_half(image: Tensor) -> Tensor:
    """What the encoder is shown of a slice (1, H, W) whose first H/2 rows are given: those, and their mirror image.

    The hidden half must not reach it, neither over the edge nor by the scale: z-scored anew.
    """
    half = image[:, : image.shape[1] // 2]
    shown = torch.cat([half, half.flip(1)], 1)
    return (shown - shown.mean()) / shown.std().clamp_min(1e-6)


def complete(
    args: argparse.Namespace, drawer: Drawer, train: dataset.SliceDataset, folder: Path
) -> None:
    """Keep half of a slice's codes, and draw the other half several times."""
    half, view = args.keep or "left", KEEP[args.keep or "left"]
    prior = drawer.run / "prior"
    if (
        view
        and (prior / "config.json").exists()
        and read_arguments(prior, {"mirrored": 0.5}).get("mirrored") == 0
    ):
        raise UserError(
            f"{prior} has seen no mirrored slice (--mirrored 0), and can only --keep left"
        )
    image = dataset.read_slice(args.complete, train.preprocessing)
    count, place = (
        args.count or COUNTS["complete"],
        math.nan if args.position is None else args.position,
    )
    turned = image.flip(-2) if view else image  # (1, 256, 128), its first rows given
    with torch.no_grad():
        codes = drawer.vqvae.encode(shown_half(turned)[None].to(drawer.device))[0]
    rows = drawer.prior.height // 2 // drawer.prior.block * drawer.prior.block
    drawn = drawer.draw(torch.full((count,), place), view, codes, rows)
    images, given = drawer.decode(drawn), torch.full_like(turned, float(turned.min()))
    given[:, : turned.shape[1] // 2] = turned[:, : turned.shape[1] // 2]
    images, given = (x.flip(-2) if view else x for x in (images, given[None]))
    write_slices(
        folder,
        "completion",
        images,
        train,
        preprocessing.slice_affine(
            args.complete, replace(train.preprocessing, form="2D", planes=1)
        ),
    )
    titles = [
        "the slice",
        f"given: its {half} half",
        *(f"completion {n + 1}" for n in range(count)),
    ]
    heading = f"{Path(args.complete).name}, completed by {folder.parent.name}'s prior: {how(args)}"
    images, spacing = torch.cat([image[None], given, images])[:64], train.description["spacing"]
    plots.plot_slices(folder / "completion.png", images, titles[:64], heading, 6, spacing=spacing)


# ---------------------------------------------------------------- measuring


def halves(cases: list[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of two halves of the slices, no case in both; of a single case, any two halves."""
    names = sorted(set(cases))
    chosen = {names[i] for i in torch.randperm(len(names), generator=generator)[: len(names) // 2]}
    first = torch.tensor([case in chosen for case in cases])
    if len(names) == 1:
        first = torch.randperm(len(cases), generator=generator) < len(cases) // 2
    return first.nonzero().flatten(), (~first).nonzero().flatten()


def subset(features: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return features[torch.randperm(len(features), generator=generator)[:size]]


def measure(
    sets: dict[str, Tensor], train: Tensor, parts: list[tuple[Tensor, Tensor]], size: int
) -> list[dict]:
    """A row for each set of features, (N, F): its distances from the training slices', (M, F), at `size` a side.

    Five subsets of each: mean, and half the range. The first row is of `parts`, pairs of halves of the training slices.
    """
    generator = torch.Generator().manual_seed(0)
    directions = realism.main_directions(train, min(64, size // 4)).to(train)
    rows = []
    for name, features in {"training, two halves": None, **sets}.items():
        values = []
        for first, second in parts:
            x, y = (train[first], train[second]) if features is None else (features, train)
            x, y = subset(x, size, generator), subset(y, size, generator)
            values.append(
                (
                    realism.kernel_distance(x, y),
                    realism.frechet_distance(x @ directions, y @ directions),
                )
            )
        row = {"set": name}
        for key, column in zip(("kernel", "frechet"), zip(*values, strict=True), strict=True):
            row[key] = {"mean": float(np.mean(column)), "spread": (max(column) - min(column)) / 2}
        rows.append(row)
    return rows


def audit(
    drawn: Tensor, held_out: Tensor, train: Tensor, features: realism.Features, cases: list[str]
) -> dict:
    """Whether drawn slices are copies: nearer to a training slice than reconstructions of slices it never saw are.

    All (N, 1, H, W). For pixels and for features: the 1st percentile of the held-out distances, the share of drawn
    slices under it, how many of them by the case of their nearest training slice, and each one's distance and slice.
    """
    result, bar = {}, functools.partial(tqdm, desc="searching for copies", unit=" shifts")
    for name, search, rest in (
        ("pixels", realism.nearest_pixels, (train, bar)),
        ("features", realism.nearest_features, (train, features)),
    ):
        usual, _ = search(held_out, *rest)
        near, which = search(drawn, *rest)
        threshold = usual.double().quantile(0.01).item()
        flagged = near < threshold
        result[name] = {
            "threshold": threshold, "held_out_median": usual.median().item(), "drawn_median": near.median().item(),
            "flagged": flagged.float().mean().item(),
            "flagged_by_case": dict(sorted(Counter(cases[i] for i in which[flagged].tolist()).items())),
            "distance": near.tolist(), "nearest": which.tolist(),
        }  # fmt: skip
    return result


def evaluate(args: argparse.Namespace, drawer: Drawer, run: Path, folder: Path) -> None:
    real, images = {}, {}
    for split in ("train", "validate", "test"):
        real[split], _ = load_run_data(run, split, args.data, args.cache_dir)
        kept = (~real[split].constant).nonzero().flatten()
        images[split] = real[split].batch(kept)
        if split == "train":
            names = [real[split].names[i] for i in kept]
            cases, stems = [name.case for name in names], [name.stem for name in names]
    train, count = images["train"], args.count or max(2, len(images["train"]) // 2)
    drawn = drawer.decode(drawer.draw(positions(args, real["train"], count)))
    with torch.no_grad():
        encoded = {
            split: torch.cat(
                [
                    drawer.vqvae.encode(some.to(drawer.device)).cpu()
                    for some in images[split].split(16)
                ]
            )
            for split in images
        }
    generator = torch.Generator().manual_seed(args.seed)
    parts = [halves(cases, generator) for _ in range(SUBSETS)]
    pool = encoded["train"].flatten()
    at_random = pool[
        torch.randint(len(pool), (count, *encoded["train"].shape[1:]), generator=generator)
    ]

    device = drawer.device
    features = realism.Features().to(device).fit(train.to(device))
    size = min(len(images["test"]), count, *(len(half) for pair in parts for half in pair))
    reconstructed = {split: drawer.decode(codes) for split, codes in encoded.items()}
    sets = {
        "test, real": images["test"], "test, reconstructed": reconstructed["test"],
        "training, reconstructed": reconstructed["train"], "drawn from the prior": drawn,
        "codes drawn independently": drawer.decode(at_random),
    }  # fmt: skip
    seen = {name: features(some.to(device)) for name, some in {**sets, "training": train}.items()}
    rows = measure({name: seen[name] for name in sets}, seen["training"], parts, size)
    for row in rows[1:]:
        if (value := realism.inception_distance(sets[row["set"]], train)) is not None:
            row["inception"] = value
    held_out = torch.cat([reconstructed["validate"], reconstructed["test"]])
    copies = audit(*(some.to(device) for some in (drawn, held_out, train)), features, cases)

    result = {
        "settings": how(args),
        "drawn": count,
        "slices_a_side": size,
        "training_slices": len(train),
    }
    result |= {"cases": len(set(cases)), "distances": rows, "audit": copies}
    result |= {"device": utils.describe_device(drawer.device), "versions": utils.versions()}
    utils.write_json(folder / "evaluation.json", result)
    print_evaluation(result)
    heading = f"drawn from {run.name}'s prior: {how(args)}"
    chosen = torch.linspace(0, count - 1, min(count, 16)).round().long()
    spacing = real["train"].description["spacing"]
    plots.plot_slices(
        folder / "slices.png", drawn[chosen], [""] * len(chosen), heading, spacing=spacing
    )
    plot_closest(folder / "closest.png", copies, drawn, train, stems, heading, spacing)


def print_evaluation(result: dict) -> None:
    """The tables, and what they say."""
    rows = {row["set"]: row for row in result["distances"]}
    inception = any("inception" in row for row in rows.values())
    print(f"\nfrom the training slices, {result['slices_a_side']} a side, {SUBSETS} subsets")
    print(
        f"{'':28}{'kernel distance':>22}{'Frechet distance':>22}" + f"{'inception':>12}" * inception
    )
    for name, row in rows.items():
        cells = "".join(
            "{:>14.3f} ± {:5.3f}".format(*row[key].values()) for key in ("kernel", "frechet")
        )
        print(f"{name:28}{cells}" + (f"{row['inception']:12.1f}" if "inception" in row else ""))
    low, high, drawn = (
        rows[name]["kernel"]["mean"]
        for name in ("training, two halves", "codes drawn independently", "drawn from the prior")
    )
    print(
        f"drawn slices are at {(drawn - low) / (high - low):.1%} of the way from the first row to the last"
    )
    if result["cases"] == 1:
        print(
            "one training case: its two halves are of the same patient, and the first row is too low for a floor"
        )
    if not inception:
        print(
            "torchmetrics' FID is left out: it needs torch-fidelity and its weights on this machine"
        )
    print(
        "\nnearest training slice: copies are nearer than 99 % of what was never seen (held-out reconstructions)"
    )
    for name, found in result["audit"].items():
        print(
            f"{name:10}held-out median {found['held_out_median']:.3f}, 1st percentile {found['threshold']:.3f}; drawn "
            f"median {found['drawn_median']:.3f}; flagged {found['flagged']:.1%} {found['flagged_by_case'] or ''}"
        )


def plot_closest(
    path: Path,
    copies: dict,
    drawn: Tensor,
    train: Tensor,
    stems: list[str],
    heading: str,
    spacing: list[float] | None,
) -> None:
    """The four closest pairs by pixels and by features: each drawn slice above its nearest training slice."""
    pairs = [
        (name, i, found["nearest"][i], found["distance"][i])
        for name, found in copies.items()
        for i in np.argsort(found["distance"])[:4].tolist()
    ]
    images = torch.cat([drawn[[i for _, i, _, _ in pairs]], train[[n for _, _, n, _ in pairs]]])
    titles = [f"drawn, {name} {distance:.3f}" for name, _, _, distance in pairs] + [
        stems[n] for _, _, n, _ in pairs
    ]
    plots.plot_slices(
        path, images, titles, f"closest pairs; {heading}", len(pairs), spacing=spacing
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    check_arguments(args)
    utils.keep_freed_memory()
    missing = f"no run with a prior in {args.runs_dir}; train one with train_prior.py, or name one with --run"
    run = Path(args.run) if args.run else newest_run(Path(args.runs_dir), "prior/best.pt", missing)
    drawer = Drawer(run, args)
    folder = Path(args.out) if args.out else run / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    if args.evaluate:
        evaluate(args, drawer, run, folder)
    else:
        train, _ = load_run_data(run, "train", args.data, args.cache_dir)
        (complete if args.complete else draw_slices)(args, drawer, train, folder)
    print(
        f"written: {', '.join(sorted(p.name for p in folder.iterdir() if p.suffix != '.gz'))} in {folder}"
    )
    return 0


if __name__ == "__main__":
    utils.run_script(main)
