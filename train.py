"""Train a VQ-VAE on MRI slices.

    python train.py                                     # sample data: about two minutes on two CPU cores
    python train.py --data /data/keras_slices_data      # HipMRI, 100 epochs
    python train.py --data ... --recipe document        # the source document's training, number for number
    python train.py --data ... --dry-run                # print what would be done, and how long it would take
    python train.py --resume                            # go on with the newest unfinished run

A run writes to runs/<name>/: config.json, metrics.csv, best.pt, last.pt, loss_ssim_plot.png, plots/.
It can be killed at any moment: --resume goes on from the last epoch's end (after SIGTERM or Ctrl-C: from the
last step), to the same weights as if nothing had happened.
"""

from __future__ import annotations

import argparse
import copy
import math
import signal
import time
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

import dataset
import phantom
import utils
from modules import CHECKPOINT_FORMAT, VQVAE, CheckpointError, load_checkpoint
from utils import UserError

SAMPLE_FOLDER, SAMPLE_EPOCHS = Path("sample_data"), 10

# The recipes. "document" is the source document's training; its one departure is a codebook that starts from
# data. "tuned" spends the same bits, batches and epochs on what makes the model learn faster and better.
RECIPES = {
    # flag                    document     tuned
    "epochs":                (100,         100,       "passes over the training split"),
    "batch_size":            (16,          16,        "slices a step"),
    "learning_rate":         (1e-4,        1e-3,      "Adam's; with a schedule, its highest value"),
    "schedule":              ("constant",  "cosine",  "learning rate over time: constant, or cosine down to zero"),
    "warmup":                (0.0,         0.05,      "share of all steps over which the learning rate rises from 0"),
    "clip_grad_norm":        (0.0,         1.0,       "longest gradient that a step may take; 0: any"),
    "augment":               (False,       True,      "flip training slices at random, along either axis"),
    "codebook":              ("gradient",  "ema",     "how embeddings move: gradient, or ema (moving averages)"),
    "codebook_init":         ("kmeans",    "kmeans",  "kmeans on the first batches, or uniform (it collapses)"),
    "ema_decay":             (0.99,        0.99,      "decay of an ema codebook's averages"),
    "restart_below":         (0.0,         0.1,       "an ema code used under this share of the mean restarts"),
    "commitment_cost":       (0.25,        0.25,      "beta, the weight of the term that ties encoder to codebook"),
    "num_embeddings":        (512,         512,       "K, the number of codes"),
    "embedding_dim":         (64,          64,        "D, the length of an embedding"),
    "hidden_channels":       (64,          64,        "twice the width of the residual stacks"),
    "residual_channels":     (32,          32,        "width inside a residual layer"),
    "num_residual_layers":   (2,           2,         "layers in a residual stack"),
}  # fmt: skip
CHOICES = {"schedule": ("constant", "cosine"), "codebook": ("gradient", "ema"), "codebook_init": ("kmeans", "uniform")}
DEFAULTS = {
    "data": None, "fit": "resize", "planes": 60, "skip_bad_files": False, "cache_dir": None, "recipe": "tuned",
    "name": None, "runs_dir": "runs", "resume": False, "dry_run": False, "plot_every": 10, "device": "auto",
    "precision": "auto", "seed": 0,
}  # fmt: skip
MODEL_ARGUMENTS = (
    "hidden_channels", "residual_channels", "num_residual_layers", "embedding_dim", "num_embeddings",
    "commitment_cost", "codebook", "ema_decay", "restart_below",
)  # fmt: skip
AT_LEAST_ONE = (
    "epochs", "batch_size", "num_embeddings", "embedding_dim", "residual_channels", "plot_every", "planes",
)  # fmt: skip
AT_LEAST_ZERO = ("learning_rate", "commitment_cost", "clip_grad_norm", "restart_below", "num_residual_layers", "seed")
# What --resume may change; anything else would make it another run.
RESUMABLE = {"data", "cache_dir", "name", "runs_dir", "resume", "dry_run", "plot_every", "device", "epochs"}


