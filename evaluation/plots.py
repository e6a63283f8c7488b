"""Pictures of slices, codes and runs, with axes and units; a slice and its reconstruction in one grey window.

SliceDataset have rows left-right and columns inferior-superior, as HipMRI's, and are shown superior up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

from utils import write_atomically

matplotlib.use("Agg")  # files only: works without a screen
import matplotlib.pyplot as plt


def save_figure(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:], dpi=110)
    )
    plt.close(figure)


def _upright(image: Tensor) -> np.ndarray:
    """(1, H, W) with rows left-right and columns inferior-superior -> array to show with superior up."""
    return image[0].float().cpu().numpy().T[::-1]


def plain(text: str) -> str:
    """For titles that hold names of files: a dollar in them begins no formula."""
    return text.replace("$", r"\$")


def fit_title(text: str, inches: float, points: float) -> str:
    """A title's lines as `plain`, those that are longer than there is room for without their middle."""
    most = max(8, int(inches * 72 / (0.6 * points)))  # characters
    lines = [line if len(line) <= most else f"{line[: most // 2 - 1]}\N{HORIZONTAL ELLIPSIS}{line[-(most // 2) :]}"
             for line in text.split("\n")]  # fmt: skip
    return plain("\n".join(lines))


def _window(original: Tensor) -> dict:
    """The grey window of a slice and of its reconstruction: the original's 0.5 and 99.5 percentiles."""
    low, high = np.quantile(original.float().cpu().numpy(), (0.005, 0.995)).tolist()
    return {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6)}


def _proportions(
    images: Tensor, spacing: Sequence[float] | None, width: float
) -> tuple[float, float, float]:
    """Inches that a slice is wide, `width` or, of tall ones, less, and high; and a pixel's height over its width.

    images: (..., H, W). spacing: mm between rows and between columns; None: alike.
    """
    aspect = spacing[1] / spacing[0] if spacing and min(spacing) > 0 else 1.0
    aspect = min(max(aspect, 0.1), 10.0)  # of odd headers the slice should still be seen
    tall = aspect * images.shape[-1] / images.shape[-2]
    width *= min(1, (0.7 / tall) ** 0.5)
    return width, width * tall, aspect


def plot_reconstructions(
    path: Path, originals: Tensor, reconstructions: Tensor, titles: list[str], heading: str,
    spacing: Sequence[float] | None = None,
) -> None:  # fmt: skip
    """Original, reconstruction and signed error under each other, a column a slice; (B, 1, H, W) z-scores.

    spacing: mm between rows and between columns; None: alike.
    """
    width, height, aspect = _proportions(originals, spacing, 2.7)
    size = (max(width * len(titles), 3) + 0.9, 3 * height + 0.85)
    figure, axes = plt.subplots(3, len(titles), figsize=size, squeeze=False, layout="constrained")
    errors = reconstructions - originals
    limit = max(float(np.quantile(errors.abs().numpy(), 0.995)), 1e-6)
    for column, title in enumerate(titles):
        grey = _window(originals[column])
        axes[0, column].imshow(_upright(originals[column]), aspect=aspect, **grey)
        axes[1, column].imshow(_upright(reconstructions[column]), aspect=aspect, **grey)
        error = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        shown = axes[2, column].imshow(_upright(errors[column]), aspect=aspect, **error)
        axes[0, column].set_title(fit_title(title, size[0] / len(titles) - 0.3, 8), fontsize=8)
    for row, label in zip(axes, ("original", "reconstruction", "error"), strict=True):
        row[0].set_ylabel(label)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    bar = {"shrink": 0.3, "anchor": (0, 0), "fraction": 0.03, "pad": 0.01}  # beside the errors
    figure.colorbar(shown, ax=axes, **bar).set_label("standard deviations", fontsize=8)
    figure.suptitle(fit_title(heading, size[0], 10), fontsize=10)
    save_figure(figure, path)


