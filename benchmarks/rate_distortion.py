"""This project's runs beside JPEG, JPEG 2000, JPEG XL, WebP and AVIF: equal bits, the same slices, the same scores.

    pip install -r benchmarks/requirements.txt
    python benchmarks/rate_distortion.py --data DIR                         # the codecs alone
    python benchmarks/rate_distortion.py --data DIR --runs runs/a runs/b
    python benchmarks/rate_distortion.py --volume T1.nii.gz --runs runs/a   # images of a kind that no run has seen

Writes <out>.md, <out>.json and, for several rates, <out>.png. What is counted, and how each method is set, stands in
RULES below and in <out>.md. Encodes on as many threads as torch computes with ($OMP_NUM_THREADS).
"""

from __future__ import annotations

import argparse
import bisect
import functools
import itertools
import math
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure as torchmetrics_ms_ssim,
)
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import entropy

import dataset
import utils
from evaluation import metrics, plots
from evaluation.metrics import SCORE_NAMES, SSIM_NAMES
from modules import VQVAE
from mri import hipmri, preprocessing
from mri.files import Source
from prior.model import CodePrior
from training.checkpoint import load_model
from training.run_folder import read_arguments
from utils import CheckpointError, UserError

try:
    import imagecodecs
except ImportError:  # main() says what to install
    imagecodecs = None

RATES = (0.0703125, 0.140625, 0.28125, 0.5625, 1.125)  # bits per pixel
PIXELS = math.prod(preprocessing.SIZE)
SCALE_BITS = 32  # two float16
ACCOUNTINGS = ("file", "payload")
SCORES = (*SSIM_NAMES, "ms_ssim", "psnr")
# Of the five scales' weights (Wang, Simoncelli, Bovik 2003) the four that 128 columns have room for, rescaled to sum 1.
MS_SSIM_WEIGHTS = tuple(weight / 0.8668 for weight in (0.0448, 0.2856, 0.3001, 0.2363))
STANDARD_TABLES = 0x83CDEA47  # CRC-32 of JPEG's standard Huffman tables for luminance

RULES = """\
- Budget: rate x pixels and, for every method, 32 bits a slice more: its two scale numbers in float16, minimum and range
  for a codec, mean and deviation for a run. Both sides scale with the rounded numbers. Intensities are first divided by
  a power of two common to the split, which changes no rounding and keeps them in float16's range. Bits per pixel
  include the 32 bits.
- Each slice is coded by itself, at the finest setting that fits, found by bisection; sizes grow with the setting, if
  not strictly: JPEG XL may miss a setting that is 0.1 dB finer. `file` counts the whole file, a bare codestream where
  the format has one. `payload` leaves out what a decoder that knows the format, the image size and the encoder's flags
  can do without. A codec whose coarsest setting is over budget for one slice does not fit at that rate, and gets no
  score: a mean over the other slices would favour it.
- Codecs get the slice scaled to [0, 1], at each depth that is named here; kept is the one of the best mean `ssim` at
  that rate. JPEG (libjpeg-turbo): baseline, 8 and 12 bits, Huffman tables standard or optimised, whichever is smaller.
  JPEG 2000 (OpenJPEG): irreversible 9/7, one tile, one layer, 8 and 16 bits. JPEG XL (libjxl): effort 10, 8 bits, and
  16 in linear light, as imagecodecs labels them. WebP (libwebp): method 6, 8 bits, grey RGB. AVIF (libavif, libaom):
  monochrome, speed 2 (0 takes three times as long and is no better), 8, 10 and 12 bits.
- A run's codes are counted at their fixed length; `entropy-coded` counts the bits of each slice's own stream, written
  by an arithmetic coder under the run's prior (benchmarks/entropy.py) and decoded again to the same codes. Their mean
  over slices is the rate, where codecs fit each slice's budget. A run's weights, with its prior's where it is used,
  are not counted, as a codec's program is not; the table names their number.
- What each is made for: a run, slices like its training data and the training loss in its config.json. JPEG, JPEG 2000
  and WebP, squared error, with JPEG's visual weighting of frequencies and WebP's default psychovisual preset. AVIF,
  libavif's default tuning: SSIM, from 1.4 on "iq", for SSIMULACRA 2. JPEG XL, Butteraugli.
- The SSIM names and PSNR: the README's. `ms_ssim`: torchmetrics, on `ssim`'s images, with the first four of the usual
  five scales, as 128 columns are too few for the fifth; their weights rescaled to sum 1.
"""


