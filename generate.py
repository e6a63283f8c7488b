"""Sample new slices from a trained prior, complete half a slice, or evaluate the samples.

    python generate.py                               # 16 slices (newest flow in runs/, or bundled)
    python generate.py --count 64 --steps 50 --position 0.5 --seed 1
    python generate.py --complete slice.nii.gz       # sample the right half of a slice, 4 times
    python generate.py --evaluate                    # measure realism, search for copies

The output folder is <run>/generated/, generated/ for the bundled model, or --out. The files are
slices.png and sample_<n>.nii.gz; with --complete, completion.png and completion_<n>.nii.gz; with
--evaluate, slices.png (sampled and held-out slices), closest.png and evaluation.json. Intensities
in the NIfTI files are scaled to those of typical training slices. The voxel size is that of the
training slices or, with --complete, of the given slice. The same flags on the same machine give the
same slices.

A sampled slice does not show a real patient, but it may be a near copy of a training slice;
--evaluate searches for such copies.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dataset
import utils
from evaluation import plots
from mri import nifti
from mri.files import SPLITS
from mri.preprocessing import Preprocessing, slice_affine
from prior.codes import evenly_spaced
from prior.evaluate import RealSlices, evaluate_samples, print_evaluation, read_slices
from prior.sampling import Sampler, load_sampler
from training import environment
from training.guards import preserve_process_state
from training.options import check_range
from training.run_folder import load_run_data, newest_run
from training.run_names import find_runs, resolve_run
from utils import UserError

NUM_SAMPLES = 16  # default of --count
NUM_COMPLETIONS = 4  # default of --count with --complete
MAX_PICTURES = 64  # maximum number of slices in slices.png and in completion.png


# ---------------------------------------------------------------- main


@preserve_process_state()
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    check_arguments(args)
    run = find_run(args)
    name = run.name if run else "the bundled model"
    sampler = load_sampler(
        run,
        utils.pick_device(args.device),
        Path(args.prior) if args.prior else None,
        steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
    )
    folder = Path(args.out) if args.out else (run or Path()) / "generated"
    utils.make_folder(folder)
    if args.evaluate:
        evaluate(sampler, run, folder, args)
    elif args.complete:
        complete(sampler, name, folder, args)
    else:
        sample(sampler, name, folder, args)
    print(f"results: {folder}")
    return 0


# ---------------------------------------------------------------- flags


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument_group("run").add_argument
    flag(
        "--run",
        metavar="DIR",
        help="folder of the run (default: the run in --runs-dir with the newest flow; if there is "
        "none, the bundled model)",
    )
    flag("--runs-dir", metavar="DIR", default="runs", help="folder of all runs (default: runs)")
    flag(
        "--prior",
        metavar="FILE",
        help="checkpoint of the prior (default: <run>/prior/best.pt)",
    )
    flag(
        "--data",
        metavar="DIR",
        help="folder of the real slices for --evaluate (default: as in training)",
    )
    flag(
        "--cache-dir",
        metavar="DIR",
        help="folder for cached slices for --evaluate (default: as in training)",
    )
    flag = parser.add_argument_group("sampling").add_argument
    flag(
        "--count",
        type=int,
        metavar="N",
        help="number of slices to sample (default: 16; with --complete, 4; with --evaluate, half "
        "the number of training slices)",
    )
    flag(
        "--position",
        type=float,
        metavar="X",
        help="position of the slices in the volume, from 0 (first) to 1 (last) (default: "
        "distributed as in the training split; with --complete, unknown)",
    )
    flag(
        "--steps",
        type=int,
        default=Sampler.steps,
        metavar="N",
        help=f"steps from noise to latents (default: {Sampler.steps})",
    )
    flag(
        "--guidance",
        type=float,
        default=Sampler.guidance,
        metavar="X",
        help="strength of guidance; above 1, anatomy is more pronounced and slices are less "
        f"varied; 1: no guidance (default: {Sampler.guidance})",
    )
    flag("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    flag(
        "--complete",
        metavar="FILE",
        help="2D NIfTI slice, of which one half is kept and the other half is sampled",
    )
    flag(
        "--keep",
        choices=("left", "right"),
        help="half that --complete keeps, as displayed in the figures (default: left)",
    )
    flag(
        "--evaluate",
        action="store_true",
        help="compare samples with real slices, and search for copies",
    )
    flag("--out", metavar="DIR", help="output folder (default: <run>/generated)")
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError if a flag is out of range or flags cannot be combined."""
    check_range("--steps", args.steps, 1, 1000)
    check_range("--guidance", args.guidance, 0, 100)
    check_range("--seed", args.seed, 0, 2**40)
    check_range("--position", args.position, 0, 1)
    check_range("--count", args.count, 2 if args.evaluate else 1, 1e6)
    if args.keep and not args.complete:
        raise UserError("--keep chooses the half that --complete keeps; add --complete FILE")
    if (args.data or args.cache_dir) and not args.evaluate:
        raise UserError(
            "--data and --cache-dir are only for --evaluate, because sampling needs no "
            "data; omit them"
        )
    if args.evaluate and args.complete:
        raise UserError("--evaluate and --complete cannot be combined; give one of them")