def plot_slices(
    path: Path, images: Tensor, titles: list[str], heading: str, columns: int = 8, crop=None,
    spacing: Sequence[float] | None = None,
) -> None:  # fmt: skip
    """A grid of slices, (B, 1, H, W) z-scores, each in its own window; beside it its part `crop`, rows and columns.

    spacing: mm between rows and between columns; None: alike.
    """
    pictures = [(image, _window(image), title) for image, title in zip(images, titles, strict=True)]
    if crop:
        enlarged = [(image[:, crop[0], crop[1]], grey, "enlarged") for image, grey, _ in pictures]
        pictures = [picture for pair in zip(pictures, enlarged, strict=True) for picture in pair]
        columns *= 2
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height, aspect = _proportions(images, spacing, 2.4)
    size = (max(width * columns, 4), (height + 0.3) * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (image, grey, title) in zip(axes.flat, pictures, strict=False):
        axis.imshow(_upright(image), aspect=aspect, **grey)
        axis.set_title(fit_title(title, size[0] / columns, 7), fontsize=7)
    figure.suptitle(fit_title(heading, size[0], 10), fontsize=10)
    save_figure(figure, path)


def plot_curves(path: Path, history: list[dict], column: str, heading: str) -> None:
    """Training and validation loss, and one more column, by epoch; history: rows of metrics.csv."""
    epochs = [row["epoch"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(epochs, [row["train_loss"] for row in history], marker=".", label="training")
    left.plot(epochs, [row["val_loss"] for row in history], marker=".", label="validation")
    left.set(xlabel="epoch", ylabel="loss", yscale="log")
    left.legend()
    right.plot(epochs, [row[column] for row in history], marker=".", color="C2")
    right.set(xlabel="epoch", ylabel=column.replace("val_", "validation "))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(plain(heading), fontsize=10)
    save_figure(figure, path)


def plot_score_histogram(path: Path, scores: dict[str, np.ndarray], heading: str) -> None:
    """One histogram a SSIM name; scores: {name: (N,)}, NaN left out."""
    figure, axes = plt.subplots(
        1, len(scores), figsize=(3.2 * len(scores), 3.2), sharey=True, layout="constrained"
    )
    for axis, (name, values) in zip(np.atleast_1d(axes), scores.items(), strict=True):
        values = values[np.isfinite(values)]
        limits = (
            values.min() - 1e-3,
            values.max() + 1e-3,
        )  # not empty where all slices score alike
        axis.hist(values, bins=min(40, max(5, len(values) // 3)), range=limits, color="0.4")
        axis.axvline(values.mean(), color="C3", label=f"mean {values.mean():.3f}")
        axis.set(xlabel=name)
        axis.legend(fontsize=8)
    np.atleast_1d(axes)[0].set_ylabel("slices")
    figure.suptitle(plain(heading), fontsize=10)
    save_figure(figure, path)


def plot_code_usage(path: Path, counts: Tensor, heading: str) -> None:
    """How often each code is used, most used first; counts: (K,)."""
    share = (counts.double() / counts.sum()).sort(descending=True).values.numpy() * 100
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axis.bar(np.arange(1, len(share) + 1), share, width=1.0, color="0.3")
    axis.axhline(100 / len(share), color="C3", linewidth=1, label="all codes alike")
    axis.set(xlabel="code, most used first", ylabel="share of all code positions (%)", yscale="log")
    axis.legend()
    figure.suptitle(plain(heading), fontsize=10)
    save_figure(figure, path)


def plot_code_map(
    path: Path, original: Tensor, reconstruction: Tensor, indices: Tensor, colours: Tensor, title: str,
    spacing: Sequence[float] | None = None,
) -> None:  # fmt: skip
    """A slice, its codes as an image, and its reconstruction; (1, H, W), (1, H, W), (h, w).

    colours: (K, 3) in [0, 1], codes of like embeddings alike in colour. spacing: see `plot_slices`.
    """
    width, height, aspect = _proportions(original, spacing, 4)
    size = (max(3 * width, 6), height + 0.7)
    figure, axes = plt.subplots(1, 3, figsize=size, layout="constrained")
    grey = _window(original)
    axes[0].imshow(_upright(original), aspect=aspect, **grey)
    axes[1].imshow(
        colours[indices.cpu()].numpy().transpose(1, 0, 2)[::-1],
        aspect=aspect,
        interpolation="nearest",
    )
    axes[2].imshow(_upright(reconstruction), aspect=aspect, **grey)
    grid = "{} x {}".format(*indices.shape)
    for axis, label in zip(axes, ("original", f"its {grid} codes", "reconstruction"), strict=True):
        axis.set_title(label, fontsize=9)
        axis.set_axis_off()
    figure.suptitle(fit_title(title, size[0], 10), fontsize=10)
    save_figure(figure, path)
