"""Train a VQ-VAE on MRI slices.

    python train.py                                     # sample data; takes minutes on two cores
    python train.py --data /data/keras_slices_data      # HipMRI, 100 epochs
    python train.py --data ... --recipe document        # the source document's recipe
    python train.py --data ... --gan                    # adversarial loss in the second half
    python train.py --data ... --dry-run                # print the plan and the expected time
    python train.py --resume                            # continue the newest unfinished run
    torchrun --nproc-per-node 4 train.py --data ...     # four processes, on four GPUs or on a CPU

A run is saved in runs/<name>/: config.json, metrics.csv, best.pt, last.pt, loss_ssim_plot.png and
plots/. It can be killed at any moment. --resume continues from last.pt, which is saved after every
epoch and, on SIGTERM, SIGUSR1 or Ctrl-C, after the current step. The final weights are the same
as those of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import dataset
import utils
from dataset import SliceDataset
from evaluation import metrics, plots, report
from modules import VQVAE, Quantized
from mri import phantom, splits
from mri.files import Source
from training import distributed
from training.adversarial import DISCRIMINATOR_RATE, PatchDiscriminator, adversarial_losses
from training.config import TrainConfig, check_config, parse_train_flags
from training.guards import preserve_process_state
from training.run import Run, epoch_order
from training.run_folder import load_training_data, open_run, read_manifest
from training.run_names import reserve_folder
from training.schedule import learning_rate, set_learning_rate
from training.step import clip_gradients, compile_if_enabled, may_step
from utils import UserError

SAMPLE_FOLDER = Path("sample_data")
SAMPLE_EPOCHS = 10  # default of --epochs for the sample data

# Columns of metrics.csv for the values that `compute_losses` returns. Training minimises the sum of
# all of them, except the adaptive weight, which is only recorded.
LOSSES = ("train_recon", "train_vq")
GAN_LOSSES = (*LOSSES, "train_adversarial", "train_discriminator", "adaptive_weight")
NUM_MINIMISED = 4

# ---------------------------------------------------------------- a run from start to end


def main(argv: list[str] | None = None) -> int:
    flags = parse_train_flags(argv, __doc__)
    with preserve_process_state(), distributed.session(), contextlib.ExitStack() as stack:
        folder, config, checkpoint = open_run(flags)
        if distributed.get_rank() == 0 and not config.resume and not config.dry_run:
            folder = stack.enter_context(reserve_folder(folder, numbered=not config.name))
        folder = distributed.broadcast_object(folder)  # its name may contain the time of rank 0
        return train(folder, config, checkpoint, flags)


def train(folder: Path, config: TrainConfig, checkpoint: dict | None, flags: dict) -> int:
    """Start or resume a run, and return the exit code.

    Args:
        folder, config, checkpoint: the result of `open_run`, with the reserved folder.
        flags: only the flags that were typed.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    check_config(config, world_size)
    utils.set_deterministic(config.deterministic)
    device = utils.pick_device(config.device, rank, world_size)
    precision = utils.pick_precision(config.precision, device)

    # Data
    with distributed.rank_zero_first():
        config, source, manifest = resolve_data(config, flags, folder)
        train_slices, val_slices = load_training_data(config, source, folder)
    if device.type != "cpu":
        print(train_slices.cache_on_device(device))
        print(val_slices.cache_on_device(device))

    # Model and optimizer
    torch.manual_seed(config.seed)
    # The configuration has a field for each argument of VQVAE.
    arguments = {name: getattr(config, name) for name in inspect.signature(VQVAE).parameters}
    modules: dict[str, nn.Module] = {"model": VQVAE(**arguments)}
    if config.gan:
        modules["discriminator"] = PatchDiscriminator()
    for module in modules.values():
        utils.to_device(module, device)
    model, discriminator = modules["model"], modules.get("discriminator")
    optimizer = make_optimizer(model, discriminator, config)

    def eager_losses(images: Tensor, adversary: nn.Module | None) -> tuple[Tensor, Quantized]:
        return compute_losses(model, adversary, images, precision, config)

    full_batch_losses = compile_if_enabled(eager_losses, config, device)

    run = Run(
        folder=folder,
        config=config,
        device=device,
        precision=precision,
        modules=modules,
        optimizer=optimizer,
        num_examples=len(train_slices),
        losses=GAN_LOSSES if config.gan else LOSSES,
        num_shown=2,
        best_column="val_ssim",
        best=-math.inf,
        fingerprint=f"{train_slices.fingerprint} {val_slices.fingerprint}",
        info={
            "slices": {"train": len(train_slices), "validate": len(val_slices)},
            "bits_per_pixel": model.bits_per_pixel,
            "preprocessing": dataclasses.asdict(train_slices.preprocessing),
            **({"scans": manifest} if manifest else {}),
        },
        extra_state={"slices": train_slices.description},
        resume_command=utils.format_command(
            "train.py", "--resume", "--runs-dir", folder.parent, "--name", folder.name
        ),
    )
    if checkpoint:
        run.restore(checkpoint)
    elif config.codebook_init == "kmeans":
        init_codebook(model, train_slices, config, device)
    print_plan(run, train_slices, val_slices)

    with run:
        for epoch in run.epochs():
            for step in run.steps(train_slices):
                rate = learning_rate(config, step.number, run.total_steps)
                set_learning_rate(optimizer, rate)
                images = dataset.augment(step.batch, config.crop, config.augment)
                adversary = discriminator if step.progress >= config.gan_start else None
                batch_losses = full_batch_losses if step.is_full else eager_losses
                losses, quantized = batch_losses(images, adversary)  # (2,), or with --gan (5,)
                if step.size == 0:
                    losses = losses.nan_to_num()  # the means over an empty batch are NaN

                optimizer.zero_grad(set_to_none=True)
                total = losses[:NUM_MINIMISED].sum()
                (total * step.weight).backward()  # weight: see training.step.Step
                distributed.average_gradients(modules.values())
                finite = clip_gradients(modules.values(), config.clip_grad_norm)
                if may_step(finite, optimizer):
                    optimizer.step()
                model.vector_quantization.update_codebook(quantized.vectors, quantized.indices)

                run.record_step(losses, finite)
                if run.should_stop():
                    return run.stop()

            start = time.perf_counter()
            scores = validate(model, val_slices, config, device)
            if config.dry_run:
                run.print_expected_time(time.perf_counter() - start)
                return 0
            row = run.end_epoch(scores)
            run.write(format_epoch(row))
            if scores["val_ssim"] > run.best and may_be_best(epoch, run):
                run.best = scores["val_ssim"]
                run.save("best.pt")
            if run.is_plot_epoch(epoch):
                plot_epoch(run, model, val_slices)
            run.write_history()
            run.save("last.pt")  # at the end: a run that is killed earlier repeats the epoch

    if rank == 0:
        page = report.write_report(folder)
        print(f"best validation ssim {run.best:.4f}; report: {page}; to evaluate the run:")
        has_test_split = manifest is None or "test" in manifest
        split = [] if has_test_split else ["--split", "validate"]
        print("    " + utils.format_command("predict.py", "--run", folder, *split))
    return 0


