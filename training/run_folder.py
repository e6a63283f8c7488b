"""What a run's folder holds, for the scripts that use a trained run."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import dataset
import utils
from mri import hipmri, splits
from mri.preprocessing import Preprocessing
from training.checkpoint import read_checkpoint
from training.config import DEFAULTS, KINDS, RESUMABLE, flag_name, with_defaults
from utils import CheckpointError, UserError


def read_arguments(run: Path, defaults: dict) -> dict:
    """The `arguments` of its config.json, as far as `defaults` knows them. UserError where one is of another type."""
    path = run / "config.json"
    found = utils.read_json(path).get("arguments", {})
    if not isinstance(found, dict):
        raise UserError(
            f"{path} has arguments of type {type(found).__name__}; expected what train.py writes"
        )
    found = {name: value for name, value in found.items() if name in defaults}
    for name, value in found.items():
        usual = defaults[name]
        kinds = (int, float) if type(usual) is float else type(usual)
        if usual is None:
            kinds = (KINDS.get(name, str), type(None))
        if not isinstance(value, kinds) or (
            isinstance(value, bool) and not (isinstance(usual, bool) or name == "compile")
        ):
            raise UserError(
                f"{path} has {name} {value!r:.80}; expected a value such as {usual!r}, as train.py writes"
            )
    return found


def unfinished_checkpoint(folder: Path, args: dict) -> dict | None:
    """The last one; None where the run was ended before its first epoch was. Raises UserError for a finished run."""
    checkpoint = last_checkpoint(folder)
    if checkpoint and checkpoint["epochs_done"] >= args["epochs"]:
        done = checkpoint["epochs_done"]
        raise UserError(
            f"{folder} has finished {done} epochs; give --epochs more than that, or start another run"
        )
    return checkpoint


def last_checkpoint(folder: Path) -> dict | None:
    """None where the run was ended before its first epoch was."""
    path = folder / "last.pt"
    checkpoint = read_checkpoint(path) if path.exists() else None
    if checkpoint and not isinstance(checkpoint.get("epochs_done"), int):
        raise CheckpointError(f"{path} does not say how many epochs it has done; start a new run")
    return checkpoint


def newest_unfinished(runs_dir: Path) -> Path:
    """The folder with the newest config.json whose last.pt lacks epochs."""
    configs = sorted(
        runs_dir.glob("*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    for config in configs:
        checkpoint = last_checkpoint(config.parent)
        epochs = read_arguments(config.parent, {"epochs": 0}).get("epochs", 0)
        if not checkpoint or checkpoint["epochs_done"] < epochs:
            return config.parent
    raise UserError(
        f"no unfinished run in {runs_dir} ({len(configs)} runs there); start one without --resume"
    )


def newest_run(runs_dir: Path, file: str = "best.pt", missing: str = "") -> Path:
    """The run whose best.pt, or other file, is newest, finished or not. UserError, with `missing`, if none has it."""
    found = list(runs_dir.glob(f"*/{file}"))
    if not found:
        missing = (
            missing
            or f"no run with a best.pt in {runs_dir}; train one with train.py, or name one with --run"
        )
        raise UserError(missing)
    return (
        runs_dir / max(found, key=lambda path: path.stat().st_mtime).relative_to(runs_dir).parts[0]
    )


def read_manifest(run: Path) -> dict[str, dict[str, list[str]]] | None:
    """Which scans were in which split, as `splits.to_manifest` told it to the run's config.json; None: it had no scans."""
    known = utils.read_json(run / "config.json").get("scans")
    whole = known is None or (
        isinstance(known, dict) and known.keys() <= hipmri.HIPMRI_CASES.keys()
        and all(isinstance(those, dict) for those in known.values())
        and all(isinstance(names, list) for those in known.values() for names in those.values())
        and all(isinstance(name, str) for those in known.values() for names in those.values() for name in names)
    )  # fmt: skip
    if not whole:
        raise UserError(
            f"{run / 'config.json'} has scans {known!r:.80}; expected what train.py writes"
        )
    return known


def training_files(run: Path) -> set[Path] | None:
    """The files that a run was trained on, links followed; None where they are no longer where they were."""
    try:
        arguments = read_arguments(run, with_defaults("tuned", {}))
        chosen = [arguments.get(name) for name in ("axis", "split", "seed", "subjects")]
        source = splits.find_source(
            arguments.get("data") or "", *chosen, read_manifest(run), include_new_subjects=False
        )
    except (UserError, utils.DataError, OSError):
        return None
    return {file.resolve() for file in source.splits.get("train", [])}


def load_run_data(
    run: Path,
    split: str,
    data: str | None = None,
    cache_dir: str | None = None,
    skip_bad_files: bool = False,
) -> tuple[dataset.SliceDataset, str]:
    """A split, prepared as the run's training data was, and the folder that it is in: `data`, or the run's own."""
    trained_with = read_arguments(run, with_defaults("tuned", {}))
    root, line = splits.find_data(data or trained_with.get("data"))
    if root is None:
        raise UserError(
            f"{run / 'config.json'} names no data; say where the slices are with --data"
        )
    print(line if data else f"data: {root} (the run's own)")
    known = read_manifest(run)
    axis, parts = trained_with.get("axis"), None if known else trained_with.get("split")
    source = splits.find_source(
        root, axis, parts, trained_with.get("seed", 0), trained_with.get("subjects"), known
    )
    names = ("size", "fit", "axis", "planes")
    preprocessing = Preprocessing.resolve(source, **{key: trained_with.get(key) for key in names})
    slices = dataset.load_split(
        source,
        split,
        preprocessing,
        cache_dir=cache_dir or trained_with.get("cache_dir"),
        skip_bad_files=skip_bad_files or trained_with.get("skip_bad_files", False),
    )
    for note in [*source.notes, *slices.notes]:
        print(f"note: {note}")
    return slices, str(source.root)


# ---------------------------------------------------------------- the run that is asked for


def open_run(given: dict) -> tuple[Path, dict, dict | None]:
    """Folder, arguments and checkpoint (None: from the start) of the run that the typed flags ask for."""
    runs_dir = Path(given.get("runs_dir", DEFAULTS["runs_dir"]))
    if not given.get("resume"):
        args = with_defaults(given.get("recipe", DEFAULTS["recipe"]), given)
        folder = runs_dir / (args["name"] or f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{args['recipe']}")
        if (folder / "config.json").exists() or (folder / "last.pt").exists():
            raise UserError(
                f"{folder} exists; add --resume to go on with it, or choose another --name"
            )
        return folder, args, None

    folder = runs_dir / given["name"] if "name" in given else newest_unfinished(runs_dir)
    saved = saved_arguments(folder, given, RESUMABLE, with_defaults("tuned", {}))
    args = with_defaults(saved.get("recipe", DEFAULTS["recipe"]), saved | given)
    return folder, args, unfinished_checkpoint(folder, args)


def saved_arguments(folder: Path, given: dict, resumable: set[str], defaults: dict) -> dict:
    """A run's arguments, as its config.json has them. Raises UserError where `given` would make it another run."""
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder} holds no run to go on with; start one without --resume, or name another"
        )
    saved = read_arguments(folder, defaults)
    changed = sorted(key for key in given.keys() - resumable if given[key] != saved.get(key))
    if changed:
        told = ", ".join(
            f"{flag_name(key)} {given[key]} (it has {saved.get(key)})" for key in changed
        )
        raise UserError(f"{folder} can't go on with {told}; leave that out, or start another run")
    return saved
