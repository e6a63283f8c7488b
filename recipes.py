"""The recipes, the flags of train.py, and the run that they ask for: a new one, or one to go on with.

A flag's value is what was typed, else the recipe's, else (what no recipe knows: data, names, devices) DEFAULTS'.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

import dataset
import sources
import utils
from modules import CheckpointError, load_checkpoint
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
KINDS = {"compile": bool, "split": list, "size": list, "planes": int}  # of what has no default; all others: str
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
    flag("--data", metavar="DIR", help="folder of slices (2D) or volumes (3D); else $HIPMRI_DATA; else sample data")
    axes = ("coronal", "sagittal", "axial", "0", "1", "2")
    flag("--axis", choices=axes, help="scans of any kind, cut this way: by the affine, or as stored")
    flag("--split", nargs="+", metavar="S", help="of scans: three shares of subjects, or a CSV file (0.8 0.1 0.1)")
    flag(
        "--subjects",
        metavar="REGEX",
        help="of scans: what finds in a path whose it is (sub-<name>, else the file's name)",
    )
    flag("--size", nargs=2, type=int, metavar=("H", "W"), help="of slices (256 128; of scans, most slices' own)")
    flag("--fit", choices=("resize", "crop", "trim"), help="what is of another size: resize it, centre-crop it, or cut "
         "off a few pixels and resize only what is of quite another (resize; scans trim)")  # fmt: skip
    flag("--planes", type=int, help="of volumes, how many central planes are slices (HipMRI 60, scans all)")
    flag("--skip-bad-files", action="store_true", help="go on without files that can't be used, and count them")
    flag("--cache-dir", metavar="DIR", help="where prepared slices are kept; else $HIPMRI_CACHE; else the user's cache")
    flag = parser.add_argument_group("run").add_argument
    flag("--recipe", choices=("tuned", "document"), help="sets every flag of the last group (tuned)")
    flag("--name", help="the run's folder in --runs-dir (time and recipe)")
    flag("--runs-dir", metavar="DIR", help="where runs are kept (runs)")
    flag("--resume", action="store_true", help="go on with --name, or with the newest unfinished run")
    flag("--plot-every", type=int, metavar="N", help="panels each N epochs, and at the first and the last (10)")
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
    flag("--dry-run", action="store_true", help="print data, model, steps and expected time; train nothing")
    flag("--device", help="auto, cuda, cuda:1, mps or cpu (auto)")
    flag("--precision", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 where the hardware has it (auto)")
    flag("--compile", action=argparse.BooleanOptionalAction, help="a compiled step: a minute once (on a GPU)")
    flag("--deterministic", action="store_true", help="on a GPU: equal runs give equal weights, at some speed (no)")
    flag("--seed", type=int, help="start of everything random (0)")


def flag_name(argument: str) -> str:
    return "--" + argument.replace("_", "-")


def with_defaults(recipe: str, given: dict) -> dict:
    """All arguments: what is given, over the recipe's values, over the other defaults."""
    if recipe not in ("document", "tuned"):
        raise UserError(f"the recipe is {recipe!r:.80}; expected document or tuned")
    column = ("document", "tuned").index(recipe)
    args = DEFAULTS | {name: row[column] for name, row in RECIPES.items()} | {"recipe": recipe} | given
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
    if size and not (len(size) == 2 and all(type(side) is int and side >= 16 and side % stride == 0 for side in size)):
        raise UserError(f"--size is {' '.join(map(str, size))}; expected two numbers from 16 on, divisible by {stride}")
    for name, (*_, allowed, _) in RECIPES.items():  # they may come from a config.json
        if isinstance(allowed, list) and args[name] not in allowed:
            raise UserError(f"{flag_name(name)} is {args[name]}; expected one of {', '.join(map(str, allowed))}")
    if args["crop"] % args["stride"] or 0 < args["crop"] < 16:
        stride = args["stride"]
        raise UserError(f"--crop is {args['crop']}; expected 0, or 16 to 128 and divisible by --stride {stride}")
    if args["compile"] and args["gan"]:
        raise UserError("--compile is for training without --gan: leave one out")
    if args["restart_below"] and args["codebook"] == "gradient":
        raise UserError("--restart-below needs --codebook ema: a gradient codebook keeps no counts of use")