# ---------------------------------------------------------------- codecs


def segments(file: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker segments of JPEG and JPEG 2000, which begin alike: (marker, where its contents begin, where they end)."""
    position = 2  # after SOI or SOC
    while True:
        marker, length = struct.unpack_from(">HH", file, position)
        yield marker, position + 4, position + 2 + length
        position += 2 + length


def jpeg_payload(file: bytes) -> int:
    """The entropy-coded scan, Huffman tables other than the standard's, and a byte for the quality: it sets DQT."""
    tables = b""
    for marker, start, end in segments(file):
        if marker == 0xFFC4:  # DHT
            tables += file[start:end]
        elif marker == 0xFFDA:  # SOS: the scan goes on to EOI
            return (
                len(file)
                - 2
                - end
                + (0 if zlib.crc32(tables) == STANDARD_TABLES else len(tables))
                + 1
            )


def jpeg2000_payload(file: bytes) -> int:
    """The packets: what lies between SOD, which is no segment but a bare marker, and EOC."""
    return next(
        len(file) - 2 - (start - 2) for marker, start, _ in segments(file) if marker == 0xFF93
    )


def jpegxl_payload(file: bytes) -> int:
    """The frame: all but signature, image size and metadata, which take 8 bytes of these slices."""
    return len(file) - 8


def webp_payload(file: bytes) -> int:
    """The VP8 chunk but for its frame header: 3 bytes of sizes, 3 of start code, 4 of width and height."""
    return int.from_bytes(file[16:20], "little") - 10


def avif_payload(file: bytes) -> int:
    """The coded frame: in the mdat box, the contents of the units (OBU) that are frame header, tile group or both."""
    position = 0
    while file[position + 4 : position + 8] != b"mdat":
        position += int.from_bytes(file[position : position + 4], "big")
    end, position = position + int.from_bytes(file[position : position + 4], "big"), position + 8
    total = 0
    while position < end:
        kind, size, shift = file[position] >> 3 & 15, 0, 0
        while (
            shift == 0 or file[position] > 127
        ):  # the size in LEB128: 7 bits a byte, the lowest first
            position += 1
            size |= (file[position] & 127) << shift
            shift += 7
        total += size if kind in (3, 4, 6) else 0
        position += 1 + size
    return total


class Encoded(NamedTuple):
    """A slice coded at one setting, and how many bytes that takes."""

    data: bytes  # a file to decode
    file: int  # the smallest whole file of the same picture
    payload: int  # without headers


def to_linear(image: np.ndarray) -> np.ndarray:
    """sRGB's curve undone, on [0, 1]."""
    return np.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)


