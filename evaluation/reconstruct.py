"""Reconstruct the user's own files, slices or volumes, at their original size.

`predict.py PATH... -o OUT` calls `reconstruct_files`. For each file, it writes a NIfTI file with
the same shape and geometry to OUT, and adds a row to scores.csv. On request, it also writes the
absolute error as NIfTI and the codes as .npz or .vqc. Figures show the first files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

import utils
from evaluation.batch import Batch
from evaluation.batch_figures import MAX_FIGURES
from evaluation.codec import Coder, decode_planes, encode_planes, is_entropy_coded
from evaluation.inputs import find_files
from evaluation.reconstruct_group import MIN_SIDE, LoadedFile
from evaluation.scan_warnings import warn_of_size, warn_of_spacing
from evaluation.score_table import input_path
from modules import VQVAE
from mri import files, nifti, preprocessing
from mri.copies import FileSet
from mri.segmentations import read_labels
from training.checkpoint import load_model, read_checkpoint
from training.run_folder import newest_run, training_files
from training.run_names import find_runs, resolve_run
from utils import DataError, full_float32

__all__ = ["decode_planes", "encode_planes", "reconstruct_files"]  # documented in docs/data.md

PELVIS_MODEL = Path(__file__).parents[1] / "resources" / "pelvis.pt"


@full_float32()
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
    entropy_coded: bool = False,
    load_coder: Callable[[Path | None, VQVAE], Coder] | None = None,
    figures: int = MAX_FIGURES,
) -> None:
    """Reconstruct files, and write the results and scores.csv to a folder.

    The folder may contain results of earlier calls. Those of the same files are replaced, all
    others are kept. After a stop signal (see `collect_stop_signals`), the results of finished files
    are still written.

    Args:
        paths: files, or folders of files.
        out: the folder to write to.
        run, runs_dir: the run with the model (see `find_run`).
        device: the device to compute on.
        axis: axis along which volumes are cut (see `nifti.read_scan`); None for the run's axis.
        nan_value: the value that replaces NaN; None for the run's value.
        resize: whether to resize slices to the size of the training slices, and to resize the
            reconstructions back to the original size.
        error_map: whether to also write the absolute error as NIfTI.
        export_codes: whether to also write the codes.
        from_codes: whether `paths` are files from `export_codes`, to be decoded.
        entropy_coded: whether to write the codes as .vqc.
        load_coder: function (run folder or None, model) -> the coder of .vqc files.
        figures: maximum number of figures: one per volume, and contact sheets of 2D files.

    Raises:
        UserError: if a path does not exist, if `out` is a file, if its scores.csv is damaged, or if
            files cannot be read or written. In the last case, all other files are reconstructed
            first.
        KeyboardInterrupt, SystemExit: after a stop signal.
    """
    out = Path(out)
    inputs = _without_repetitions(find_files(paths, out, "codes" if from_codes else "nifti"))
    run_folder = find_run(run, runs_dir)
    model, description = load_run_model(run_folder, device)
    coder = None
    if entropy_coded or (from_codes and any(map(is_entropy_coded, inputs))):
        coder = load_coder(run_folder, model)
    utils.make_folder(out)
    with utils.lock(out / ".lock", f"another process is writing to {out}; waiting for its end"):
        batch = Batch(model, inputs, out, coder)
        if from_codes:
            batch.decode()
            return
        load = partial(
            load_file,
            axis=description["axis"] if axis is None else axis,
            nan_value=description.get("nan_value") if nan_value is None else nan_value,
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
    model = utils.to_device(load_model(VQVAE, path), device)
    print(f"model: {path}, {model.bits_per_pixel:.4f} bits per pixel")
    description = {"size": list(preprocessing.SIZE), "spacing": None, "axis": None}
    return model, description | (read_checkpoint(path).get("slices") or {})


# ---------------------------------------------------------------- one file


def load_file(
    file: Path,
    name: str,
    *,
    axis: str | int | None = None,
    nan_value: float | None = None,
    trained_on: FileSet | None = None,
    model_spacing: Sequence[float] | None = None,
) -> LoadedFile:
    """Read a file and, if `files.find_segmentation` finds one, its segmentation.

    Args:
        file: a NIfTI file.
        name: its output name (see `evaluation.score_table`).
        axis: axis along which a volume is cut (see `nifti.read_scan`).
        nan_value: the value that replaces NaN (default: NaN is an error).
        trained_on: the files that the model was trained on; None if unknown.
        model_spacing: pixel spacing of the training slices in mm, to warn of large differences.

    Raises:
        DataError: if the file cannot be used.
    """
    try:
        scan = nifti.read_scan(file, axis, nan_value)
    except ValueError as error:
        raise DataError(f"{file} {error}") from error
    warn_of_size(file, scan, MIN_SIDE)
    warn_of_spacing(file, scan, model_spacing)
    loaded = LoadedFile(file, name, scan, in_training=_describe_membership(file, trained_on))
    try:
        loaded.labels = _read_labels(file, scan)
    except DataError as error:
        loaded.label_error = str(error)
    return loaded


def _describe_membership(file: Path, trained_on: FileSet | None) -> str:
    """Return "yes", "no" or "unknown": whether the model was trained on the file or a copy."""
    if trained_on is None:
        return "unknown"
    return "yes" if trained_on.has_copy(file) else "no"


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
