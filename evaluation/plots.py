"""Draw figures of slices, codes and runs, and write them as PNG files.

In a slice, the row index runs left-right and the column index inferior-superior, as in HipMRI.
Figures show superior at the top and, if the spacing is known, true proportions. A slice and its
reconstruction share one grey window, from the 0.5 to the 99.5 percentile of the original.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from utils import write_atomically

# Figures neither use nor change settings of the user ($MPLBACKEND, matplotlibrc) or of a calling
# program: pyplot is not used, and `default_style` decorates each function that draws.
_settings = dict(matplotlib.rcParamsDefault)
_settings.pop("backend")
default_style = matplotlib.rc_context(_settings)

MAX_COLUMNS = 8  # maximum number of columns in a figure
PNG_OPTIONS = {"format": "png", "dpi": 110, "pil_kwargs": {"compress_level": 3}}  # fast


def new_figure(rows: int, columns: int, size: tuple[float, float], **options):
    """Return a figure and its axes, an array that is squeezed as by `Figure.subplots`.

    Args:
        rows, columns: numbers of rows and of columns of axes.
        size: width and height in inches.
        options: further options of `Figure.subplots`.
    """
    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


# ---------------------------------------------------------------- slices


def spread_indices(count: int, number: int = 4) -> Tensor:
    """Return at most `number` different indices, evenly spaced in range(count).

    Both ends are avoided, because the first and last slices of a volume show little.
    """
    positions = torch.linspace(0, count - 1, number + 2)[1:-1]
    return positions.round().long().unique()


@default_style
def plot_reconstructions(
    path: Path,
    originals: Tensor,
    reconstructions: Tensor,
    titles: list[str],
    heading: str,
    spacing: Sequence[float] | None = None,
) -> None:
    """Plot original, reconstruction and signed error in three rows, with one column per slice.

    Args:
        path: the file to write.
        originals, reconstructions: both (B, 1, H, W), z-scored; B must be at most 8.
        titles: title of each slice.
        heading: title of the figure.
        spacing: mm between rows and between columns; None for square pixels.
    """
    if len(titles) > MAX_COLUMNS:
        raise ValueError(f"{len(titles)} slices; expected at most {MAX_COLUMNS}")
    width, height, aspect = _panel_size(originals, spacing, 2.7)
    size = (max(width * len(titles), 3) + 0.9, 3 * height + 0.85)
    figure, axes = new_figure(3, len(titles), size, squeeze=False)
    errors = reconstructions - originals
    limit = max(float(np.quantile(errors.abs().numpy(), 0.995)), 1e-6)
    error_window = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    for column, title in enumerate(titles):
        grey = _grey_window(originals[column])
        axes[0, column].imshow(_upright(originals[column]), aspect=aspect, **grey)
        axes[1, column].imshow(_upright(reconstructions[column]), aspect=aspect, **grey)
        error = axes[2, column].imshow(_upright(errors[column]), aspect=aspect, **error_window)
        axes[0, column].set_title(fit_title(title, size[0] / len(titles) - 0.3, 8), fontsize=8)
    for row, label in zip(axes, ("original", "reconstruction", "error"), strict=True):
        row[0].set_ylabel(label)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    # The colour bar is next to the bottom row.
    bar = figure.colorbar(error, ax=axes, shrink=0.3, anchor=(0, 0), fraction=0.03, pad=0.01)
    bar.set_label("standard deviations", fontsize=8)
    figure.suptitle(fit_title(heading, size[0], 10), fontsize=10)
    save_figure(figure, path)


@default_style
def plot_slices(
    path: Path,
    images: Tensor,
    titles: list[str],
    heading: str,
    columns: int = MAX_COLUMNS,
    crop: tuple[slice, slice] | None = None,
    spacing: Sequence[float] | None = None,
) -> None:
    """Plot a grid of slices, each in its own grey window.

    Args:
        path: the file to write.
        images: (B, 1, H, W), z-scored.
        titles: title of each slice.
        heading: title of the figure.
        columns: slices per row.
        crop: rows and columns of a crop that is shown enlarged, to the right of each slice.
        spacing: mm between rows and between columns; None for square pixels.
    """
    panels = []
    for image, title in zip(images, titles, strict=True):
        grey = _grey_window(image)
        panels.append((image, grey, title))
        if crop:
            panels.append((image[:, crop[0], crop[1]], grey, "enlarged"))
    panels_per_slice = 2 if crop else 1
    columns = min(columns * panels_per_slice, MAX_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width, height, aspect = _panel_size(images, spacing, 2.4)
    size = (max(width * columns, 4), (height + 0.3) * rows + 0.5)
    figure, axes = new_figure(rows, columns, size, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (image, grey, title) in zip(axes.flat, panels, strict=False):
        axis.imshow(_upright(image), aspect=aspect, **grey)
        axis.set_title(fit_title(title, size[0] / columns, 7), fontsize=7)
    figure.suptitle(fit_title(heading, size[0], 10), fontsize=10)
    save_figure(figure, path)


@default_style
def plot_contact_sheet(
    path: Path,
    originals: Sequence[Tensor],
    reconstructions: Sequence[Tensor],
    titles: list[str],
    heading: str,
    spacing: Sequence[float] | None = None,
) -> None:
    """Plot many slices in rows of at most 8, each slice above its reconstruction.

    Args:
        path: the file to write.
        originals, reconstructions: z-scored slices, each (1, H, W) of the same shape.
        titles: title of each slice, of at most two lines.
        heading: title of the figure.
        spacing: mm between rows and between columns; None for square pixels.
    """
    columns = min(MAX_COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    width, height, _ = _panel_size(originals[0], spacing, 2.4)
    gap, title_height, heading_height = 0.06, 0.36, 0.4
    column_width = max(width, 1.0) + 2 * gap  # at least the width of a title
    row_height = title_height + 2 * height + 2 * gap
    size = (max(columns * column_width, 4.5), heading_height + rows * row_height)
    figure = Figure(figsize=size)
    # All slices share one pair of axes, in inches. Separate axes would take seconds to draw.
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    for i, title in enumerate(titles):
        centre = size[0] / 2 + (i % columns - (columns - 1) / 2) * column_width
        bottom = size[1] - heading_height - (i // columns + 1) * row_height
        grey = _grey_window(originals[i])
        for image, lower in (
            (originals[i], bottom + height + 2 * gap),
            (reconstructions[i], bottom + gap),
        ):
            extent = (centre - width / 2, centre + width / 2, lower, lower + height)
            axis.imshow(_upright(image), extent=extent, aspect="auto", **grey)
        axis.text(
            centre,
            bottom + 2 * height + 2.8 * gap,
            fit_title(title, column_width, 7),
            fontsize=7,
            ha="center",
            va="bottom",
        )
    axis.set(xlim=(0, size[0]), ylim=(0, size[1]))
    figure.suptitle(fit_title(heading, size[0], 10), fontsize=10, y=1 - 0.12 / size[1], va="top")
    save_figure(figure, path)


def _upright(image: Tensor) -> np.ndarray:
    """Rotate a slice, (1, H, W) -> (W, H), so that its last (superior) column is at the top."""
    return image[0].float().cpu().numpy().T[::-1]


def _grey_window(original: Tensor) -> dict:
    """Return the `imshow` options that a slice and its reconstruction share."""
    low, high = np.quantile(original.float().cpu().numpy(), (0.005, 0.995)).tolist()
    return {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6)}


def _panel_size(
    images: Tensor, spacing: Sequence[float] | None, width: float
) -> tuple[float, float, float]:
    """Compute the size of a panel that shows one slice.

    Args:
        images: (..., H, W).
        spacing: mm between rows and between columns; None for square pixels.
        width: maximum width in inches; panels of tall slices are narrower.

    Returns:
        Width and height in inches, and the aspect ratio of a pixel, height / width.
    """
    aspect = spacing[1] / spacing[0] if spacing and min(spacing) > 0 else 1.0
    aspect = min(max(aspect, 0.1), 10.0)  # keeps slices visible if the spacing is wrong
    height_per_width = aspect * images.shape[-1] / images.shape[-2]
    width *= min(1, (0.7 / height_per_width) ** 0.5)
    return width, width * height_per_width, aspect


# ---------------------------------------------------------------- runs


@default_style
def plot_curves(path: Path, history: list[dict], column: str, heading: str) -> None:
    """Plot training loss, validation loss and one more column by epoch.

    Args:
        path: the file to write.
        history: rows of metrics.csv.
        column: name of the additional column, such as "val_ssim".
        heading: title of the figure.
    """
    epochs = [row["epoch"] for row in history]
    figure, (left, right) = new_figure(1, 2, (10, 4))
    left.plot(epochs, [row["train_loss"] for row in history], marker=".", label="training")
    left.plot(epochs, [row["val_loss"] for row in history], marker=".", label="validation")
    left.set(xlabel="epoch", ylabel="loss", yscale="log")
    left.legend()
    right.plot(epochs, [row[column] for row in history], marker=".", color="C2")
    right.set(xlabel="epoch", ylabel=column.replace("val_", "validation "))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(escape_dollars(heading), fontsize=10)
    save_figure(figure, path)


@default_style
def plot_comparison(
    curves: list[tuple[str, list[int], list[float]]], points: list[tuple[str, float, float]]
) -> bytes:
    """Plot several runs in the same axes, and return the figure as the bytes of a PNG file.

    Args:
        curves: (run, epochs, validation ssim of each epoch).
        points: (run, bits per pixel, ssim) of the evaluated runs.
    """
    figure, (left, right) = new_figure(1, 2, (10, 4.2))
    for run, epochs, ssim in curves:
        left.plot(epochs, ssim, marker=".", label=escape_dollars(run))
    for run, bits_per_pixel, ssim in points:
        right.scatter(bits_per_pixel, ssim, label=escape_dollars(run))
    left.set(xlabel="epoch", ylabel="validation ssim")
    right.set(xlabel="bits per pixel", ylabel="ssim of the split in the table")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, **PNG_OPTIONS)
    return content.getvalue()


@default_style
def plot_score_histogram(path: Path, scores: dict[str, np.ndarray], heading: str) -> None:
    """Plot a histogram of each score {name: (N,)}, without NaN values."""
    size = (3.2 * len(scores), 3.2)
    figure, axes = new_figure(1, len(scores), size, squeeze=False, sharey=True)
    for axis, (name, values) in zip(axes[0], scores.items(), strict=True):
        values = values[np.isfinite(values)]
        limits = (values.min() - 1e-3, values.max() + 1e-3)  # wider than 0 if all are equal
        axis.hist(values, bins=min(40, max(5, len(values) // 3)), range=limits, color="0.4")
        axis.axvline(values.mean(), color="C3", label=f"mean {values.mean():.3f}")
        axis.set(xlabel=name)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("slices")
    figure.suptitle(escape_dollars(heading), fontsize=10)
    save_figure(figure, path)


# ---------------------------------------------------------------- codes


@default_style
def plot_code_usage(path: Path, counts: Tensor, heading: str) -> None:
    """Plot the frequency of each code in descending order, from its counts (K,)."""
    frequencies = counts.double() / counts.sum()
    percentages = frequencies.sort(descending=True).values.numpy() * 100
    figure, axis = new_figure(1, 1, (7, 3.4))
    axis.bar(np.arange(1, len(percentages) + 1), percentages, width=1.0, color="0.3")
    axis.axhline(100 / len(percentages), color="C3", linewidth=1, label="uniform usage")
    axis.set(xlabel="code, most used first", ylabel="share of all code positions (%)", yscale="log")
    axis.legend()
    figure.suptitle(escape_dollars(heading), fontsize=10)
    save_figure(figure, path)


@default_style
def plot_code_map(
    path: Path,
    original: Tensor,
    reconstruction: Tensor,
    indices: Tensor,
    colours: Tensor,
    title: str,
    spacing: Sequence[float] | None = None,
) -> None:
    """Plot a slice, its codes as colours, and its reconstruction.

    Args:
        path: the file to write.
        original, reconstruction: both (1, H, W).
        indices: (h, w), the codes.
        colours: (K, 3) in [0, 1] (see `code_colours`).
        title: title of the figure.
        spacing: mm between rows and between columns; None for square pixels.
    """
    width, height, aspect = _panel_size(original, spacing, 4)
    size = (max(3 * width, 6), height + 0.7)
    figure, axes = new_figure(1, 3, size)
    grey = _grey_window(original)
    code_image = colours[indices.cpu()].numpy().transpose(1, 0, 2)[::-1]
    axes[0].imshow(_upright(original), aspect=aspect, **grey)
    axes[1].imshow(code_image, aspect=aspect, interpolation="nearest")
    axes[2].imshow(_upright(reconstruction), aspect=aspect, **grey)
    rows, columns = indices.shape
    labels = ("original", f"{rows} x {columns} codes", "reconstruction")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_title(label, fontsize=9)
        axis.set_axis_off()
    figure.suptitle(fit_title(title, size[0], 10), fontsize=10)
    save_figure(figure, path)


def code_colours(embeddings: Tensor) -> Tensor:
    """Return a colour for each code, so that similar embeddings have similar colours.

    Red, green and blue are the ranks of the embeddings along their first three principal
    components. Ranks spread the colours evenly.

    Args:
        embeddings: (K, D).

    Returns:
        (K, 3) in [0, 1].
    """
    centred = embeddings - embeddings.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:3]  # (at most 3, D)
    ranks = (embeddings @ directions.T).argsort(0).argsort(0)
    colours = ranks / max(1, len(embeddings) - 1)
    return torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]))


# ---------------------------------------------------------------- titles and files


def escape_dollars(text: str) -> str:
    """Escape dollar signs, because matplotlib would read text between them as a formula."""
    return text.replace("$", r"\$")


def fit_title(text: str, inches: float, points: float) -> str:
    """Shorten each line of a title to the available width, with an ellipsis in the middle.

    Args:
        text: the title; dollar signs in it are escaped.
        inches: available width in inches.
        points: font size in points; a character is about 0.6 times this size wide.
    """
    limit = max(8, int(inches * 72 / (0.6 * points)))  # characters
    lines = []
    for line in text.split("\n"):
        if len(line) > limit:
            end = line[-(limit // 2) :]
            line = line[: limit // 2 - 1] + "\N{HORIZONTAL ELLIPSIS}" + end
        lines.append(line)
    return escape_dollars("\n".join(lines))


@default_style
def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, **PNG_OPTIONS))
