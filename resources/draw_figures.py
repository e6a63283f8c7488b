"""Draw architecture.png and loss.png, the two diagrams of the README.

    python resources/draw_figures.py        # a few seconds on a CPU

The slice is from the phantom. Its codes and reconstruction are computed with resources/pelvis.pt.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

sys.path.insert(0, str(Path(__file__).parents[1]))
import dataset
from modules import VQVAE
from mri import hipmri, phantom
from training.checkpoint import load_model

RESOURCES = Path(__file__).parent

INK = "#22303c"  # text and outlines
GREY = "#6f7a85"  # secondary text and lines
FILL = "#eef1f4"  # networks
EMBEDDING = "#cfe0ef"  # embedding vectors
RECONSTRUCTION = "#c0392b"  # one colour for each loss term
CODEBOOK = "#1f6fb2"
COMMITMENT = "#2e8b57"

WIDTH = 9.0  # inches; a README shows a figure at about 900 pixels
SLICE = 10  # a slice with the bladder, the prostate and both femoral heads

TIMES = "\N{MULTIPLICATION SIGN}"
Point = tuple[float, float]


# ---------------------------------------------------------------- what the figures show


def phantom_example() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return a slice, its codes as colours, its reconstruction, and the codebook.

    In all images, superior is up. The slices have shape (128, 256), the colours of the codes
    (32, 64, 3), and the codebook (512, 64).
    """
    model = load_model(VQVAE, RESOURCES / "pelvis.pt")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "phantom"
        phantom.write_phantom(data, volumes=(1, 1, 1), workers=1, progress=False)
        source = hipmri.find_hipmri(data)
        cache_dir = Path(folder) / "cache"
        test = dataset.load_split(source, "test", cache_dir=cache_dir, progress=False)
        image = test.batch(torch.tensor([SLICE]))  # (1, 1, 256, 128)
    with torch.no_grad():
        codes = model.encode(image)  # (1, 64, 32)
        reconstruction = model.decode_codes(codes)
    codebook = model.vector_quantization.embedding.weight.detach().numpy()
    colours = first_component_colours(codebook)[codes[0].numpy()]  # (64, 32, 3)
    return upright(image[0, 0]), upright(colours), upright(reconstruction[0, 0]), codebook


