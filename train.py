"""Train a VQ-VAE on MRI slices.

    python train.py                                     # sample data: minutes on two CPU cores
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
import inspect
import math
import signal
import time
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

import dataset
import metrics
import phantom
import utils
from modules import CHECKPOINT_FORMAT, VQVAE, CheckpointError, load_checkpoint
from utils import UserError

SAMPLE_FOLDER, SAMPLE_EPOCHS = Path("sample_data"), 10

# The recipes. "document" is the source document's training; its one departure is a codebook that starts from
# data. "tuned" learns faster and better from the same bits, batches and epochs, with 1.8 times the multiply-adds.
ANY, SOME = (0, 1e9), (1, 1e9)  # bounds; a list is of choices
RECIPES = {
    # flag                  document    tuned     allowed                 help
    "epochs":              (100,        100,      SOME,                   "passes over the training split"),
    "batch_size":          (16,         16,       SOME,                   "slices a step"),
    "learning_rate":       (1e-4,       2e-3,     ANY,                    "Adam's; with a schedule, its peak"),
    "schedule":            ("constant", "cosine", ["constant", "cosine"], "of the learning rate; cosine ends at 0"),
    "warmup":              (0.0,        0.05,     (0, 1),                 "share of steps in which it rises from 0"),
    "clip_grad_norm":      (0.0,        1.0,      ANY,                    "longest gradient of a step; 0: any"),
    "crop":                (0,          128,      (0, 128),               "side of random squares; 0: whole slices"),
    "augment":             (False,      True,     None,                   "flip slices, turn squares, at random"),
    "ssim_weight":         (0.0,        0.5,      ANY,                    "of 1 - SSIM beside the squared error"),
    "codebook":            ("gradient", "ema",    ["gradient", "ema"],    "how it moves; ema: moving averages"),
    "codebook_init":       ("kmeans",   "kmeans", ["kmeans", "uniform"],  "from data; uniform collapses"),
    "ema_decay":           (0.99,       0.99,     (0, 1),                 "of an ema codebook's averages"),
    "restart_below":       (0.0,        0.1,      ANY,                    "share of mean use; rarer ema codes restart"),
    "commitment_cost":     (0.25,       0.25,     ANY,                    "beta: ties the encoder to the codebook"),
    "stride":              (4,          4,        [4, 8, 16],             "pixels a side of one code position"),
    "num_codebooks":       (1,          1,        (1, 64),                "codes a position; each takes what is left"),
    "num_embeddings":      (512,        512,      SOME,                   "K, the number of codes"),
    "embedding_dim":       (64,         64,       SOME,                   "D, the length of an embedding"),
    "hidden_channels":     (64,         64,       (2, 1e9),               "twice the width of the residual stacks"),
    "residual_channels":   (32,         32,       SOME,                   "width inside a residual layer"),
    "num_residual_layers": (2,          3,        ANY,                    "layers in a residual stack"),
    "num_code_layers":     (0,          4,        ANY,                    "the decoder's, at the codes' own grid"),
    "refine_channels":     (0,          16,       ANY,                    "of one more, full-size convolution"),
}  # fmt: skip
DEFAULTS = {
    "data": None, "fit": "resize", "planes": 60, "skip_bad_files": False, "cache_dir": None, "recipe": "tuned",
    "name": None, "runs_dir": "runs", "resume": False, "dry_run": False, "plot_every": 10, "device": "auto",
    "precision": "auto", "seed": 0,
}  # fmt: skip
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
    flag("--plot-every", type=int, metavar="N", help="panels each N epochs, and at the first and the last (10)")
    flag("--device", help="auto, cuda, cuda:1, mps or cpu (auto)")
    flag("--precision", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on GPUs that have it (auto)")
    flag("--seed", type=int, help="start of everything random (0)")
    group = parser.add_argument_group("recipe", "defaults: tuned | document")
    for name, (document, tuned, allowed, text) in RECIPES.items():
        options = {"type": type(tuned), "metavar": "X"}
        if isinstance(tuned, bool):
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(allowed, list):
            options = {"choices": allowed, "type": type(tuned)}
        group.add_argument(flag_name(name), help=f"{text} ({tuned} | {document})", **options)
    return vars(parser.parse_args(argv))


def flag_name(argument: str) -> str:
    return "--" + argument.replace("_", "-")


def with_defaults(recipe: str, given: dict) -> dict:
    """All arguments: what is given, over the recipe's values, over the other defaults."""
    column = ("document", "tuned").index(recipe)
    args = DEFAULTS | {name: row[column] for name, row in RECIPES.items()} | {"recipe": recipe} | given
    if args["codebook"] == "gradient" and "restart_below" not in given:
        args["restart_below"] = 0.0  # a gradient codebook keeps no counts of use
    return args


