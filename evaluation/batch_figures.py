"""Draw the figures in predict.py's output folder: one per volume, and contact sheets of slices.

Drawing takes longer than reconstruction, so the number of figures is limited. The column `figure`
of scores.csv names the figure that shows a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evaluation import plots
from evaluation.reconstruct_group import Result, output_path
from evaluation.score_table import SHEET_NAME, ScoreTable

MAX_FIGURES = 20  # the default of --figures
SLICES_PER_SHEET = 32
MAX_SIDE = 512  # maximum side in pixels of slices on a contact sheet; larger ones are shrunk


@dataclass
class _Panel:
    """A single-slice file on a contact sheet."""

    row: dict  # the file's row of scores.csv
    original: Tensor  # (1, H, W), z-scored
    reconstruction: Tensor  # (1, H, W), z-scored
    ssim: float


class BatchFigures:
    """Draw figures of reconstructed files until a maximum number of figures is reached.

    Attributes:
        num_left_out: number of files that have no figure because of the limit.
        errors: messages about figures that could not be written.
    """

    def __init__(self, out: Path, table: ScoreTable, names: list[str], limit: int, rate: float):
        """Prepare the figures of a call.

        Args:
            out: the folder to write to.
            table: the rows of scores.csv.
            names: output names of the files of this call.
            limit: maximum number of figures.
            rate: bits per pixel, for the figures' headings.
        """
        self.num_left_out = 0
        self.errors: list[str] = []
        self._out = out
        self._table = table
        self._remaining = limit
        self._rate = f"{rate:.4f} bits per pixel"
        self._sheets: dict[tuple, list[_Panel]] = {}  # (shape, spacing) -> sheet to fill
        self._others = _sheets_of_others(out, table, set(names))  # numbers that are in use
        self._number = 0  # number of the last contact sheet

    def add(self, result: Result) -> None:
        """Draw a figure of a volume, or put a slice on a contact sheet; draw a full sheet."""
        if not result.shown:  # only empty slices
            return
        scan = result.source.scan
        is_volume = len(scan.planes) > 1
        key = (scan.planes.shape[1:], *(round(side, 3) for side in scan.spacing))
        if is_volume or key not in self._sheets:
            if not self._remaining:
                self.num_left_out += 1
                return
            self._remaining -= 1
        if is_volume:
            titles = [f"slice {index}\n{_score_title(ssim)}" for index, ssim in result.shown]
            images = (result.originals, result.reconstructions)
            self._draw_file(result.row, *images, titles, scan.spacing)
            return
        panel = _Panel(
            result.row,
            _shrink(result.originals)[0],
            _shrink(result.reconstructions)[0],
            result.shown[0][1],
        )
        sheet = self._sheets.setdefault(key, [])
        sheet.append(panel)
        if len(sheet) == SLICES_PER_SHEET:
            self._draw_sheet(self._sheets.pop(key), scan.spacing)

    def finish(self) -> None:
        """Draw the contact sheets that are not full; a lone slice gets a figure of its own."""
        for (_, *spacing), sheet in self._sheets.items():
            if len(sheet) > 1:
                self._draw_sheet(sheet, spacing)
            else:
                (panel,) = sheet
                images = (panel.original[None], panel.reconstruction[None])
                self._draw_file(panel.row, *images, [_score_title(panel.ssim)], spacing)
        self._sheets.clear()

    def _draw_file(
        self,
        row: dict,
        originals: Tensor,
        reconstructions: Tensor,
        titles: list[str],
        spacing: Sequence[float],
    ) -> None:
        """Draw a figure of one file; originals and reconstructions are (B, 1, H, W)."""
        path = output_path(self._out, row["file"], ".png")
        heading = f"{row['file']}, {self._rate}"
        try:
            plots.plot_reconstructions(path, originals, reconstructions, titles, heading, spacing)
        except OSError as error:
            self.errors.append(str(error))
        else:
            row["figure"] = path.name

    def _draw_sheet(self, sheet: list[_Panel], spacing: Sequence[float]) -> None:
        """Draw a contact sheet; its number is the next one that no other sheet needs."""
        self._number += 1
        while self._number in self._others:
            self._number += 1
        path = self._out / f"contact_sheet_{self._number:03d}.png"
        titles = [f"{panel.row['file']}\n{_score_title(panel.ssim)}" for panel in sheet]
        try:
            plots.plot_contact_sheet(
                path,
                [panel.original for panel in sheet],
                [panel.reconstruction for panel in sheet],
                titles,
                f"original above reconstruction, {self._rate}",
                spacing,
            )
        except OSError as error:
            self.errors.append(str(error))
            return
        for row in list(self._table.rows.values()):  # a copy, as another thread adds rows
            if row.get("figure") == path.name:  # an earlier sheet that this one replaces
                row["figure"] = ""
        for panel in sheet:
            panel.row["figure"] = path.name


def _sheets_of_others(out: Path, table: ScoreTable, names: set[str]) -> set[int]:
    """Return the numbers of contact sheets that must be kept.

    A sheet may be replaced only if scores.csv lists its files, and all of them are in `names`.

    Args:
        out: the output folder.
        table: the rows of scores.csv.
        names: output names of the files of this call.
    """
    shown: dict[str, set[str]] = {}
    for name, row in table.rows.items():
        shown.setdefault(row.get("figure", ""), set()).add(name)
    numbers = set()
    for file in os.listdir(out):
        match = SHEET_NAME.fullmatch(file)
        if match and not (file in shown and shown[file] <= names):
            numbers.add(int(match[1]))
    return numbers


def _score_title(ssim: float) -> str:
    """Format the SSIM of a slice for its title."""
    return "not scored" if math.isnan(ssim) else f"ssim {ssim:.3f}"


def _shrink(images: Tensor) -> Tensor:
    """Downsample images (B, 1, H, W) by block averaging if a side exceeds MAX_SIDE pixels."""
    factor = math.ceil(max(images.shape[-2:]) / MAX_SIDE)
    if factor == 1:
        return images
    size = [max(1, side // factor) for side in images.shape[-2:]]
    return torch.nn.functional.adaptive_avg_pool2d(images, size)
