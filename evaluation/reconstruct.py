"""Reconstruct the user's own files, which are slices or volumes, at their original size.

`predict.py PATH... -o OUT` calls `reconstruct_files`. For each file, it writes to OUT a NIfTI file
with the same shape and affine, a figure (unless all slices are empty), and a row in scores.csv. On
request, it also writes the absolute error as NIfTI and the codes as .npz.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import utils
from evaluation import metrics, plots
from evaluation.codec import (
    Coded,
    decode_planes,
    encode_planes,
    read_codes,
    split_batches,
    write_codes,
)
from evaluation.inputs import find_files
from evaluation.scan_warnings import warn_of_size, warn_of_spacing
from modules import VQVAE
from mri import files, nifti, preprocessing
from mri.copies import FileSet
from mri.files import printable
from mri.segmentations import read_labels
from training.checkpoint import load_model, read_checkpoint
from training.run_folder import newest_run, training_files
from training.run_names import find_runs, resolve_run
from utils import DataError, UserError

PELVIS_MODEL = Path(__file__).parents[1] / "resources" / "pelvis.pt"
MIN_SIDE = 11  # slices with a smaller side have no scores, as the SSIM window is 11 x 11
MAX_PRINTED = 20  # number of files in the printed table


def reconstruct_files(
    paths: Sequence[str | Path],
    out: Path,
    *,
    run: str | Path | None,
    runs_dir: str | Path,
    device: torch.device,
    axis: str | int | None = None,
    nan_value: float | None = None,
    resize: bool = False,
    error_map: bool = False,
    export_codes: bool = False,
    from_codes: bool = False,
) -> None:
    """Reconstruct files one after the other, and write the results and scores.csv to a folder.

    Args:
        paths: files, or folders of files.
        out: the folder to write to.
        run, runs_dir: the run with the model (see `find_run`).
        device: the device to compute on.
        axis: axis along which volumes are cut (see `nifti.read_scan`); None for the run's axis.
        nan_value: the value that replaces NaN; None for the run's value.
        resize: resize slices to the size of the training slices, and resize the reconstructions
            back to the original size.
        error_map: also write the absolute error as NIfTI.
        export_codes: also write the codes as .npz.
        from_codes: decode `paths`, which are .npz files from `export_codes`.

    Raises:
        UserError: if a path does not exist, or if files cannot be used. In the second case, all
            other files are reconstructed first.
    """
    inputs = find_files(paths, out, "npz" if from_codes else "nifti")
    names = output_names(inputs)
    run_folder = find_run(run, runs_dir)
    model, description = load_run_model(run_folder, device)
    trained_on = training_files(run_folder) if run_folder and not from_codes else None
    out.mkdir(parents=True, exist_ok=True)
    rows, errors = [], []
    for file, name in zip(tqdm(inputs, unit=" files"), names, strict=True):
        try:
            if from_codes:
                decode_file(model, file, out / f"{name}_reconstruction.nii.gz")
                continue
            row = reconstruct_file(
                model,
                file,
                out / name,
                axis=description["axis"] if axis is None else axis,
                nan_value=description.get("nan_value") if nan_value is None else nan_value,
                resize_to=tuple(description["size"]) if resize else None,
                model_spacing=description["spacing"],
                error_map=error_map,
                export_codes=export_codes,
            )
        except DataError as error:
            errors.append(printable(str(error)))
            continue
        row["in_training"] = _describe_membership(file, trained_on)
        rows.append(row)
    if rows:
        _write_scores(out / "scores.csv", rows)
        _print_scores(rows)
    print(f"{len(inputs) - len(errors)} of {len(inputs)} files reconstructed; results are in {out}")
    if errors:
        listing = "\n  ".join(errors)
        raise UserError(f"{len(errors)} of {len(inputs)} files cannot be used:\n  {listing}")


# ---------------------------------------------------------------- model and files


def find_run(run: str | Path | None, runs_dir: str | Path) -> Path | None:
    """Return the run that `run` names, or the newest run in `runs_dir`; None if there is none."""
    if run:
        return resolve_run(run)
    runs_dir = Path(runs_dir)
    return newest_run(runs_dir) if find_runs(runs_dir, "best.pt") else None


def load_run_model(run: Path | None, device: torch.device) -> tuple[VQVAE, dict]:
    """Load the best model of a run, or the bundled model if `run` is None.

    Returns:
        The model, and a description of its training slices: "size" (rows, columns), "spacing" (mm
        between rows and between columns, or None), "axis" (the axis along which volumes were cut,
        or None) and "nan_value" (the value that replaced NaN, or None; optional).
    """
    path = run / "best.pt" if run else PELVIS_MODEL
    model = load_model(VQVAE, path, device)
    print(f"model: {path}, {model.bits_per_pixel:.4f} bits per pixel")
    description = {"size": list(preprocessing.SIZE), "spacing": None, "axis": None}
    return model, description | (read_checkpoint(path).get("slices") or {})


def output_names(inputs: list[Path]) -> list[str]:
    """Return a unique output name for each file, which is numbered if the file's name is taken."""
    names: dict[str, Path] = {}
    for file in inputs:
        stem = files.parse_name(file.name).stem.removesuffix(".npz").removesuffix("_codes")
        name = stem
        number = 1
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names[name] = file
    return list(names)


