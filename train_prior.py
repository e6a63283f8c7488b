"""Train a prior for a trained VQ-VAE; `generate.py` samples new slices from it.

    python train_prior.py                            # for the newest run of train.py
    python train_prior.py --run runs/x --model causal    # a different model (see below)
    python train_prior.py --resume                   # continue an interrupted training
    torchrun --nproc-per-node 2 train_prior.py       # data-parallel, with two processes

The run's training slices are encoded once, together with mirror images. One of two models is
trained on them:

- flow (default): a rectified flow over the latents before quantisation (`prior.flow.FlowPrior`).
- causal: a transformer that predicts each code from the previous codes (`prior.model.CodePrior`).

Everything is saved in <run>/prior/: config.json, metrics.csv, best.pt (with the lowest velocity
error, or the fewest bits, on the validation split), last.pt, metrics.json, the learning curves
(velocity_plot.png or bits_plot.png) and plots/.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import utils
from evaluation import plots
from modules import VQVAE
from prior import causal_training, flow_training
from prior.codes import hash_codebook
from prior.config import (
    PriorConfig,
    check_prior_config,
    parse_prior_flags,
    resolve_prior_config,
)
from training import distributed, environment
from training.checkpoint import load_model
from training.guards import preserve_process_state
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
from training.step import clip_gradients, compile_if_enabled, may_step, update_average
from utils import UserError

MODELS = {"flow": flow_training, "causal": causal_training}

# ---------------------------------------------------------------- a run from start to end


def main(argv: list[str] | None = None) -> int:
    flags = parse_prior_flags(argv, __doc__)
    with preserve_process_state(), distributed.session():
        return train(flags)


def train(flags: dict) -> int:
    """Train a prior as the flags specify, and return the exit code."""
    vqvae_run, config, checkpoint = open_prior(flags)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    check_prior_config(config, flags, world_size)
    utils.set_deterministic(config.deterministic)
    device = utils.pick_device(config.device, rank, world_size)
    precision = utils.pick_precision(config.precision, device)

    # Data
    vqvae = load_model(VQVAE, vqvae_run / "best.pt", device)
    print(f"VQ-VAE: {vqvae_run / 'best.pt'}")
    options = {"data": config.data, "cache_dir": config.cache_dir}
    options["data_run"] = None if "data" in flags else vqvae_run / "prior"
    with distributed.rank_zero_first():
        train_slices, root = load_run_data(vqvae_run, "train", **options)
        val_slices, _ = load_run_data(vqvae_run, "validate", **options)
    config = replace(config, data=root)

    # Model and optimizer
    prior = MODELS[config.model]
    torch.manual_seed(config.seed)
    model, train_data, val_data = prior.prepare(vqvae, train_slices, val_slices, config)
    optimizer = make_optimizer(model, config)
    modules = {"model": model}
    average = model  # the weights that are validated and saved as the model
    if config.model == "flow":
        average = copy.deepcopy(model)
        modules = {"model": average, "trained": model}

    def eager_losses(data: Tensor, position: Tensor) -> Tensor:
        return prior.compute_losses(model, data, position, precision, config)

    full_batch_losses = compile_if_enabled(eager_losses, config, device)

    codebook_hash = hash_codebook(vqvae)  # not of codes, a few of which differ between devices
    losses = prior.loss_names(config)
    run = Run(
        folder=vqvae_run / "prior",
        config=config,
        device=device,
        precision=precision,
        modules=modules,
        optimizer=optimizer,
        num_examples=len(train_data),
        losses=losses,
        num_shown=len(losses),
        best_column=prior.BEST_COLUMN,
        best=math.inf,
        fingerprint=f"{train_slices.fingerprint} {val_slices.fingerprint} {codebook_hash}",
        info={
            "slices": {"train": len(train_data), "validate": len(val_data)},
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
    print(f"data: {len(train_data)} training and {len(val_data)} validation slices")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"prior: {config.model}, {num_parameters:,} parameters")
    print(run.describe_plan())

    with run:
        for epoch in run.epochs():
            for step in run.steps(train_data):
                rate = learning_rate(config, step.number, run.total_steps)
                set_learning_rate(optimizer, rate)
                batch_losses = full_batch_losses if step.is_full else eager_losses
                losses = batch_losses(*step.batch)  # in the order of `prior.loss_names`
                if step.size == 0:
                    losses = losses.nan_to_num()  # the means over an empty batch are NaN

                optimizer.zero_grad(set_to_none=True)
                (losses.sum() * step.weight).backward()
                distributed.average_gradients([model])
                finite = clip_gradients([model], config.clip_grad_norm)
                if may_step(finite, optimizer):
                    optimizer.step()
                if average is not model:
                    update_average(average, model, step.number)

                run.record_step(losses, finite)
                if run.should_stop():
                    return run.stop()

            start = time.perf_counter()
            scores = prior.validate(average, val_data, config, device)
            if config.dry_run:
                run.print_expected_time(time.perf_counter() - start)
                return 0
            row = run.end_epoch(scores)
            run.write(
                f"epoch {epoch}: train loss {row['train_loss']:.4f}, "
                f"{prior.describe_scores(scores)}, {row['seconds']:.1f} s"
            )
            if scores[run.best_column] < run.best:
                run.best = scores[run.best_column]
                run.save("best.pt")
            if config.keep_every and epoch % config.keep_every == 0:
                run.save(f"epoch_{epoch}.pt")
            if run.is_plot_epoch(epoch):
                plot_epoch(run, prior, vqvae, val_data)
            run.write_history()
            run.save("last.pt")  # saved last: a run killed before this repeats the epoch

    average.load_state_dict(load_model(type(model), run.folder / "best.pt").state_dict())
    scores = prior.validate(average, val_data, config, device)
    if rank == 0:
        content = {
            "validation": prior.final_scores(scores, vqvae, train_data, val_data),
            "slices": run.info["slices"],
            "versions": environment.versions(),
        }
        utils.write_json(run.folder / "metrics.json", content)
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
        return run, resolve_prior_config(flags), None
    arguments = resumed_arguments(folder, PriorConfig, flags)
    # The priors of earlier versions, whose config.json has no model, are causal.
    config = resolve_prior_config({"model": "causal"} | arguments)
    if not (folder / "metrics.json").exists():  # may be missing after the last epoch
        return run, config, last_checkpoint(folder)
    return run, config, unfinished_checkpoint(folder, config.epochs)


# ---------------------------------------------------------------- optimizer, plots


def make_optimizer(model: nn.Module, config: PriorConfig) -> torch.optim.Optimizer:
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


@torch.no_grad()
def plot_epoch(run: Run, prior: ModuleType, vqvae: VQVAE, val_data) -> None:
    """Plot the training curves, and four slices that are sampled with the same seed every time."""
    position = torch.tensor([0.2, 0.4, 0.6, 0.8], device=run.device)
    titles = [f"position {value:.1f}" for value in position.tolist()]
    if val_data.positions.isnan().all():
        position = torch.full_like(position, math.nan)
        titles = ["position unknown"] * 4
    generator = torch.Generator().manual_seed(run.config.seed)
    codes = prior.sample_codes(run.modules["model"], vqvae, position, generator)
    images = vqvae.decode_codes(codes).float().cpu()
    name = f"epoch_{run.epochs_done}"
    heading = f"{run.folder.parent.name}, sampled from the prior after epoch {run.epochs_done}"
    path = run.folder / "plots" / name / f"{name}_samples.png"
    plots.plot_slices(path, images, titles, heading, spacing=val_data.spacing)
    curves = run.folder / f"{run.best_column.removeprefix('val_')}_plot.png"
    plots.plot_curves(curves, run.history, run.best_column, heading)


if __name__ == "__main__":
    utils.run_script(main)
