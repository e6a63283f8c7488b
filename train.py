"""Train a VQ-VAE on MRI slices.

    python train.py                                     # sample data: minutes on two CPU cores
    python train.py --data /data/keras_slices_data      # HipMRI, 100 epochs
    python train.py --data ... --recipe document        # the source document's training, number for number
    python train.py --data ... --dry-run                # print what would be done, and how long it would take
    python train.py --resume                            # go on with the newest unfinished run
    torchrun --nproc-per-node 4 train.py --data ...     # several processes: one a GPU, or on a CPU

A run writes to runs/<name>/: config.json, metrics.csv, best.pt, last.pt, loss_ssim_plot.png, plots/.
It can be killed at any moment: --resume goes on from the last epoch's end (after SIGTERM or Ctrl-C: from the
last step), to the same weights as if nothing had happened.
"""

from __future__ import annotations

import copy
import inspect
import math
import signal
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dataset
import metrics
import phantom
import utils
from modules import CHECKPOINT_FORMAT, VQVAE, CheckpointError
from recipes import check_arguments, open_run, parse_arguments
from utils import UserError, process_count, process_rank, sum_over_processes

SAMPLE_FOLDER, SAMPLE_EPOCHS = Path("sample_data"), 10
UNCOMPILED = "the step can't be compiled here, and goes on uncompiled"

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

    PROGRESS = ("epochs_done", "history", "best_ssim", "steps_done", "seconds")  # as checkpoints keep it, beside `sums`

    def __init__(self, folder: Path, args: dict, fingerprint: str):
        self.folder, self.args, self.fingerprint = folder, args, fingerprint  # of the training and validation slices
        self.device = utils.pick_device(args["device"])
        self.precision = utils.pick_precision(args["precision"], self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        torch.manual_seed(args["seed"])
        self.model = VQVAE(**{key: args[key] for key in inspect.signature(VQVAE).parameters}).to(self.device)
        if self.device.type != "mps":  # what convolutions on CPUs and matrix units are fastest in
            self.model.to(memory_format=torch.channels_last)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=args["learning_rate"], fused=True)
        self.parallel = self.model
        if process_count() > 1:  # each process has a copy of the model; backward takes the mean of their gradients
            # The codebook's averages are kept equal by the quantiser; copying them at each step would hide where not.
            known = inspect.signature(DistributedDataParallel).parameters
            copying = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its old name
            self.parallel = DistributedDataParallel(self.model, **{copying: False})
        self.losses = augmented_losses
        if args["compile"] or (args["compile"] is None and self.device.type == "cuda" and process_count() == 1):
            self.compile()
        self.epochs_done, self.history, self.best_ssim = 0, [], -math.inf
        self.begin_epoch()

    def compile(self) -> None:
        """The losses of a whole batch, on a GPU as CUDA graphs; `seconds_a_step` tries it."""
        try:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.losses = torch.compile(augmented_losses, mode=mode, dynamic=False)
        except RuntimeError as error:  # a Python that it does not know
            print(f"warning: {UNCOMPILED}: {utils.first_line(error)}")

    def begin_epoch(self) -> None:
        self.steps_done, self.seconds = 0, 0.0
        # Over this process's slices, on the device: both losses, these slices, steps skipped; and the last such step.
        self.sums = torch.zeros(5, device=self.device)

    def add(self, losses: Tensor, finite: Tensor, count: int, step: int) -> None:
        """To `sums`, what `train_step` returned for `count` slices."""
        self.sums[:2] += torch.where(finite, losses * count, 0)
        self.sums[2] += finite * count
        self.sums[3] += ~finite
        self.sums[4] = torch.where(finite, self.sums[4], step)

    def sums_of_all(self) -> Tensor:
        """`sums` over the slices of all processes, on the CPU."""
        return torch.cat([sum_over_processes(self.sums[:3]), self.sums[3:].cpu()])  # all skip the same steps

    def state(self) -> dict:
        """No generator's, since each step seeds itself, and no schedule's, a function of the step."""
        state = {key: getattr(self, key) for key in self.PROGRESS}
        return state | {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "sums": self.sums_of_all()
        }  # fmt: skip

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for key in self.PROGRESS:
            setattr(self, key, state[key])
        self.sums = state["sums"].to(self.device)
        if process_rank():  # what was summed is the first process's, also where others had a part in it
            self.sums[:3] = 0

    def save(self, name: str) -> None:
        """By the first process; all must call it."""
        checkpoint = {"format": CHECKPOINT_FORMAT, "model_args": self.model.arguments, **self.state()}
        if process_rank() == 0:
            utils.save_checkpoint(self.folder / name, checkpoint | {"fingerprint": self.fingerprint})

    def restore(self, checkpoint: dict) -> None:
        if checkpoint["format"] != CHECKPOINT_FORMAT:
            raise UserError(f"{self.folder} was begun by an older version, which this one can't go on from; start anew")
        if checkpoint["fingerprint"] != self.fingerprint:
            data = self.args["data"]
            raise UserError(f"{self.folder} was trained on other slices than {data} holds; name the same with --data")
        if checkpoint["model_args"] != self.model.arguments:
            raise UserError(f"{self.folder} is of another version, whose recipe made another model; start a new run")
        self.load(checkpoint)


