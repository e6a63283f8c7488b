"""Reconstruct the user's own files, which are slices or volumes, at their original size.

`predict.py PATH... -o OUT` calls `reconstruct_files`. For each file, it writes to OUT a NIfTI file
with the same shape and affine, and a row in scores.csv. On request, it also writes the absolute
error as NIfTI and the codes as .npz. Figures show the first files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import utils
from evaluation.batch import Batch
from evaluation.batch_figures import MAX_FIGURES
from evaluation.codec import decode_planes, encode_planes
from evaluation.reconstruct_group import LoadedFile
from evaluation.score_table import input_path
from modules import VQVAE
from mri import files, nifti, preprocessing
from mri.files import printable
from training.checkpoint import load_model, read_checkpoint
from training.run_folder import newest_run, training_files
from utils import DataError, UserError

__all__ = ["decode_planes", "encode_planes", "reconstruct_files"]  # documented in docs/data.md

PELVIS_MODEL = Path(__file__).parents[1] / "resources" / "pelvis.pt"


def reconstruct_files(
    paths: Sequence[str | Path],
    out: Path,
    *,
    run: str | Path | None,
    runs_dir: str | Path,
    device: torch.device,
    axis: str | int | None = None,
    resize: bool = False,
    error_map: bool = False,
    export_codes: bool = False,
    from_codes: bool = False,
    figures: int = MAX_FIGURES,
) -> None:
    """Reconstruct files, and write the results and scores.csv to a folder.

    The folder may contain results of earlier calls: those of the same files are replaced, all
    others stay. After a stop signal (see `collect_stop_signals`), the results of the files that are
    complete are written.

    Args:
        paths: files, or folders of files.
        out: the folder to write to.
        run, runs_dir: the run with the model (see `find_run`).
        device: the device to compute on.
        axis: axis along which volumes are cut (see `nifti.read_scan`); None for the run's axis.
        resize: resize slices to the size of the training slices, and resize the reconstructions
            back to the original size.
        error_map: also write the absolute error as NIfTI.
        export_codes: also write the codes as .npz.
        from_codes: decode `paths`, which are .npz files from `export_codes`.
        figures: largest number of figures: one per volume, and contact sheets of 2D files.

    Raises:
        UserError: if a path does not exist, if scores.csv in the folder is damaged, or if files
            cannot be read or written. In the last case, all other files are reconstructed first.
        KeyboardInterrupt, SystemExit: after a stop signal.
    """
    out = Path(out)
    inputs = _without_repetitions(find_files(paths, out, "npz" if from_codes else "nifti"))
    run_folder = find_run(run, runs_dir)
    model, description = load_run_model(run_folder, device)
    out.mkdir(parents=True, exist_ok=True)
    with utils.lock(out / ".lock", f"another process is writing to {out}; waiting for its end"):
        batch = Batch(model, inputs, out)
        if from_codes:
            batch.decode()
            return
        load = partial(
            load_file,
            axis=description["axis"] if axis is None else axis,
            trained_on=training_files(run_folder) if run_folder else None,
            model_spacing=None if resize else description["spacing"],
        )
        batch.reconstruct(
            load,
            resize_to=tuple(description["size"]) if resize else None,
            figures=figures,
            error_map=error_map,
            export_codes=export_codes,
        )


def _without_repetitions(inputs: list[Path]) -> list[Path]:
    """Keep the first of several paths to the same file."""
    unique: dict[Path, Path] = {}
    for file in inputs:
        unique.setdefault(input_path(file), file)
    return list(unique.values())


# ---------------------------------------------------------------- model and files


def find_run(run: str | Path | None, runs_dir: str | Path) -> Path | None:
    """Return `run`, or the newest run with a best.pt in `runs_dir`, or None if no run has one."""
    if run:
        return Path(run)
    runs_dir = Path(runs_dir)
    return newest_run(runs_dir) if any(runs_dir.glob("*/best.pt")) else None


def load_run_model(run: Path | None, device: torch.device) -> tuple[VQVAE, dict]:
    """Load the best model of a run, or the bundled model if `run` is None.

    Returns:
        The model, and a description of its training slices: "size" (rows, columns), "spacing" (mm
        between rows and between columns, or None) and "axis" (the axis along which volumes were
        cut, or None).
    """
    path = run / "best.pt" if run else PELVIS_MODEL
    model = load_model(VQVAE, path, device)
    print(f"model: {path}, {model.bits_per_pixel:.4f} bits per pixel")
    description = {"size": list(preprocessing.SIZE), "spacing": None, "axis": None}
    return model, description | (read_checkpoint(path).get("slices") or {})


def find_files(paths: Sequence[str | Path], out: Path, file_type: str) -> list[Path]:
    """List the files to read, in the order of `paths`.

    Args:
        paths: files and folders. A file may have any name. Folders are searched recursively for
            files of `file_type`, except segmentations and outputs of predict.py.
        out: the output folder; files in it are skipped, unless `out` itself is one of `paths`.
        file_type: "nifti" or "npz".

    Raises:
        UserError: if a path does not exist, or no file is found.
    """
    patterns = {"nifti": files.NIFTI_NAME.pattern, "npz": r"\.npz$"}
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(files.files_below(path, patterns[file_type])):
                in_out = out.resolve() in file.resolve().parents
                skipped = in_out and path.resolve() != out.resolve()
                if not (skipped or files.is_output(file) or files.is_segmentation(file)):
                    found.append(file)
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path} does not exist; expected a file or a folder of files")
    if not found:
        endings = {"nifti": ".nii or .nii.gz", "npz": ".npz"}
        folders = ", ".join(map(str, paths))
        raise UserError(f"no {endings[file_type]} file in {folders}; name a file, or its folder")
    return found


# ---------------------------------------------------------------- one file


def load_file(
    file: Path,
    name: str,
    *,
    axis: str | int | None = None,
    trained_on: set[Path] | None = None,
    model_spacing: Sequence[float] | None = None,
) -> LoadedFile:
    """Read a file and, if `files.find_segmentation` finds one, its segmentation.

    Args:
        file: a NIfTI file.
        name: the name of its outputs.
        axis: axis along which a volume is cut (see `nifti.read_scan`).
        trained_on: the files that the model was trained on; None if unknown.
        model_spacing: pixel spacing of the training slices in mm, to warn of large differences.

    Raises:
        DataError: if the file cannot be used.
    """
    try:
        scan = nifti.read_scan(file, axis)
    except ValueError as error:
        raise DataError(f"{file} {error}") from error
    _warn_of_spacing(file, scan, model_spacing)
    loaded = LoadedFile(file, name, scan, in_training=_describe_membership(file, trained_on))
    try:
        loaded.labels = _read_labels(file, scan)
    except DataError as error:
        loaded.label_error = str(error)
    return loaded


def _describe_membership(file: Path, trained_on: set[Path] | None) -> str:
    """Return "yes" or "no" for whether the model was trained on the file, or "unknown"."""
    if trained_on is None:
        return "unknown"
    return "yes" if file.resolve() in trained_on else "no"


def _warn_of_spacing(file: Path, scan: nifti.Scan, model_spacing: Sequence[float] | None) -> None:
    """Warn if pixels are more than 1.5 times larger or smaller than in the training slices."""
    if not model_spacing or min(*model_spacing, *scan.spacing) <= 0:
        return
    ratios = np.array(scan.spacing) / np.array(model_spacing)
    if max(*ratios, *(1 / np.maximum(ratios, 1e-9))) > 1.5:
        rows, columns = scan.spacing
        model_rows, model_columns = model_spacing
        tqdm.write(
            f"warning: {printable(str(file))}: its voxels are {rows:.2f} x {columns:.2f} mm in the "
            "slice, but those of the training slices are about "
            f"{model_rows:.2f} x {model_columns:.2f} mm; expect a worse reconstruction"
        )


def _read_labels(file: Path, scan: nifti.Scan) -> np.ndarray | None:
    """Return the segmentation of a file, (N, rows, columns), or None if it has none."""
    mask = files.find_segmentation(file)
    if mask is None:
        return None
    message = f"{file} is reconstructed but not scored, because its segmentation"
    try:
        labels = nifti.read_scan(mask, scan.axis).planes
    except ValueError as error:
        raise DataError(f"{message} {mask} {error}") from error
    if labels.shape != scan.planes.shape:
        raise DataError(f"{message} {mask} has another shape; replace or remove it")
    return labels
