"""Train a prior over the codes of a trained VQ-VAE; `generate.py` samples new slices from it.

    python train_prior.py                            # for the newest run of train.py
    python train_prior.py --run runs/x --channels 512 --num-layers 12 --num-heads 8    # on a GPU
    python train_prior.py --resume                   # continue an interrupted training
    torchrun --nproc-per-node 2 train_prior.py       # data-parallel, with two processes

The run's training slices are encoded once, together with their mirror images. A causal transformer
(`prior.model.CodePrior`) learns the probability of each code given the previous codes. Everything
is saved in <run>/prior/: config.json, metrics.csv, best.pt (with the fewest validation bits),
last.pt, metrics.json (compared with log2 K, entropy and gzip), bits_plot.png and plots/.
"""

from __future__ import annotations

import inspect
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from evaluation import plots
from modules import VQVAE
from prior.codes import MIRRORS, CodeDataset, compressed_bits, encode_split, hash_codebook
from prior.model import CodePrior
from training import distributed, environment
from training.checkpoint import load_model
from training.config import RunConfig, check_processes
from training.guards import preserve_process_state
from training.options import check_bounds, option, parse_flags
from training.run import Run
from training.run_folder import (
    last_checkpoint,
    load_run_data,
    newest_run,
    resumed_arguments,
    unfinished_checkpoint,
)
from training.run_names import resolve_run
from training.schedule import learning_rate, set_learning_rate
from training.step import clip_gradients, compile_if_enabled, may_step
from utils import UserError

UNKNOWN_POSITION = 0.1  # fraction of training slices whose position is hidden
_prior = partial(option, group="prior")


@dataclass(frozen=True, kw_only=True)
class PriorConfig(RunConfig):
    """The configuration of train_prior.py."""

    run: str | None = option(
        None,
        "folder of the VQ-VAE's run (default: the newest run in --runs-dir)",
        group="run",
        metavar="DIR",
        resumable=True,
    )
    epochs: int = _prior(30, "passes over the training split (default: 30)", low=1, resumable=True)
    batch_size: int = _prior(2, "slices per step (default: 2)", low=1)
    learning_rate: float = _prior(2e-3, "peak learning rate (default: 0.002)", low=0, high=1)
    weight_decay: float = _prior(
        0.05, "weight decay of all matrices (default: 0.05)", low=0, high=10
    )
    dropout: float = _prior(0.0, "fraction of dropped activations (default: 0)", low=0, high=0.99)
    mirrored: float = _prior(
        0.5, "fraction of training slices that are mirrored (default: 0.5)", low=0, high=1
    )
    num_grids: int = _prior(
        2,
        "number of grids: the codes, preceded by 0, 1 or 2 coarser outlines (default: 2)",
        low=1,
        high=3,
    )
    num_outlines: int = _prior(
        32, "brightness levels of an outline (default: 32)", low=2, high=1024
    )
    channels: int = _prior(
        128, "width of the transformer (default: 128; for thousands of slices, try 512)", low=1
    )
    num_layers: int = _prior(4, "layers of the transformer (default: 4; on a GPU, try 12)", low=1)
    num_heads: int = _prior(4, "attention heads (default: 4; on a GPU, try 8)", low=1)

    # Fixed values, which are not flags
    warmup = 0.05
    schedule = "cosine"
    clip_grad_norm = 1.0


# ---------------------------------------------------------------- a run from start to end


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(PriorConfig, argv, __doc__)
    with preserve_process_state(), distributed.session():
        return train(flags)


