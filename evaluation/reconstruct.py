"""A person's own files, for `predict.py PATH... -o OUT`: slices and volumes at their own size, by organ, as codes.

model, slices = pick_model(args)
coded = encode_planes(model, nifti.read_scan("scan.nii.gz").planes)    # codes, and each slice's mean and deviation
planes = decode_planes(model, coded)                                   # (N, rows, columns)
"""

from __future__ import annotations

import argparse
import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

import utils
from evaluation import metrics, plots
from evaluation.metrics import SCORE_NAMES
from modules import VQVAE
from mri import nifti, preprocessing
from mri.files import (
    files_below,
    find_segmentation,
    is_output,
    is_segmentation,
    parse_name,
    printable,
)
from training.checkpoint import load_model, read_checkpoint
from training.run_folder import newest_run, training_files
from utils import UserError

PELVIS_MODEL = Path(__file__).parents[1] / "resources" / "pelvis.pt"
BATCH = 16  # slices at a time
CODES_FORMAT = 1


class Coded(NamedTuple):
    """What is kept of N slices: all that `decode_planes` needs beside the model."""

    codes: (
        np.ndarray
    )  # (N, h, w) uint16, over 65,536 embeddings uint32; or (N, h, w, num_codebooks)
    mean: np.ndarray  # (N,) float32, in the file's intensities
    std: np.ndarray  # (N,) float32; 0: a slice of one value, whose codes mean nothing
    size: tuple[int, int]  # rows and columns that come back