def check_arguments(args: dict) -> None:
    """Refuse, before any work, the values that could only fail later."""
    bounds = {name: row[2] for name, row in RECIPES.items() if isinstance(row[2], tuple)}
    for name, (low, high) in (bounds | {"plot_every": SOME, "planes": (1, 256), "seed": (0, 2**40)}).items():
        if not low <= args[name] <= high:
            raise UserError(f"{flag_name(name)} is {args[name]}; expected {low} to {high:g}")
    if args["crop"] % args["stride"] or 0 < args["crop"] < 16:
        stride = args["stride"]
        raise UserError(f"--crop is {args['crop']}; expected 0, or 16 to 128 and divisible by --stride {stride}")
    if args["restart_below"] and args["codebook"] == "gradient":
        raise UserError("--restart-below needs --codebook ema: a gradient codebook keeps no counts of use")


# ---------------------------------------------------------------- the run's folder


def open_run(given: dict) -> tuple[Path, dict, dict | None]:
    """Folder, arguments and checkpoint (None: from the start) of the run that the typed flags ask for."""
    runs_dir = Path(given.get("runs_dir", DEFAULTS["runs_dir"]))
    if not given.get("resume"):
        args = with_defaults(given.get("recipe", DEFAULTS["recipe"]), given)
        folder = runs_dir / (args["name"] or f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{args['recipe']}")
        if (folder / "config.json").exists():
            raise UserError(f"{folder} exists; add --resume to go on with it, or choose another --name")
        return folder, args, None

    folder = runs_dir / given["name"] if "name" in given else newest_unfinished(runs_dir)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no run to go on with; start one without --resume, or check --name")
    saved = utils.load_json(folder / "config.json").get("arguments", {})
    changed = sorted(key for key in given.keys() - RESUMABLE if given[key] != saved.get(key))
    if changed:
        told = ", ".join(f"{flag_name(key)} {given[key]} (it has {saved.get(key)})" for key in changed)
        raise UserError(f"{folder} can't go on with {told}; leave that out, or start a new run with another --name")
    args = with_defaults(saved.get("recipe", DEFAULTS["recipe"]), saved | given)
    checkpoint = last_checkpoint(folder)
    if checkpoint and checkpoint["epochs_done"] >= args["epochs"]:
        done = checkpoint["epochs_done"]
        raise UserError(f"{folder} has finished {done} epochs; give --epochs more than that, or a new --name")
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
        if not root.exists() or not any(root.iterdir()):
            phantom.write_phantom(root)
        if "epochs" not in given:
            args["epochs"] = SAMPLE_EPOCHS
            print(f"training {SAMPLE_EPOCHS} epochs on it; --epochs trains longer")
    source = dataset.find_splits(root)
    options = {key: args[key] for key in ("cache_dir", "fit", "planes", "skip_bad_files")}
    train, validation = (dataset.load_split(source, split, **options) for split in ("train", "validate"))
    for note in [*source.notes, *train.notes, *validation.notes]:
        print(f"note: {note}")
    if validation.constant.all():
        raise UserError(f"all {len(validation)} validation slices are constant: no checkpoint could be chosen by them")
    args["data"] = str(Path(source.root).resolve())
    return train, validation


# ---------------------------------------------------------------- the run


class Run:
    """What a run consists of: folder, arguments, model, optimizer, and how far it has come."""

    def __init__(self, folder: Path, args: dict, fingerprint: str):
        self.folder, self.args, self.fingerprint = folder, args, fingerprint  # of the training and validation slices
        self.device = utils.pick_device(args["device"])
        self.precision = utils.pick_precision(args["precision"], self.device)
        torch.manual_seed(args["seed"])
        self.model = VQVAE(**{key: args[key] for key in inspect.signature(VQVAE).parameters}).to(self.device)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=args["learning_rate"])
        self.epochs_done, self.history, self.best_ssim = 0, [], -math.inf
        # Of the epoch under way: steps done, seconds spent, and the sums of both losses over its slices.
        self.steps_done, self.seconds, self.loss_sums = 0, 0.0, torch.zeros(2, device=self.device)

    def save(self, name: str) -> None:
        """All of it: no generator's state, since each step seeds itself, and no schedule's, a function of the step."""
        checkpoint = {
            "format": CHECKPOINT_FORMAT, "model_args": self.model.arguments, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "epochs_done": self.epochs_done, "history": self.history,
            "best_ssim": self.best_ssim, "steps_done": self.steps_done, "seconds": self.seconds,
            "loss_sums": self.loss_sums, "fingerprint": self.fingerprint,
        }  # fmt: skip
        utils.save_checkpoint(self.folder / name, checkpoint)

    def restore(self, checkpoint: dict) -> None:
        if checkpoint["fingerprint"] != self.fingerprint:
            data = self.args["data"]
            raise UserError(f"{self.folder} was trained on other slices than {data} holds; name the same with --data")
        if checkpoint["model_args"] != self.model.arguments:
            raise UserError(f"{self.folder} is of another version, whose recipe made another model; start a new run")
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
    """k-means on the encoder's outputs for the 64 slices that the first epoch begins with."""
    if run.args["codebook_init"] == "kmeans":
        order = epoch_order(train, run.args["seed"], epoch=1)[:64]
        z = run.model.encoder(train.batch(order).to(run.device))  # (B, D, h, w)
        vectors = z.movedim(1, -1).reshape(-1, z.shape[1])
        generator = torch.Generator().manual_seed(run.args["seed"])
        try:
            run.model.vector_quantization.initialize(vectors, generator=generator)
        except ValueError as error:
            raise UserError(f"{error}; lower --num-embeddings, or train on more slices") from None


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
    if args["crop"]:
        images = dataset.crop_at_random(images, args["crop"])
    if args["augment"]:
        images = dataset.flip_at_random(images)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bfloat16"):
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
            best = {"best_ssim": f"{run.best_ssim:.4f}"} if run.history else {}
            bar.set_postfix(loss=f"{run.loss_sums.sum().item() / slices:.4f}", **best)
        if interrupted:
            return