# ---------------------------------------------------------------- data


def resolve_data(
    config: TrainConfig, flags: dict, folder: Path
) -> tuple[TrainConfig, Source, dict | None]:
    """Find the files of each split, and complete the configuration.

    If neither `--data` nor $HIPMRI_DATA is set, use the sample data, and generate it if necessary.

    Returns:
        The configuration, with the path of the data and, for the sample data, fewer epochs; the
        files of each split; and the manifest, which lists the scans of each split. The manifest is
        None for data other than scans.

    Raises:
        DataError: if the data cannot be found.
    """
    is_recorded = config.resume and "data" not in flags
    root, description = splits.find_data(config.data, folder if is_recorded else None)
    print(description)
    if root is None:
        root = SAMPLE_FOLDER
        if not root.exists() or not any(root.iterdir()):
            with contextlib.suppress(FileExistsError):  # another run has just written it
                phantom.write_phantom(root)
        if "epochs" not in flags:
            config = dataclasses.replace(config, epochs=SAMPLE_EPOCHS)
            print(f"training {SAMPLE_EPOCHS} epochs on the sample; set --epochs to train longer")
    manifest = read_manifest(folder) if config.resume else None
    source = splits.find_source(
        root,
        config.axis,
        config.split,
        config.seed,
        config.subjects,
        manifest,
        include_new_subjects=False,
    )
    if source.form != "scans":
        return dataclasses.replace(config, data=str(Path(source.root).resolve())), source, None
    config = dataclasses.replace(config, data=str(Path(root).resolve()))
    return config, source, manifest or splits.to_manifest(source)


# ---------------------------------------------------------------- model, losses, optimizer


def make_optimizer(
    model: VQVAE, discriminator: PatchDiscriminator | None, config: TrainConfig
) -> torch.optim.Optimizer:
    """Return an Adam optimizer for the model and, with --gan, also for the discriminator."""
    groups: list[dict] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if discriminator is not None:
        # The first beta is low, because slowly averaged gradients would lag behind the generator.
        parameters = list(discriminator.parameters())
        groups.append(
            {"params": parameters, "betas": (0.5, 0.9), "rate_factor": DISCRIMINATOR_RATE}
        )
    return torch.optim.Adam(groups, lr=config.learning_rate, fused=True)


@torch.no_grad()
def init_codebook(
    model: VQVAE, train_slices: SliceDataset, config: TrainConfig, device: torch.device
) -> None:
    """Initialise the codebook by k-means on encoder outputs for the first 64 slices of epoch 1.

    Raises:
        UserError: if the slices give fewer vectors than there are codes.
    """
    quantizer = model.vector_quantization
    if distributed.get_rank() == 0:
        indices = epoch_order(len(train_slices), config.seed, epoch=1)[:64]
        z = model.encoder(train_slices.batch(indices).to(device))  # (64, D, h, w)
        vectors = z.movedim(1, -1).reshape(-1, z.shape[1])  # (64 h w, D)
        generator = torch.Generator().manual_seed(config.seed)
        try:
            quantizer.init_codebook(vectors, generator=generator)
        except ValueError as error:
            raise UserError(f"{error}; lower --num-embeddings, or use more slices") from None
    distributed.broadcast_tensors(quantizer.state_dict())