def parse_arguments(argv: list[str] | None = None) -> dict:
    """The flags that were typed, no defaults among them: those differ between a new run and a resumed one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    flag = parser.add_argument_group("data").add_argument
    flag("--data", metavar="DIR", help="folder of slices (2D) or volumes (3D); else $HIPMRI_DATA; else sample data")
    flag("--fit", choices=("resize", "crop"), help="what is not 256 x 128: resize it, or centre-crop (resize)")
    flag("--planes", type=int, help="3D data: how many central coronal planes of a volume are slices (60)")
    flag("--skip-bad-files", action="store_true", help="go on without files that can't be used, and count them")
    flag("--cache-dir", metavar="DIR", help="where prepared slices are kept; else $HIPMRI_CACHE; else the user's cache")
    flag = parser.add_argument_group("run").add_argument
    flag("--recipe", choices=("tuned", "document"), help="sets every flag of the last group (tuned)")
    flag("--name", help="the run's folder in --runs-dir (time and recipe)")
    flag("--runs-dir", metavar="DIR", help="where runs are kept (runs)")
    flag("--resume", action="store_true", help="go on with --name, or with the newest unfinished run")
    flag("--dry-run", action="store_true", help="print data, model, steps and expected time; train nothing")
    flag(
        "--plot-every",
        type=int,
        metavar="N",
        help="reconstruction panels each N epochs, at the first and the last (10)",
    )
    flag("--device", help="auto, cuda, cuda:1, mps or cpu (auto)")
    flag("--precision", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on GPUs that have it (auto)")
    flag("--seed", type=int, help="start of everything random (0)")
    group = parser.add_argument_group("recipe", "defaults: tuned | document")
    for name, (document, tuned, text) in RECIPES.items():
        options = {"type": type(tuned), "choices": CHOICES.get(name), "metavar": None if name in CHOICES else "X"}
        if isinstance(tuned, bool):
            options = {"action": argparse.BooleanOptionalAction}
        group.add_argument(flag_name(name), help=f"{text} ({tuned} | {document})", **options)
    return vars(parser.parse_args(argv))


def defaults(recipe: str) -> dict:
    column = ("document", "tuned").index(recipe)
    return DEFAULTS | {name: row[column] for name, row in RECIPES.items()} | {"recipe": recipe}


def flag_name(argument: str) -> str:
    return "--" + argument.replace("_", "-")


def check_arguments(args: dict) -> None:
    """Refuse, before any work, the values that could only fail later."""
    bounds = dict.fromkeys(AT_LEAST_ONE, (1, math.inf)) | dict.fromkeys(AT_LEAST_ZERO, (0, math.inf))
    for name, (low, high) in (bounds | {"warmup": (0, 1), "ema_decay": (0, 1)}).items():
        if not low <= args[name] <= high or args[name] == math.inf:
            expected = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise UserError(f"{flag_name(name)} is {args[name]}; expected {expected}")
    if args["restart_below"] and args["codebook"] == "gradient":
        raise UserError("--restart-below needs --codebook ema: a gradient codebook keeps no counts of use")


# ---------------------------------------------------------------- the run's folder


def open_run(given: dict) -> tuple[Path, dict, dict | None]:
    """Folder, arguments and checkpoint (None: from the start) of the run that the typed flags ask for."""
    runs_dir = Path(given.get("runs_dir", DEFAULTS["runs_dir"]))
    if not given.get("resume"):
        args = defaults(given.get("recipe", DEFAULTS["recipe"])) | given
        folder = runs_dir / (args["name"] or f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{args['recipe']}")
        if (folder / "config.json").exists():
            raise UserError(f"{folder} exists; add --resume to go on with it, or choose another --name")
        return folder, args, None

    folder = runs_dir / given["name"] if "name" in given else newest_unfinished(runs_dir)
    saved = utils.load_json(folder / "config.json").get("arguments", {})
    changed = sorted(key for key in given.keys() - RESUMABLE if given[key] != saved.get(key))
    if changed:
        told = ", ".join(f"{flag_name(key)} {given[key]} (it has {saved.get(key)})" for key in changed)
        raise UserError(f"{folder} can't go on with {told}; leave that out, or start a new run with another --name")
    args = defaults(saved.get("recipe", DEFAULTS["recipe"])) | saved | given
    checkpoint = last_checkpoint(folder)
    if checkpoint and checkpoint["epochs_done"] >= args["epochs"]:
        raise UserError(f"{folder} has finished its {args['epochs']} epochs; give more --epochs, or a new --name")
    return folder, args, checkpoint


def last_checkpoint(folder: Path) -> dict | None:
    """None where the run was ended before its first epoch was."""
    path = folder / "last.pt"
    return load_checkpoint(path) if path.exists() else None


def newest_unfinished(runs_dir: Path) -> Path:
    """The folder with the newest config.json whose last.pt lacks epochs."""
    configs = sorted(runs_dir.glob("*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for config in configs:
        checkpoint = last_checkpoint(config.parent)
        epochs = utils.load_json(config).get("arguments", {}).get("epochs", 0)
        if not checkpoint or checkpoint["epochs_done"] < epochs:
            return config.parent
    raise UserError(f"no unfinished run in {runs_dir} ({len(configs)} runs there); start one without --resume")


# ---------------------------------------------------------------- data


def load_data(args: dict, given: dict) -> tuple[dataset.Slices, dataset.Slices]:
    """The training and validation splits; makes the sample data, and shortens the run, where no other is given."""
    root, line = dataset.find_data(args["data"])
    print(line)
    if root is None:
        root = SAMPLE_FOLDER
        if not root.exists():
            phantom.write_phantom(root)
        if "epochs" not in given:
            args["epochs"] = SAMPLE_EPOCHS
            print(f"training {SAMPLE_EPOCHS} epochs on it; --epochs trains longer")
    source = dataset.find_splits(root)
    options = {key: args[key] for key in ("cache_dir", "fit", "planes", "skip_bad_files")}
    splits = [dataset.load_split(source, split, **options) for split in ("train", "validate")]
    for note in [*source.notes, *splits[0].notes, *splits[1].notes]:
        print(f"note: {note}")
    args["data"] = str(Path(source.root).resolve())
    return splits[0], splits[1]


# ---------------------------------------------------------------- the run


class Run:
    """What a run consists of: folder, arguments, model, optimizer, and how far it has come."""

    def __init__(self, folder: Path, args: dict, device: torch.device):
        self.folder, self.args, self.device = folder, args, device
        torch.manual_seed(args["seed"])
        self.model = VQVAE(**{key: args[key] for key in MODEL_ARGUMENTS}).to(device)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=args["learning_rate"])
        self.epochs_done, self.history, self.best_ssim = 0, [], -math.inf
        # Of the epoch under way: steps done, seconds spent, and the sums of both losses over its slices.
        self.steps_done, self.seconds, self.loss_sums = 0, 0.0, torch.zeros(2, device=device)

    def save(self, name: str) -> None:
        """All of it: no generator's state, since each step seeds itself, and no schedule's, a function of the step."""
        checkpoint = {
            "format": CHECKPOINT_FORMAT, "model_args": self.model.arguments, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "epochs_done": self.epochs_done, "history": self.history,
            "best_ssim": self.best_ssim, "steps_done": self.steps_done, "seconds": self.seconds,
            "loss_sums": self.loss_sums,
        }  # fmt: skip
        utils.save_checkpoint(self.folder / name, checkpoint)

    def restore(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for key in ("epochs_done", "history", "best_ssim", "steps_done", "seconds"):
            setattr(self, key, checkpoint[key])
        self.loss_sums = checkpoint["loss_sums"].to(self.device)


def epoch_order(train: dataset.Slices, seed: int, epoch: int) -> torch.Tensor:
    """A shuffle that depends on seed and epoch alone, so that a resumed run draws the same."""
    return torch.randperm(len(train), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


@torch.no_grad()
def start_codebook(run: Run, train: dataset.Slices) -> None:
    """k-means on the encoder's outputs of the first batches, those that the first epoch begins with."""
    if run.args["codebook_init"] == "kmeans":
        order = epoch_order(train, run.args["seed"], epoch=1)[: 4 * run.args["batch_size"]]
        z = run.model.encoder(train.batch(order).to(run.device))  # (B, D, h, w)
        vectors = z.movedim(1, -1).reshape(-1, z.shape[1])
        generator = torch.Generator().manual_seed(run.args["seed"])
        try:
            run.model.vector_quantization.initialize(vectors, generator=generator)
        except ValueError as error:
            raise UserError(f"{error}, or lower --num-embeddings") from None


