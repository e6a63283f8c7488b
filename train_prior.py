"""Train a prior over the codes of a trained VQ-VAE: what `generate.py` draws new slices from.

    python train_prior.py                            # for the newest run of train.py, on the data it was trained on
    python train_prior.py --run runs/x --channels 512 --num-layers 12 --num-heads 8    # a GPU, thousands of slices
    python train_prior.py --resume                   # go on with it
    torchrun --nproc-per-node 2 train_prior.py ...   # several processes, by which --batch-size must divide

The run's training slices are encoded once, also mirrored; a causal transformer (model.CodePrior) learns how likely
each code is after those before it. Writes to <run>/prior/: config.json, metrics.csv, best.pt (by bits per code on the
validation split), last.pt, metrics.json (bits beside log2 K, entropy and gzip), bits_plot.png, plots/.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from evaluation import plots
from modules import VQVAE
from prior.codes import MIRRORS, CodeDataset, compressed_bits, encode_split
from prior.model import CodePrior
from training import distributed
from training import run as loop
from training.checkpoint import load_model
from training.config import add_training_flags, check_run_arguments
from training.distributed import get_world_size
from training.run_folder import (
    last_checkpoint,
    load_run_data,
    newest_run,
    saved_arguments,
    unfinished_checkpoint,
)
from utils import UserError

SOME, SHARE = (1, 1e9), (0, 0.99)
FLAGS = {
    # flag           default  allowed  help
    "epochs":        (30,     SOME,    "passes over the training split"),
    "batch_size":    (2,      SOME,    "slices a step"),
    "learning_rate": (2e-3,   (0, 1),  "AdamW's, at its peak: a linear warm-up, then a cosine down to 0"),
    "weight_decay":  (0.05,   (0, 10), "AdamW's, of all matrices"),
    "dropout":       (0.0,    SHARE,   "share of activations dropped in training"),
    "mirrored":      (0.5,    (0, 1),  "share of training slices that are mirrored, which the prior is told"),
    "num_grids":     (2,       (1, 3), "2: an outline before the codes; 3: one before that; 1: none, fewest bits"),
    "num_outlines":  (32,      (2, 1024), "levels of brightness that outlines tell"),
    "channels":      (128,    SOME,    "width of the transformer; 512 for a GPU and thousands of slices"),
    "num_layers":    (4,      SOME,    "its layers; for a GPU 12"),
    "num_heads":     (4,      SOME,    "its attention heads; for a GPU 8"),
}  # fmt: skip
DEFAULTS = {name: row[0] for name, row in FLAGS.items()} | {
    "data": None, "cache_dir": None, "resume": False, "dry_run": False, "plot_every": 10,
    "device": "auto", "precision": "auto", "compile": None, "deterministic": False, "seed": 0,
}  # fmt: skip
FIXED = {"warmup": 0.05, "schedule": "cosine", "clip_grad_norm": 1.0}  # what `loop` reads besides
RESUMABLE = {
    "run",
    "runs_dir",
    "data",
    "cache_dir",
    "resume",
    "dry_run",
    "plot_every",
    "device",
    "compile",
    "epochs",
}
UNKNOWN = 0.1  # share of training slices whose place in the volume is not told: it may be unknown when drawing


def parse_arguments(argv: list[str] | None = None) -> dict:
    """The flags that were typed, no defaults among them: those differ between a new run and a resumed one."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    flag = parser.add_argument
    flag(
        "--run",
        metavar="DIR",
        help="folder of the VQ-VAE's run (the newest in --runs-dir that has a best.pt)",
    )
    flag("--runs-dir", metavar="DIR", help="where runs are kept (runs)")
    flag("--data", metavar="DIR", help="folder of slices or volumes (the run's own)")
    flag(
        "--cache-dir",
        metavar="DIR",
        help="where prepared slices are kept; else $HIPMRI_CACHE; else the user's cache",
    )
    for name, (default, _, text) in FLAGS.items():
        kind = int if isinstance(default, int) else float
        flag("--" + name.replace("_", "-"), type=kind, metavar="X", help=f"{text} ({default})")
    flag("--resume", action="store_true", help="go on with the run's prior")
    flag(
        "--plot-every",
        type=int,
        metavar="N",
        help="draw four slices each N epochs, at the first and the last (10)",
    )
    add_training_flags(flag)
    return vars(parser.parse_args(argv))


