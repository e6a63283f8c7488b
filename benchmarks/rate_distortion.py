"""Compare runs with JPEG, JPEG 2000, JPEG XL, WebP and AVIF at equal rates, on the same slices.

    pip install -r benchmarks/requirements.txt
    python benchmarks/rate_distortion.py --data DIR                         # the codecs only
    python benchmarks/rate_distortion.py --data DIR --runs runs/a runs/b
    python benchmarks/rate_distortion.py --volume T1.nii.gz --runs runs/a   # an unseen organ

The result files are <out>.md, <out>.json and, for several rates, <out>.png. The notes below the
table (RULES in rate_distortion_report.py) state what is counted and how each method is configured.
The codecs run on as many threads as torch uses ($OMP_NUM_THREADS).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import image_codecs
from image_codecs import ACCOUNTINGS, CODECS, Codec, Encoded, search
from ms_ssim import ms_ssim
from rate_distortion_report import RULES, SCORES, plot, table

import dataset
import utils
from evaluation import metrics
from evaluation.metrics import SCORE_NAMES
from modules import VQVAE
from mri import hipmri
from mri.files import Source
from mri.preprocessing import SIZE, Preprocessing
from prior.coding import EntropyCoder, check_installed, load_prior
from training import environment
from training.checkpoint import load_model
from training.config import TrainConfig
from training.run_folder import read_arguments
from training.run_names import PRIORS
from utils import UserError

RESULTS = Path(__file__).parent / "results"
RATES = (0.0703125, 0.140625, 0.28125, 0.5625, 1.125)  # bits per pixel
PIXELS = math.prod(SIZE)
SCALE_BITS = 32  # bits per slice for two float16 numbers that scale it

# ---------------------------------------------------------------- slices and scores


class Originals(NamedTuple):
    """The N slices to compress, without constant slices.

    Intensities are divided by a power of two so that they are in the range of float16.
    """

    images: Tensor  # (N, 1, 256, 128) float32
    mean: Tensor  # (N, 1, 1, 1), for z-scoring
    std: Tensor  # (N, 1, 1, 1), for z-scoring
    cases: list[str]  # case of each slice


def load(args: argparse.Namespace) -> tuple[Originals, int]:
    """Return the slices of the split or volume, and the number of excluded constant slices."""
    if args.volume:
        source = Source(args.volume.parent, "3D", {args.split: [args.volume]}, [])
    else:
        source = hipmri.find_hipmri(args.data)
    # Resizing would distort a volume whose slices have a different aspect ratio, so its slices are
    # cropped. Pixels are assumed to be square.
    fit = "crop" if args.volume else "resize"
    preprocessing = Preprocessing.resolve(source, fit=fit, planes=args.planes)
    slices = dataset.load_split(source, args.split, preprocessing)
    for note in [*source.notes, *slices.notes]:
        print(f"note: {note}")
    indices = torch.nonzero(~slices.constant).flatten()
    if not len(indices):
        raise UserError(
            f"all {len(slices)} slices of the {args.split} split are constant; choose another "
            "split or other data"
        )
    images = slices.denormalise(slices.batch(indices), indices)
    unit = 2.0 ** math.ceil(math.log2(float(images.abs().max())) - 14)
    originals = Originals(
        images / unit,
        slices.mean[indices].view(-1, 1, 1, 1) / unit,
        slices.std[indices].view(-1, 1, 1, 1) / unit,
        [slices.names[i].case for i in indices],
    )
    return originals, len(slices) - len(indices)


def score(
    originals: Tensor, reconstructions: Tensor, names: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Compute the given SCORES of each slice, {name: (N,)}, from two batches (N, 1, H, W)."""
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    base_names = tuple(name for name in names if name in SCORE_NAMES)
    for pair in zip(originals.split(16), reconstructions.split(16), strict=True):
        batch_scores = metrics.slice_scores(*pair, base_names)
        if "ms_ssim" in names:
            batch_scores["ms_ssim"] = ms_ssim(*pair)
        for name in names:
            parts[name].append(batch_scores[name])
    return {name: torch.cat(values).double().numpy() for name, values in parts.items()}