def learning_rate(args: dict, step: int, steps: int) -> float:
    """Of step 0..steps-1: a linear warm-up, then constant or a cosine down to zero."""
    warmup = round(args["warmup"] * steps)
    if step < warmup:
        return args["learning_rate"] * (step + 1) / warmup
    if args["schedule"] == "constant":
        return args["learning_rate"]
    return args["learning_rate"] * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train_step(run: Run, images: torch.Tensor) -> torch.Tensor:
    """One update on images (B, 1, H, W); returns the reconstruction and quantisation losses, (2,), on the device."""
    args, model = run.args, run.model
    if args["augment"]:
        images = images.flip([axis for axis in (-2, -1) if torch.rand(()) < 0.5])
    with torch.autocast(run.device.type, torch.bfloat16, enabled=args["precision"] == "bfloat16"):
        losses = torch.stack(model.loss(images, model(images)))
    run.optimizer.zero_grad(set_to_none=True)
    losses.sum().backward()
    if args["clip_grad_norm"]:
        torch.nn.utils.clip_grad_norm_(model.parameters(), args["clip_grad_norm"])
    run.optimizer.step()
    return losses.detach()


def train_epoch(run: Run, train: dataset.Slices, bar: tqdm, interrupted: list[int]) -> None:
    """The steps that the epoch under way still lacks, or up to a signal."""
    args, epoch = run.args, run.epochs_done + 1
    batches = epoch_order(train, args["seed"], epoch).split(args["batch_size"])
    start = time.perf_counter() - run.seconds
    for batch in batches[run.steps_done :]:
        step = run.epochs_done * len(batches) + run.steps_done
        torch.manual_seed(args["seed"] * 1_000_003 + step)  # flips and restarted codes
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(args, step, args["epochs"] * len(batches))
        losses = train_step(run, train.batch(batch).to(run.device))
        run.loss_sums += losses * len(batch)
        run.steps_done += 1
        run.seconds = time.perf_counter() - start
        if bar.update(len(batch)):  # a few times a second the bar is drawn anew: only then wait for the device
            slices = min(run.steps_done * args["batch_size"], len(train))
            bar.set_postfix(loss=f"{run.loss_sums.sum().item() / slices:.4f}", ssim=f"{max(run.best_ssim, 0):.4f}")
        if interrupted:
            return