def batches(count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Indices of so many slices, BATCH at a time, of larger ones than 512 x 512 fewer."""
    return np.array_split(
        np.arange(count), -(-count // max(1, BATCH * 512**2 // max(512**2, size[0] * size[1])))
    )


@torch.no_grad()
def encode_planes(
    model: VQVAE, planes: np.ndarray, resize_to: tuple[int, int] | None = None
) -> Coded:
    """SliceDataset (N, rows, columns) of any size -> codes. Each is z-scored by its own mean and deviation, as in training.

    The edge is repeated up to a multiple of the stride. resize_to: they are resized to it first.
    """
    device, (rows, columns) = next(model.parameters()).device, planes.shape[1:]
    mean, std = (
        np.array([f(plane, dtype=np.float64) for plane in planes]) for f in (np.mean, np.std)
    )
    low = planes.min(axis=(1, 2)).astype(np.float64)
    high = planes.max(axis=(1, 2)).astype(np.float64)
    constant = preprocessing.is_constant(low, high)
    std = np.where(constant, 0, preprocessing.floor_std(std, constant)).astype(np.float32)
    mean, codes = mean.astype(np.float32), []
    kind = np.uint16 if model.vector_quantization.num_embeddings <= 1 << 16 else np.uint32
    for some in batches(len(planes), (rows, columns)):
        images = torch.from_numpy(planes[some].astype(np.float64))[:, None]  # (B, 1, rows, columns)
        scale = torch.from_numpy(np.where(std[some] > 0, std[some], 1)).view(-1, 1, 1, 1)
        images = ((images - torch.from_numpy(mean[some]).view(-1, 1, 1, 1)) / scale).float()
        if resize_to:
            images = resize(images, list(resize_to), antialias=True)
        below, right = (-size % model.stride for size in images.shape[-2:])
        images = torch.nn.functional.pad(images, (0, right, 0, below), mode="replicate")
        codes.append(model.encode(images.to(device)).cpu().numpy().astype(kind))
    return Coded(np.concatenate(codes), mean, std, (rows, columns))


@torch.no_grad()
def decode_planes(model: VQVAE, coded: Coded, resized: bool = False) -> np.ndarray:
    """SliceDataset (N, rows, columns) float32, in the file's intensities."""
    device, images = next(model.parameters()).device, []
    for some in batches(len(coded.codes), coded.size):
        restored = (
            model.decode_codes(torch.from_numpy(coded.codes[some].astype(np.int64)).to(device))
            .float()
            .cpu()
        )
        restored = resize(restored, list(coded.size), antialias=True) if resized else restored
        restored = restored[:, 0, : coded.size[0], : coded.size[1]].numpy()
        images.append(restored * coded.std[some, None, None] + coded.mean[some, None, None])
    return np.concatenate(images)


def find_files(paths: list[str], ending: str, out: Path) -> list[Path]:
    """The files among `paths` and in the folders among them, at any depth; hidden ones, masks and outputs left out."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(files_below(path, ending)):
                inside_out = (
                    out.resolve() in file.resolve().parents and path.resolve() != out.resolve()
                )
                if not (inside_out or is_output(file) or is_segmentation(file)):
                    found.append(file)
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"there is no {path}; give a file, or a folder of files")
    if not found:
        raise UserError(f"no file in {', '.join(paths)} ends in what is wanted ({ending})")
    return found


def output_names(files: list[Path]) -> Iterator[str]:
    """A name for each file's outputs: its own, without endings; with a number where it is taken."""
    taken: set[str] = set()
    for file in files:
        name = stem = parse_name(file.name).stem.removesuffix(".npz").removesuffix("_codes")
        number = 1
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        yield name


def pick_run(args: argparse.Namespace) -> Path | None:
    """--run, or the newest run; None: there is none."""
    newest = any(Path(args.runs_dir).glob("*/best.pt"))
    return Path(args.run or newest_run(Path(args.runs_dir))) if args.run or newest else None


def pick_model(args: argparse.Namespace) -> tuple[VQVAE, dict]:
    """The model of `pick_run`, or the one that comes with the repository; its slices' description."""
    run = pick_run(args)
    path = run / "best.pt" if run else PELVIS_MODEL
    model = load_model(VQVAE, path, utils.pick_device(args.device))
    print(f"model: {path}, {model.bits_per_pixel:.4f} bits per pixel")
    slices = read_checkpoint(path).get("slices")
    return model, {"size": list(preprocessing.SIZE), "spacing": None, "axis": None} | (slices or {})


def reconstruct_file(
    model: VQVAE, file: Path, scan: nifti.Scan, name: str, args: argparse.Namespace, size
) -> dict:
    """Writes what is asked for of one file; its row of scores.csv."""
    folder, coded = Path(args.out), encode_planes(model, scan.planes, size)
    planes = decode_planes(model, coded, size is not None)
    utils.write_bytes(folder / f"{name}_reconstruction.nii.gz", scan.to_bytes(planes))
    if args.error_map:
        error = np.abs(planes - scan.planes)
        whole = (
            scan.dtype.kind in "iu" and error.max() < 32767
        )  # integers take a fourth of the room
        utils.write_bytes(
            folder / f"{name}_error.nii.gz", scan.to_bytes(error, np.dtype("i2" if whole else "f4"))
        )
    level = preprocessing.background_threshold(scan.planes)
    empty = np.array([preprocessing.is_empty(plane, level) for plane in scan.planes]) | (
        coded.std == 0
    )
    scores = score_planes(scan, planes, empty, file)
    heading = f"{name}, {model.bits_per_pixel:.4f} bits per pixel"
    if not empty.all():
        draw(
            folder / f"{name}.png",
            scan,
            planes,
            coded,
            np.flatnonzero(~empty),
            scores["ssim"],
            heading,
        )
    # 64 bits a slice are its mean and deviation.
    bits = coded.codes.size * math.log2(model.vector_quantization.num_embeddings) + 64 * len(planes)
    row = {
        "file": name,
        "path": printable(str(file)),
        "slices": len(planes),
        "empty_slices": int(empty.sum()),
    }
    row |= {"rows": planes.shape[1], "columns": planes.shape[2]}
    row |= {
        score: f"{np.nanmean(values):.6f}" if np.isfinite(values).any() else ""
        for score, values in scores.items()
    }
    row |= {"bits_per_pixel": f"{bits / planes.size:.5f}", "code_bytes": math.ceil(bits / 8)}
    if args.export_codes:
        row["npz_bytes"] = write_codes(folder / f"{name}_codes.npz", model, coded, scan, size)
    return row | {"file_bytes": file.stat().st_size}


def score_planes(
    scan: nifti.Scan, planes: np.ndarray, empty: np.ndarray, file: Path
) -> dict[str, np.ndarray]:
    """{score: (N,)}, NaN for empty slices and those under 11 pixels; by organ where there is a segmentation."""
    labels = None
    if mask := find_segmentation(file):
        try:
            labels = nifti.read_scan(mask, scan.cut_axis).planes
        except ValueError as error:
            raise ValueError(
                f"is done, without scores, as its segmentation {mask} {error}"
            ) from error
        if labels.shape != planes.shape:
            raise ValueError(f"has another shape than its segmentation {mask}")
    found: dict[str, list[torch.Tensor]] = {}
    for some in batches(len(planes), planes.shape[1:]):
        pair = [
            torch.from_numpy(x[some].astype(np.float32))[:, None] for x in (scan.planes, planes)
        ]
        nothing = torch.full((len(some),), torch.nan)
        scores = (
            metrics.slice_scores(*pair)
            if min(planes.shape[1:]) >= 11
            else dict.fromkeys(SCORE_NAMES, nothing)
        )
        if labels is not None and min(planes.shape[1:]) >= 11:
            by_organ = metrics.organ_scores(*pair, torch.from_numpy(labels[some].astype(np.int64)))
            scores |= {
                f"{organ}_{score}": x
                for organ, those in by_organ.items()
                for score, x in those.items()
            }
        for score, values in scores.items():
            found.setdefault(score, []).append(
                values.masked_fill(torch.from_numpy(empty[some]), torch.nan)
            )
    return {score: torch.cat(parts).numpy() for score, parts in found.items()}


def draw(
    path: Path,
    scan: nifti.Scan,
    planes: np.ndarray,
    coded: Coded,
    shown: np.ndarray,
    ssim: np.ndarray,
    heading: str,
) -> None:
    """Up to four slices, spread over those that show something, whose indices are `shown`."""
    chosen = np.unique(shown[np.linspace(0, len(shown) - 1, 6).round().astype(int)[1:-1]])
    mean, std = (x[chosen, None, None] for x in (coded.mean, coded.std))
    pair = [
        torch.from_numpy(((x[chosen] - mean) / std).astype(np.float32))[:, None]
        for x in (scan.planes, planes)
    ]
    titles = [f"slice {i}\nssim {ssim[i]:.3f}" for i in chosen]
    plots.plot_reconstructions(path, *pair, titles, heading, scan.spacing)


def write_codes(
    path: Path, model: VQVAE, coded: Coded, scan: nifti.Scan, size: tuple[int, int] | None
) -> int:
    """All that `--from-codes` needs beside the model, no field of the file's header but geometry; bytes written."""
    content = io.BytesIO()
    np.savez_compressed(
        content, format=CODES_FORMAT, model=model.fingerprint, codes=coded.codes, mean=coded.mean, std=coded.std,
        size=coded.size, resized=size is not None, affine=scan.affine, shape=scan.shape, kind=scan.dtype.str,
        axis=scan.axis, turn=np.zeros((0, 2)) if scan.orientation is None else scan.orientation,
    )  # fmt: skip
    utils.write_bytes(path, content.getbuffer())
    return content.tell()


def read_codes(path: Path, model: VQVAE) -> tuple[Coded, nifti.Scan, bool]:
    """What `write_codes` wrote; the scan's planes are empty. Raises ValueError."""
    quantizer = model.vector_quantization
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(record.file_size for record in archive.infolist()) > nifti.MAX_VOXELS:
                raise ValueError("unpacks to more than any file of --export-codes")
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        if found["format"] != CODES_FORMAT:
            raise ValueError(f"has format {found['format']}, expected {CODES_FORMAT}")
        if found["model"] != model.fingerprint:
            raise ValueError(
                f"is of the model {found['model']}, and this one is {model.fingerprint}; name its --run"
            )
        coded = Coded(found["codes"], found["mean"], found["std"], tuple(found["size"].tolist()))
        turn = found["turn"] if len(found["turn"]) else None
        shape, kind, axis = (
            tuple(found["shape"].tolist()),
            np.dtype(str(found["kind"])),
            int(found["axis"]),
        )
        scan = nifti.Scan(np.zeros((0, *coded.size)), found["affine"], shape, kind, axis, turn)
        grid, count = coded.codes.shape[1:3], math.prod(shape)
        whole = coded.codes.dtype in (np.uint16, np.uint32) and coded.codes.ndim == 3 + (
            quantizer.num_codebooks > 1
        )
        whole &= (
            len(coded.codes) == len(coded.mean) == len(coded.std)
            and kind.kind in "iuf"
            and axis in (0, 1, 2)
        )
        whole &= (
            len(coded.codes) * math.prod(coded.size) == count
            and coded.codes.max() < quantizer.num_embeddings
        )
        whole &= bool(found["resized"]) or grid == tuple(
            -(-side // model.stride) for side in coded.size
        )
        if not whole:
            raise ValueError("is damaged: its parts don't fit each other")
        return coded, scan, bool(found["resized"])
    except (
        OSError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"is no file of --export-codes ({error})") from error


def reconstruct(args: argparse.Namespace) -> int:
    """A person's own files, one after the other: no more than one is in memory."""
    files = find_files(
        args.paths, r"\.npz$" if args.from_codes else r"\.nii(\.gz)?$", Path(args.out)
    )
    model, slices = pick_model(args)
    rows, bad = [], []
    Path(args.out).mkdir(parents=True, exist_ok=True)
    axis = int(args.axis) if args.axis in ("0", "1", "2") else args.axis or slices["axis"]
    size = tuple(slices["size"]) if args.resize else None
    learned = training_files(run) if not args.from_codes and (run := pick_run(args)) else None
    for file, name in zip(bar := tqdm(files, unit=" files"), output_names(files), strict=True):
        try:
            if args.from_codes:
                coded, scan, resized = read_codes(file, model)
                content = scan.to_bytes(decode_planes(model, coded, resized))
                utils.write_bytes(Path(args.out) / f"{name}_reconstruction.nii.gz", content)
                continue
            scan = nifti.read_scan(file, axis)
            if (warning := strange_spacing(scan, slices["spacing"])) and not size:
                bar.write(f"warning: {printable(str(file))}: {warning}")
            row = reconstruct_file(model, file, scan, name, args, size)
            rows.append(
                row
                | {
                    "in_training": "unknown"
                    if learned is None
                    else ("no", "yes")[file.resolve() in learned]
                }
            )
            if row["empty_slices"] == row["slices"]:
                bar.write(
                    f"note: {name} has no slice that shows anything: no picture, and no scores"
                )
        except ValueError as error:
            bad.append(printable(f"{file} {error}"))
    if rows:
        names = list(
            dict.fromkeys(name for row in rows for name in row)
        )  # organs are not in every file
        utils.write_csv(
            Path(args.out) / "scores.csv",
            [{name: row.get(name, "") for name in names} for row in rows],
        )
        print_rows(rows)
        if count := sum(row["in_training"] == "yes" for row in rows):
            print(
                f"note: {count} of {len(rows)} files are of the run's training: scores on them say nothing about others"
            )
    print(f"{len(files) - len(bad)} of {len(files)} files done, in {args.out}")
    if bad:
        raise UserError(f"{len(bad)} of {len(files)} files can't be used:\n  " + "\n  ".join(bad))
    return 0


def strange_spacing(scan: nifti.Scan, trained: list[float] | None) -> str:
    """Where voxels are over 1.5 times as large as those in training, or as small: what that means."""
    if not trained or not min(*trained, *scan.spacing) > 0:
        return ""
    ratios = [found / known for found, known in zip(scan.spacing, trained, strict=True)]
    if max(*ratios, *(1 / max(ratio, 1e-9) for ratio in ratios)) <= 1.5:
        return ""
    found, known = (
        " x ".join(f"{value:.2f}" for value in values) for values in (scan.spacing, trained)
    )
    return f"its voxels are {found} mm in the slice, the model is for about {known}: expect less"


def print_rows(rows: list[dict]) -> None:
    print(
        f"\n{'file':40}{'slices':>8}{'empty':>7}{'ssim':>9}{'ssim_body':>11}{'psnr (dB)':>11}{'bits per pixel':>16}"
    )
    for row in rows[:20]:
        cells = [f"{float(row[name]):{width}}" if row[name] else " " * int(width.split(".")[0])
                 for name, width in (("ssim", "9.4f"), ("ssim_body", "11.4f"), ("psnr", "11.2f"))]  # fmt: skip
        print(
            f"{row['file'][:39]:40}{row['slices']:8}{row['empty_slices']:7}{''.join(cells)}{row['bits_per_pixel']:>16}"
        )
    if len(rows) > 20:
        print(f"... and {len(rows) - 20} more, in scores.csv")
