"""Train a VQ-VAE on MRI slices.

    python train.py                                     # sample data: minutes on two CPU cores
    python train.py --data /data/keras_slices_data      # HipMRI, 100 epochs
    python train.py --data ... --recipe document        # the source document's training, number for number
    python train.py --data ... --gan                    # sharper: an adversarial loss in the second half
    python train.py --data ... --dry-run                # print what would be done, and how long it would take
    python train.py --resume                            # go on with the newest unfinished run
    torchrun --nproc-per-node 4 train.py --data ...     # several processes: one a GPU, or on a CPU

A run writes to runs/<name>/: config.json, metrics.csv, best.pt, last.pt, loss_ssim_plot.png, plots/.
It can be killed at any moment: --resume goes on from the last epoch's end (after SIGTERM, SIGUSR1 or Ctrl-C:
from the last step), to the same weights as if nothing had happened.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import dataset
import utils
from evaluation import metrics, plots, report
from modules import VQVAE
from mri import phantom, splits
from mri.preprocessing import Preprocessing
from training import distributed
from training import run as loop
from training.adversarial import PatchDiscriminator
from training.config import check_arguments, parse_arguments
from training.distributed import get_rank, get_world_size
from training.run_folder import open_run, read_manifest
from utils import UserError

SAMPLE_FOLDER, SAMPLE_EPOCHS = Path("sample_data"), 10

# ---------------------------------------------------------------- data


def load_data(
    args: dict, given: dict, known: dict | None = None
) -> tuple[dataset.SliceDataset, dataset.SliceDataset, dict]:
    """The training and validation splits; makes the sample data, and shortens the run, where no other is given.

    known: of a run that goes on, which scans are in which split, see `splits.find_scans`. They are also returned.
    """
    root, line = splits.find_data(args["data"])
    print(line)
    if root is None:
        root = SAMPLE_FOLDER
        if not root.exists() or not any(root.iterdir()):
            phantom.write_phantom(root)
        if "epochs" not in given:
            args["epochs"] = SAMPLE_EPOCHS
            print(f"training {SAMPLE_EPOCHS} epochs on it; --epochs trains longer")
    source = splits.find_source(
        root,
        args["axis"],
        args["split"],
        args["seed"],
        args["subjects"],
        known,
        include_new_subjects=False,
    )
    preprocessing = Preprocessing.resolve(
        source, args["size"], args["fit"], args["axis"], args["planes"]
    )
    options = {"cache_dir": args["cache_dir"], "skip_bad_files": args["skip_bad_files"]}
    loaded, errors = [], []
    for split in ("train", "validate"):
        try:
            loaded.append(dataset.load_split(source, split, preprocessing, **options))
        except utils.DataError as error:  # what is wrong with both splits is told at once
            errors.append(str(error))
    if errors:
        raise utils.DataError("\n".join(dict.fromkeys(errors)))
    train, validation = loaded
    for note in [*source.notes, *train.notes, *validation.notes]:
        print(f"note: {note}")
    if validation.constant.all():
        raise UserError(
            f"all {len(validation)} validation slices are constant: no checkpoint could be chosen by them"
        )
    args["data"] = str(Path(root if source.form == "scans" else source.root).resolve())
    args["size"], args["fit"] = list(train.size), train.fit
    return (
        train,
        validation,
        known or (splits.to_manifest(source) if source.form == "scans" else {}),
    )


# ---------------------------------------------------------------- the run


class Run(loop.Run):
    """A VQ-VAE, with --gan a discriminator beside it, and one Adam for both."""

    SHOWN, BEST, HIGHER = 2, "val_ssim", True
    LINE = (
        "epoch {epoch}: train loss {train_loss:.4f}, validation loss {val_loss:.4f}, ssim {val_ssim:.4f}, "
        "psnr {val_psnr:.2f} dB, {codes_used} codes, {seconds:.1f} s"
    )

    def __init__(self, folder: Path, args: dict, fingerprint: str, slices: dict | None = None):
        """slices: what the training slices are like, `dataset.SliceDataset.description`, for `predict.py` of other files."""
        self.slices = slices
        self.LOSSES = ("train_recon", "train_vq")
        if args["gan"]:
            self.LOSSES += ("train_adversarial", "train_discriminator", "adaptive_weight")
        torch.manual_seed(args["seed"])
        modules = {
            "model": VQVAE(**{key: args[key] for key in inspect.signature(VQVAE).parameters})
        }
        if args["gan"]:
            modules["discriminator"] = PatchDiscriminator()
        if (
            utils.pick_device(args["device"]).type != "mps"
        ):  # what convolutions on CPUs and matrix units like best
            for module in modules.values():
                module.to(memory_format=torch.channels_last)
        super().__init__(folder, args, fingerprint, **modules)

    def state(self) -> dict:
        return super().state() | {"slices": self.slices}

    def make_optimizer(self) -> torch.optim.Optimizer:
        groups = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        if self.args["gan"]:  # a slow mean of gradients would lag behind its opponent
            groups.append(
                {"params": list(self.modules["discriminator"].parameters()), "betas": (0.5, 0.9)}
            )
        return torch.optim.Adam(groups, lr=self.args["learning_rate"], fused=True)

    def eager_losses(self, images: Tensor) -> Tensor:
        """Reconstruction and quantisation loss, (2,), of slices (B, 1, H, W) cropped and turned at random.

        With --gan also the adversarial and the discriminator's loss, and the weight of the former, (5,).
        """
        if self.args["crop"]:
            side = min(
                self.args["crop"], *(side - side % 16 for side in images.shape[-2:])
            )  # of small slices less
            images = dataset.random_crop(images, side)
        if self.args["augment"]:
            images = dataset.random_flip(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            reconstruction, quantized = self.parallel(images)
            losses = torch.stack(self.model.loss(images, reconstruction, quantized))
            if not self.args["gan"]:
                return losses
            if self.share < self.args["gan_start"]:
                return torch.cat([losses, losses.new_zeros(3)])
            return torch.cat([losses, self.adversarial_losses(images, reconstruction)])

    def adversarial_losses(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Hinge losses of both sides, and the weight of the first, (3,): (B, 1, H, W) twice.

        As VQGAN (Esser et al. 2021, arXiv 2012.09841, equation 7), the adversarial gradient is made as long as the
        reconstruction loss's, times `gan_weight`. Both are taken at the reconstruction, not at the decoder's last
        layer: that needs no second pass through the decoder, and counts every process's slices alike.
        """
        discriminator = self.modules["discriminator"]
        leaf = reconstructions.detach().requires_grad_()
        adversarial = -discriminator(leaf).mean()
        reconstruction = self.model.reconstruction_loss(leaf, images)
        pulls = [
            torch.autograd.grad(loss, leaf)[0].float() for loss in (reconstruction, adversarial)
        ]
        squares = torch.stack([pull.square().sum() for pull in pulls])
        if get_world_size() > 1:
            dist.all_reduce(squares)
        weight = self.args["gan_weight"] * (
            squares[0] / squares[1].clamp_min(1e-12)
        ).sqrt().clamp_max(1e4)
        # Its gradient is that of weight x adversarial; its value, for the table, is the adversarial loss itself.
        push = (reconstructions.float() * (weight * pulls[1]).to(reconstructions)).sum()
        hinge = discriminator.hinge_loss(images, leaf.detach())
        return torch.stack([push - push.detach() + adversarial.detach().float(), hinge, weight])

    def is_best(self, row: dict) -> bool:
        """With --gan, no epoch before the discriminator took part: those reconstruct better, and are not what it is."""
        begun = self.share >= self.args["gan_start"] or row["epoch"] == self.args["epochs"]
        return super().is_best(row) and (begun or not self.args["gan"])

    def validate(self, validation: dataset.SliceDataset) -> dict:
        scores, counts, loss = metrics.evaluate(
            self.model, validation, self.args["batch_size"], self.device
        )
        used, perplexity = metrics.code_usage(counts)
        return {
            "val_loss": loss, "val_ssim": scores["ssim"].nanmean().item(), "val_psnr": scores["psnr"].nanmean().item(),
            "perplexity": perplexity, "codes_used": used,
        }  # fmt: skip

    @torch.no_grad()
    def plot(self, validation: dataset.SliceDataset) -> None:
        """Original, reconstruction and error of four validation slices, the same ones every time; and the curves."""
        chosen = (
            torch.linspace(0, len(validation) - 1, 6).round().long()[1:-1].unique()
        )  # a volume's ends show little
        self.model.eval()
        originals = validation.batch(chosen)
        reconstructions = self.model(originals.to(self.device))[0].float().cpu()
        self.model.train()
        scores = metrics.slice_scores(originals, reconstructions, ("ssim",))["ssim"]
        titles = [
            f"{validation.names[i]}\nssim {score:.3f}"
            for i, score in zip(chosen.tolist(), scores, strict=True)
        ]
        name, rate = f"epoch_{self.epochs_done}", self.model.bits_per_pixel
        heading = (
            f"{self.folder.name}, epoch {self.epochs_done}, validation, {rate:.4f} bits per pixel"
        )
        path = self.folder / "plots" / name / f"{name}_images.png"
        plots.plot_reconstructions(
            path, originals, reconstructions, titles, heading, validation.description["spacing"]
        )
        plots.plot_curves(
            self.folder / "loss_ssim_plot.png", self.history, self.BEST, self.folder.name
        )