def end_epoch(run: Run, train: dataset.Slices, validation: dataset.Slices) -> dict:
    """Validate, and close the epoch with its row of metrics.csv."""
    start = time.perf_counter()
    scores, counts, val_loss = utils.evaluate(run.model, validation, run.args["batch_size"], run.device)
    recon, quantisation = (run.loss_sums / len(train)).tolist()
    if not math.isfinite(recon + quantisation + val_loss):
        raise UserError(
            f"the loss is no longer finite in epoch {run.epochs_done + 1} (training {recon + quantisation}, validation "
            f"{val_loss}); last.pt and best.pt keep what was before it; try a lower --learning-rate"
        )
    codes_used, perplexity = utils.code_use(counts)
    run.epochs_done += 1
    row = {
        "epoch": run.epochs_done, "step": run.epochs_done * run.steps_done, "train_loss": recon + quantisation,
        "train_recon": recon, "train_vq": quantisation, "val_loss": val_loss,
        "val_ssim": scores["ssim"].nanmean().item(), "val_psnr": scores["psnr"].nanmean().item(),
        "perplexity": perplexity, "codes_used": codes_used, "lr": run.optimizer.param_groups[0]["lr"],
        "seconds": round(run.seconds + time.perf_counter() - start, 2),
    }  # fmt: skip
    run.history.append(row)
    run.steps_done, run.seconds = 0, 0.0
    run.loss_sums.zero_()
    return row


@torch.no_grad()
def plot_panels(run: Run, validation: dataset.Slices) -> None:
    """Original, reconstruction and error of up to 8 validation slices, the same ones every time."""
    chosen = torch.linspace(0, len(validation) - 1, min(8, len(validation))).round().long()
    run.model.eval()
    originals = validation.batch(chosen)
    reconstructions = run.model(originals.to(run.device)).reconstruction.float().cpu()
    run.model.train()
    scores = utils.slice_scores(originals, reconstructions, ("ssim",))["ssim"]
    titles = [f"{validation.names[i]}\nssim {score:.3f}" for i, score in zip(chosen.tolist(), scores, strict=True)]
    name = f"epoch_{run.epochs_done}"
    heading = f"{run.folder.name}, epoch {run.epochs_done}, validation, {run.model.bits_per_pixel:.4f} bits per pixel"
    path = run.folder / "plots" / name / f"{name}_images.png"
    utils.plot_reconstructions(path, originals, reconstructions, titles, heading)