def from_linear(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


@dataclass(frozen=True)
class Codec:
    """A codec of imagecodecs, for grey images (256, 128) in [0, 1]."""

    name: str
    functions: str  # what the names of its functions begin with
    depths: tuple[int, ...]  # bits a sample
    settings: Sequence[float]  # its `level`, coarsest first
    payload: Callable[[bytes], int]
    options: dict = field(default_factory=dict)
    rgb: bool = False  # takes grey as three equal channels

    def call(self, what: str, *arguments, **options):
        return getattr(imagecodecs, f"{self.functions}_{what}")(*arguments, **options)

    def linear(self, depth: int) -> bool:
        """imagecodecs labels JPEG XL's 8 bits as sRGB but more as linear light: then that is what it must be given."""
        return self.functions == "jpegxl" and depth > 8

    def encode(self, image: np.ndarray, setting: float, depth: int) -> Encoded:
        image = to_linear(image) if self.linear(depth) else image
        levels = np.rint(image * (2**depth - 1)).astype(np.uint8 if depth == 8 else np.uint16)
        levels = np.repeat(levels[..., None], 3, 2) if self.rgb else levels
        options = self.options | ({"bitspersample": depth} if len(self.depths) > 1 else {})
        ways = [{"optimize": True}, {"optimize": False}] if self.functions == "jpeg8" else [{}]
        files = [self.call("encode", levels, level=setting, **options, **way) for way in ways]
        return Encoded(files[0], min(map(len, files)), min(map(self.payload, files)))

    def decode(self, data: bytes, depth: int) -> np.ndarray:
        image = self.call("decode", data) / (2**depth - 1)
        image = image.mean(2) if image.ndim == 3 else image
        return from_linear(image) if self.linear(depth) else image


CODECS = {
    "jpeg": Codec("JPEG", "jpeg8", (8, 12), range(1, 101), jpeg_payload),
    "jpeg2000": Codec(
        "JPEG 2000", "jpeg2k", (8, 16), np.arange(1, 90, 1 / 16).tolist(), jpeg2000_payload,
        {"codecformat": "j2k", "reversible": False},
    ),
    "jpegxl": Codec(
        "JPEG XL", "jpegxl", (8, 16), np.arange(0, 99, 1 / 4).tolist(), jpegxl_payload,
        {"effort": 10, "lossless": False, "usecontainer": False},
    ),
    "webp": Codec(
        "WebP", "webp", (8,), np.arange(0, 100.5, 1 / 2).tolist(), webp_payload,
        {"method": 6, "lossless": False}, rgb=True,
    ),
    "avif": Codec(  # single-channel input would be coded without loss
        "AVIF", "avif", (8, 10, 12), range(100), avif_payload,
        {"speed": 2, "codec": "aom", "pixelformat": "yuv400"}, rgb=True,
    ),
}  # fmt: skip


def search(
    codec: Codec, depth: int, rates: Sequence[float], image: np.ndarray
) -> dict[tuple, Encoded | None]:
    """For each rate and accounting, `image` at the finest setting that fits; None where the coarsest does not."""
    encode = functools.cache(lambda i: codec.encode(image, codec.settings[i], depth))
    steps, found = range(len(codec.settings)), {}
    for rate, accounting in itertools.product(rates, ACCOUNTINGS):
        budget = rate * image.size / 8
        fitting = bisect.bisect_right(
            steps, budget, key=lambda i, count=accounting: getattr(encode(i), count)
        )
        found[rate, accounting] = encode(fitting - 1) if fitting else None
    return found


# ---------------------------------------------------------------- measuring


class Originals(NamedTuple):
    """The slices to code, constant ones left out."""

    images: (
        Tensor  # (N, 1, 256, 128) float32, intensities in a unit that keeps them in float16's range
    )
    mean: Tensor  # (N, 1, 1, 1), what z-scoring takes off
    std: Tensor  # and divides by
    cases: list[str]  # N


def load(args: argparse.Namespace) -> tuple[Originals, int]:
    """The slices of the split or the volume, and how many constant ones were left out."""
    if args.volume:
        # Pixels count as square, and the centre of a plane is cropped to 2 : 1 before it is resized.
        source = Source(args.volume.parent, "3D", {args.split: [args.volume]}, [])
    else:
        source = hipmri.find_hipmri(args.data)
    data = dataset.load_split(
        source, args.split, fit="crop" if args.volume else "resize", planes=args.planes
    )
    for note in [*source.notes, *data.notes]:
        print(f"note: {note}")
    kept = torch.nonzero(~data.constant).flatten()
    if not len(kept):
        raise UserError(
            f"all {len(data)} slices of {args.split} are constant; there is nothing to measure"
        )
    images = data.denormalise(data.batch(kept), kept)
    unit = 2.0 ** math.ceil(math.log2(float(images.abs().max())) - 14)
    mean, std = (numbers[kept].view(-1, 1, 1, 1) / unit for numbers in (data.mean, data.std))
    originals = Originals(images / unit, mean, std, [data.names[i].case for i in kept])
    return originals, len(data) - len(kept)


def ms_ssim(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Multi-scale SSIM of each slice, on `ssim`'s images: (B, 1, H, W) twice -> (B,)."""
    pixels = originals.flatten(1)
    pair = [
        metrics.rescale(images, pixels.amin(1), pixels.amax(1))
        for images in (reconstructions, originals)
    ]
    return torchmetrics_ms_ssim(
        *pair, reduction="none", data_range=1.0, betas=MS_SSIM_WEIGHTS
    ).flatten()


def score(
    originals: Tensor, reconstructions: Tensor, names: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Some of SCORES of each slice: (N, 1, H, W) twice -> {name: (N,)}."""
    columns = []
    for pair in zip(originals.split(16), reconstructions.split(16), strict=True):
        columns.append(
            metrics.slice_scores(*pair, tuple(name for name in names if name in SCORE_NAMES))
        )
        if "ms_ssim" in names:
            columns[-1]["ms_ssim"] = ms_ssim(*pair)
    return {
        name: torch.cat([column[name] for column in columns]).double().numpy() for name in names
    }


def summarize(originals: Originals, reconstructions: Tensor) -> dict[str, dict]:
    """Each score's mean over slices and over each case's slices, as in predict.py's metrics.json."""
    scores = score(originals.images, reconstructions, SCORES)
    return {name: metrics.mean_by_case(values, originals.cases) for name, values in scores.items()}


def measure_codec(codec: Codec, originals: Originals, rates: Sequence[float]) -> list[dict]:
    """A row for each rate and accounting: the scores at the best depth, or how many slices do not fit at any."""
    images = originals.images
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    low, span = low.half().float(), (high - low).half().float()
    scaled = ((images - low) / span).clamp(0, 1)[:, 0].double().numpy()
    found = {}
    with ThreadPoolExecutor(
        torch.get_num_threads()
    ) as pool:  # imagecodecs encodes without the interpreter's lock
        for depth in codec.depths:
            tasks = pool.map(functools.partial(search, codec, depth, rates), scaled)
            found[depth] = list(
                tqdm(tasks, f"{codec.name}, {depth} bits", len(scaled), unit=" slices")
            )
    rows = []
    for rate, accounting in itertools.product(rates, ACCOUNTINGS):
        misfits, best = [], (-math.inf, {}, None)
        for depth in codec.depths:
            coded = [slices[rate, accounting] for slices in found[depth]]
            misfits.append(coded.count(None))
            if misfits[-1]:
                continue
            decoded = np.stack([codec.decode(one.data, depth) for one in coded])
            restored = torch.from_numpy(decoded).float()[:, None] * span + low
            bits = 8 * np.mean([getattr(one, accounting) for one in coded]) + SCALE_BITS
            ssim = score(images, restored, ("ssim",))["ssim"].mean()
            if ssim > best[0]:
                best = (ssim, {"depth": depth, "bits_per_pixel": float(bits) / PIXELS}, restored)
        row = {
            "method": codec.name,
            "rate": rate,
            "accounting": accounting,
            "misfits": min(misfits),
            **best[1],
        }
        rows.append(row if row["misfits"] else row | {"scores": summarize(originals, best[2])})
    return rows


def measure_run(
    run: Path, originals: Originals, device: torch.device, entropy_coded: bool
) -> list[dict]:
    """The row of a run's best.pt; where it has a prior and its codes are to be entropy-coded, a second one."""
    model = load_model(VQVAE, run / "best.pt", device)
    trained_with = read_arguments(run, {"recipe": "tuned"})
    mean, std = originals.mean.half().float(), originals.std.half().float()
    batches = ((originals.images - mean) / std).split(16)
    with torch.no_grad():
        outputs = [model(batch.to(device)) for batch in batches]
    restored = torch.cat([output.reconstruction.float().cpu() for output in outputs]) * std + mean
    row = {
        "method": f"{run.resolve().name} ({trained_with.get('recipe', 'unknown recipe')})", "misfits": 0,
        "scores": summarize(originals, restored),
    }  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    rates = {"fixed length": (model.bits_per_pixel, parameters)}
    if entropy_coded and (run / "prior" / "best.pt").exists():
        prior = load_model(CodePrior, run / "prior" / "best.pt", device)
        parameters += sum(p.numel() for p in prior.parameters())
        bits = coded_bits(prior, torch.cat([output.indices for output in outputs]), run)
        rates["entropy-coded"] = (bits / PIXELS, parameters)
    elif entropy_coded:
        print(
            f"note: {run} has no prior/best.pt, and is counted at fixed length alone; train_prior.py trains one"
        )
    return [
        row
        | {
            "accounting": accounting,
            "rate": rate,
            "bits_per_pixel": rate + SCALE_BITS / PIXELS,
            "weights": weights,
        }
        for accounting, (rate, weights) in rates.items()
    ]


def coded_bits(prior: CodePrior, codes: Tensor, run: Path) -> float:
    """Bits of a slice's stream, mean over codes (N, h, w), which come back from the streams or there is no figure."""
    if tuple(codes.shape[1:]) != (prior.height, prior.width):
        raise UserError(
            f"{run / 'prior'} is of {prior.height} x {prior.width} codes, the run of other grids"
        )
    streams = entropy.encode(prior, codes)
    if not torch.equal(entropy.decode(prior, streams), codes):
        raise UserError(
            f"the codes of {run} do not come back from their streams: this machine does not compute alike"
        )
    return 32 * sum(map(len, streams)) / len(streams)


# ---------------------------------------------------------------- results


def table(rows: list[dict], slices: int) -> str:
    """Markdown, a row a method, rate and accounting."""
    names = " | ".join("PSNR (dB)" if name == "psnr" else f"`{name}`" for name in SCORES)
    lines = [
        f"| rate | method | counted | bits per pixel | {names} |",
        "|" + "---|" * (4 + len(SCORES)),
    ]
    for row in rows:
        detail = f", {row['depth']} bits" if "depth" in row else ""
        detail += f", {row['weights']:,} weights" if "weights" in row else ""
        cells = [f"{row['rate']:.4f}", row["method"] + detail, row["accounting"]]
        if "scores" in row:
            cells.append(f"{row['bits_per_pixel']:.4f}")
            cells += [
                f"{row['scores'][name]['mean']:.{2 if name == 'psnr' else 4}f}" for name in SCORES
            ]
        else:
            cells += [f"does not fit ({row['misfits']} of {slices} slices)", *[""] * len(SCORES)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(path: Path, rows: list[dict], heading: str) -> None:
    """ssim against bits per pixel: a curve a codec and accounting, a point a run."""
    figure, axis = plots.plt.subplots(figsize=(9, 5.2), layout="constrained")
    curves: dict[tuple[str, str], list] = {}
    for row in rows:
        if "scores" in row:
            point = (row["bits_per_pixel"], row["scores"]["ssim"]["mean"])
            curves.setdefault((row["method"], row["accounting"]), []).append(point)
    colours = {codec.name: f"C{number}" for number, codec in enumerate(CODECS.values())}
    shapes = dict(
        zip(sorted({method for method, _ in curves} - colours.keys()), itertools.cycle("osD^vP*X"))
    )
    for (method, accounting), points in sorted(curves.items()):
        label = f"{method}, {accounting}"
        if method in colours:
            style = {
                "color": colours[method],
                "linestyle": "-" if accounting == "payload" else "--",
                "marker": ".",
            }
        else:  # a shape a run: beside the points, labels of like runs would overlap
            fill = "full" if accounting == "fixed length" else "none"
            style = {"color": "k", "linestyle": "", "marker": shapes[method], "fillstyle": fill}
        axis.plot(*zip(*points, strict=True), label=label, **style)
    ticks = sorted({row["rate"] for row in rows if row["method"] in colours})
    axis.set(xscale="log", xlabel="bits per pixel", ylabel="ssim", title=heading)
    axis.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    plots.save_figure(figure, path)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of slices or volumes, as for train.py"
    )
    source.add_argument(
        "--volume", type=Path, metavar="FILE", help="a NIfTI volume: its central coronal planes"
    )
    flag = parser.add_argument
    flag("--split", choices=("train", "validate", "test"), default="test", help="of --data (test)")
    flag("--planes", type=int, default=60, help="of each volume (60)")
    flag(
        "--runs",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of runs, each with a best.pt (none)",
    )
    flag(
        "--entropy-coded",
        action="store_true",
        help="code the codes of runs with a prior, too: a minute a run",
    )
    flag(
        "--rates",
        type=float,
        nargs="+",
        default=RATES,
        help=f"of the codecs, bits per pixel {RATES}",
    )
    flag(
        "--codecs",
        nargs="+",
        choices=CODECS,
        default=list(CODECS),
        metavar="NAME",
        help=f"of {', '.join(CODECS)}",
    )
    flag("--device", default="auto", help="of the runs: auto, cuda, cuda:1, mps or cpu (auto)")
    flag(
        "--out",
        type=Path,
        help="result files, without ending (benchmarks/results/rate_distortion_<data>)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if imagecodecs is None:
        raise UserError(
            "imagecodecs, which has the codecs, is missing: pip install -r benchmarks/requirements.txt"
        )
    if args.entropy_coded:
        entropy.check_installed()
    versions = utils.versions() | {"imagecodecs": imagecodecs.__version__}
    versions |= {name: CODECS[name].call("version") for name in args.codecs}
    device = utils.pick_device(args.device)
    utils.keep_freed_memory()
    originals, excluded = load(args)
    rows = [
        row for run in args.runs for row in measure_run(run, originals, device, args.entropy_coded)
    ]
    for name in args.codecs:
        rows += measure_codec(CODECS[name], originals, sorted(args.rates))
    rows.sort(key=lambda row: row["rate"])  # at a rate: runs, then codecs

    name = (args.volume or args.data).resolve().name.split(".")[0]
    out = args.out or Path(__file__).parent / "results" / f"rate_distortion_{name}"
    out.parent.mkdir(parents=True, exist_ok=True)
    slices = len(originals.cases)
    result = {"data": name, "split": args.split, "planes": args.planes if args.volume else None}
    result |= {
        "slices": slices,
        "excluded_slices": excluded,
        "device": utils.describe_device(device),
    }
    utils.write_json(Path(f"{out}.json"), result | {"versions": versions, "rows": rows})
    heading = f"{name}, {'central planes' if args.volume else args.split}, {slices} slices"
    text = f"{heading}; {excluded} constant ones excluded.\n\n{table(rows, slices)}\n{RULES}"
    Path(f"{out}.md").write_text(text, encoding="utf-8")
    if len(args.rates) > 1:  # one rate makes no curve
        plot(Path(f"{out}.png"), rows, heading)
    print(
        f"\n{table(rows, slices)}\nwritten: {out}.md and .json{', .png' if len(args.rates) > 1 else ''}"
    )
    return 0


if __name__ == "__main__":
    utils.run_script(
        main, utils.DataError, CheckpointError, ImportError
    )  # a build of imagecodecs may lack a codec