@torch.no_grad()
def start_codebook(run: Run, train: dataset.SliceDataset) -> None:
    """k-means on the encoder's outputs for the 64 slices that the first epoch begins with."""
    quantizer = run.model.vector_quantization
    if run.args["codebook_init"] == "kmeans" and get_rank() == 0:
        order = loop.epoch_order(train, run.args["seed"], epoch=1)[:64]
        z = run.model.encoder(train.batch(order).to(run.device))  # (B, D, h, w)
        vectors = z.movedim(1, -1).reshape(-1, z.shape[1])
        try:
            quantizer.init_codebook(
                vectors, generator=torch.Generator().manual_seed(run.args["seed"])
            )
        except ValueError as error:
            raise UserError(f"{error}; lower --num-embeddings, or train on more slices") from None
    distributed.broadcast_tensors(quantizer.state_dict())


def main(argv: list[str] | None = None) -> int:
    given = parse_arguments(argv, __doc__)
    distributed.init()
    folder, args, checkpoint = open_run(given)
    folder = distributed.broadcast_object(folder)  # its name may hold the second
    check_arguments(args, get_world_size())
    utils.set_deterministic(args["deterministic"])
    utils.keep_freed_memory()
    with distributed.rank_zero_first():
        known = read_manifest(folder) if args["resume"] else None
        train, validation, scans = load_data(args, given, known)
    run = Run(folder, args, f"{train.fingerprint} {validation.fingerprint}", train.description)
    if run.device.type != "cpu":
        for slices in (train, validation):
            print(slices.cache_on_device(run.device))
    if checkpoint:
        run.restore(checkpoint)
    else:
        start_codebook(run, train)

    rate = run.model.bits_per_pixel
    size = " x ".join(map(str, train.size))
    print(
        f"data: {args['data']}: {len(train)} training and {len(validation)} validation slices of {size}"
    )
    print(
        f"model: {sum(p.numel() for p in run.model.parameters()):,} parameters, "
        f"{args['num_codebooks']} x {args['num_embeddings']} codes, {rate:.4f} bits per pixel (each slice's mean and "
        "deviation, apart: 0.001)"
    )
    loop.announce(
        run,
        train,
        validation,
        f"recipe {args['recipe']}{', with a discriminator' if args['gan'] else ''}",
    )
    config = {"slices": {"train": len(train), "validate": len(validation)}, "bits_per_pixel": rate}
    config |= {"scans": scans} if scans else {}
    resume = utils.format_command(
        "train.py", "--resume", "--runs-dir", folder.parent, "--name", folder.name
    )
    first = get_rank() == 0  # asked while there are others
    if (code := loop.carry_out(run, train, validation, config, resume)) or args["dry_run"]:
        return code
    if first:
        page = report.write_report(folder)
        split = ["--split", "validate"] if scans and "test" not in scans else []
        print(f"best validation ssim {run.best:.4f}; all of it is in {page}; next, its scores:")
        print("    " + utils.format_command("predict.py", "--run", folder, *split))
    return 0


if __name__ == "__main__":
    utils.run_script(main)
