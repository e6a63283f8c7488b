"""Reconstruct a volume, or several single-slice files of the same shape as one batch.

    for group in split_groups(loaded_files):         # each a list of `LoadedFile`
        for result in reconstruct_group(model, group, resize_to=None):
            write_outputs(model, result, out)        # files, and more columns of result.row

Batching only saves time: each file gets the same codes and scores as on its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import utils
from evaluation import metrics, plots
from evaluation.codec import (
    BATCH_SIZE,
    Coded,
    Coder,
    decode_planes,
    encode_planes,
    is_entropy_coded,
    read_codes,
    split_batches,
    write_codes,
)
from evaluation.organs import organ_scores
from evaluation.score_table import input_path
from modules import VQVAE
from mri import nifti, preprocessing
from mri.files import printable
from utils import DataError

MIN_SIDE = 11  # pixels, the side of the SSIM window; smaller slices get no scores
MAX_WAITING = 8 * BATCH_SIZE  # maximum number of slices that wait until their groups are full


@dataclass
class LoadedFile:
    """A file that has been read, and its segmentation if there is one."""

    file: Path
    name: str  # output name (see `evaluation.score_table`)
    scan: nifti.Scan
    labels: np.ndarray | None = None  # (N, rows, columns), the segmentation
    in_training: str = "unknown"  # whether the model was trained on it: "yes", "no" or "unknown"
    label_error: str = ""  # why the segmentation cannot be used; the file then has no scores


@dataclass
class Result:
    """A reconstructed file, before its outputs are written."""

    source: LoadedFile
    coded: Coded
    planes: np.ndarray  # (N, rows, columns) float32, in the file's intensities
    row: dict  # the file's row of scores.csv
    # Up to four non-empty slices for a figure, z-scored as for the model.
    originals: Tensor  # (B, 1, rows, columns)
    reconstructions: Tensor  # (B, 1, rows, columns)
    shown: list[tuple[int, float]] = field(default_factory=list)  # index and ssim of these slices


# ---------------------------------------------------------------- groups


def split_groups(loaded: Iterable[LoadedFile]) -> Iterator[list[LoadedFile]]:
    """Group up to 16 single-slice files of the same shape and data type; yield volumes alone.

    At most MAX_WAITING slices wait for their groups to fill, which bounds the memory. The order of
    the files changes.
    """
    waiting: dict[tuple, list[LoadedFile]] = {}
    for item in loaded:
        planes = item.scan.planes
        if len(planes) > 1:
            yield [item]
            continue
        key = (planes.shape, planes.dtype)
        waiting.setdefault(key, []).append(item)
        max_size = len(split_batches(BATCH_SIZE, planes.shape[1:])[0])
        if len(waiting[key]) >= max_size:
            yield waiting.pop(key)
        elif sum(map(len, waiting.values())) >= MAX_WAITING:
            yield waiting.pop(max(waiting, key=lambda other: len(waiting[other])))
    yield from waiting.values()


@torch.no_grad()
def reconstruct_group(
    model: VQVAE, group: list[LoadedFile], resize_to: tuple[int, int] | None = None
) -> list[Result]:
    """Reconstruct and score the files of a group from `split_groups`.

    Args:
        model: the model, in eval mode.
        group: the files.
        resize_to: (rows, columns) to resize the slices to before encoding; None: not resized.
    """
    originals = np.concatenate([item.scan.planes for item in group])
    coded = encode_planes(model, originals, resize_to, one_scan=len(group) == 1)
    planes = decode_planes(model, coded)
    empty = np.concatenate([_empty_slices(item.scan.planes) for item in group]) | (coded.std == 0)
    scores = _score_planes(originals, planes, empty, group)
    results = []
    start = 0
    for item in group:
        part = slice(start, start + len(item.scan.planes))
        start = part.stop
        file_coded = Coded(
            coded.codes[part], coded.mean[part], coded.std[part], coded.size, coded.resized
        )
        file_scores = {name: values[part] for name, values in scores.items()}
        if item.labels is None:
            file_scores = {name: file_scores[name] for name in metrics.SCORE_NAMES}
        result = _make_result(model, item, file_coded, planes[part], empty[part], file_scores)
        results.append(result)
    return results


def _empty_slices(planes: np.ndarray) -> np.ndarray:
    """Return a mask of the empty planes of a scan: (N, rows, columns) -> (N,) bool."""
    threshold = preprocessing.background_threshold(planes)
    return np.array([preprocessing.is_empty(plane, threshold) for plane in planes])


def _score_planes(
    originals: np.ndarray, planes: np.ndarray, empty: np.ndarray, group: list[LoadedFile]
) -> dict[str, np.ndarray]:
    """Score reconstructed slices; if a file has labels, also score the inside of each organ.

    Args:
        originals: (N, rows, columns), the slices of all files of the group.
        planes: (N, rows, columns), the reconstructions.
        empty: (N,) bool, the slices that get no scores because they are empty.
        group: the files.

    Returns:
        Score name -> (N,) values. The values are NaN for empty slices, slices with a side below
        MIN_SIDE, and slices of files whose segmentation cannot be used.
    """
    count, rows, columns = planes.shape
    if min(rows, columns) < MIN_SIDE:
        return dict.fromkeys(metrics.SCORE_NAMES, np.full(count, np.nan))
    labels, is_labelled, is_scored = [], [], []
    for item in group:
        shape = item.scan.planes.shape
        labels.append(np.zeros(shape, np.int64) if item.labels is None else item.labels)
        is_labelled += [item.labels is not None] * shape[0]
        is_scored += [not item.label_error] * shape[0]
    labels = np.concatenate(labels)
    batch_scores = []
    for indices in split_batches(count, (rows, columns)):
        batch_originals = torch.from_numpy(originals[indices].astype(np.float32))[:, None]
        batch_planes = torch.from_numpy(planes[indices].astype(np.float32))[:, None]
        scores = metrics.slice_scores(batch_originals, batch_planes)
        if any(is_labelled):
            batch_labels = torch.from_numpy(labels[indices].astype(np.int64))
            values_by_organ = organ_scores(batch_originals, batch_planes, batch_labels)
            for organ, values in values_by_organ.items():
                scores |= {f"{organ}_{name}": score for name, score in values.items()}
        batch_scores.append(scores)
    without_score = torch.from_numpy(empty | ~np.array(is_scored))
    results = {}
    for name in batch_scores[0]:
        values = torch.cat([scores[name] for scores in batch_scores])
        results[name] = values.masked_fill(without_score, torch.nan).numpy()
    return results


def _make_result(
    model: VQVAE,
    item: LoadedFile,
    coded: Coded,
    planes: np.ndarray,
    empty: np.ndarray,
    scores: dict[str, np.ndarray],
) -> Result:
    """Return the result of one file.

    Args:
        model: the model.
        item: the file.
        coded: the codes of its N slices.
        planes: (N, rows, columns), its reconstruction.
        empty: (N,) bool, its empty slices.
        scores: score name -> (N,) values.
    """
    # Each slice also needs 64 bits for its mean and std, which are float32.
    bits_per_code = math.log2(model.vector_quantization.num_embeddings)
    bits = coded.codes.size * bits_per_code + 64 * len(planes)
    row = {
        "file": item.name,
        "path": printable(str(input_path(item.file))),
        "slices": len(planes),
        "empty_slices": int(empty.sum()),
        "rows": planes.shape[1],
        "columns": planes.shape[2],
    }
    for name, values in scores.items():
        row[name] = f"{np.nanmean(values):.6f}" if np.isfinite(values).any() else ""
    row["bits_per_pixel"] = f"{bits / planes.size:.5f}"
    row["code_bytes"] = math.ceil(bits / 8)

    candidates = np.flatnonzero(~empty)
    indices = candidates[plots.spread_indices(len(candidates)).numpy()] if len(candidates) else []
    mean = coded.mean[indices, None, None]
    std = coded.std[indices, None, None]
    return Result(
        source=item,
        coded=coded,
        planes=planes,
        row=row,
        originals=_to_images((item.scan.planes[indices] - mean) / std),
        reconstructions=_to_images((planes[indices] - mean) / std),
        shown=[(int(index), float(scores["ssim"][index])) for index in indices],
    )


def _to_images(planes: np.ndarray) -> Tensor:
    """Convert planes (N, rows, columns) to a float32 batch (N, 1, rows, columns)."""
    return torch.from_numpy(planes.astype(np.float32))[:, None]


# ---------------------------------------------------------------- outputs


def write_outputs(
    model: VQVAE,
    result: Result,
    out: Path,
    error_map: bool = False,
    export_codes: bool = False,
    coder: Coder | None = None,
) -> None:
    """Write the reconstruction of a file and, on request, the absolute error and the codes.

    The sizes of the codes and of the input file, in bytes, are added to the result's row. The codes
    are written as .vqc if there is a coder, else as .npz.

    Raises:
        DataError, OSError: if an output cannot be written; outputs that were written before are
            deleted.
    """
    scan, planes = result.source.scan, result.planes
    written = []
    try:
        path = output_path(out, result.source.name, "_reconstruction.nii.gz")
        utils.write_bytes(path, scan.to_bytes(planes))
        written.append(path)
        if error_map:
            path = output_path(out, result.source.name, "_error.nii.gz")
            utils.write_bytes(path, _error_bytes(scan, planes))
            written.append(path)
        if export_codes:
            file_type = "npz" if coder is None else "vqc"
            path = output_path(out, result.source.name, f"_codes.{file_type}")
            num_bytes = write_codes(path, model, result.coded, scan, coder)
            result.row[f"{file_type}_bytes"] = num_bytes
        result.row["file_bytes"] = result.source.file.stat().st_size
    except (DataError, OSError):
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def decode_file(
    model: VQVAE, file: Path, path: Path, coder: Coder | None = None
) -> tuple[int, int, int]:
    """Decode a file of codes, .npz or .vqc, and write the slices to `path` as NIfTI.

    Returns:
        (N, rows, columns), the shape of the slices.

    Raises:
        DataError: if the file of codes cannot be used.
    """
    coded, scan = read_codes(file, model, coder if is_entropy_coded(file) else None)
    planes = decode_planes(model, coded)
    utils.write_bytes(path, scan.to_bytes(planes))
    return planes.shape


def output_path(out: Path, name: str, ending: str) -> Path:
    """Return the path of an output of a file, such as `out/scan_codes.npz`."""
    return out / (name + ending)  # `with_suffix` fails if names contain dots


def _error_bytes(scan: nifti.Scan, planes: np.ndarray) -> bytes:
    """Encode |reconstruction - original| as NIfTI: int16 for integer scans, else float32."""
    error = np.abs(planes - scan.planes)
    is_integer = scan.dtype.kind in "iu" and error.max() < 32767
    return scan.to_bytes(error, np.dtype("i2" if is_integer else "f4"))