def end_epoch(run: Run, train: dataset.Slices, validation: dataset.Slices) -> dict:
    """Validate, and close the epoch with its row of metrics.csv."""
    start = time.perf_counter()
    scores, counts, val_loss = metrics.evaluate(run.model, validation, run.args["batch_size"], run.device)
    recon, quantisation = (run.loss_sums / len(train)).tolist()
    if not math.isfinite(recon + quantisation + val_loss):
        raise UserError(
            f"the loss is no longer finite in epoch {run.epochs_done + 1} (training {recon + quantisation}, validation "
            f"{val_loss}); the checkpoints keep the epochs before it, if any; try a lower --learning-rate"
        )
    codes_used, perplexity = metrics.code_use(counts)
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
    """Original, reconstruction and error of four validation slices, the same ones every time."""
    chosen = torch.linspace(0, len(validation) - 1, 6).round().long()[1:-1].unique()  # the ends of a volume show little
    run.model.eval()
    originals = validation.batch(chosen)
    reconstructions = run.model(originals.to(run.device)).reconstruction.float().cpu()
    run.model.train()
    scores = metrics.slice_scores(originals, reconstructions, ("ssim",))["ssim"]
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
        f"model: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{args['num_codebooks']} x {args['num_embeddings']} codes, "
        f"{model.bits_per_pixel:.4f} bits per pixel (each slice's mean and deviation, apart: 0.001)"
    )
    print(
        f"training: recipe {args['recipe']}, {args['epochs']} epochs of {steps_an_epoch} steps of {args['batch_size']} "
        f"slices, {steps} steps to go, on {utils.describe_device(run.device)} in {run.precision}: "
        f"about {math.ceil(seconds / 60)} min, and validation"
    )
    if run.device.type == "cpu" and seconds > 2 * 3600:
        epochs = max(1, int(args["epochs"] * 3600 / seconds))
        print(f"warning: over two hours on this CPU; --epochs {epochs} takes about one hour, a GPU minutes")