def epoch_order(train: dataset.Slices, seed: int, epoch: int) -> Tensor:
    """A shuffle that depends on seed and epoch alone, so that a resumed run draws the same."""
    return torch.randperm(len(train), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


@torch.no_grad()
def start_codebook(run: Run, train: dataset.Slices) -> None:
    """k-means on the encoder's outputs for the 64 slices that the first epoch begins with."""
    quantizer = run.model.vector_quantization
    if run.args["codebook_init"] == "kmeans" and process_rank() == 0:
        order = epoch_order(train, run.args["seed"], epoch=1)[:64]
        z = run.model.encoder(train.batch(order).to(run.device))  # (B, D, h, w)
        vectors = z.movedim(1, -1).reshape(-1, z.shape[1])
        try:
            quantizer.initialize(vectors, generator=torch.Generator().manual_seed(run.args["seed"]))
        except ValueError as error:
            raise UserError(f"{error}; lower --num-embeddings, or train on more slices") from None
    utils.copy_from_first_process(quantizer.state_dict())


def learning_rate(args: dict, step: int, steps: int) -> float:
    """Of step 0..steps-1: a linear warm-up, then constant or a cosine down to zero."""
    warmup = round(args["warmup"] * steps)
    if step < warmup:
        return args["learning_rate"] * (step + 1) / warmup
    if args["schedule"] == "constant":
        return args["learning_rate"]
    return args["learning_rate"] * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def augmented_losses(run: Run, images: Tensor) -> Tensor:
    """Reconstruction and quantisation loss, (2,), of slices (B, 1, H, W) cropped and turned at random."""
    if run.args["crop"]:
        images = dataset.crop_at_random(images, run.args["crop"])
    if run.args["augment"]:
        images = dataset.flip_at_random(images)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bfloat16"):
        return torch.stack(run.model.loss(images, run.parallel(images)))


def train_step(run: Run, images: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """One update on images (B, 1, H, W), of several processes this one's share of a batch of `count`.

    Returns both losses, (2,), and whether the gradient was finite, (): if not, no weight was updated (nor a moving
    average, where the encoder's output was not finite). They stay on the device: nothing here waits for it.
    """
    count = count or len(images) * process_count()
    share = len(images) * process_count() / count  # the mean is over slices, not over processes
    whole = count == run.args["batch_size"]  # compiled for one shape
    losses = (run.losses if whole else augmented_losses)(run, images)
    if not len(images):
        losses = losses.nan_to_num()  # the mean over no slice
    run.optimizer.zero_grad(set_to_none=True)
    (losses.sum() * share).backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.args["clip_grad_norm"] or math.inf)
    run.optimizer.found_inf = (~norm.isfinite()).float()  # the fused Adam leaves out such a step
    run.optimizer.step()
    return losses.detach(), norm.isfinite()


def train_epoch(run: Run, train: dataset.Slices, bar: tqdm, interrupted: list[int]) -> int:
    """The steps that the epoch under way still lacks, or up to a signal to any process; its number, or 0."""
    args, epoch = run.args, run.epochs_done + 1
    batches = epoch_order(train, args["seed"], epoch).split(args["batch_size"])
    left = batches[run.steps_done :]
    shares = [batch.tensor_split(process_count())[process_rank()] for batch in left]
    start = time.perf_counter() - run.seconds
    for batch, images in zip(left, train.batches(shares, run.device), strict=True):
        step = run.epochs_done * len(batches) + run.steps_done
        # Crops, flips and restarted codes: drawn anew each step, and otherwise in each process.
        torch.manual_seed(args["seed"] * 1_000_003 + step + (process_rank() << 48))
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(args, step, args["epochs"] * len(batches))
        losses, finite = train_step(run, images, len(batch))
        run.add(losses, finite, len(images), step + 1)
        run.steps_done += 1
        run.seconds = time.perf_counter() - start
        if bar.update(len(batch)):  # a few times a second the bar is drawn anew: only then wait for the device
            bar.set_postfix(progress(run))
        if sum_over_processes(torch.tensor(len(interrupted))):
            return interrupted[0] if interrupted else signal.SIGTERM
    return 0


def progress(run: Run) -> dict[str, str]:
    """What the bar shows."""
    recon, quantisation, slices, skipped, last = run.sums.tolist()
    shown = {"loss": f"{(recon + quantisation) / max(slices, 1):.4f}"}
    if skipped:
        shown["skipped"] = f"{skipped:.0f} (last: step {last:.0f})"
    return shown | ({"best_ssim": f"{run.best_ssim:.4f}"} if run.history else {})


def end_epoch(run: Run, train: dataset.Slices, validation: dataset.Slices) -> dict:
    """Validate, and close the epoch with its row of metrics.csv."""
    start = time.perf_counter()
    utils.check_equal_processes(run.model.state_dict())
    scores, counts, val_loss = metrics.evaluate(run.model, validation, run.args["batch_size"], run.device)
    recon, quantisation, slices, skipped, last = run.sums_of_all().tolist()
    if not slices or not math.isfinite(val_loss):
        raise UserError(
            f"the loss is no longer finite in epoch {run.epochs_done + 1} ({skipped:.0f} of {run.steps_done} steps "
            f"skipped, validation {val_loss}); the checkpoints keep the epochs before it, if any; try a lower "
            "--learning-rate"
        )
    run.epochs_done += 1
    if skipped:
        tqdm.write(
            f"warning: {skipped:.0f} of {run.steps_done} steps of epoch {run.epochs_done} were skipped, the last of "
            f"them step {last:.0f}: their gradients were not finite"
        )
    codes_used, perplexity = metrics.code_use(counts)
    row = {
        "epoch": run.epochs_done, "step": run.epochs_done * run.steps_done,
        "train_loss": (recon + quantisation) / slices, "train_recon": recon / slices, "train_vq": quantisation / slices,
        "val_loss": val_loss, "val_ssim": scores["ssim"].nanmean().item(), "val_psnr": scores["psnr"].nanmean().item(),
        "perplexity": perplexity, "codes_used": codes_used, "lr": run.optimizer.param_groups[0]["lr"],
        "seconds": round(run.seconds + time.perf_counter() - start, 2),
    }  # fmt: skip
    run.history.append(row)
    run.begin_epoch()
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
    """Measured, after one that warms up, or three that compile and record CUDA graphs; all changes are put back."""
    before = copy.deepcopy(run.state())
    whole = torch.arange(run.args["batch_size"]) % len(train)
    images = next(train.batches([whole.tensor_split(process_count())[process_rank()]], run.device))
    start = time.perf_counter()
    try:
        for _ in range(3 if run.losses is not augmented_losses else 1):
            train_step(run, images)[1].item()  # waits for the device
    except Exception as error:  # compilers fail in many ways
        if run.losses is augmented_losses:
            raise
        print(f"warning: {UNCOMPILED}: {utils.first_line(error)}")
        run.losses = augmented_losses
        run.load(before)
        return seconds_a_step(run, train, steps)
    if run.losses is not augmented_losses:
        print(f"step compiled in {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    for _ in range(steps):
        train_step(run, images)[1].item()
    seconds = (time.perf_counter() - start) / steps
    run.load(before)
    return seconds


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
    first = process_rank() == 0
    with tqdm(total=epochs * len(train), initial=done, unit=" slices", smoothing=0.05, disable=not first) as bar:
        while run.epochs_done < epochs:
            bar.set_description(f"epoch {run.epochs_done + 1}/{epochs}")
            if number := train_epoch(run, train, bar, interrupted):
                run.save("last.pt")
                return number
            row = end_epoch(run, train, validation)
            bar.write(
                "epoch {epoch}: train loss {train_loss:.4f}, validation loss {val_loss:.4f}, ssim {val_ssim:.4f}, "
                "psnr {val_psnr:.2f} dB, {codes_used} codes, {seconds:.1f} s".format(**row)
            )
            if row["val_ssim"] > run.best_ssim:
                run.best_ssim = row["val_ssim"]
                run.save("best.pt")
            if first and (run.epochs_done in (1, epochs) or run.epochs_done % run.args["plot_every"] == 0):
                plot_panels(run, validation)
                utils.plot_curves(folder / "loss_ssim_plot.png", run.history, folder.name)
            if first:
                utils.save_csv(folder / "metrics.csv", run.history)
            run.save("last.pt")  # after the rest: a run that is killed before this does the epoch again
    return 0


def main(argv: list[str] | None = None) -> int:
    given = parse_arguments(argv, __doc__)
    utils.join_processes()
    folder, args, checkpoint = open_run(given)
    folder = utils.from_first_process(folder)  # its name may hold the second
    check_arguments(args, process_count())
    utils.keep_freed_memory()
    with utils.first_process_first():
        train, validation = load_data(args, given)
    run = Run(folder, args, f"{train.fingerprint} {validation.fingerprint}")
    if run.device.type != "cpu":
        for slices in (train, validation):
            print(slices.place(run.device))
    if checkpoint:
        run.restore(checkpoint)
    else:
        start_codebook(run, train)
    announce(run, train, validation)
    if args["dry_run"]:
        print(f"dry run: nothing trained, nothing written to {folder}")
        utils.leave_processes()
        return 0

    if process_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        slices = {"train": len(train), "validate": len(validation)}
        config = {"name": folder.name, "arguments": args, "slices": slices, "bits_per_pixel": run.model.bits_per_pixel}
        config |= {"device": utils.describe_device(run.device), "precision": run.precision}
        utils.save_json(folder / "config.json", config | {"versions": utils.versions()})
    resume = utils.command("train.py", "--resume", "--runs-dir", folder.parent, "--name", folder.name)
    try:
        number = fit(run, train, validation)
    except RuntimeError as error:
        if not utils.lost_process(error):
            raise
        reason = utils.first_line(error)
        raise UserError(f"another process of this run ended or hangs ({reason}); to go on from the last epoch's end, "
                        f"with any number of processes:\n    {resume}") from None  # fmt: skip
    utils.leave_processes()
    if number:
        print(f"stopped in epoch {run.epochs_done + 1}; to go on:\n    {resume}")
        return 128 + number
    print(f"best validation ssim {run.best_ssim:.4f}; the plots are in {folder}; next, the test split:")
    print("    " + utils.command("predict.py", "--run", folder))
    return 0


if __name__ == "__main__":
    utils.run_script(main, dataset.DataError, CheckpointError)