def mean_scores(originals: Originals, reconstructions: Tensor) -> dict[str, dict]:
    """Return the mean of each score over all slices, and over the slices of each case."""
    scores = score(originals.images, reconstructions, SCORES)
    return {name: metrics.mean_by_case(values, originals.cases) for name, values in scores.items()}


# ---------------------------------------------------------------- codecs and runs


def measure_codec(codec: Codec, originals: Originals, rates: Sequence[float]) -> list[dict]:
    """Compress the slices with a codec; return a row for each rate and each of ACCOUNTINGS.

    A row has the scores at the bit depth with the best mean `ssim`. It has no scores if some slices
    exceed the rate at every bit depth. "misfits" is the smallest number of slices, over the bit
    depths, that exceed the rate.
    """
    images = originals.images
    minimum = images.amin((1, 2, 3), keepdim=True)
    maximum = images.amax((1, 2, 3), keepdim=True)
    low = minimum.half().float()  # (N, 1, 1, 1), as transmitted
    span = (maximum - minimum).half().float()
    scaled = ((images - low) / span).clamp(0, 1)[:, 0].double().numpy()
    coded_at_depth = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # imagecodecs releases the GIL
        for depth in codec.depths:
            results = pool.map(functools.partial(search, codec, depth, rates), scaled)
            description = f"{codec.name}, {depth} bits"
            progress = tqdm(results, description, len(scaled), unit=" slices")
            coded_at_depth[depth] = list(progress)

    rows = []
    for rate, accounting in itertools.product(rates, ACCOUNTINGS):
        row = {"method": codec.name, "rate": rate, "accounting": accounting}
        misfits = []
        best_ssim, best_restored = -math.inf, None
        best = {}
        for depth in codec.depths:
            coded = [results[rate, accounting] for results in coded_at_depth[depth]]
            misfits.append(coded.count(None))
            if None in coded:
                continue
            restored = decode_slices(codec, depth, coded) * span + low
            ssim = score(images, restored, ("ssim",))["ssim"].mean()
            if ssim > best_ssim:
                best_ssim, best_restored = ssim, restored
                num_bytes = np.mean([getattr(item, accounting) for item in coded])
                bits = 8 * num_bytes + SCALE_BITS
                best = {"depth": depth, "bits_per_pixel": float(bits) / PIXELS}
        row |= {"misfits": min(misfits), **best}
        if best_restored is not None:
            row["scores"] = mean_scores(originals, best_restored)
        rows.append(row)
    return rows


def decode_slices(codec: Codec, depth: int, coded: list[Encoded]) -> Tensor:
    """Decode slices to (N, 1, rows, columns) float32 in [0, 1]."""
    images = np.stack([codec.decode(item.data, depth) for item in coded])
    return torch.from_numpy(images).float()[:, None]


def measure_run(
    run: Path, originals: Originals, device: torch.device, entropy_coded: bool
) -> list[dict]:
    """Reconstruct the slices with a run's best.pt, and return one or two rows.

    Args:
        run: folder of the run.
        originals: the slices to reconstruct.
        device: the device to compute on.
        entropy_coded: whether to add a row with entropy-coded codes, if the run has a causal prior.
    """
    model = load_model(VQVAE, run / "best.pt", device)
    recipe = read_arguments(run, TrainConfig).get("recipe", "unknown recipe")
    mean, std = originals.mean.half().float(), originals.std.half().float()
    reconstructions, codes = [], []
    with torch.no_grad():
        for batch in ((originals.images - mean) / std).split(16):
            reconstruction, quantized = model(batch.to(device))
            reconstructions.append(reconstruction.float().cpu())
            codes.append(quantized.indices)
    row = {
        "method": f"{run.resolve().name} ({recipe})",
        "misfits": 0,
        "scores": mean_scores(originals, torch.cat(reconstructions) * std + mean),
    }
    num_weights = sum(p.numel() for p in model.parameters())
    rates = {"fixed length": (model.bits_per_pixel, num_weights)}
    if entropy_coded and (run / PRIORS["causal"] / "best.pt").exists():
        prior = load_prior(run, model)
        num_weights += sum(p.numel() for p in prior.parameters())
        bits = coded_bits(EntropyCoder(prior), torch.cat(codes).cpu().numpy(), run)
        rates["entropy-coded"] = (bits / PIXELS, num_weights)
    elif entropy_coded:
        print(
            f"note: {run} has no causal prior and is counted at fixed length only; train one with "
            "train_prior.py --model causal"
        )
    rows = []
    for accounting, (rate, weights) in rates.items():
        bits_per_pixel = rate + SCALE_BITS / PIXELS
        counts = {"accounting": accounting, "rate": rate, "bits_per_pixel": bits_per_pixel}
        rows.append(row | counts | {"weights": weights})
    return rows


