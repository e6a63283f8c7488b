"""Train named variants for equal epochs on equal data, and compare them on the test split.

    python benchmarks/ablation.py --data DIR                             # every variant, one seed
    python benchmarks/ablation.py --data DIR --variants document tuned --seeds 0 1 2
    python benchmarks/ablation.py --data DIR --jobs 2                    # two runs at a time, a share of the cores each

A variant is a set of train.py's flags, at equal bits unless its name says otherwise; what lost lives here as a class
or function put in the place of one of modules.py, and such runs open only from here. Each variant and seed is a run of
train.py and predict.py in --runs-dir; a run that is there already is not trained again, one that was stopped goes on.
Writes <out>.json and <out>.md: mean and half the range over seeds. Choose by the validation column; the test columns
are for reporting.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rate_distortion import MS_SSIM_WEIGHTS

import modules
import predict
import train
import utils
from modules import (
    VQVAE,
    Decoder,
    Encoder,
    Quantized,
    ResidualLayer,
    ResidualStack,
    VectorQuantizer,
    ssim_loss,
)
from training import run
from training.config import RECIPES, parse_arguments, with_defaults
from utils import UserError

RESULTS = Path(__file__).parent / "results"

# ---------------------------------------------------------------- what did not earn a place in modules.py


class FSQ(nn.Module):
    """Finite scalar quantisation (arXiv 2309.15505): 8 levels on each of 3 channels make 512 fixed codes.

    1 x 1 convolutions lead from D channels to the 3 and back, so that encoder and decoder are the others'.
    """

    num_codebooks = 1

    def __init__(self, num_embeddings: int, embedding_dim: int, *others):
        super().__init__()
        assert num_embeddings == 8**3
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.down, self.up = nn.Conv2d(embedding_dim, 3, 1), nn.Conv2d(3, embedding_dim, 1)
        grid = torch.cartesian_prod(*[torch.arange(-4.0, 4)] * 3) / 4  # (512, 3)
        self.embedding = nn.Embedding.from_pretrained(grid, freeze=True)

    def forward(self, z: Tensor) -> Quantized:
        rounded = self.round(self.down(z).float())
        digits = rounded.detach().round().long() + 4  # (B, 3, h, w) in 0..7
        indices = digits[:, 0] * 64 + digits[:, 1] * 8 + digits[:, 2]
        counts = torch.bincount(indices.flatten(), minlength=self.num_embeddings).float()
        zero = torch.zeros((), device=z.device)
        return Quantized(self.up(rounded / 4), indices, zero, zero, counts)

    @staticmethod
    def round(z: Tensor) -> Tensor:
        """To the integers -4..3, with the gradient of what is rounded."""
        half = 3.5 * 1.001
        bounded = torch.tanh(z + math.tan(0.5 / half)) * half - 0.5
        return bounded + (bounded.round() - bounded).detach()

    def initialize(self, vectors: Tensor, generator=None) -> None:
        """Nothing to start: the codes are fixed."""

    def embed(self, indices: Tensor) -> Tensor:
        return self.up(self.embedding(indices).movedim(-1, 1))


class RotationTrick(VectorQuantizer):
    """Gradients reach the encoder through the rotation that takes z to its embedding (arXiv 2410.06424)."""

    def forward(self, z: Tensor) -> Quantized:
        result = super().forward(z)
        z, e = z.float(), result.quantized.detach()
        u, v = F.normalize(z.detach(), dim=1), F.normalize(e, dim=1)
        middle = F.normalize(u + v, dim=1)
        scale = e.norm(dim=1, keepdim=True) / z.detach().norm(dim=1, keepdim=True).clamp_min(1e-6)
        along, before = ((z * a).sum(1, keepdim=True) for a in (middle, u))
        return result._replace(quantized=scale * (z - 2 * along * middle + 2 * before * v))


class CosineCodes(VectorQuantizer):
    """Vectors of one length, sqrt(D), and embeddings that are means of such: cosine similarity (arXiv 2110.04627)."""

    def forward(self, z: Tensor) -> Quantized:
        return super().forward(self.on_sphere(z))

    def initialize(self, vectors: Tensor, *others, **more) -> None:
        super().initialize(self.on_sphere(vectors), *others, **more)

    def on_sphere(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors.float(), dim=1) * math.sqrt(self.embedding_dim)


class SimVQ(VectorQuantizer):
    """A fixed table times a matrix that is trained: one gradient moves all codes (arXiv 2411.02038).

    For codebook "gradient". The table starts from data, as the other codebooks do, and the matrix at the identity.
    """

    class Product(nn.Module):
        def __init__(self, table: Tensor):
            super().__init__()
            self.register_buffer("table", table)  # (K, D)
            self.matrix = nn.Parameter(torch.eye(table.shape[1]))

        @property
        def weight(self) -> Tensor:
            return self.table @ self.matrix

        def forward(self, indices: Tensor) -> Tensor:
            return F.embedding(indices, self.weight)

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.embedding = self.Product(self.embedding.weight.detach().clone())

    @torch.no_grad()
    def initialize(self, vectors: Tensor, *others, **more) -> None:
        product, self.embedding = (
            self.embedding,
            nn.Embedding(*self.embedding.table.shape, device=vectors.device),
        )
        super().initialize(vectors, *others, **more)  # writes into an embedding
        product.table.copy_(self.embedding.weight)
        self.embedding = product


class SubPixelDecoder(Decoder):
    """Doubles by 3 x 3 convolutions whose channels become pixels (arXiv 1609.05158), not by transposed ones."""

    def __init__(self, *widths):
        super().__init__(*widths)
        for name in ("conv1", "conv2"):
            own = getattr(self, name)
            conv = nn.Conv2d(own.in_channels, 4 * own.out_channels, kernel_size=3, padding=1)
            setattr(self, name, nn.Sequential(conv, nn.PixelShuffle(2)))


class NormalisedLayer(ResidualLayer):
    """Batch normalisation before a residual layer's first activation."""

    def __init__(self, channels: int, residual_channels: int):
        super().__init__(channels, residual_channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.conv1(self.relu(self.norm(x)))))