def check_bounds(args: dict, bounds: dict[str, tuple]) -> None:
    """Refuse what is not between {argument: (lowest, highest)}; None is not given."""
    for name, (low, high) in bounds.items():
        if args[name] is not None and not low <= args[name] <= high:
            raise UserError(f"{flag_name(name)} is {args[name]}; expected {low} to {high:g}")


def check_run_arguments(args: dict, bounds: dict[str, tuple], processes: int) -> None:
    """The part of it that is every script's which trains; bounds: {argument: (lowest, highest)}."""
    check_bounds(args, bounds | {"plot_every": SOME, "seed": (0, 2**40)})
    if args["batch_size"] % processes:
        raise UserError(f"--batch-size is {args['batch_size']}; expected a multiple of the {processes} processes")
    if args["compile"] and processes > 1:
        raise UserError(f"--compile is for one process, and here are {processes}: leave it out")


# ---------------------------------------------------------------- the run that is asked for


def open_run(given: dict) -> tuple[Path, dict, dict | None]:
    """Folder, arguments and checkpoint (None: from the start) of the run that the typed flags ask for."""
    runs_dir = Path(given.get("runs_dir", DEFAULTS["runs_dir"]))
    if not given.get("resume"):
        args = with_defaults(given.get("recipe", DEFAULTS["recipe"]), given)
        folder = runs_dir / (args["name"] or f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{args['recipe']}")
        if (folder / "config.json").exists() or (folder / "last.pt").exists():
            raise UserError(f"{folder} exists; add --resume to go on with it, or choose another --name")
        return folder, args, None

    folder = runs_dir / given["name"] if "name" in given else newest_unfinished(runs_dir)
    saved = saved_arguments(folder, given, RESUMABLE, with_defaults("tuned", {}))
    args = with_defaults(saved.get("recipe", DEFAULTS["recipe"]), saved | given)
    return folder, args, unfinished_checkpoint(folder, args)


def saved_arguments(folder: Path, given: dict, resumable: set[str], defaults: dict) -> dict:
    """A run's arguments, as its config.json has them. Raises UserError where `given` would make it another run."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no run to go on with; start one without --resume, or name another")
    saved = read_arguments(folder, defaults)
    changed = sorted(key for key in given.keys() - resumable if given[key] != saved.get(key))
    if changed:
        told = ", ".join(f"{flag_name(key)} {given[key]} (it has {saved.get(key)})" for key in changed)
        raise UserError(f"{folder} can't go on with {told}; leave that out, or start another run")
    return saved


def read_arguments(run: Path, defaults: dict) -> dict:
    """The `arguments` of its config.json, as far as `defaults` knows them. UserError where one is of another type."""
    path = run / "config.json"
    found = utils.load_json(path).get("arguments", {})
    if not isinstance(found, dict):
        raise UserError(f"{path} has arguments of type {type(found).__name__}; expected what train.py writes")
    found = {name: value for name, value in found.items() if name in defaults}
    for name, value in found.items():
        usual = defaults[name]
        kinds = (int, float) if type(usual) is float else type(usual)
        if usual is None:
            kinds = (KINDS.get(name, str), type(None))
        if not isinstance(value, kinds) or (
            isinstance(value, bool) and not (isinstance(usual, bool) or name == "compile")
        ):
            raise UserError(f"{path} has {name} {value!r:.80}; expected a value such as {usual!r}, as train.py writes")
    return found


def unfinished_checkpoint(folder: Path, args: dict) -> dict | None:
    """The last one; None where the run was ended before its first epoch was. Raises UserError for a finished run."""
    checkpoint = last_checkpoint(folder)
    if checkpoint and checkpoint["epochs_done"] >= args["epochs"]:
        done = checkpoint["epochs_done"]
        raise UserError(f"{folder} has finished {done} epochs; give --epochs more than that, or start another run")
    return checkpoint


def last_checkpoint(folder: Path) -> dict | None:
    """None where the run was ended before its first epoch was."""
    path = folder / "last.pt"
    checkpoint = load_checkpoint(path) if path.exists() else None
    if checkpoint and not isinstance(checkpoint.get("epochs_done"), int):
        raise CheckpointError(f"{path} does not say how many epochs it has done; start a new run")
    return checkpoint


def newest_unfinished(runs_dir: Path) -> Path:
    """The folder with the newest config.json whose last.pt lacks epochs."""
    configs = sorted(runs_dir.glob("*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for config in configs:
        checkpoint = last_checkpoint(config.parent)
        epochs = read_arguments(config.parent, {"epochs": 0}).get("epochs", 0)
        if not checkpoint or checkpoint["epochs_done"] < epochs:
            return config.parent
    raise UserError(f"no unfinished run in {runs_dir} ({len(configs)} runs there); start one without --resume")


# ---------------------------------------------------------------- a trained run, and its data


def newest_run(runs_dir: Path, file: str = "best.pt", missing: str = "") -> Path:
    """The run whose best.pt, or other file, is newest, finished or not. UserError, with `missing`, if none has it."""
    found = list(runs_dir.glob(f"*/{file}"))
    if not found:
        missing = missing or f"no run with a best.pt in {runs_dir}; train one with train.py, or name one with --run"
        raise UserError(missing)
    return runs_dir / max(found, key=lambda path: path.stat().st_mtime).relative_to(runs_dir).parts[0]


def known_scans(run: Path) -> dict[str, dict[str, list[str]]] | None:
    """Which scans were in which split, as `sources.placed` told it to the run's config.json; None: it had no scans."""
    known = utils.load_json(run / "config.json").get("scans")
    whole = known is None or (
        isinstance(known, dict) and known.keys() <= sources.HIPMRI_CASES.keys()
        and all(isinstance(those, dict) for those in known.values())
        and all(isinstance(names, list) for those in known.values() for names in those.values())
        and all(isinstance(name, str) for those in known.values() for names in those.values() for name in names)
    )  # fmt: skip
    if not whole:
        raise UserError(f"{run / 'config.json'} has scans {known!r:.80}; expected what train.py writes")
    return known


def training_files(run: Path) -> set[Path] | None:
    """The files that a run was trained on, links followed; None where they are no longer where they were."""
    try:
        arguments = read_arguments(run, with_defaults("tuned", {}))
        chosen = [arguments.get(name) for name in ("axis", "split", "seed", "subjects")]
        source = sources.find_source(arguments.get("data") or "", *chosen, known_scans(run), others=False)
    except (UserError, sources.DataError, OSError):
        return None
    return {file.resolve() for file in source.splits.get("train", [])}


def load_run_data(
    run: Path, split: str, data: str | None = None, cache_dir: str | None = None, skip_bad_files: bool = False
) -> tuple[dataset.Slices, str]:
    """A split, prepared as the run's training data was, and the folder that it is in: `data`, or the run's own."""
    trained_with = read_arguments(run, with_defaults("tuned", {}))
    root, line = sources.find_data(data or trained_with.get("data"))
    if root is None:
        raise UserError(f"{run / 'config.json'} names no data; say where the slices are with --data")
    print(line if data else f"data: {root} (the run's own)")
    known = known_scans(run)
    axis, parts = trained_with.get("axis"), None if known else trained_with.get("split")
    source = sources.find_source(root, axis, parts, trained_with.get("seed", 0), trained_with.get("subjects"), known)
    options = {key: trained_with[key] for key in ("fit", "planes", "axis", "size") if key in trained_with}
    options["skip_bad_files"] = skip_bad_files or trained_with.get("skip_bad_files", False)
    slices = dataset.load_split(source, split, cache_dir=cache_dir or trained_with.get("cache_dir"), **options)
    for note in [*source.notes, *slices.notes]:
        print(f"note: {note}")
    return slices, str(source.root)