# ---------------------------------------------------------------- one file


def reconstruct_file(
    model: VQVAE,
    file: Path,
    target: Path,
    *,
    axis: str | int | None = None,
    nan_value: float | None = None,
    resize_to: tuple[int, int] | None = None,
    model_spacing: Sequence[float] | None = None,
    error_map: bool = False,
    export_codes: bool = False,
) -> dict:
    """Reconstruct a file, write the results, and return the file's row of scores.csv.

    Args:
        model: the model, in eval mode.
        file: a NIfTI file; scores per organ are added if `files.find_segmentation` finds labels.
        target: path of the outputs, to which endings such as "_reconstruction.nii.gz" are added.
        axis: axis along which a volume is cut (see `nifti.read_scan`).
        nan_value: the value that replaces NaN (default: NaN is an error).
        resize_to: (rows, columns) to resize the slices to before encoding; None: not resized.
        model_spacing: pixel spacing of the training slices in mm, to warn of large differences.
        error_map, export_codes: see `reconstruct_files`.

    Raises:
        DataError: if the file or its segmentation cannot be used.
    """
    try:
        scan = nifti.read_scan(file, axis, nan_value)
    except ValueError as error:
        raise DataError(f"{file} {error}") from error
    warn_of_size(file, scan, MIN_SIDE)
    if not resize_to:
        warn_of_spacing(file, scan, model_spacing)
    coded = encode_planes(model, scan.planes, resize_to)
    planes = decode_planes(model, coded)
    utils.write_bytes(_output(target, "_reconstruction.nii.gz"), scan.to_bytes(planes))
    if error_map:
        utils.write_bytes(_output(target, "_error.nii.gz"), _error_bytes(scan, planes))

    threshold = preprocessing.background_threshold(scan.planes)
    empty = np.array([preprocessing.is_empty(plane, threshold) for plane in scan.planes])
    empty |= coded.std == 0
    scores = _score_planes(scan, planes, empty, _read_labels(file, scan))
    if empty.all():
        tqdm.write(f"note: {target.name} has only empty slices; it gets no figure and no scores")
    else:
        heading = f"{target.name}, {model.bits_per_pixel:.4f} bits per pixel"
        _plot(_output(target, ".png"), scan, planes, coded, empty, scores["ssim"], heading)

    # Each slice also needs 64 bits for its mean and std, which are float32.
    bits_per_code = math.log2(model.vector_quantization.num_embeddings)
    bits = coded.codes.size * bits_per_code + 64 * len(planes)
    row = {
        "file": target.name,
        "path": printable(str(file)),
        "slices": len(planes),
        "empty_slices": int(empty.sum()),
        "rows": planes.shape[1],
        "columns": planes.shape[2],
    }
    for name, values in scores.items():
        row[name] = f"{np.nanmean(values):.6f}" if np.isfinite(values).any() else ""
    row["bits_per_pixel"] = f"{bits / planes.size:.5f}"
    row["code_bytes"] = math.ceil(bits / 8)
    if export_codes:
        row["npz_bytes"] = write_codes(_output(target, "_codes.npz"), model, coded, scan)
    row["file_bytes"] = file.stat().st_size
    return row


def decode_file(model: VQVAE, file: Path, path: Path) -> None:
    """Decode an .npz file of codes, and write the slices as NIfTI.

    Raises:
        DataError: if the .npz file cannot be used.
    """
    coded, scan = read_codes(file, model)
    utils.write_bytes(path, scan.to_bytes(decode_planes(model, coded)))


def _describe_membership(file: Path, trained_on: FileSet | None) -> str:
    """Return "yes" if the model was trained on the file or a copy of it, else "no" or "unknown"."""
    if trained_on is None:
        return "unknown"
    return "yes" if trained_on.has_copy(file) else "no"


def _output(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)  # `with_suffix` fails if names contain dots


