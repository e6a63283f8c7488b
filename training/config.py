"""Configure a training run: one typed field per flag, with its help text and bounds.

    config = TrainConfig()                                  # the `tuned` recipe
    config = TrainConfig(**DOCUMENT, epochs=50)             # the source document's recipe
    flags = parse_train_flags(argv, __doc__)                # only the flags that were typed
    config = resolve_config(flags)                          # flags override the recipe

`train.py` uses TrainConfig. `prior.config` defines the PriorConfig of `train_prior.py` in the same
way.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from training.options import check_bounds, option, parse_flags
from utils import UserError

RECIPE_GROUP = "recipe (defaults: tuned | document)"
_data = partial(option, group="data")
_run = partial(option, group="run")
_recipe = partial(option, group=RECIPE_GROUP)

# ---------------------------------------------------------------- fields of both scripts


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The fields that train.py and train_prior.py have in common."""

    data: str | None = _data(
        None,
        "folder of slices (2D) or volumes (3D) (default: $HIPMRI_DATA, else the sample data; for "
        "train_prior.py, the data of the VQ-VAE's run)",
        metavar="DIR",
        resumable=True,
    )
    cache_dir: str | None = _data(
        None,
        "folder for the cache of decoded slices (default: $HIPMRI_CACHE, else the user's cache "
        "folder; for train_prior.py, the cache of the VQ-VAE's run)",
        metavar="DIR",
        resumable=True,
    )
    runs_dir: str = _run(
        "runs", "folder that contains all runs (default: runs)", metavar="DIR", resumable=True
    )
    resume: bool = _run(False, "continue an interrupted run (see above)", resumable=True)
    dry_run: bool = _run(
        False,
        "print the plan and the expected time, measured on a few steps, without starting a run",
        resumable=True,
    )
    plot_every: int = _run(
        10,
        "epochs between plots; the first and last epoch are always plotted (default: 10)",
        low=1,
        resumable=True,
    )
    device: str = _run("auto", "auto, cuda, cuda:1, mps or cpu (default: auto)", resumable=True)
    precision: str = _run(
        "auto",
        "precision of convolutions and matrix products; auto: bfloat16 if the hardware supports it "
        "(default: auto)",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: bool | None = _run(
        None,
        "compile the training step, which delays the start by about a minute (default: only on "
        "CUDA GPUs)",
        negatable=True,
        resumable=True,
    )
    deterministic: bool = _run(False, "make GPU results bit-identical, at some cost in speed")
    seed: int = _run(0, "random seed (default: 0)", low=0, high=2**40)

    def to_json(self) -> dict:
        """Return the arguments for config.json, with absolute paths of folders.

        A later command may run in another folder, where relative paths would be wrong.
        """
        arguments = dict(vars(self))
        for field in dataclasses.fields(self):
            path = arguments[field.name]
            if field.metadata["metavar"] == "DIR" and path:
                arguments[field.name] = os.path.abspath(os.path.expanduser(path))
        return arguments


# ---------------------------------------------------------------- train.py


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """The configuration of train.py. The defaults are the `tuned` recipe."""

    # Data
    axis: str | None = _data(
        None,
        "read --data as a folder of any scans, and cut volumes along this axis: an anatomical "
        "name, or the number of a stored axis",
        choices=("coronal", "sagittal", "axial", "0", "1", "2"),
    )
    split: list[str] | None = _data(
        None,
        "for scans: fractions of the subjects in train, validate and test; or a CSV file with a "
        "column `split`, and a column `subject` or `file` (default: 0.8 0.1 0.1)",
        nargs="+",
        metavar="S",
    )
    subjects: str | None = _data(
        None,
        "for scans: regular expression that extracts the subject from a path (default: "
        "sub-<name>, or the file name)",
        metavar="REGEX",
    )
    size: list[int] | None = _data(
        None,
        "rows and columns of a slice (default: 256 128; for scans, the most common size)",
        nargs=2,
        metavar=("H", "W"),
    )
    fit: str | None = _data(
        None,
        "how to fit slices of other sizes: resize; crop the centre to the proportions of --size, "
        "then resize; or trim to --size if that removes at most 10 %% of the rows and of the "
        "columns, otherwise resize (default: resize; for scans, trim)",
        choices=("resize", "crop", "trim"),
    )
    planes: int | None = _data(
        None,
        "maximum number of slices from the centre of a volume (default: 60 for HipMRI; for scans, "
        "all)",
        low=1,
        high=256,
    )
    nan_value: float | None = _data(
        None,
        "value that replaces NaN in images, for example in a background without data (default: "
        "files with NaN are unusable)",
        low=-1e30,
        high=1e30,
    )
    skip_bad_files: bool = _data(False, "skip unusable files, with a note")

    # Run
    recipe: str = _run(
        "tuned",
        "recipe that sets the defaults of the last group of flags (default: tuned)",
        choices=("tuned", "document"),
    )
    name: str | None = _run(
        None, "name of the run's folder in --runs-dir (default: time and recipe)", resumable=True
    )

    # Optimisation
    epochs: int = _recipe(100, "passes over the training split", low=1, resumable=True)
    batch_size: int = _recipe(16, "slices per step", low=1)
    learning_rate: float = _recipe(2e-3, "peak learning rate of Adam", low=0)
    schedule: str = _recipe(
        "cosine",
        "learning rate after the warm-up: constant, or a cosine decay towards 0",
        choices=("constant", "cosine"),
    )
    warmup: float = _recipe(0.05, "fraction of the steps used for a linear warm-up", low=0, high=1)
    clip_grad_norm: float = _recipe(1.0, "maximum gradient norm; 0: no clipping", low=0)
    crop: int = _recipe(
        128, "side of random square crops, in pixels; 0: whole slices", low=0, high=128
    )
    augment: bool = _recipe(
        True, "random flips; square crops are also randomly transposed", negatable=True
    )

    # Losses
    ssim_weight: float = _recipe(0.5, "weight of 1 - SSIM, which is added to the MSE", low=0)
    gan: bool = _recipe(
        False, "add an adversarial loss: sharper slices, but a slightly lower SSIM", negatable=True
    )
    gan_weight: float = _recipe(
        0.3, "ratio of gradient norms: adversarial loss to reconstruction loss", low=0
    )
    gan_start: float = _recipe(
        0.5, "fraction of the steps after which the adversarial loss is added", low=0, high=0.99
    )
    commitment_cost: float = _recipe(0.25, "weight of the commitment loss (beta)", low=0)

    # Codebook
    codebook: str = _recipe(
        "ema",
        "update of the codebook: by gradient descent, or by exponential moving averages (ema)",
        choices=("gradient", "ema"),
    )
    codebook_init: str = _recipe(
        "kmeans",
        "initial codebook: k-means of encoder outputs, or uniform noise, which leads to collapse",
        choices=("kmeans", "uniform"),
    )
    ema_decay: float = _recipe(0.99, "decay of the moving averages", low=0, high=1)
    restart_below: float = _recipe(
        0.1,
        "reinitialise EMA codes whose usage is below this fraction of the mean; 0: never",
        low=0,
    )

    # Model
    stride: int = _recipe(
        4, "downsampling factor: one code represents stride x stride pixels", choices=(4, 8, 16)
    )
    num_codebooks: int = _recipe(
        1, "codebooks per position; each quantises the residual of the previous one", low=1, high=64
    )
    num_embeddings: int = _recipe(512, "number of codes per codebook (K)", low=1)
    embedding_dim: int = _recipe(64, "length of an embedding (D)", low=1)
    hidden_channels: int = _recipe(
        64, "hidden channels; the feature maps of encoder and decoder have half as many", low=2
    )
    residual_channels: int = _recipe(32, "channels inside a residual layer", low=1)
    num_residual_layers: int = _recipe(3, "residual layers in each stack", low=0)
    num_code_layers: int = _recipe(4, "residual layers at the start of the decoder", low=0)
    refine_channels: int = _recipe(
        16, "input channels of an additional convolution at full resolution; 0: none", low=0
    )


# The fields in which the `document` recipe differs from the defaults. The recipe departs from the
# source document in one point: the codebook is initialised from data (`codebook_init`).
DOCUMENT = {
    "recipe": "document",
    "learning_rate": 1e-4,
    "schedule": "constant",
    "warmup": 0.0,
    "clip_grad_norm": 0.0,
    "crop": 0,
    "augment": False,
    "ssim_weight": 0.0,
    "codebook": "gradient",
    "restart_below": 0.0,
    "num_residual_layers": 2,
    "num_code_layers": 0,
    "refine_channels": 0,
}


def parse_train_flags(argv: list[str] | None, description: str | None) -> dict:
    """Return only the flags of train.py that were typed; `--help` shows both recipes."""
    flags = parse_flags(TrainConfig, argv, description, alternatives=(RECIPE_GROUP, DOCUMENT))
    if len(flags.get("split", ())) == 1:  # a CSV file, which --resume must find from any folder
        flags["split"] = [str(Path(flags["split"][0]).resolve())]
    return flags


def resolve_config(flags: dict) -> TrainConfig:
    """Build the configuration; flags override the recipe, which overrides the defaults."""
    values = dict(flags)
    if flags.get("recipe") == "document":
        values = DOCUMENT | flags
    if values.get("codebook") == "gradient" and "restart_below" not in flags:
        values["restart_below"] = 0.0  # a gradient codebook has no usage counts
    if values.get("gan") and values.get("compile") is None:
        values["compile"] = False  # the training step changes at `gan_start`
    return TrainConfig(**values)


def check_config(config: TrainConfig, world_size: int) -> None:
    """Check all values, and how they combine, before any work is done.

    Args:
        config: the configuration.
        world_size: number of processes.

    Raises:
        UserError: if a value is invalid.
    """
    check_bounds(config)
    check_processes(config, world_size)
    stride = config.stride
    if config.size is not None and not _is_slice_size(config.size, stride):
        raise UserError(
            f"--size is {' '.join(map(str, config.size))}; expected two numbers of at least 16, "
            f"divisible by {stride}"
        )
    if config.crop % stride or 0 < config.crop < 16:
        raise UserError(
            f"--crop is {config.crop}; expected 0, or 16 to 128 and divisible by --stride {stride}"
        )
    if config.compile and config.gan:
        raise UserError("--compile does not work with --gan; omit one of them")
    if config.restart_below and config.codebook == "gradient":
        raise UserError(
            "--restart-below needs --codebook ema: a gradient codebook has no usage counts"
        )


def _is_slice_size(size: list[int], stride: int) -> bool:
    """Return whether `size` is two integers of at least 16 that are divisible by the stride."""
    return len(size) == 2 and all(
        type(side) is int and side >= 16 and side % stride == 0 for side in size
    )


def check_processes(config, world_size: int) -> None:
    """Check the flags that the number of processes restricts; raise UserError if one is invalid."""
    if config.batch_size % world_size:
        raise UserError(
            f"--batch-size is {config.batch_size}; expected a multiple of the {world_size} "
            "processes"
        )