def train(flags: dict) -> int:
    """Train a prior as the flags specify, and return the exit code."""
    vqvae_run, config, checkpoint = open_prior(flags)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    check_bounds(config)
    check_processes(config, world_size)
    utils.set_deterministic(config.deterministic)
    device = utils.pick_device(config.device, rank, world_size)
    precision = utils.pick_precision(config.precision, device)

    # Data: codes of the VQ-VAE
    vqvae = load_model(VQVAE, vqvae_run / "best.pt", device)
    print(f"model: {vqvae_run / 'best.pt'}")
    num_codebooks = vqvae.vector_quantization.num_codebooks
    if num_codebooks > 1:
        raise UserError(
            f"{vqvae_run} has {num_codebooks} codebooks; a prior needs a run with --num-codebooks 1"
        )
    options = {"data": config.data, "cache_dir": config.cache_dir}
    options["data_run"] = None if "data" in flags else vqvae_run / "prior"
    with distributed.rank_zero_first():
        train_slices, root = load_run_data(vqvae_run, "train", **options)
        val_slices, _ = load_run_data(vqvae_run, "validate", **options)
    config = replace(config, data=root)
    train_codes = encode_split(vqvae, train_slices, MIRRORS)
    val_codes = encode_split(vqvae, val_slices, MIRRORS[:1])

    # Model and optimizer
    torch.manual_seed(config.seed)
    model = make_prior(vqvae, train_codes, config).to(device)
    optimizer = make_optimizer(model, config)

    def eager_losses(codes: Tensor, position: Tensor) -> Tensor:
        return compute_losses(model, codes, position, precision, config)

    full_batch_losses = compile_if_enabled(eager_losses, config, device)

    codebook_hash = hash_codebook(vqvae)  # not of codes, a few of which differ between devices
    outline_blocks = [2**n for n in reversed(range(1, config.num_grids))]  # coarse to fine
    losses = (*(f"train_outline_{block}" for block in outline_blocks), "train_codes")
    run = Run(
        folder=vqvae_run / "prior",
        config=config,
        device=device,
        precision=precision,
        modules={"model": model},
        optimizer=optimizer,
        num_examples=len(train_codes),
        losses=losses,
        num_shown=len(losses),
        best_column="val_bits",
        best=math.inf,
        fingerprint=f"{train_slices.fingerprint} {val_slices.fingerprint} {codebook_hash}",
        info={
            "slices": {"train": len(train_codes), "validate": len(val_codes)},
            "vqvae": str((vqvae_run / "best.pt").resolve()),
        },
        resume_command=utils.format_command("train_prior.py", "--resume", "--run", vqvae_run),
    )
    if checkpoint:
        if str(checkpoint.get("fingerprint")).split()[-1:] != [codebook_hash]:
            raise UserError(
                f"{run.folder} was trained on codes of a different model: {vqvae_run / 'best.pt'} "
                "has changed since then; move the prior's folder to train a new one"
            )
        run.restore(checkpoint)
    print_plan(run, train_codes, val_codes)

    with run:
        for epoch in run.epochs():
            for step in run.steps(train_codes):
                rate = learning_rate(config, step.number, run.total_steps)
                set_learning_rate(optimizer, rate)
                batch_losses = full_batch_losses if step.is_full else eager_losses
                losses = batch_losses(*step.batch)  # (num_grids,), nats per code
                if step.size == 0:
                    losses = losses.nan_to_num()  # the means over an empty batch are NaN

                optimizer.zero_grad(set_to_none=True)
                (losses.sum() * step.weight).backward()
                distributed.average_gradients([model])
                finite = clip_gradients([model], config.clip_grad_norm)
                if may_step(finite, optimizer):
                    optimizer.step()

                run.record_step(losses, finite)
                if run.should_stop():
                    return run.stop()

            start = time.perf_counter()
            scores = validate(model, val_codes, config, device)
            if config.dry_run:
                run.print_expected_time(time.perf_counter() - start)
                return 0
            row = run.end_epoch(scores)
            run.write(
                f"epoch {epoch}: train loss {row['train_loss']:.4f}, validation "
                f"{row['val_bits']:.4f} bits per code (outlines: {row['val_outline_bits']:.4f}), "
                f"{row['seconds']:.1f} s"
            )
            if scores["val_bits"] < run.best:
                run.best = scores["val_bits"]
                run.save("best.pt")
            if run.is_plot_epoch(epoch):
                plot_epoch(run, model, vqvae, val_codes)
            run.write_history()
            run.save("last.pt")  # saved last: a run killed before this repeats the epoch

    model.load_state_dict(load_model(CodePrior, run.folder / "best.pt").state_dict())
    bits = {"prior": validate(model, val_codes, config, device)["val_bits"]}
    if rank == 0:
        train_views, val_views = train_codes.codes[:, 0].long(), val_codes.codes[:, 0].long()
        num_embeddings = vqvae.vector_quantization.num_embeddings
        bits |= compressed_bits(train_views, val_views, num_embeddings)
        write_metrics(run, bits, vqvae.stride)
        print(f"plots: {run.folder}; to generate new slices:")
        print("    " + utils.format_command("generate.py", "--run", vqvae_run))
    return 0


