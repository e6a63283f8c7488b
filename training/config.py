"""The configuration of a training run: one typed field per flag, with its help text and bounds.

    config = TrainConfig()                                  # the `tuned` recipe
    config = TrainConfig(**DOCUMENT, epochs=50)             # the source document's recipe
    flags = parse_train_flags(argv, __doc__)                # only the flags that were typed
    config = resolve_config(flags)                          # flags over recipe over defaults

`train.py` uses TrainConfig. `train_prior.py` defines its own PriorConfig by the same mechanism.
"""

from __future__ import annotations

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
        "folder of slices (2D) or volumes (3D) (default: $HIPMRI_DATA, else the sample data)",
        metavar="DIR",
        resumable=True,
    )
    cache_dir: str | None = _data(
        None,
        "folder for the cache of decoded slices (default: $HIPMRI_CACHE, else the user's cache)",
        metavar="DIR",
        resumable=True,
    )
    runs_dir: str = _run(
        "runs", "folder of all runs (default: runs)", metavar="DIR", resumable=True
    )
    resume: bool = _run(False, "continue an interrupted run, see above", resumable=True)
    dry_run: bool = _run(
        False,
        "print the plan and the expected time, measured on a few steps; write nothing",
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
        "precision of the convolutions; auto: bfloat16 where the hardware has it (default: auto)",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: bool | None = _run(
        None,
        "compile the training step, once per run, in about a minute (default: on one GPU)",
        negatable=True,
        resumable=True,
    )
    deterministic: bool = _run(False, "bit-identical results on a GPU, at some cost in speed")
    seed: int = _run(0, "random seed (default: 0)", low=0, high=2**40)


# ---------------------------------------------------------------- train.py


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """The configuration of train.py. The defaults are the `tuned` recipe."""

    # Data
    axis: str | None = _data(
        None,
        "for scans of any kind: axis along which volumes are cut, by the affine or as stored",
        choices=("coronal", "sagittal", "axial", "0", "1", "2"),
    )
    split: list[str] | None = _data(
        None,
        "for scans: fractions of the subjects in train, validate and test, or a CSV file with the "
        "columns split and subject or file (default: 0.8 0.1 0.1)",
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
        "how to fit slices of another size: resize, centre-crop, or trim up to 10 %% and resize "
        "the rest (default: resize; for scans, trim)",
        choices=("resize", "crop", "trim"),
    )
    planes: int | None = _data(
        None,
        "number of central planes taken from a volume (default: 60 for HipMRI; for scans, all)",
        low=1,
        high=256,
    )
    skip_bad_files: bool = _data(False, "skip files that cannot be used, and count them")

    # Run
    recipe: str = _run(
        "tuned", "default values of the last group (default: tuned)", choices=("tuned", "document")
    )
    name: str | None = _run(
        None, "folder of the run inside --runs-dir (default: time and recipe)", resumable=True
    )

    # Optimisation
    epochs: int = _recipe(100, "passes over the training split", low=1, resumable=True)
    batch_size: int = _recipe(16, "slices per step", low=1)
    learning_rate: float = _recipe(2e-3, "Adam's learning rate; with a schedule, its peak", low=0)
    schedule: str = _recipe(
        "cosine",
        "learning rate after the warm-up; cosine ends at 0",
        choices=("constant", "cosine"),
    )
    warmup: float = _recipe(0.05, "fraction of the steps with a linear warm-up", low=0, high=1)
    clip_grad_norm: float = _recipe(1.0, "largest gradient norm; 0: no clipping", low=0)
    crop: int = _recipe(
        128, "side of random square crops, in pixels; 0: whole slices", low=0, high=128
    )
    augment: bool = _recipe(True, "random flips, and for square crops transposes", negatable=True)

    # Losses
    ssim_weight: float = _recipe(0.5, "weight of 1 - SSIM, added to the squared error", low=0)
    gan: bool = _recipe(
        False, "adversarial loss: sharper slices, slightly lower SSIM", negatable=True
    )
    gan_weight: float = _recipe(
        0.3, "norm of the adversarial gradient relative to the reconstruction's", low=0
    )
    gan_start: float = _recipe(
        0.5, "fraction of the steps before the adversarial loss starts", low=0, high=0.99
    )
    commitment_cost: float = _recipe(0.25, "beta, the weight of the commitment loss", low=0)

    # Codebook
    codebook: str = _recipe(
        "ema",
        "how the codebook is updated: by gradient or by an exponential moving average",
        choices=("gradient", "ema"),
    )
    codebook_init: str = _recipe(
        "kmeans",
        "initial codebook: k-means of encoder outputs, or uniform noise, which collapses",
        choices=("kmeans", "uniform"),
    )
    ema_decay: float = _recipe(0.99, "decay of the moving averages", low=0, high=1)
    restart_below: float = _recipe(
        0.1, "EMA codes used less than this fraction of the mean use are restarted; 0: never", low=0
    )

    # Model
    stride: int = _recipe(
        4, "side of the square that one code covers, in pixels", choices=(4, 8, 16)
    )
    num_codebooks: int = _recipe(
        1, "codebooks per position; each quantises the residual of the previous one", low=1, high=64
    )
    num_embeddings: int = _recipe(512, "K, codes per codebook", low=1)
    embedding_dim: int = _recipe(64, "D, length of an embedding", low=1)
    hidden_channels: int = _recipe(64, "twice the width of the residual stacks", low=2)
    residual_channels: int = _recipe(32, "width inside a residual layer", low=1)
    num_residual_layers: int = _recipe(3, "residual layers in each stack", low=0)
    num_code_layers: int = _recipe(4, "residual layers of the decoder on the code grid", low=0)
    refine_channels: int = _recipe(
        16, "channels of an additional full-size convolution; 0: none", low=0
    )


# The values in which the source document's recipe differs. It departs from the document in one
# point: its codebook starts from data (`codebook_init`).
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
    """Return the flags of train.py that were typed; `--help` shows the values of both recipes."""
    flags = parse_flags(TrainConfig, argv, description, alternatives=(RECIPE_GROUP, DOCUMENT))
    if len(flags.get("split", ())) == 1:  # a CSV file, which --resume must find from any folder
        flags["split"] = [str(Path(flags["split"][0]).resolve())]
    return flags


def resolve_config(flags: dict) -> TrainConfig:
    """Return the configuration: the flags over the recipe's values over the defaults."""
    values = dict(flags)
    if flags.get("recipe") == "document":
        values = DOCUMENT | flags
    if values.get("codebook") == "gradient" and "restart_below" not in flags:
        values["restart_below"] = 0.0  # a gradient codebook keeps no counts of use
    if values.get("gan") and values.get("compile") is None:
        values["compile"] = False  # its losses change in the middle of a run
    return TrainConfig(**values)


def check_config(config: TrainConfig, world_size: int) -> None:
    """Reject, before any work, values that could only fail later.

    Raises:
        UserError: with the flag, its value, and what was expected.
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
            "--restart-below needs --codebook ema: a gradient codebook keeps no counts of use"
        )


def _is_slice_size(size: list[int], stride: int) -> bool:
    return len(size) == 2 and all(
        type(side) is int and side >= 16 and side % stride == 0 for side in size
    )


def check_processes(config, world_size: int) -> None:
    """Check the flags that depend on the number of processes; raises UserError."""
    if config.batch_size % world_size:
        raise UserError(
            f"--batch-size is {config.batch_size}; expected a multiple of the {world_size} "
            "processes"
        )
    if config.compile and world_size > 1:
        raise UserError(f"--compile works with one process, not {world_size}; omit it")