def _error_bytes(scan: nifti.Scan, planes: np.ndarray) -> bytes:
    """Return the absolute error as NIfTI; if the file has integers, use int16 to save space."""
    error = np.abs(planes - scan.planes)
    is_integer = scan.dtype.kind in "iu" and error.max() < 32767
    return scan.to_bytes(error, np.dtype("i2" if is_integer else "f4"))


def _read_labels(file: Path, scan: nifti.Scan) -> np.ndarray | None:
    """Return the segmentation of a file, (N, rows, columns), or None if it has none."""
    mask = files.find_segmentation(file)
    if mask is None:
        return None
    message = f"{file} is reconstructed but not scored, because its segmentation"
    try:
        return read_labels(mask, scan.planes.shape, scan.axis)
    except ValueError as error:
        raise DataError(f"{message} {mask} {error}; replace or remove it") from error


def _score_planes(
    scan: nifti.Scan, planes: np.ndarray, empty: np.ndarray, labels: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Score reconstructed slices and, if there are labels, also the inside of each organ.

    Returns:
        {name: (N,)}, NaN for empty slices and for slices with a side below 11 pixels.
    """
    count, rows, columns = planes.shape
    if min(rows, columns) < MIN_SIDE:
        return dict.fromkeys(metrics.SCORE_NAMES, np.full(count, np.nan))
    batch_scores = []
    for indices in split_batches(count, (rows, columns)):
        originals = torch.from_numpy(scan.planes[indices].astype(np.float32))[:, None]
        reconstructions = torch.from_numpy(planes[indices].astype(np.float32))[:, None]
        scores = metrics.slice_scores(originals, reconstructions)
        if labels is not None:
            batch_labels = torch.from_numpy(labels[indices].astype(np.int64))
            organ_scores = metrics.organ_scores(originals, reconstructions, batch_labels)
            for organ, values in organ_scores.items():
                scores |= {f"{organ}_{name}": score for name, score in values.items()}
        batch_scores.append(scores)
    results = {}
    for name in batch_scores[0]:
        values = torch.cat([scores[name] for scores in batch_scores])
        results[name] = values.masked_fill(torch.from_numpy(empty), torch.nan).numpy()
    return results


def _plot(
    path: Path,
    scan: nifti.Scan,
    planes: np.ndarray,
    coded: Coded,
    empty: np.ndarray,
    ssim: np.ndarray,
    heading: str,
) -> None:
    """Plot up to four slices that are not empty, z-scored as the model sees them."""
    candidates = np.flatnonzero(~empty)
    indices = candidates[plots.spread_indices(len(candidates)).numpy()]
    mean = coded.mean[indices, None, None]
    std = coded.std[indices, None, None]
    originals = ((scan.planes[indices] - mean) / std).astype(np.float32)
    reconstructions = ((planes[indices] - mean) / std).astype(np.float32)
    titles = [f"slice {index}\nssim {ssim[index]:.3f}" for index in indices]
    plots.plot_reconstructions(
        path,
        torch.from_numpy(originals)[:, None],
        torch.from_numpy(reconstructions)[:, None],
        titles,
        heading,
        scan.spacing,
    )


# ---------------------------------------------------------------- scores of all files


def _write_scores(path: Path, rows: list[dict]) -> None:
    """Write scores.csv, with empty cells for organs that a file does not show."""
    columns: dict[str, None] = {}  # used as an ordered set
    for row in rows:
        columns |= dict.fromkeys(row)
    complete_rows = [dict.fromkeys(columns, "") | row for row in rows]
    utils.write_csv(path, complete_rows)


def _print_scores(rows: list[dict]) -> None:
    """Print the scores of the first files, and a note if the model was trained on some files."""
    print(
        f"\n{'file':40}{'slices':>8}{'empty':>7}{'ssim':>9}{'ssim_body':>11}{'psnr (dB)':>11}"
        f"{'bits per pixel':>16}"
    )
    for row in rows[:MAX_PRINTED]:
        line = f"{row['file'][:39]:40}{row['slices']:8}{row['empty_slices']:7}"
        for name, width, digits in (("ssim", 9, 4), ("ssim_body", 11, 4), ("psnr", 11, 2)):
            cell = f"{float(row[name]):.{digits}f}" if row[name] else ""
            line += f"{cell:>{width}}"
        print(f"{line}{row['bits_per_pixel']:>16}")
    if len(rows) > MAX_PRINTED:
        print(f"... and {len(rows) - MAX_PRINTED} more, in scores.csv")
    in_training = sum(row["in_training"] == "yes" for row in rows)
    if in_training:
        print(
            f"note: the model was trained on {in_training} of {len(rows)} files; the scores of "
            "these files say nothing about other files"
        )