# ---------------------------------------------------------------- run


def find_run(args: argparse.Namespace) -> Path | None:
    """Return the run that `--run` names, or the run with the newest flow; None if there is none."""
    if args.run:
        return resolve_run(args.run)
    if find_runs(Path(args.runs_dir), "prior/best.pt"):
        return newest_run(Path(args.runs_dir), "prior/best.pt")
    if args.evaluate:
        raise UserError(
            f"no run in {args.runs_dir} has a flow to evaluate; train one with train_prior.py, or "
            "name a run with --run"
        )
    print(
        f"no run in {args.runs_dir} has a flow, so the bundled one is used. It was trained on "
        "simulated pelves (mri/phantom.py): its slices show no real patient, and vary far less "
        "than real patients do. For a flow of your own slices, run train.py and train_prior.py"
    )
    return None


# ---------------------------------------------------------------- sample


def sample(sampler: Sampler, name: str, folder: Path, args: argparse.Namespace) -> None:
    """Sample slices, and write them as a figure and as NIfTI files."""
    positions = choose_positions(args, sampler.slices, args.count or NUM_SAMPLES)
    images = sampler.decode(sampler.sample(positions))
    write_slices(folder, "sample", images, sampler.slices, np.array(sampler.slices["affine"]))
    titles = []
    for position in positions[:MAX_PICTURES].tolist():
        titles.append("" if math.isnan(position) else f"position {position:.2f}")
    heading = f"sampled from the prior of {name}: {sampler.settings}"
    path = folder / "slices.png"
    spacing = sampler.slices["spacing"]
    plots.plot_slices(path, images[:MAX_PICTURES], titles, heading, spacing=spacing)


def choose_positions(args: argparse.Namespace, slices: dict, count: int) -> Tensor:
    """Return positions in the volume, (count,): --position, or quantiles of training positions."""
    if args.position is not None:
        return torch.full((count,), args.position)
    quantiles = torch.tensor(slices["positions"])
    return quantiles[evenly_spaced(len(quantiles), count)]


def write_slices(folder: Path, name: str, images: Tensor, slices: dict, affine: np.ndarray) -> None:
    """Write images (N, 1, H, W) as <name>_<n>.nii.gz; delete such files of an earlier call.

    Images get the typical mean and standard deviation of the training slices (see
    `prior.sampling.describe_slices`).
    """
    for old in folder.glob(f"{name}_*.nii.gz"):
        old.unlink()
    intensities = images * slices["std"] + slices["mean"]
    for number, image in enumerate(intensities.float().cpu().numpy()):
        voxels = image[0][..., None]  # (H, W, 1)
        utils.write_bytes(folder / f"{name}_{number:03d}.nii.gz", nifti.nifti_bytes(voxels, affine))


# ---------------------------------------------------------------- complete


def complete(sampler: Sampler, name: str, folder: Path, args: argparse.Namespace) -> None:
    """Keep the codes of one half of a slice, and sample the other half several times."""
    half = args.keep or "left"
    is_right = half == "right"
    count = args.count or NUM_COMPLETIONS
    position = math.nan if args.position is None else args.position
    size, fit, axis, nan_value = (sampler.slices[k] for k in ("size", "fit", "axis", "nan_value"))
    preprocessing = Preprocessing("2D", tuple(size), fit, axis, nan_value=nan_value)
    image = dataset.read_slice(args.complete, preprocessing)  # (1, H, W)

    # The kept half must come first. If the right half is kept, the mirrored slice is completed.
    oriented = image.flip(-2) if is_right else image
    num_rows = image.shape[1] // 2
    positions = torch.full((count,), position)
    completions = sampler.decode(sampler.sample(positions, mirrored_half(oriented)))
    masked = torch.full_like(oriented, float(oriented.min()))
    masked[:, :num_rows] = oriented[:, :num_rows]
    if is_right:
        completions = completions.flip(-2)
        masked = masked.flip(-2)

    affine = slice_affine(args.complete, preprocessing)
    write_slices(folder, "completion", completions, sampler.slices, affine)
    titles = ["the slice", f"its {half} half"]
    titles += [f"completion {number}" for number in range(1, count + 1)]
    images = torch.cat([image[None], masked[None], completions])
    heading = f"{Path(args.complete).name}, completed by the prior of {name}: {sampler.settings}"
    plots.plot_slices(
        folder / "completion.png",
        images[:MAX_PICTURES],
        titles[:MAX_PICTURES],
        heading,
        columns=6,
        spacing=sampler.slices["spacing"],
    )