def first_component_colours(codebook: np.ndarray) -> np.ndarray:
    """Colour each embedding, (K, 3), by its rank along the first principal component."""
    centred = codebook - codebook.mean(0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    ranks = (centred @ direction).argsort().argsort()
    return colormaps["cividis"](ranks / (len(ranks) - 1))[:, :3]


def upright(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """Rotate an image of a slice, (rows, columns, ...), so that superior is up."""
    return np.asarray(image).swapaxes(0, 1)[::-1]


# ---------------------------------------------------------------- parts of a figure


def new_figure(height: float) -> tuple[Figure, Axes]:
    """Return an empty figure of WIDTH x height inches, with axes in inches."""
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def label(axes: Axes, x: float, y: float, text: str, size: float = 9, **style) -> None:
    style = {"ha": "center", "va": "center", "color": INK, "linespacing": 1.35} | style
    axes.text(x, y, text, fontsize=size, **style)


def arrow(axes: Axes, start: Point, end: Point, color: str = INK, **style) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 10, "linewidth": 1.2} | style
    axes.add_patch(FancyArrowPatch(start, end, color=color, shrinkA=0, shrinkB=0, **style))


def picture(axes: Axes, image: np.ndarray, x: float, y: float, width: float) -> None:
    """Show an image, twice as wide as high, with its left edge at x and its centre at height y."""
    height = width / 2
    extent = (x, x + width, y - height / 2, y + height / 2)
    grey = {"cmap": "gray", "vmin": -1.0, "vmax": 2.6} if image.ndim == 2 else {}
    interpolation = "antialiased" if image.ndim == 2 else "nearest"
    axes.imshow(image, extent=extent, interpolation=interpolation, zorder=2, **grey)
    frame = Rectangle((x, y - height / 2), width, height, fill=False, edgecolor=INK, linewidth=0.8)
    axes.add_patch(frame)
    frame.set_zorder(3)


def network(axes: Axes, x: float, y: float, left: float, right: float, text: str) -> None:
    """Draw a trapezoid 0.8 inches wide, whose left and right sides have the given heights."""
    corners = [
        (x, y - left / 2),
        (x, y + left / 2),
        (x + 0.8, y + right / 2),
        (x + 0.8, y - right / 2),
    ]
    axes.add_patch(Polygon(corners, facecolor=FILL, edgecolor=INK, linewidth=1.0))
    label(axes, x + 0.4, y, text, size=10)


def volume(axes: Axes, x: float, y: float, color: str) -> None:
    """Draw a stack of feature maps, 0.72 x 0.48 inches, centred at y with its left edge at x."""
    for sheet in reversed(range(5)):
        corner = (x + 0.04 * sheet, y - 0.24 + 0.04 * sheet)
        sheet_box = Rectangle(corner, 0.56, 0.32, facecolor=color, edgecolor=INK, linewidth=0.7)
        axes.add_patch(sheet_box)


# ---------------------------------------------------------------- the two figures


def draw_architecture(path: Path) -> None:
    """Draw the path of a slice through the model, with the size of each step."""
    image, codes, reconstruction, codebook = phantom_example()
    figure, axes = new_figure(3.0)
    y = 2.3

    picture(axes, image, 0.1, y, 1.5)
    arrow(axes, (1.64, y), (1.82, y))
    network(axes, 1.84, y, 0.95, 0.5, "Encoder")
    arrow(axes, (2.66, y), (2.84, y))
    volume(axes, 2.87, y, "white")
    arrow(axes, (3.62, y), (3.82, y))
    picture(axes, codes, 3.85, y, 1.3)
    arrow(axes, (5.18, y), (5.38, y))
    volume(axes, 5.41, y, EMBEDDING)
    arrow(axes, (6.16, y), (6.34, y))
    network(axes, 6.36, y, 0.5, 0.95, "Decoder")
    arrow(axes, (7.18, y), (7.36, y))
    picture(axes, reconstruction, 7.4, y, 1.5)

    for x, name, size in (
        (0.85, "slice", "256 x 128"),
        (3.23, "$z$", "64 x 64 x 32"),
        (4.5, "codes", "64 x 32"),
        (5.77, "$e$", "64 x 64 x 32"),
        (8.15, "reconstruction", "256 x 128"),
    ):
        label(axes, x, y + 0.53, name, size=10, va="baseline")
        label(axes, x, y - 0.66, size.replace("x", TIMES), color=GREY, va="baseline")

    # Arrows from z to the codebook, and from the codebook to e
    middle = 0.87
    lookup = {"color": GREY, "linewidth": 1.0, "snap": False}
    draw_codebook(axes, codebook, x=3.94, y=middle)
    axes.plot((3.7, 3.7), (y - 0.1, middle), **lookup)
    arrow(axes, (3.7, middle), (3.9, middle), **lookup)
    axes.plot((5.18, 5.28, 5.28), (middle, middle, y - 0.2), **lookup)
    arrow(axes, (5.28, y - 0.25), (5.28, y - 0.1), **lookup)
    nearest = "Each of the 2,048 vectors of $z$\nis replaced by its nearest\nembedding."
    rate = "A code is the index of an embedding:\n9 bits, 18,432 bits per slice,\n"
    rate += "0.5625 bits per pixel."
    label(axes, 3.55, middle, nearest, ha="right")
    label(axes, 5.45, middle, rate, ha="left")
    figure.savefig(path, dpi=200)


def draw_codebook(axes: Axes, codebook: np.ndarray, x: float, y: float) -> None:
    """Draw four of the embeddings as rows, each with the colour of its code, centred at y."""
    colours = first_component_colours(codebook)
    height = 0.15
    for row, step in ((0, 2), (1, 1), (2, 0), (len(codebook) - 1, -2)):
        bottom = y - height / 2 + step * height
        color_box = {"facecolor": colours[row], "edgecolor": INK, "linewidth": 0.7}
        axes.add_patch(Rectangle((x, bottom), height, height, **color_box))
        extent = (x + 0.22, x + 1.22, bottom, bottom + height)
        axes.imshow(codebook[row : row + 1], extent=extent, cmap="Blues", vmin=-2, vmax=2)
        frame = {"fill": False, "edgecolor": INK, "linewidth": 0.7}
        axes.add_patch(Rectangle((x + 0.22, bottom), 1.0, height, **frame))
    for dot in (-1, 0, 1):
        axes.add_patch(Circle((x + 0.72, y - height + 0.045 * dot), 0.011, color=GREY))
    label(axes, x + 0.61, y - 0.58, "codebook", size=10, va="baseline")
    label(axes, x + 0.61, y - 0.76, f"512 {TIMES} 64", color=GREY, va="baseline")


def draw_loss(path: Path) -> None:
    """Draw where each term of the loss acts, after Figure 1 of arXiv 1711.00937."""
    figure, axes = new_figure(3.7)
    draw_gradient_flow(axes, y=2.55)
    draw_embedding_space(axes, x=5.75, y=1.35, width=3.1, height=2.2)
    draw_terms(axes, y=0.72)
    figure.savefig(path, dpi=200)


def draw_gradient_flow(axes: Axes, y: float) -> None:
    """Draw the forward pass from x to its reconstruction, and the gradients back."""
    square = {"edgecolor": INK, "linewidth": 1.0, "boxstyle": "round,pad=0,rounding_size=0.05"}
    for x, name, color in (
        (0.1, "$x$", "white"),
        (1.85, "$z$", "white"),
        (2.95, "$e$", EMBEDDING),
        (4.7, r"$\hat{x}$", "white"),
    ):
        box = FancyBboxPatch((x, y - 0.2), 0.4, 0.4, facecolor=color, **square)
        axes.add_patch(box)
        label(axes, x + 0.2, y, name, size=11)
    network(axes, 0.75, y, 0.95, 0.5, "Encoder")
    network(axes, 3.65, y, 0.5, 0.95, "Decoder")
    for start, end in ((0.52, 0.73), (1.57, 1.83), (2.27, 2.93), (3.37, 3.63), (4.47, 4.68)):
        arrow(axes, (start, y), (end, y))
    label(axes, 2.6, y + 0.13, "nearest", size=8, color=GREY)

    # The reconstruction term compares x with its reconstruction.
    top = y + 0.72
    term = {"color": RECONSTRUCTION, "linewidth": 1.2}
    axes.plot((0.3, 0.3, 4.9, 4.9), (y + 0.25, top, top, y + 0.25), **term)
    text = r"$\Vert x-\hat{x}\Vert^2$"
    label(axes, 2.6, top, text, size=11, color=RECONSTRUCTION, backgroundcolor="white")

    # The term's gradient flows through the decoder, skips the quantiser, and reaches the encoder.
    back = {"color": RECONSTRUCTION, "linewidth": 1.2, "linestyle": (0, (4, 2))}
    low = y - 0.62
    under = y - 0.25  # lower edge of the boxes
    axes.plot((4.9, 4.9, 3.2, 3.2), (under, low, low, under - 0.05), **back)
    arrow(axes, (3.2, under - 0.08), (3.2, under + 0.02), **back)
    arrow(axes, (4.05, low), (4.05, y - 0.38), **back)
    arrow(axes, (3.1, under), (2.1, under), connectionstyle="arc3,rad=-0.5", **back)
    axes.plot((2.0, 2.0, 1.15, 1.15), (under, low, low, y - 0.5), **back)
    arrow(axes, (1.15, y - 0.5), (1.15, y - 0.38), **back)
    text = "straight through:\nthe gradient at $e$\nis copied to $z$"
    label(axes, 2.6, y - 0.9, text, size=8.5, color=RECONSTRUCTION)


def draw_embedding_space(axes: Axes, x: float, y: float, width: float, height: float) -> None:
    """Draw an encoder output z among the embeddings, and how the loss terms move z and e."""
    frame = {"facecolor": "white", "edgecolor": GREY, "linewidth": 0.8}
    axes.add_patch(Rectangle((x, y), width, height, **frame))
    label(axes, x + 0.1, y + height - 0.15, "embedding space", size=8.5, color=GREY, ha="left")

    others = ((0.35, 0.5), (0.8, 1.55), (1.0, 0.3), (2.7, 0.35), (2.75, 1.75), (1.95, 1.85))
    for across, up in others:
        axes.add_patch(Circle((x + across, y + up), 0.06, facecolor=EMBEDDING, edgecolor=INK))
    z = (x + 0.95, y + 0.95)
    e = (x + 2.05, y + 0.95)
    axes.add_patch(Circle(e, 0.08, facecolor=CODEBOOK, edgecolor=INK, zorder=3))
    axes.add_patch(Circle(z, 0.08, facecolor=INK, edgecolor=INK, zorder=3))
    label(axes, z[0] - 0.2, z[1], "$z$", size=12)
    label(axes, e[0] + 0.2, e[1], "$e$", size=12)
    axes.plot((z[0], e[0]), (z[1], e[1]), color=GREY, linewidth=0.8, linestyle=":")
    arrow(axes, (z[0] + 0.1, z[1] - 0.08), (z[0] + 0.5, z[1] - 0.08), color=COMMITMENT)
    arrow(axes, (e[0] - 0.1, e[1] + 0.08), (e[0] - 0.5, e[1] + 0.08), color=CODEBOOK)
    back = {"color": RECONSTRUCTION, "linestyle": (0, (4, 2))}
    arrow(axes, (z[0] + 0.03, z[1] + 0.12), (z[0] + 0.22, z[1] + 0.55), **back)
    label(axes, z[0] + 0.26, z[1] + 0.62, "reconstruction", size=8, color=RECONSTRUCTION, ha="left")
    label(axes, z[0] + 0.3, z[1] - 0.23, "commitment", size=8, color=COMMITMENT)
    label(axes, e[0] - 0.3, e[1] + 0.23, "codebook", size=8, color=CODEBOOK)


def draw_terms(axes: Axes, y: float) -> None:
    """Write the loss, and what each of its terms trains."""
    reconstruction = "reconstruction:\ntrains the decoder and the encoder"
    codebook = "codebook:\nmoves $e$ towards a fixed $z$"
    commitment = "commitment:\nmoves $z$ towards a fixed $e$"
    label(axes, 0.35, y, r"$L\;=$", size=13)
    for x, formula, meaning, color in (
        (1.5, r"$\Vert x-\hat{x}\Vert^2$", reconstruction, RECONSTRUCTION),
        (4.4, r"$\Vert\mathrm{sg}[z]-e\Vert^2$", codebook, CODEBOOK),
        (7.4, r"$\beta\;\Vert z-\mathrm{sg}[e]\Vert^2$", commitment, COMMITMENT),
    ):
        label(axes, x, y, formula, size=13, color=color)
        label(axes, x, y - 0.4, meaning, size=8.5, color=color)
    for x in (2.95, 5.9):
        label(axes, x, y, "+", size=13)


def main() -> None:
    draw_architecture(RESOURCES / "architecture.png")
    draw_loss(RESOURCES / "loss.png")


if __name__ == "__main__":
    main()
