"""The recipes, the flags of train.py, and the run that they ask for: a new one, or one to go on with.

A flag's value is what was typed, else the recipe's, else (what no recipe knows: data, names, devices) DEFAULTS'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from utils import UserError

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
    "gan":                 (False,      False,    None,                   "an adversarial loss: sharper, less ssim"),
    "gan_weight":          (0.3,        0.3,      ANY,                    "its gradient over the reconstruction's"),
    "gan_start":           (0.5,        0.5,      (0, 0.99),                 "share of steps before it, without"),
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
    "data": None, "axis": None, "split": None, "subjects": None, "size": None, "fit": None, "planes": None,
    "skip_bad_files": False, "cache_dir": None, "recipe": "tuned", "name": None, "runs_dir": "runs", "resume": False,
    "dry_run": False, "plot_every": 10, "device": "auto", "precision": "auto", "compile": None, "deterministic": False,
    "seed": 0,
}  # fmt: skip
KINDS = {
    "compile": bool,
    "split": list,
    "size": list,
    "planes": int,
}  # of what has no default; all others: str
# What --resume may change; anything else would make it another run.
RESUMABLE = {
    "data", "cache_dir", "name", "runs_dir", "resume", "dry_run", "plot_every", "device", "compile", "epochs",
}  # fmt: skip


def parse_arguments(argv: list[str] | None = None, description: str | None = None) -> dict:
    """The flags that were typed, no defaults among them: those differ between a new run and a resumed one."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    flag = parser.add_argument_group("data").add_argument
    flag(
        "--data",
        metavar="DIR",
        help="folder of slices (2D) or volumes (3D); else $HIPMRI_DATA; else sample data",
    )
    axes = ("coronal", "sagittal", "axial", "0", "1", "2")
    flag(
        "--axis", choices=axes, help="scans of any kind, cut this way: by the affine, or as stored"
    )
    flag(
        "--split",
        nargs="+",
        metavar="S",
        help="of scans: three shares of subjects, or a CSV file (0.8 0.1 0.1)",
    )
    flag(
        "--subjects",
        metavar="REGEX",
        help="of scans: what finds in a path whose it is (sub-<name>, else the file's name)",
    )
    flag(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="of slices (256 128; of scans, most slices' own)",
    )
    flag("--fit", choices=("resize", "crop", "trim"), help="what is of another size: resize it, centre-crop it, or cut "
         "off a few pixels and resize only what is of quite another (resize; scans trim)")  # fmt: skip
    flag(
        "--planes",
        type=int,
        help="of volumes, how many central planes are slices (HipMRI 60, scans all)",
    )
    flag(
        "--skip-bad-files",
        action="store_true",
        help="go on without files that can't be used, and count them",
    )
    flag(
        "--cache-dir",
        metavar="DIR",
        help="where prepared slices are kept; else $HIPMRI_CACHE; else the user's cache",
    )
    flag = parser.add_argument_group("run").add_argument
    flag(
        "--recipe", choices=("tuned", "document"), help="sets every flag of the last group (tuned)"
    )
    flag("--name", help="the run's folder in --runs-dir (time and recipe)")
    flag("--runs-dir", metavar="DIR", help="where runs are kept (runs)")
    flag(
        "--resume", action="store_true", help="go on with --name, or with the newest unfinished run"
    )
    flag(
        "--plot-every",
        type=int,
        metavar="N",
        help="panels each N epochs, and at the first and the last (10)",
    )
    add_training_flags(flag)
    group = parser.add_argument_group("recipe", "defaults: tuned | document")
    for name, (document, tuned, allowed, text) in RECIPES.items():
        options = {"type": type(tuned), "metavar": "X"}
        if isinstance(tuned, bool):
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(allowed, list):
            options = {"choices": allowed, "type": type(tuned)}
        group.add_argument(flag_name(name), help=f"{text} ({tuned} | {document})", **options)
    given = vars(parser.parse_args(argv))
    if len(given.get("split", ())) == 1:  # a file, that --resume must find from another folder too
        given["split"] = [str(Path(given["split"][0]).resolve())]
    return given