def compute_losses(
    model: VQVAE,
    discriminator: nn.Module | None,
    images: Tensor,
    precision: str,
    config: TrainConfig,
) -> tuple[Tensor, Quantized]:
    """Return the losses of a batch, in the order of `LOSSES` or `GAN_LOSSES`, and its codes.

    Args:
        model: the VQ-VAE.
        discriminator: the discriminator; None without --gan, and before --gan-start.
        images: (B, 1, H, W) z-scored.
        precision: precision of the convolutions, "float32" or "bfloat16".
        config: the configuration, which contains the weights of the losses.

    Returns:
        The losses, (2,), or with --gan (5,); and the quantiser's result.
    """
    use_bfloat16 = precision == "bfloat16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=use_bfloat16):
        reconstruction, quantized = model(images)
        losses = torch.stack(model.loss(images, reconstruction, quantized))
        if not config.gan:
            return losses, quantized
        if discriminator is None:
            return torch.cat([losses, losses.new_zeros(3)]), quantized
        adversarial = adversarial_losses(
            discriminator, images, reconstruction, model.reconstruction_loss, config.gan_weight
        )
        return torch.cat([losses, torch.stack(adversarial)]), quantized


# ---------------------------------------------------------------- validation


def validate(
    model: VQVAE, val_slices: SliceDataset, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Compute the validation columns of metrics.csv; all processes return the same values."""
    scores, counts, loss = metrics.evaluate(model, val_slices, config.batch_size, device)
    codes_used, perplexity = metrics.code_usage(counts)
    return {
        "val_loss": loss,
        "val_ssim": scores["ssim"].nanmean().item(),
        "val_psnr": scores["psnr"].nanmean().item(),
        "perplexity": perplexity,
        "codes_used": codes_used,
    }


def may_be_best(epoch: int, run: Run) -> bool:
    """Return whether the model of this epoch may be saved as best.pt.

    With --gan, epochs before --gan-start do not qualify. Their SSIM is higher, but they lack the
    detail that the adversarial loss adds. The last epoch always qualifies, so that every run has a
    best.pt.
    """
    if not run.config.gan or epoch == run.config.epochs:
        return True
    last_step = epoch * run.steps_per_epoch - 1
    return last_step / run.total_steps >= run.config.gan_start


# ---------------------------------------------------------------- printed lines and plots


def print_plan(run: Run, train_slices: SliceDataset, val_slices: SliceDataset) -> None:
    """Print the data, the model, the recipe and the steps of a run."""
    config, model = run.config, run.modules["model"]
    size = " x ".join(map(str, train_slices.size))
    print(
        f"data: {config.data}: {len(train_slices)} training and {len(val_slices)} validation "
        f"slices of {size}"
    )
    print(
        f"model: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{config.num_codebooks} x {config.num_embeddings} codes, {model.bits_per_pixel:.4f} bits "
        f"per pixel (plus {32 / math.prod(train_slices.size):.3f} for each slice's mean and "
        "standard deviation in float16)"
    )
    gan = ", with a discriminator" if config.gan else ""
    print(f"recipe: {config.recipe}{gan}")
    print(run.describe_plan())


def format_epoch(row: dict) -> str:
    """Format a row of metrics.csv as a line to print."""
    return (
        f"epoch {row['epoch']}: train loss {row['train_loss']:.4f}, validation loss "
        f"{row['val_loss']:.4f}, ssim {row['val_ssim']:.4f}, psnr {row['val_psnr']:.2f} dB, "
        f"{row['codes_used']} codes, {row['seconds']:.1f} s"
    )


@torch.no_grad()
def plot_epoch(run: Run, model: VQVAE, val_slices: SliceDataset) -> None:
    """Plot up to four validation slices, the same in every epoch, and the curves so far."""
    indices = plots.spread_indices(len(val_slices))
    originals = val_slices.batch(indices)
    model.eval()
    reconstructions = model(originals.to(run.device))[0].float().cpu()
    model.train()
    scores = metrics.slice_scores(originals, reconstructions, ("ssim",))["ssim"]
    names = [val_slices.names[i] for i in indices]
    titles = [f"{name}\nssim {score:.3f}" for name, score in zip(names, scores, strict=True)]
    name = f"epoch_{run.epochs_done}"
    path = run.folder / "plots" / name / f"{name}_images.png"
    bits = f"{model.bits_per_pixel:.4f} bits per pixel"
    heading = f"{run.folder.name}, epoch {run.epochs_done}, validation, {bits}"
    spacing = val_slices.description["spacing"]
    plots.plot_reconstructions(path, originals, reconstructions, titles, heading, spacing)
    plots.plot_curves(run.folder / "loss_ssim_plot.png", run.history, "val_ssim", run.folder.name)


if __name__ == "__main__":
    utils.run_script(main)