def open_prior(flags: dict) -> tuple[Path, PriorConfig, dict | None]:
    """Return the VQ-VAE's run, the configuration, and the checkpoint to resume from, or None.

    Raises:
        UserError: if there is no run, a prior exists already, or there is no prior to resume.
    """
    runs_dir = Path(flags.get("runs_dir", "runs"))
    resume = flags.get("resume", False)
    if "run" in flags:
        run = resolve_run(flags["run"])
    elif resume:
        missing = f"{runs_dir} contains no prior to resume; omit --resume, or name a run with --run"
        run = newest_run(runs_dir, "prior/config.json", missing)
    else:
        run = newest_run(runs_dir)
    folder = run / "prior"
    if not resume:
        if (folder / "config.json").exists():
            raise UserError(
                f"{folder} exists; add --resume to continue it, or move it away to train another"
            )
        return run, PriorConfig(**flags), None
    config = PriorConfig(**resumed_arguments(folder, PriorConfig, flags))
    if not (folder / "metrics.json").exists():  # may be missing after the last epoch
        return run, config, last_checkpoint(folder)
    return run, config, unfinished_checkpoint(folder, config.epochs)


# ---------------------------------------------------------------- model, losses, optimizer


def make_prior(vqvae: VQVAE, train_codes: CodeDataset, config: PriorConfig) -> CodePrior:
    """Return a prior for the VQ-VAE's codebook, initialised from the training codes.

    Raises:
        UserError: if the code grid or the codes do not fit the configuration.
    """
    quantizer = vqvae.vector_quantization
    names = inspect.signature(CodePrior).parameters
    arguments = {name: getattr(config, name) for name in names if hasattr(config, name)}
    shape = (quantizer.num_embeddings, quantizer.embedding_dim, *train_codes.codes.shape[-2:])
    try:
        model = CodePrior(*shape, **arguments)
        model.initialize(
            quantizer.embedding.weight.detach().cpu(),
            train_codes.brightness,
            train_codes.codes[:, 0].long(),
            train_codes.positions,
            torch.Generator().manual_seed(config.seed),
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return model


def make_optimizer(model: CodePrior, config: PriorConfig) -> torch.optim.Optimizer:
    """Return an AdamW optimizer with weight decay on all matrices, except biases that are 2D."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.endswith("bias")
        (matrices if is_matrix else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def compute_losses(
    model: CodePrior, codes: Tensor, position: Tensor, precision: str, config: PriorConfig
) -> Tensor:
    """Compute the mean -ln p per code of each grid, (num_grids,), for a random view of each slice.

    All grids have the same weight: an outline has few codes, but they decide most of the layout.

    Args:
        model: the prior.
        codes: codes of the V views of each slice (see MIRRORS), (B, V, h, w).
        position: positions of the slices in their volumes, (B,), 0 to 1; NaN if unknown.
        precision: data type of the matrix products, "float32" or "bfloat16".
        config: the configuration, which includes the fraction of mirrored slices.
    """
    draws = torch.rand(3, len(codes), device=codes.device)
    num_mirrored = len(MIRRORS) - 1
    mirrored_view = 1 + (draws[1] * num_mirrored).long().clamp_max(num_mirrored - 1)
    view = mirrored_view.masked_fill(draws[0] >= config.mirrored, 0)
    position = position.masked_fill(draws[2] < UNKNOWN_POSITION, math.nan)
    codes = codes[torch.arange(len(codes), device=codes.device), view]  # (B, h, w)
    with torch.autocast(codes.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return negative_log_likelihood(model, codes, position, view)


def negative_log_likelihood(
    model: CodePrior, codes: Tensor, position: Tensor, view: Tensor
) -> Tensor:
    """Compute the mean -ln p per code of each grid, (num_grids,), given the coarser grids."""
    grids = model.to_grids(codes)
    logits = model(grids, position, view)
    losses = []
    for grid_logits, grid in zip(logits, grids, strict=True):
        losses.append(F.cross_entropy(grid_logits.flatten(0, 2), grid.flatten()))
    return torch.stack(losses)


# ---------------------------------------------------------------- validation, plots, results


@torch.no_grad()
def validate(
    model: CodePrior, val_codes: CodeDataset, config: PriorConfig, device: torch.device
) -> dict[str, float]:
    """Compute the validation columns of metrics.csv in float32, from unmirrored slices.

    Bits are per code of the VQ-VAE. "val_bits" includes the bits of outlines.
    """
    model.eval()
    totals = torch.zeros(config.num_grids, device=device)
    batches = torch.arange(len(val_codes)).split(config.batch_size)
    batches = batches[distributed.get_rank() :: distributed.get_world_size()]
    for codes, position in val_codes.batches(batches, device):
        view = torch.zeros(len(codes), dtype=torch.long, device=device)
        nats = negative_log_likelihood(model, codes[:, 0], position, view)
        totals += nats * len(codes)
    model.train()
    nats = (distributed.all_reduce_sum(totals) / len(val_codes)).tolist()
    bits = []
    for n, value in zip(reversed(range(config.num_grids)), nats, strict=True):
        bits.append(value * 4.0**-n / math.log(2))  # halved n times, a grid has 4^-n as many codes
    return {"val_loss": sum(nats), "val_bits": sum(bits), "val_outline_bits": sum(bits[:-1])}


@torch.no_grad()
def plot_epoch(run: Run, model: CodePrior, vqvae: VQVAE, val_codes: CodeDataset) -> None:
    """Plot the training curves, and four slices that are sampled with the same seed every time."""
    position = torch.tensor([0.2, 0.4, 0.6, 0.8], device=run.device)
    view = torch.zeros(4, dtype=torch.long, device=run.device)
    model.eval()
    codes = model.sample(position, view, torch.Generator().manual_seed(run.config.seed))
    model.train()
    images = vqvae.decode_codes(codes).float().cpu()
    name = f"epoch_{run.epochs_done}"
    heading = f"{run.folder.parent.name}, sampled from the prior after epoch {run.epochs_done}"
    titles = [f"position {value:.1f}" for value in position.tolist()]
    path = run.folder / "plots" / name / f"{name}_samples.png"
    plots.plot_slices(path, images, titles, heading, spacing=val_codes.spacing)
    plots.plot_curves(run.folder / "bits_plot.png", run.history, "val_bits", heading)


def print_plan(run: Run, train_codes: CodeDataset, val_codes: CodeDataset) -> None:
    print(
        f"data: {len(train_codes)} training and {len(val_codes)} validation slices, "
        f"{train_codes.codes[0, 0].numel()} codes each"
    )
    print(f"prior: {sum(p.numel() for p in run.modules['model'].parameters()):,} parameters")
    print(run.describe_plan())


def write_metrics(run: Run, bits: dict[str, float], stride: int) -> None:
    """Print the bits per code and per pixel of the validation split; write them to metrics.json.

    Args:
        bits: name of a method -> bits per code.
        stride: side of the square that one code covers, in pixels.
    """
    slices = run.info["slices"]
    rows = {}
    print(f"\nvalidation, {slices['validate']} slices{'bits per code':>26}{'bits per pixel':>18}")
    for name, value in sorted(bits.items(), key=lambda item: item[1]):
        rows[name] = {"bits_per_code": value, "bits_per_pixel": value / stride**2}
        print(f"{name.replace('_', ' '):24}{value:26.3f}{value / stride**2:18.4f}")
    content = {"validation": rows, "slices": slices, "versions": environment.versions()}
    utils.write_json(run.folder / "metrics.json", content)


if __name__ == "__main__":
    utils.run_script(main)