def coded_bits(coder: EntropyCoder, codes: np.ndarray, run: Path) -> float:
    """Entropy-code codes (N, h, w), and return the mean number of bits per slice.

    Raises:
        DataError: if decoding does not return the same codes.
    """
    arrays = coder.encode(codes, run)
    coder.decode(arrays, run)  # compares a checksum
    return 32 * len(arrays["words"]) / len(codes)


# ---------------------------------------------------------------- the command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of slices or volumes, as for train.py"
    )
    source.add_argument(
        "--volume",
        type=Path,
        metavar="FILE",
        help="NIfTI volume, whose central coronal slices are used",
    )
    flag = parser.add_argument
    flag(
        "--split",
        choices=("train", "validate", "test"),
        default="test",
        help="split of --data (default: test)",
    )
    flag("--planes", type=int, default=60, help="number of slices per volume (default: 60)")
    flag(
        "--runs",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of runs, each with a best.pt (default: none)",
    )
    flag(
        "--entropy-coded",
        action="store_true",
        help="add a row with entropy-coded codes for each run that has a causal prior (a minute "
        "per run)",
    )
    flag(
        "--rates",
        type=float,
        nargs="+",
        default=RATES,
        help=f"rates of the codecs in bits per pixel (default: {' '.join(map(str, RATES))})",
    )
    flag(
        "--codecs",
        nargs="+",
        choices=CODECS,
        default=list(CODECS),
        metavar="NAME",
        help=f"codecs to compare with (default: {' '.join(CODECS)})",
    )
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    flag(
        "--out",
        type=Path,
        help="result files, without suffix (default: benchmarks/results/rate_distortion_<data>)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    versions = environment.versions() | image_codecs.versions(args.codecs)
    if args.entropy_coded:
        check_installed()  # before minutes of work
    device = utils.pick_device(args.device)
    utils.keep_freed_memory()
    originals, num_excluded = load(args)
    rows = []
    for run in args.runs:
        rows += measure_run(run, originals, device, args.entropy_coded)
    for name in args.codecs:
        rows += measure_codec(CODECS[name], originals, sorted(args.rates))
    rows.sort(key=lambda row: row["rate"])  # stable: at equal rates, runs come first

    name = (args.volume or args.data).resolve().name.split(".")[0]
    out = args.out or RESULTS / f"rate_distortion_{name}"
    out.parent.mkdir(parents=True, exist_ok=True)
    num_slices = len(originals.cases)
    result = {
        "data": name,
        "split": args.split,
        "planes": args.planes if args.volume else None,
        "slices": num_slices,
        "excluded_slices": num_excluded,
        "device": environment.describe_device(device),
        "versions": versions,
        "rows": rows,
    }
    utils.write_json(Path(f"{out}.json"), result)
    heading = f"{name}, {'central slices' if args.volume else args.split}, {num_slices} slices"
    text = table(rows, num_slices)
    page = f"{heading}; {num_excluded} constant slices excluded.\n\n{text}\n{RULES}"
    Path(f"{out}.md").write_text(page, encoding="utf-8")
    has_curves = len(args.rates) > 1
    if has_curves:
        plot(Path(f"{out}.png"), rows, heading)
    print(f"\n{text}\nwritten: {out}.md and .json{', .png' if has_curves else ''}")
    return 0


if __name__ == "__main__":
    utils.run_script(main)