def open_prior(given: dict) -> tuple[Path, dict, dict | None]:
    """The VQ-VAE's run, the arguments, and the checkpoint to go on from (None: from the start)."""
    runs_dir = Path(given.get("runs_dir", "runs"))
    if "run" in given:
        run = Path(given["run"])
    elif given.get("resume"):
        advice = "start one without --resume, or name its run with --run"
        run = newest_run(
            runs_dir, "prior/config.json", f"no prior to go on with in {runs_dir}; {advice}"
        )
    else:
        run = newest_run(runs_dir)
    folder = run / "prior"
    if given.get("resume"):
        args = DEFAULTS | saved_arguments(folder, given, RESUMABLE, DEFAULTS | FIXED) | given
        if not (
            folder / "metrics.json"
        ).exists():  # perhaps all epochs are done, and not yet their report
            return run, args, last_checkpoint(folder)
        return run, args, unfinished_checkpoint(folder, args)
    if (folder / "config.json").exists():
        raise UserError(
            f"{folder} exists; add --resume to go on with it, or move it away to train another"
        )
    return run, DEFAULTS | FIXED | given, None


# ---------------------------------------------------------------- the run


class Run(loop.Run):
    """A prior, trained on a VQ-VAE's codes."""

    BEST, HIGHER = "val_bits", False
    LINE = (
        "epoch {epoch}: train loss {train_loss:.4f}, validation {val_bits:.4f} bits per code "
        "({val_outline_bits:.4f} of them the outlines'), {seconds:.1f} s"
    )

    def __init__(
        self, folder: Path, args: dict, fingerprint: str, vqvae: VQVAE, train: CodeDataset
    ):
        torch.manual_seed(args["seed"])
        quantizer = vqvae.vector_quantization
        shape = (quantizer.num_embeddings, quantizer.embedding_dim, *train.codes.shape[-2:])
        generator = torch.Generator().manual_seed(args["seed"])
        embedding, codes = quantizer.embedding.weight.detach().cpu(), train.codes[:, 0].long()
        known = inspect.signature(CodePrior).parameters
        try:
            model = CodePrior(*shape, **{key: args[key] for key in known if key in FLAGS})
            model.initialize(embedding, train.brightness, codes, train.positions, generator)
        except ValueError as error:
            raise UserError(str(error)) from None
        blocks = [
            2**n for n in reversed(range(1, args["num_grids"]))
        ]  # coarse to fine, as the model's grids
        self.LOSSES = (*(f"train_outline_{block}" for block in blocks), "train_codes")
        self.SHOWN = len(self.LOSSES)
        super().__init__(folder, args, fingerprint, model=model)
        self.vqvae = vqvae

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Weight decay pulls at matrices alone, as is usual, not at biases, of which some are tables of frequencies."""
        matrices, others = [], []
        for name, parameter in self.model.named_parameters():
            (matrices if parameter.ndim > 1 and not name.endswith("bias") else others).append(
                parameter
            )
        groups = [{"params": matrices, "weight_decay": self.args["weight_decay"]}]
        groups.append({"params": others, "weight_decay": 0.0})
        return torch.optim.AdamW(
            groups, lr=self.args["learning_rate"], betas=(0.9, 0.95), fused=True
        )

    def eager_losses(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """-ln p of a code of each grid, means, (num_grids,), of slices' codes (B, V, h, w), V views.

        Of each slice one view, drawn at random. All grids are trained alike: few as they are, outlines decide the most.
        """
        codes, position = batch
        chance = torch.rand(3, len(codes), device=codes.device)
        other = 1 + (chance[1] * (len(MIRRORS) - 1)).long().clamp_max(len(MIRRORS) - 2)
        view = torch.where(chance[0] < self.args["mirrored"], other, 0)
        position = position.masked_fill(chance[2] < UNKNOWN, math.nan)
        codes = codes[torch.arange(len(codes), device=codes.device), view]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.nats(self.parallel, codes, position, view)

    def nats(self, model, codes: Tensor, position: Tensor, view: Tensor) -> Tensor:
        """-ln p of a code of each grid, given the grids before it, means, (num_grids,): of codes (B, h, w)."""
        pyramid = self.model.pyramid(codes)
        logits = model(pyramid, position, view)
        pairs = zip(logits, pyramid, strict=True)
        return torch.stack(
            [F.cross_entropy(found.flatten(0, 2), true.flatten()) for found, true in pairs]
        )

    @torch.no_grad()
    def validate(self, validation: CodeDataset) -> dict:
        """Of slices as they are, in float32: bits per code, those of the outlines shared out among its codes."""
        self.model.eval()
        totals = torch.zeros(len(self.LOSSES), device=self.device)
        groups = torch.arange(len(validation)).split(self.args["batch_size"])[
            distributed.get_rank() :: get_world_size()
        ]
        for codes, position in validation.batches(groups, self.device):
            view = torch.zeros(len(codes), dtype=torch.long, device=self.device)
            totals += self.nats(self.model, codes[:, 0], position, view) * len(codes)
        self.model.train()
        nats = (distributed.all_reduce_sum(totals) / len(validation)).tolist()
        shares = [4.0**-n for n in reversed(range(len(nats)))]
        bits = [value * share / math.log(2) for value, share in zip(nats, shares, strict=True)]
        return {"val_loss": sum(nats), "val_bits": sum(bits), "val_outline_bits": sum(bits[:-1])}

    @torch.no_grad()
    def plot(self, validation: CodeDataset) -> None:
        """Four slices drawn from the prior, from equal random numbers every time; and the curves."""
        self.model.eval()
        position = torch.tensor([0.2, 0.4, 0.6, 0.8], device=self.device)
        view = torch.zeros(4, dtype=torch.long, device=self.device)
        codes = self.model.sample(position, view, torch.Generator().manual_seed(self.args["seed"]))
        images = self.vqvae.decode_codes(codes).float().cpu()
        self.model.train()
        name = f"epoch_{self.epochs_done}"
        heading = f"{self.folder.parent.name}, drawn from the prior after epoch {self.epochs_done}"
        titles = [f"position {place:.1f}" for place in position.tolist()]
        path = self.folder / "plots" / name / f"{name}_samples.png"
        plots.plot_slices(path, images, titles, heading, spacing=validation.spacing)
        plots.plot_curves(self.folder / "bits_plot.png", self.history, self.BEST, heading)


def report(run: Run, train: CodeDataset, validation: CodeDataset) -> dict:
    """Bits per code and per pixel of the validation split under best.pt, beside what knows no context."""
    run.model.load_state_dict(load_model(CodePrior, run.folder / "best.pt").state_dict())
    bits = {"prior": run.validate(validation)["val_bits"]}
    bits |= compressed_bits(
        train.codes[:, 0].long(),
        validation.codes[:, 0].long(),
        run.vqvae.vector_quantization.num_embeddings,
    )
    bits = dict(sorted(bits.items(), key=lambda item: item[1]))
    pixels = run.vqvae.stride**2
    print(f"\nvalidation, {len(validation)} slices{'bits per code':>26}{'bits per pixel':>18}")
    for name, value in bits.items():
        print(f"{name.replace('_', ' '):24}{value:26.3f}{value / pixels:18.4f}")
    both = {
        name: {"bits_per_code": value, "bits_per_pixel": value / pixels}
        for name, value in bits.items()
    }
    return {"validation": both, "slices": {"train": len(train), "validate": len(validation)}}


def main(argv: list[str] | None = None) -> int:
    given = parse_arguments(argv)
    distributed.init()
    vqvae_run, args, checkpoint = open_prior(given)
    bounds = {name: row[1] for name, row in FLAGS.items()}
    check_run_arguments(args, bounds, get_world_size())
    utils.set_deterministic(args["deterministic"])
    utils.keep_freed_memory()
    vqvae = load_model(VQVAE, vqvae_run / "best.pt", utils.pick_device(args["device"]))
    print(f"model: {vqvae_run / 'best.pt'}")
    if (count := vqvae.vector_quantization.num_codebooks) > 1:
        raise UserError(
            f"{vqvae_run} has {count} codebooks; a prior is for one: train with --num-codebooks 1"
        )
    with distributed.rank_zero_first():
        loaded = [
            load_run_data(vqvae_run, split, args["data"], args["cache_dir"])
            for split in ("train", "validate")
        ]
    slices, args["data"] = [split for split, _ in loaded], loaded[0][1]
    train, validation = (
        encode_split(vqvae, *some) for some in zip(slices, (MIRRORS, MIRRORS[:1]), strict=True)
    )
    # Of slices and codebook, not of the codes: another device may round one of millions to another code.
    codebook = hashlib.sha256(
        vqvae.vector_quantization.embedding.weight.detach().cpu().numpy().tobytes()
    ).hexdigest()
    fingerprint = " ".join([*(split.fingerprint for split in slices), codebook[:16]])
    run = Run(vqvae_run / "prior", args, fingerprint, vqvae, train)
    if checkpoint:
        if str(checkpoint.get("fingerprint")).split()[-1:] != [codebook[:16]]:
            raise UserError(f"{run.folder} is of other codes than those of {vqvae_run / 'best.pt'}, which has changed "
                            "since; move the prior away to train another")  # fmt: skip
        run.restore(checkpoint)

    print(
        f"data: {len(train)} training and {len(validation)} validation slices, {train.codes[0, 0].numel()} codes each"
    )
    print(f"prior: {sum(p.numel() for p in run.model.parameters()):,} parameters")
    loop.announce(run, train, validation, "prior")
    config = {
        "slices": {"train": len(train), "validate": len(validation)},
        "vqvae": str(vqvae_run / "best.pt"),
    }
    resume = utils.format_command("train_prior.py", "--resume", "--run", vqvae_run)
    first = distributed.get_rank() == 0  # asked while there are others
    if (code := loop.carry_out(run, train, validation, config, resume)) or args["dry_run"]:
        return code
    if first:
        utils.write_json(
            run.folder / "metrics.json",
            report(run, train, validation) | {"versions": utils.versions()},
        )
        print(f"the plots are in {run.folder}; next, slices drawn from it:")
        print("    " + utils.format_command("generate.py", "--run", vqvae_run))
    return 0


if __name__ == "__main__":
    utils.run_script(main)