def mirrored_half(image: Tensor) -> Tensor:
    """Replace the second half of a slice's rows by the mirrored first half, and z-score the slice.

    Without this, the encoder would have information about the half that is to be sampled, from its
    pixels and from the mean and standard deviation of the whole slice.

    Args:
        image: (1, H, W).
    """
    half = image[:, : image.shape[1] // 2]
    mirrored = torch.cat([half, half.flip(1)], 1)
    return (mirrored - mirrored.mean()) / mirrored.std().clamp_min(1e-6)


# ---------------------------------------------------------------- evaluate


def evaluate(sampler: Sampler, run: Path, folder: Path, args: argparse.Namespace) -> None:
    """Measure how realistic sampled slices are, and search for copies of training slices."""
    slices = {split: load_run_data(run, split, args.data, args.cache_dir)[0] for split in SPLITS}
    training = read_slices(slices["train"])
    if len(training.images) < 4 or min(training.images.shape[2:]) < 80:
        raise UserError("--evaluate needs at least 4 training slices of at least 80 x 80 pixels")
    held_out = read_slices(slices["validate"], slices["test"])
    count = args.count or max(2, len(training.images) // 2)

    positions = choose_positions(args, sampler.slices, count)
    sampled = sampler.decode(sampler.sample(positions))
    evaluation = evaluate_samples(sampler, sampled, positions, training, held_out)
    result = {
        "settings": sampler.settings,
        **evaluation,
        "device": environment.describe_device(sampler.device),
        "versions": environment.versions(),
    }
    utils.write_json(folder / "evaluation.json", result)
    print_evaluation(evaluation)
    heading = f"sampled from the prior of {run.name}: {sampler.settings}"
    spacing = sampler.slices["spacing"]
    shown = evenly_spaced(count, min(count, NUM_SAMPLES))
    real = held_out.images[match_positions(positions[shown], held_out, args.seed)]
    titles = ["sampled"] * len(shown) + ["held-out"] * len(shown)
    path = folder / "slices.png"
    plots.plot_slices(path, torch.cat([sampled[shown], real]), titles, heading, spacing=spacing)
    stems = [name.stem for name in training.names]
    path = folder / "closest.png"
    plot_closest(path, evaluation["audit"], sampled, training.images, stems, heading, spacing)


def match_positions(positions: Tensor, held_out: RealSlices, seed: int) -> Tensor:
    """Return the index of a held-out slice at about each position; which of several is random."""
    generator = torch.Generator().manual_seed(seed)
    distances = (positions[:, None] - held_out.positions).abs().nan_to_num(1)
    ties = 1e-3 * torch.rand(distances.shape, generator=generator)
    return (distances + ties).argmin(1)


def plot_closest(
    path: Path,
    copies: dict[str, dict],
    sampled: Tensor,
    training: Tensor,
    stems: list[str],
    heading: str,
    spacing: list[float] | None,
) -> None:
    """Plot the four closest pairs by pixels, and by features: samples above training slices."""
    upper, lower, upper_titles, lower_titles = [], [], [], []
    for name, search in copies.items():
        for i in np.argsort(search["distance"])[:4].tolist():
            nearest = search["nearest"][i]
            upper.append(sampled[i])
            lower.append(training[nearest])
            upper_titles.append(f"sampled, {name} {search['distance'][i]:.3f}")
            lower_titles.append(stems[nearest])
    plots.plot_slices(
        path,
        torch.stack(upper + lower),
        upper_titles + lower_titles,
        f"closest pairs; {heading}",
        columns=len(upper),
        spacing=spacing,
    )


if __name__ == "__main__":
    utils.run_script(main)
