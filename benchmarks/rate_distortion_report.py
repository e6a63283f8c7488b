"""Write the table of rate_distortion.py, the notes below it, and the plot."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from image_codecs import CODECS

from evaluation import plots
from evaluation.metrics import SSIM_NAMES

SCORES = (*SSIM_NAMES, "ms_ssim", "psnr")

RULES = """\
- The budget of a slice is rate x pixels, plus 32 bits for every method. The 32 bits are two float16
  numbers that scale the slice: minimum and range for a codec, mean and standard deviation for a
  run. Encoder and decoder both use the rounded numbers. Before that, intensities are divided by a
  power of two, the same for the whole split. This keeps them in the range of float16 and changes no
  rounding. The bits per pixel in the table include the 32 bits.
- Each slice is compressed on its own, at the finest setting that fits the budget, found by
  bisection. The size usually grows with the setting, but not always, so the search may miss a
  better setting (JPEG XL: 0.1 dB better). `file` counts the whole file, or the bare codestream if
  the format has one. `payload` leaves out everything that a decoder does not need if it knows the
  format, the image size and the encoder's options. If the coarsest setting of a codec exceeds the
  budget for any slice, the codec does not fit at that rate and gets no score, because a mean over
  the other slices would favour it.
- Codecs get the slice scaled to [0, 1], at each of the bit depths below. The table has the depth
  with the best mean `ssim` at that rate. JPEG (libjpeg-turbo): sequential, 8 and 12 bits, standard
  or optimised Huffman tables, whichever are smaller. JPEG 2000 (OpenJPEG): irreversible 9/7
  wavelet, one tile, one layer, 8 and 16 bits. JPEG XL (libjxl): effort 10, 8 bits in sRGB and 16
  bits in linear light, as imagecodecs labels them. WebP (libwebp): method 6, 8 bits, greyscale as
  RGB. AVIF (libavif, libaom): monochrome, speed 2, 8, 10 and 12 bits. Speed 0 takes three times as
  long and gives no better scores.
- The codes of a run are counted at fixed length. `entropy-coded` counts the bits of each slice's
  own stream, which a range coder writes with the run's prior (prior/coding.py) and which is
  decoded again to the same codes. Its rate is the mean over slices, whereas a codec must
  fit the budget with every slice. The table gives the number of weights of a run, including those
  of its prior if it is used; they are not counted, and neither is the program of a codec.
- The methods are optimised for different goals. A run is optimised for slices like its training
  data and for the training loss in its config.json; JPEG, JPEG 2000 and WebP for squared error,
  where JPEG weights frequencies by visibility and WebP uses its default psychovisual preset; AVIF
  for libavif's default tuning, which is SSIM up to version 1.3 and "iq" (for SSIMULACRA 2) from
  version 1.4 on; JPEG XL for Butteraugli.
- docs/metrics.md defines the SSIM variants and PSNR. `ms_ssim` is torchmetrics' multi-scale SSIM,
  computed on the same scaled images as `ssim`. It uses the first four of the usual five scales,
  because 128 columns are too few for the fifth. Their weights are rescaled so that their sum is 1.
"""


def table(rows: list[dict], num_slices: int) -> str:
    """Return a Markdown table with one row per method, rate and accounting."""
    names = " | ".join("PSNR (dB)" if name == "psnr" else f"`{name}`" for name in SCORES)
    lines = [
        f"| rate | method | counted | bits per pixel | {names} |",
        "|" + "---|" * (4 + len(SCORES)),
    ]
    for row in rows:
        method = row["method"]
        if "depth" in row:
            method += f", {row['depth']} bits"
        if "weights" in row:
            method += f", {row['weights']:,} weights"
        cells = [f"{row['rate']:.4f}", method, row["accounting"]]
        if "scores" in row:
            cells.append(f"{row['bits_per_pixel']:.4f}")
            for name in SCORES:
                digits = 2 if name == "psnr" else 4
                cells.append(f"{row['scores'][name]['mean']:.{digits}f}")
        else:
            cells.append(f"does not fit ({row['misfits']} of {num_slices} slices)")
            cells += [""] * len(SCORES)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@plots.default_style
def plot(path: Path, rows: list[dict], heading: str) -> None:
    """Plot ssim against bits per pixel: a curve per codec and accounting, and a point per run."""
    figure, axis = plots.new_figure(1, 1, (9, 5.2))
    curves: dict[tuple[str, str], list] = {}
    for row in rows:
        if "scores" in row:
            point = (row["bits_per_pixel"], row["scores"]["ssim"]["mean"])
            curves.setdefault((row["method"], row["accounting"]), []).append(point)
    colours = {codec.name: f"C{number}" for number, codec in enumerate(CODECS.values())}
    # Runs are distinguished by markers, because labels next to the points would overlap.
    runs = sorted({method for method, _ in curves} - colours.keys())
    markers = dict(zip(runs, itertools.cycle("osD^vP*X"), strict=False))
    for (method, accounting), points in sorted(curves.items()):
        if method in colours:
            line = "-" if accounting == "payload" else "--"
            style = {"color": colours[method], "linestyle": line, "marker": "."}
        else:
            fill = "full" if accounting == "fixed length" else "none"
            style = {"color": "k", "linestyle": "", "marker": markers[method], "fillstyle": fill}
        axis.plot(*zip(*points, strict=True), label=f"{method}, {accounting}", **style)
    ticks = sorted({row["rate"] for row in rows if row["method"] in colours})
    axis.set(xscale="log", xlabel="bits per pixel", ylabel="ssim", title=heading)
    axis.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    plots.save_figure(figure, path)