def four_scales_loss(reconstructions: Tensor, images: Tensor) -> Tensor:
    """The SSIM term at four scales, with MS-SSIM's weights; summed, as the gradient of its product has no bound."""
    scales = [[F.avg_pool2d(x.float(), 2**i) for x in (reconstructions, images)] for i in range(4)]
    return sum(
        weight * ssim_loss(*pair) for weight, pair in zip(MS_SSIM_WEIGHTS, scales, strict=True)
    )


class CodeGridEncoder(Encoder):
    """The residual stack after the last convolution, on the code grid: a quarter of the work a layer and channel."""

    def __init__(
        self,
        channels: int,
        residual_channels: int,
        num_layers: int,
        embedding_dim: int,
        stride: int,
    ):
        super().__init__(channels, residual_channels, 0, embedding_dim, stride)
        self.code_stack = ResidualStack(embedding_dim, embedding_dim, num_layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.code_stack(super().forward(x))


class CodeGridDecoder(Decoder):
    """The residual stack before the first convolution, on the code grid."""

    def __init__(
        self, channels: int, residual_channels: int, num_layers: int, embedding_dim: int, *others
    ):
        super().__init__(channels, residual_channels, 0, embedding_dim, *others)
        self.code_stack = ResidualStack(
            embedding_dim, embedding_dim, num_layers
        )  # Decoder.forward applies it first


# ---------------------------------------------------------------- variants


class Variant(NamedTuple):
    flags: str  # of train.py
    replaced: Mapping[str, Callable] = MappingProxyType(
        {}
    )  # names in modules.py: what stands in for them


CODE_GRID = {"Encoder": CodeGridEncoder, "Decoder": CodeGridDecoder}
VARIANTS = {
    "document": Variant("--recipe document"),
    "document, uniform start": Variant("--recipe document --codebook-init uniform"),
    "tuned": Variant(""),
    "tuned, no restarts": Variant("--restart-below 0"),
    "tuned, no flips or turns": Variant("--no-augment"),
    "tuned, gradient codebook": Variant("--codebook gradient --restart-below 0"),
    "tuned, squared error alone": Variant("--ssim-weight 0"),
    "tuned, SSIM weight 0.25": Variant("--ssim-weight 0.25"),
    "tuned, SSIM weight 1": Variant("--ssim-weight 1"),
    "tuned, SSIM at four scales": Variant("", {"ssim_loss": four_scales_loss}),
    "tuned, no refinement": Variant("--refine-channels 0"),
    "tuned, no code layers": Variant("--num-code-layers 0"),
    "tuned, the document's architecture": Variant(
        "--num-residual-layers 2 --num-code-layers 0 --refine-channels 0"
    ),
    "tuned, whole slices": Variant("--crop 0"),
    "tuned, learning rate 1e-3": Variant("--learning-rate 1e-3"),
    "tuned, learning rate 4e-3": Variant("--learning-rate 4e-3"),
    "tuned, restart below 0.3": Variant("--restart-below 0.3"),
    "tuned, commitment cost 1": Variant("--commitment-cost 1"),
    "tuned, codes of 16 numbers": Variant("--embedding-dim 16"),
    "tuned, stride 8, 4 residual codebooks": Variant("--stride 8 --num-codebooks 4"),
    "tuned, depth at the code grid": Variant(
        "--num-residual-layers 4 --num-code-layers 0", CODE_GRID
    ),
    "tuned, sub-pixel decoder": Variant("", {"Decoder": SubPixelDecoder}),
    "tuned, batch normalisation": Variant("", {"ResidualLayer": NormalisedLayer}),
    "tuned, FSQ 8 x 8 x 8": Variant("", {"VectorQuantizer": FSQ}),
    "tuned, rotation trick": Variant("", {"VectorQuantizer": RotationTrick}),
    "tuned, cosine codes": Variant("", {"VectorQuantizer": CosineCodes}),
    "tuned, SimVQ": Variant("--codebook gradient --restart-below 0", {"VectorQuantizer": SimVQ}),
}
SCORES = ("ssim", "ssim_zscore", "ssim_uniform", "ssim_body", "psnr")


@contextlib.contextmanager
def replaced(stand_ins: Mapping[str, Callable]):
    """While it lasts, `modules` builds models of these classes and uses these functions."""
    own = {name: getattr(modules, name) for name in stand_ins}
    for name, stand_in in stand_ins.items():
        setattr(modules, name, stand_in)
    try:
        yield
    finally:
        for name, original in own.items():
            setattr(modules, name, original)


# ---------------------------------------------------------------- runs


def run_once(args: argparse.Namespace, variant: str, seed: int) -> dict:
    """Train and evaluate one variant with one seed; what the results file holds of it."""
    chosen = VARIANTS[variant]
    flags = [
        *chosen.flags.split(),
        "--epochs",
        str(args.epochs),
        "--seed",
        str(seed),
        "--precision",
        args.precision,
    ]
    name = "".join(c if c.isalnum() else "_" for c in f"{variant} epochs {args.epochs} seed {seed}")
    run = args.runs_dir / args.data.resolve().name / name
    if epochs_done(run, args.data, flags) < args.epochs:
        where = ["--data", args.data, "--runs-dir", run.parent, "--name", name]
        resume = ["--resume"] if (run / "config.json").exists() else []
        execute(train.main, [*where, *flags, *resume], run, chosen.replaced)
    if not (run / "test" / "metrics.json").exists():
        execute(predict.main, ["--run", run, "--data", args.data], run, chosen.replaced)
    config = json.loads((run / "config.json").read_text())
    summary = json.loads((run / "test" / "metrics.json").read_text())
    with open(run / "metrics.csv") as file:
        history = list(csv.DictReader(file))
    with replaced(chosen.replaced):
        model = modules.load_model(VQVAE, run / "best.pt")
    return {
        "variant": variant, "flags": chosen.flags, "replaced": {k: v.__name__ for k, v in chosen.replaced.items()},
        "seed": seed, "epochs": len(history),
        "minutes": round(sum(float(row["seconds"]) for row in history) / 60, 2),
        "gmac": round(multiply_adds(model) / 1e9, 3), "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_pixel": summary["bits_per_pixel"], "codes_used": summary["codes_used"],
        "perplexity": round(summary["perplexity"], 1),
        "validation_ssim": max(float(row["val_ssim"]) for row in history),
        "test": {name: {k: summary[name][k] for k in ("mean", "by_case")} for name in SCORES},
        "test_slices": summary["slices"], "device": config["device"], "precision": config["precision"],
        "versions": config["versions"],  # the commit that it was trained at among them
    }  # fmt: skip


def epochs_done(run: Path, data: Path, flags: list[str]) -> int:
    """Epochs of a run that is there already, trained on the same folder with the same settings, or refused."""
    if not (run / "metrics.csv").exists():
        return 0
    trained_with = json.loads((run / "config.json").read_text())["arguments"]
    trained_on, data = Path(trained_with["data"]), data.resolve()
    if (
        data not in (trained_on, *trained_on.parents) and data.parent != trained_on
    ):  # train.py looks around a little
        raise UserError(
            f"{run} was trained on {trained_on}, not on {data}: name another --runs-dir"
        )
    given = parse_arguments(flags)
    expected = with_defaults(given.get("recipe", "tuned"), given)
    changed = [
        key for key in (*RECIPES, "seed", "precision") if trained_with.get(key) != expected[key]
    ]
    if changed:
        raise UserError(
            f"{run} was trained with other {', '.join(changed)}: name another --runs-dir"
        )
    return len((run / "metrics.csv").read_text().splitlines()) - 1


def execute(main, flags: list, run: Path, stand_ins: Mapping[str, Callable]) -> None:
    """One of the scripts, here in this process; what it prints goes to a file beside the run."""
    run.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(run.parent / f"{run.name}.log", "a") as log, replaced(stand_ins),
        contextlib.redirect_stdout(log), contextlib.redirect_stderr(log),
    ):  # fmt: skip
        code = main([str(flag) for flag in flags])
    for number in (signal.SIGINT, signal.SIGTERM):  # train.py's would let the rest run on
        signal.signal(number, signal.SIG_DFL)
    if code:
        os._exit(code)  # the pool is told by the loss of a worker, and starts no other run


