"""Figures: orientation, grey windows, proportions, titles."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from evaluation import plots
from modules import VQVAE


def test_slices_are_shown_superior_up_in_one_window(monkeypatch, tmp_path):
    """Column 127 (superior) is at the top; both images have the original's grey window."""
    calls = []
    imshow = Axes.imshow

    def record(axis, image, **options):
        calls.append((image, options))
        return imshow(axis, image, **options)

    monkeypatch.setattr(Axes, "imshow", record)
    original = torch.linspace(0, 1, 128).expand(1, 1, 256, 128).clone()
    plots.plot_reconstructions(tmp_path / "a.png", original, original * 2, ["title"], "heading")
    (image, window), (_, second_window), (error, error_window) = calls
    assert image.shape == (128, 256)
    assert image[0].mean() == pytest.approx(1.0)
    assert image[-1].mean() == pytest.approx(0.0)
    assert (window["vmin"], window["vmax"]) == (second_window["vmin"], second_window["vmax"])
    assert window["vmax"] == pytest.approx(0.995, abs=0.01)
    assert error.min() >= 0
    assert error_window["vmin"] == -error_window["vmax"]
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved during the test."""
    saved = []
    save_figure = plots.save_figure

    def record(figure, path):
        saved.append(figure)
        save_figure(figure, path)

    monkeypatch.setattr(plots, "save_figure", record)
    return saved


@pytest.mark.parametrize(
    ("size", "spacing"),
    [
        ((256, 128), None),
        ((256, 128), (1.7, 1.5)),
        ((40, 400), (0.5, 0.5)),
        ((272, 384), (0.6, 0.6)),
        ((300, 30), (0.5, 5.0)),
        ((64, 64), (1.0, 0.0)),
    ],
)
def test_slices_are_shown_in_true_proportions(figures, tmp_path, size, spacing):
    """Thick slices, too; and panels fill their figure, whether slices are wide or tall."""
    images = torch.rand(3, 1, *size)
    titles = ["a", "b", "c"]
    codes = torch.zeros(size[0] // 4, size[1] // 4, dtype=torch.long)
    colours = torch.rand(2, 3)
    path = tmp_path / "a.png"
    plots.plot_reconstructions(path, images, images + 0.1, titles, "heading", spacing)
    plots.plot_slices(path, images, titles, "heading", spacing=spacing)
    plots.plot_code_map(path, images[0], images[0], codes, colours, "title", spacing)
    row_mm, column_mm = spacing if spacing and min(spacing) > 0 else (1, 1)
    expected = size[1] * column_mm / (size[0] * row_mm)
    for figure, count, tolerance in zip(figures, (9, 3, 3), (0.02, 0.08, 0.08), strict=True):
        width, height = figure.get_size_inches()
        area = 0.0
        for axis in figure.axes[:count]:
            panel = axis.get_position()
            proportion = panel.height * height / (panel.width * width)
            assert proportion == pytest.approx(expected, rel=tolerance)  # codes are 4 x 4 pixels
            area += panel.width * panel.height
        if count == 9:
            assert area > 0.5


def test_figures_have_at_most_8_columns(figures, tmp_path):
    images = torch.rand(10, 1, 16, 8)
    titles = [""] * 10
    plots.plot_slices(tmp_path / "a.png", images, titles, "heading", columns=12)
    crop = (slice(0, 4), slice(0, 4))
    plots.plot_slices(tmp_path / "b.png", images, titles, "heading", crop=crop)
    for figure in figures:
        assert figure.axes[0].get_subplotspec().get_gridspec().ncols == 8
    with pytest.raises(ValueError, match="10 slices; expected at most 8"):
        plots.plot_reconstructions(tmp_path / "c.png", images, images, titles, "heading")


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0]), (2, [0, 1]), (4, [1, 2]), (6, [1, 2, 3, 4]), (320, [64, 128, 191, 255])],
)
def test_slices_are_spread_evenly_and_not_at_the_ends(count, expected):
    assert plots.spread_indices(count).tolist() == expected


def test_long_titles_stay_within_their_panels():
    assert plots.fit_title("short\nssim 0.9", 2, 8) == "short\nssim 0.9"
    name = "sub-0123456789_ses-20240101_acq-sagittal_run-01_T2w_slice_117"
    title = plots.fit_title(f"{name}\nssim 0.9", 2, 8)
    assert len(title.splitlines()[0]) <= 30
    assert title.startswith("sub-01")
    assert "slice_117\nssim 0.9" in title
    assert plots.fit_title("$a$", 2, 8) == r"\$a\$"


def test_settings_of_the_caller_have_no_effect_and_are_unchanged(tmp_path):
    history = [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "ssim": 0.5}]
    plots.plot_curves(tmp_path / "a.png", history, "ssim", "heading")
    settings = {"text.usetex": True, "font.size": 30, "savefig.transparent": True}
    settings |= {"backend": "module://not_installed", "figure.constrained_layout.use": False}
    with matplotlib.rc_context():
        matplotlib.rcParams.update(settings)
        before = matplotlib.rcParams.copy()
        plots.plot_curves(tmp_path / "b.png", history, "ssim", "heading")
        assert plots.plot_comparison([], [])
        assert matplotlib.rcParams == before
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_histogram_of_equal_scores(tmp_path):
    scores = np.array([0.5, 0.50000006], np.float32)
    plots.plot_score_histogram(tmp_path / "a.png", {"ssim": scores}, "equal")
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("num_embeddings", [1, 2, 16])
def test_every_code_has_a_colour(num_embeddings):
    model = VQVAE(embedding_dim=2, num_embeddings=num_embeddings)
    colours = plots.code_colours(model.vector_quantization.embedding.weight.detach())
    assert colours.shape == (num_embeddings, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1


def test_contact_sheets_show_pairs_in_true_proportions(figures, tmp_path):
    """Original above reconstruction, in one grey window, superior up, at most 8 columns."""
    originals = [torch.linspace(0, 1, 128).expand(1, 256, 128) + i for i in range(11)]
    reconstructions = [2 * image for image in originals]
    titles = [f"case_{i}\nssim 0.{i}" for i in range(11)]
    arguments = (originals, reconstructions, titles, "heading", (1.0, 1.5))
    plots.plot_contact_sheet(tmp_path / "a.png", *arguments)
    (axis,) = figures[0].axes
    images = axis.get_images()
    assert len(images) == 22
    lefts = set()
    for original, reconstruction in zip(images[::2], images[1::2], strict=True):
        left, right, bottom, top = original.get_extent()
        assert (top - bottom) / (right - left) == pytest.approx(128 * 1.5 / 256)
        other = reconstruction.get_extent()
        assert (other[0], other[1]) == (left, right) and other[3] < bottom
        assert original.get_clim() == reconstruction.get_clim()
        pixels = original.get_array()
        assert pixels.shape == (128, 256) and pixels[0].mean() > pixels[-1].mean()
        lefts.add(round(left, 3))
    assert len(lefts) == 8
    assert [text.get_text() for text in axis.texts] == titles
    assert axis.get_xlim()[1] == pytest.approx(figures[0].get_size_inches()[0])