def seconds_a_step(run: Run, train: dataset.Slices, steps: int = 3) -> float:
    """Measured on a copy that is thrown away; the first step, which warms up, is not counted."""
    trial = copy.deepcopy(run)
    images = train.batch(torch.arange(run.args["batch_size"]) % len(train)).to(run.device)
    for step in range(1 + steps):
        if step == 1:
            start = time.perf_counter()
        train_step(trial, images).sum().item()  # waits for the device
    return (time.perf_counter() - start) / steps


def announce(run: Run, train: dataset.Slices, validation: dataset.Slices) -> None:
    """Print what will be done, and about how long it takes."""
    args, model = run.args, run.model
    steps_an_epoch = math.ceil(len(train) / args["batch_size"])
    steps = args["epochs"] * steps_an_epoch - run.epochs_done * steps_an_epoch - run.steps_done
    seconds = steps * seconds_a_step(run, train)
    print(f"data: {args['data']}: {len(train)} training and {len(validation)} validation slices of 256 x 128")
    print(
        f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {args['num_embeddings']} codes, "
        f"{model.bits_per_pixel:.4f} bits per pixel (each slice's mean and deviation, apart: 0.001)"
    )
    print(
        f"training: recipe {args['recipe']}, {args['epochs']} epochs of {steps_an_epoch} steps of {args['batch_size']} "
        f"slices, {steps} steps to go, on {utils.describe_device(run.device)} in {args['precision']}: "
        f"about {math.ceil(seconds / 60)} min"
    )
    if run.device.type == "cpu" and seconds > 2 * 3600:
        epochs = max(1, int(args["epochs"] * 3600 / seconds))
        print(f"warning: over two hours on this CPU; --epochs {epochs} takes about one hour, a GPU minutes")


def main(argv: list[str] | None = None) -> int:
    given = parse_arguments(argv)
    folder, args, checkpoint = open_run(given)
    check_arguments(args)
    utils.keep_freed_memory()
    device = utils.pick_device(args["device"])
    args["precision"] = utils.pick_precision(args["precision"], device)
    train, validation = load_data(args, given)

    run = Run(folder, args, device)
    if checkpoint:
        run.restore(checkpoint)
    else:
        start_codebook(run, train)
    announce(run, train, validation)
    if args["dry_run"]:
        print(f"dry run: nothing trained, nothing written to {folder}")
        return 0

    folder.mkdir(parents=True, exist_ok=True)
    slices = {"train": len(train), "validate": len(validation)}
    config = {"name": folder.name, "arguments": args, "slices": slices, "bits_per_pixel": run.model.bits_per_pixel}
    config |= {"device": utils.describe_device(device), "versions": utils.versions()}
    utils.save_json(folder / "config.json", config)

    interrupted: list[int] = []  # the signal that asks for an end, once it has come
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: interrupted.append(number))

    done = run.epochs_done * len(train) + run.steps_done * args["batch_size"]
    with tqdm(total=args["epochs"] * len(train), initial=done, unit=" slices", smoothing=0.05) as bar:
        while run.epochs_done < args["epochs"]:
            bar.set_description(f"epoch {run.epochs_done + 1}/{args['epochs']}")
            train_epoch(run, train, bar, interrupted)
            if interrupted:
                break
            row = end_epoch(run, train, validation)
            bar.write(
                "epoch {epoch}: train loss {train_loss:.4f}, validation loss {val_loss:.4f}, ssim {val_ssim:.4f}, "
                "psnr {val_psnr:.2f} dB, {codes_used} codes, {seconds:.1f} s".format(**row)
            )
            if row["val_ssim"] > run.best_ssim:
                run.best_ssim = row["val_ssim"]
                run.save("best.pt")
            if run.epochs_done in (1, args["epochs"]) or run.epochs_done % args["plot_every"] == 0:
                plot_panels(run, validation)
                utils.plot_curves(folder / "loss_ssim_plot.png", run.history, f"{folder.name}, validation")
            utils.save_csv(folder / "metrics.csv", run.history)
            run.save("last.pt")  # after the rest: a run that is killed before this does the epoch again

    python = utils.python_command()
    if interrupted:
        run.save("last.pt")
        print(f"stopped in epoch {run.epochs_done + 1}, saved at the step; to go on:")
        print(f"    {python} train.py --resume --runs-dir {folder.parent} --name {folder.name}")
        return 128 + interrupted[0]
    print(f"best validation ssim {run.best_ssim:.4f}; the plots are in {folder}; next, the test split:")
    print(f"    {python} predict.py --run {folder}")
    return 0


if __name__ == "__main__":
    utils.run_script(main, dataset.DataError, CheckpointError)