def multiply_adds(model: nn.Module) -> int:
    """Of one slice, forward, nearest-code search included."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 256, 128))
    return counter.get_total_flops() // 2


def relative_step_time(args: argparse.Namespace, rounds: int = 3) -> dict[str, float]:
    """Each variant's training step over the document's: medians of steps timed in turn, alone on the machine."""
    utils.keep_freed_memory()  # as in training
    given = {
        name: parse_arguments(VARIANTS[name].flags.split()) for name in {"document", *args.variants}
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in given}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        slices, *_ = train.load_data(
            with_defaults("tuned", {"data": str(args.data)}), {"epochs": 1}
        )
    for _ in range(rounds):
        for variant, flags in given.items():
            settings = with_defaults(
                flags.get("recipe", "tuned"), flags | {"precision": args.precision}
            )
            with replaced(VARIANTS[variant].replaced):
                seconds[variant].append(
                    run.seconds_a_step(train.Run(Path(), settings, ""), slices, steps=1)
                )
    return {
        v: statistics.median(s) / statistics.median(seconds["document"]) for v, s in seconds.items()
    }


# ---------------------------------------------------------------- table


def table(results: list[dict]) -> str:
    """Markdown: a row a variant, mean over seeds, and half the range over seeds where there are several."""

    def cell(rows: list[dict], value, digits: int) -> str:
        values = [value(row) for row in rows]
        spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    lines = [
        "| variant | seeds | epochs | GMAC | step time | bits per pixel | validation `ssim` | `ssim` | `ssim_zscore` "
        "| `ssim_uniform` | `ssim_body` | PSNR (dB) | codes used | perplexity |",
        "|" + "---|" * 14,
    ]
    for variant in dict.fromkeys(row["variant"] for row in results):
        rows = [row for row in results if row["variant"] == variant]
        cells = [variant, str(len(rows)), str(rows[0]["epochs"]), f"{rows[0]['gmac']:.2f}"]
        cells += [
            f"{rows[0]['step_time']:.2f}" if "step_time" in rows[0] else "",
            f"{rows[0]['bits_per_pixel']:.4f}",
        ]
        cells += [cell(rows, lambda row: row["validation_ssim"], 3)]
        cells += [
            cell(rows, lambda row, n=n: row["test"][n]["mean"], 2 if n == "psnr" else 3)
            for n in SCORES
        ]
        cells += [
            cell(rows, lambda row: row["codes_used"], 0),
            cell(rows, lambda row: row["perplexity"], 0),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "GMAC: multiply-adds of a whole slice, forward, search included. Step time: of 16 slices in training, as",
        "the variant crops them, over the document's. CodeDataset used and perplexity: of all codebooks together.",
    ]
    return "\n".join(lines) + "\n"


def write(out: Path, results: list[dict]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps(results, indent=1) + "\n")
    Path(f"{out}.md").write_text(table(results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--data", type=Path, required=True, help="folder of slices, as for train.py")
    flag(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=f"of {list(VARIANTS)}",
    )
    flag(
        "--seeds", type=int, nargs="+", default=[0], help="a run of each variant for each seed (0)"
    )
    flag("--epochs", type=int, default=100, help="of every run (100)")
    flag("--precision", default="auto", help="of every run, as for train.py (auto)")
    flag(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time, each with its share of the CPU's cores (1)",
    )
    flag(
        "--runs-dir",
        type=Path,
        default=Path("runs/ablation"),
        help="where the runs are kept (runs/ablation)",
    )
    flag(
        "--out", type=Path, help="result files, without ending (benchmarks/results/ablation_<data>)"
    )
    args = parser.parse_args()
    args.variants = list(dict.fromkeys(args.variants))
    if args.jobs < 1 or args.epochs < 1:
        raise UserError(
            f"--jobs is {args.jobs} and --epochs {args.epochs}; expected 1 or more of each"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = args.out or RESULTS / f"ablation_{args.data.resolve().name}"
    threads = max(1, torch.get_num_threads() // args.jobs)
    results: list[dict] = []
    order = [
        (args, variant, seed) for seed in args.seeds for variant in args.variants
    ]  # a first table after one seed
    pool = ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (threads,))
    try:
        for row in pool.map(run_once, *zip(*order, strict=True)):
            results.append(row)
            results.sort(key=lambda row: (args.variants.index(row["variant"]), row["seed"]))
            write(out, results)
            print(
                f"{row['variant']}, seed {row['seed']}: validation ssim {row['validation_ssim']:.4f}",
                flush=True,
            )
    except BaseException as stop:
        for worker in active_children():
            worker.terminate()  # it saves its run first
        if isinstance(stop, BrokenProcessPool):
            raise UserError("a run was stopped; the same command goes on from there") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    step_time = relative_step_time(args)
    write(out, [row | {"step_time": round(step_time[row["variant"]], 3)} for row in results])
    print(Path(f"{out}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    utils.run_script(main)