def add_training_flags(flag) -> None:
    """Those of every script that trains; flag: a parser's `add_argument`."""
    flag(
        "--dry-run",
        action="store_true",
        help="print data, model, steps and expected time; train nothing",
    )
    flag("--device", help="auto, cuda, cuda:1, mps or cpu (auto)")
    flag(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 where the hardware has it (auto)",
    )
    flag(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="a compiled step: a minute once (on a GPU)",
    )
    flag(
        "--deterministic",
        action="store_true",
        help="on a GPU: equal runs give equal weights, at some speed (no)",
    )
    flag("--seed", type=int, help="start of everything random (0)")


def flag_name(argument: str) -> str:
    return "--" + argument.replace("_", "-")


def with_defaults(recipe: str, given: dict) -> dict:
    """All arguments: what is given, over the recipe's values, over the other defaults."""
    if recipe not in ("document", "tuned"):
        raise UserError(f"the recipe is {recipe!r:.80}; expected document or tuned")
    column = ("document", "tuned").index(recipe)
    args = (
        DEFAULTS | {name: row[column] for name, row in RECIPES.items()} | {"recipe": recipe} | given
    )
    if args["codebook"] == "gradient" and "restart_below" not in given:
        args["restart_below"] = 0.0  # a gradient codebook keeps no counts of use
    if args["gan"] and args["compile"] is None:
        args["compile"] = False  # its losses change in the middle of a run
    return args


def check_arguments(args: dict, processes: int) -> None:
    """Refuse, before any work, the values that could only fail later."""
    bounds = {name: row[2] for name, row in RECIPES.items() if isinstance(row[2], tuple)}
    check_run_arguments(args, bounds | {"planes": (1, 256)}, processes)
    size, stride = args["size"], args["stride"]
    if size and not (
        len(size) == 2
        and all(type(side) is int and side >= 16 and side % stride == 0 for side in size)
    ):
        raise UserError(
            f"--size is {' '.join(map(str, size))}; expected two numbers from 16 on, divisible by {stride}"
        )
    for name, (*_, allowed, _) in RECIPES.items():  # they may come from a config.json
        if isinstance(allowed, list) and args[name] not in allowed:
            raise UserError(
                f"{flag_name(name)} is {args[name]}; expected one of {', '.join(map(str, allowed))}"
            )
    if args["crop"] % args["stride"] or 0 < args["crop"] < 16:
        stride = args["stride"]
        raise UserError(
            f"--crop is {args['crop']}; expected 0, or 16 to 128 and divisible by --stride {stride}"
        )
    if args["compile"] and args["gan"]:
        raise UserError("--compile is for training without --gan: leave one out")
    if args["restart_below"] and args["codebook"] == "gradient":
        raise UserError(
            "--restart-below needs --codebook ema: a gradient codebook keeps no counts of use"
        )


def check_bounds(args: dict, bounds: dict[str, tuple]) -> None:
    """Refuse what is not between {argument: (lowest, highest)}; None is not given."""
    for name, (low, high) in bounds.items():
        if args[name] is not None and not low <= args[name] <= high:
            raise UserError(f"{flag_name(name)} is {args[name]}; expected {low} to {high:g}")


def check_run_arguments(args: dict, bounds: dict[str, tuple], processes: int) -> None:
    """The part of it that is every script's which trains; bounds: {argument: (lowest, highest)}."""
    check_bounds(args, bounds | {"plot_every": SOME, "seed": (0, 2**40)})
    if args["batch_size"] % processes:
        raise UserError(
            f"--batch-size is {args['batch_size']}; expected a multiple of the {processes} processes"
        )
    if args["compile"] and processes > 1:
        raise UserError(f"--compile is for one process, and here are {processes}: leave it out")
