"""Train a prior for a trained VQ-VAE; `generate.py` samples new slices from it.

    python train_prior.py                            # for the newest run of train.py
    python train_prior.py --run runs/x --model causal    # a different model (see below)
    python train_prior.py --resume                   # continue an interrupted training of a flow
    torchrun --nproc-per-node 2 train_prior.py       # data-parallel, with two processes

The run's training slices are encoded once, together with mirror images. One of two models is
trained on them:

- flow (default): a rectified flow over the latents before quantisation (`prior.flow.FlowPrior`).
- causal: a network that predicts each code from the previous codes (`prior.model.CodePrior`). It
  does not sample slices; it gives the exact number of bits that the codes need.

Everything is saved in <run>/prior/ or, for a causal prior, <run>/causal_prior/: config.json,
metrics.csv, best.pt (with the lowest velocity error, or the fewest bits, on the validation split),
last.pt, metrics.json, velocity_plot.png or bits_plot.png and, for a flow, samples in plots/.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import utils
from evaluation import plots
from modules import VQVAE
from prior import causal_training, flow_training
from prior.codes import EncodedDataset, hash_codebook
from prior.config import (
    PriorConfig,
    check_prior_config,
    parse_prior_flags,
    resolve_prior_config,
)
from prior.sampling import Sampler, describe_slices
from training import distributed, environment
from training.checkpoint import load_model
from training.guards import preserve_process_state
from training.run import Run
from training.run_folder import (
    last_checkpoint,
    load_run_data,
    newest_run,
    read_arguments,
    resumed_arguments,
    unfinished_checkpoint,
)
from training.run_names import PRIORS, resolve_run
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
    folder = vqvae_run / PRIORS[config.model]
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    check_prior_config(config, flags, world_size)
    utils.set_deterministic(config.deterministic)
    device = utils.pick_device(config.device, rank, world_size)
    precision = utils.pick_precision(config.precision, device)

    # Data
    vqvae = load_model(VQVAE, vqvae_run / "best.pt", device)
    print(f"VQ-VAE: {vqvae_run / 'best.pt'}")
    options = {"data": config.data, "cache_dir": config.cache_dir}
    options["data_run"] = None if "data" in flags else folder
    with distributed.rank_zero_first():
        train_slices, root = load_run_data(vqvae_run, "train", **options)
        val_slices, _ = load_run_data(vqvae_run, "validate", **options)
    config = replace(config, data=root)

    # Model and optimizer
    prior = MODELS[config.model]
    torch.manual_seed(config.seed)
    model, train_data, val_data = prior.prepare(vqvae, train_slices, val_slices, config)
    optimizer = prior.make_optimizer(model, config)
    modules = {"model": model}
    average = model  # the weights that are validated and saved as the model
    if config.model == "flow":
        average = copy.deepcopy(model)
        modules = {"model": average, "trained": model}

    def eager_loss(data: Tensor, position: Tensor) -> Tensor:
        return prior.compute_loss(model, data, position, precision, config)

    full_batch_loss = compile_if_enabled(eager_loss, config, device)

    codebook_hash = hash_codebook(vqvae)  # not of codes, a few of which differ between devices
    run = Run(
        folder=folder,
        config=config,
        device=device,
        precision=precision,
        modules=modules,
        optimizer=optimizer,
        num_examples=len(train_data),
        losses=(f"train_{prior.METRIC}",),
        num_shown=1,
        best_column=f"val_{prior.METRIC}",
        best=math.inf,
        fingerprint=f"{train_slices.fingerprint} {val_slices.fingerprint} {codebook_hash}",
        info={
            "slices": {"train": len(train_data), "validate": len(val_data)},
            "vqvae": str((vqvae_run / "best.pt").resolve()),
        },
        extra_state={"slices": describe_slices(train_slices)},
        resume_command=utils.format_command(
            "train_prior.py", "--resume", "--run", vqvae_run, "--model", config.model
        ),
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
                loss = (full_batch_loss if step.is_full else eager_loss)(*step.batch)
                if step.size == 0:
                    loss = loss.nan_to_num()  # the mean over an empty batch is NaN

                optimizer.zero_grad(set_to_none=True)
                (loss * step.weight).backward()
                distributed.average_gradients([model])
                finite = clip_gradients([model], config.clip_grad_norm)
                if may_step(finite, optimizer):
                    optimizer.step()
                if average is not model:
                    update_average(average, model, step.number)

                run.record_step(loss[None], finite)
                if run.should_stop():
                    return run.stop()

            start = time.perf_counter()
            score = prior.validate(average, val_data, config, device)
            if config.dry_run:
                run.print_expected_time(time.perf_counter() - start)
                return 0
            row = run.end_epoch({"val_loss": score, run.best_column: score})
            run.write(
                f"epoch {epoch}: {prior.METRIC}: training {row['train_loss']:.4f}, validation "
                f"{score:.4f}, {row['seconds']:.1f} s"
            )
            if score < run.best:
                run.best = score
                run.save("best.pt")
            if config.keep_every and epoch % config.keep_every == 0:
                run.save(f"epoch_{epoch}.pt")
            if run.is_plot_epoch(epoch):
                plot_epoch(run, vqvae, val_data)
            run.write_history()
            run.save("last.pt")  # saved last: a run killed before this repeats the epoch

    average.load_state_dict(load_model(type(model), run.folder / "best.pt").state_dict())
    score = prior.validate(average, val_data, config, device)
    if rank == 0:
        content = {
            "validation": prior.final_scores(score, vqvae, train_data, val_data),
            "slices": run.info["slices"],
            "versions": environment.versions(),
        }
        utils.write_json(run.folder / "metrics.json", content)
        print(f"results: {folder}")
        if config.model == "flow":
            print("to generate new slices:")
            print("    " + utils.format_command("generate.py", "--run", vqvae_run))
    return 0


def open_prior(flags: dict) -> tuple[Path, PriorConfig, dict | None]:
    """Return the VQ-VAE's run, the configuration, and the checkpoint to resume from, or None.

    Raises:
        UserError: if there is no run, a prior exists already, or there is no prior to resume.
    """
    model = flags.get("model", "flow")
    runs_dir = Path(flags.get("runs_dir", "runs"))
    resume = flags.get("resume", False)
    if "run" in flags:
        run = resolve_run(flags["run"])
    elif resume:
        missing = f"{runs_dir} contains no {model} prior to resume; omit --resume, or give --model"
        run = newest_run(runs_dir, f"{PRIORS[model]}/config.json", missing)
    else:
        run = newest_run(runs_dir)
    folder = run / PRIORS[model]
    exists = (folder / "config.json").exists()
    if exists and "model" not in read_arguments(folder, PriorConfig):
        raise UserError(
            f"{folder} was trained by an earlier version; move it away and train it again"
        )
    if exists and not resume:
        raise UserError(
            f"{folder} exists; add --resume to continue it, or move it away to train another"
        )
    if not resume:
        return run, resolve_prior_config(flags), None
    config = resolve_prior_config(resumed_arguments(folder, PriorConfig, flags))
    if not (folder / "metrics.json").exists():  # may be missing after the last epoch
        return run, config, last_checkpoint(folder)
    return run, config, unfinished_checkpoint(folder, config.epochs)


# ---------------------------------------------------------------- plots


@torch.no_grad()
def plot_epoch(run: Run, vqvae: VQVAE, val_data: EncodedDataset) -> None:
    """Plot the curves and, for a flow, four slices sampled with the same seed every time."""
    heading = f"{run.folder.parent.name}, {run.config.model} prior after epoch {run.epochs_done}"
    curves = run.folder / f"{run.best_column.removeprefix('val_')}_plot.png"
    plots.plot_curves(curves, run.history, run.best_column, heading)
    if run.config.model == "causal":
        return
    sampler = Sampler(vqvae, run.modules["model"], run.device, {}, seed=run.config.seed)
    position = torch.tensor([0.2, 0.4, 0.6, 0.8])
    titles = [f"position {value:.1f}" for value in position.tolist()]
    if val_data.positions.isnan().all():
        position = torch.full_like(position, math.nan)
        titles = ["position unknown"] * 4
    images = sampler.decode(sampler.sample(position))
    name = f"epoch_{run.epochs_done}"
    path = run.folder / "plots" / name / f"{name}_samples.png"
    plots.plot_slices(path, images, titles, heading, spacing=val_data.spacing)


if __name__ == "__main__":
    utils.run_script(main)