def fit(run: Run, train: dataset.Slices, validation: dataset.Slices) -> int:
    """Train up to the last epoch, or up to a signal, whose number is returned (0: to the end)."""
    epochs, folder = run.args["epochs"], run.folder
    interrupted: list[int] = []

    def interrupt(number, frame):
        if interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C waits for nothing
        interrupted.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    done = run.epochs_done * len(train) + run.steps_done * run.args["batch_size"]
    with tqdm(total=epochs * len(train), initial=done, unit=" slices", smoothing=0.05) as bar:
        while run.epochs_done < epochs:
            bar.set_description(f"epoch {run.epochs_done + 1}/{epochs}")
            train_epoch(run, train, bar, interrupted)
            if interrupted:
                if run.loss_sums.isfinite().all():  # else the last epoch's end is better
                    run.save("last.pt")
                return interrupted[0]
            row = end_epoch(run, train, validation)
            bar.write(
                "epoch {epoch}: train loss {train_loss:.4f}, validation loss {val_loss:.4f}, ssim {val_ssim:.4f}, "
                "psnr {val_psnr:.2f} dB, {codes_used} codes, {seconds:.1f} s".format(**row)
            )
            if row["val_ssim"] > run.best_ssim:
                run.best_ssim = row["val_ssim"]
                run.save("best.pt")
            if run.epochs_done in (1, epochs) or run.epochs_done % run.args["plot_every"] == 0:
                plot_panels(run, validation)
                utils.plot_curves(folder / "loss_ssim_plot.png", run.history, folder.name)
            utils.save_csv(folder / "metrics.csv", run.history)
            run.save("last.pt")  # after the rest: a run that is killed before this does the epoch again
    return 0


def main(argv: list[str] | None = None) -> int:
    given = parse_arguments(argv)
    folder, args, checkpoint = open_run(given)
    check_arguments(args)
    utils.keep_freed_memory()
    train, validation = load_data(args, given)
    run = Run(folder, args, f"{train.fingerprint} {validation.fingerprint}")
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
    config |= {"device": utils.describe_device(run.device), "precision": run.precision, "versions": utils.versions()}
    utils.save_json(folder / "config.json", config)
    number = fit(run, train, validation)
    if number:
        print(f"stopped in epoch {run.epochs_done + 1}; to go on:")
        print("    " + utils.command("train.py", "--resume", "--runs-dir", folder.parent, "--name", folder.name))
        return 128 + number
    print(f"best validation ssim {run.best_ssim:.4f}; the plots are in {folder}; next, the test split:")
    print("    " + utils.command("predict.py", "--run", folder))
    return 0


if __name__ == "__main__":
    utils.run_script(main, dataset.DataError, CheckpointError)
