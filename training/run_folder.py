"""Start a run, find a run to resume, and load the data that a run was trained on.

folder, config, checkpoint = open_run(flags)                 # train.py
run = newest_run(Path("runs"))                               # predict.py and others
slices, root = load_run_data(run, "test")
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import dataset
import utils
from mri import splits
from mri.copies import FileSet
from mri.files import SPLITS, Source, real_path
from mri.preprocessing import Preprocessing
from training.checkpoint import read_checkpoint
from training.config import TrainConfig, resolve_config
from training.options import check_types, flag_name
from training.run_names import find_runs, new_run_folder
from utils import CheckpointError, DataError, UserError

# ---------------------------------------------------------------- start or resume a run


def open_run(flags: dict) -> tuple[Path, TrainConfig, dict | None]:
    """Choose the folder of a new run, or find the run to resume, by the flags of train.py.

    Args:
        flags: only the flags that were typed (see `training.config.parse_train_flags`).

    Returns:
        The run's folder, its configuration, and the checkpoint to continue from. The checkpoint is
        None if the run starts at the first step.

    Raises:
        UserError: if a new run's folder exists or is unsuitable, or there is no run to resume.
    """
    if not flags.get("resume"):
        config = resolve_config(flags)
        return new_run_folder(config), config, None

    runs_dir = Path(flags.get("runs_dir", "runs"))
    folder = runs_dir / flags["name"] if "name" in flags else newest_unfinished_run(runs_dir)
    arguments = resumed_arguments(folder, TrainConfig, flags)
    config = resolve_config(arguments)
    return folder, config, unfinished_checkpoint(folder, config.epochs)


def resumed_arguments(folder: Path, config_class: type, flags: dict) -> dict:
    """Return the arguments of a resumed run: its saved arguments, overridden by the typed flags.

    Raises:
        UserError: if the folder contains no run, or if a flag that cannot change has a new value.
    """
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder} contains no run to resume; omit --resume to start a run, or name another run"
        )
    saved = read_arguments(folder, config_class)
    resumable = {
        field.name for field in dataclasses.fields(config_class) if field.metadata["resumable"]
    }
    changes = []
    for name in sorted(flags.keys() - resumable):
        if flags[name] != saved.get(name):
            changes.append(f"{flag_name(name)} {flags[name]} (was {saved.get(name)})")
    if changes:
        raise UserError(
            f"{folder} cannot be resumed with {', '.join(changes)}; omit these flags, or start a "
            "new run"
        )
    return saved | flags


def last_checkpoint(folder: Path) -> dict | None:
    """Return the checkpoint last.pt, or None if the run ended during its first epoch."""
    path = folder / "last.pt"
    if not path.exists():
        return None
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint.get("epochs_done"), int):
        raise CheckpointError(
            f"{path} lacks epochs_done, the number of finished epochs; start a new run"
        )
    return checkpoint


def unfinished_checkpoint(folder: Path, epochs: int) -> dict | None:
    """Return the checkpoint last.pt (see `last_checkpoint`) of a run that is to be resumed.

    Raises:
        UserError: if the run has already finished `epochs` epochs.
    """
    checkpoint = last_checkpoint(folder)
    if checkpoint and checkpoint["epochs_done"] >= epochs:
        raise UserError(
            f"{folder} has finished {checkpoint['epochs_done']} epochs; raise --epochs to train "
            "longer, or start a new run"
        )
    return checkpoint


def newest_unfinished_run(runs_dir: Path) -> Path:
    """Return the folder of the unfinished run with the newest config.json.

    Raises:
        UserError: if there is none.
    """
    runs = find_runs(runs_dir)
    runs.sort(key=lambda run: (run / "config.json").stat().st_mtime, reverse=True)
    for folder in runs:
        checkpoint = last_checkpoint(folder)
        epochs = read_arguments(folder, TrainConfig).get("epochs", 0)
        if not checkpoint or checkpoint["epochs_done"] < epochs:
            return folder
    raise UserError(
        f"{runs_dir} contains no unfinished run ({len(runs)} runs); omit --resume to start one"
    )


# ---------------------------------------------------------------- training data


def load_training_data(
    config: TrainConfig, source: Source, folder: Path
) -> tuple[dataset.SliceDataset, dataset.SliceDataset]:
    """Load the training and validation splits of a run of train.py, and print notes about them.

    Args:
        config: the run's configuration.
        source: the files of each split.
        folder: the run's folder; a resumed run uses the preprocessing that is stored there.

    Raises:
        DataError: if files cannot be used; one error lists the unusable files of both splits.
        UserError: if all validation slices are constant.
    """
    if config.resume:
        preprocessing = read_preprocessing(folder, source)
    else:
        preprocessing = Preprocessing.resolve(
            source, config.size, config.fit, config.axis, config.planes, config.nan_value
        )
    slices, errors = [], {}
    for split in ("train", "validate"):
        try:
            slices.append(
                dataset.load_split(
                    source,
                    split,
                    preprocessing,
                    cache_dir=config.cache_dir,
                    skip_bad_files=config.skip_bad_files,
                )
            )
        except DataError as error:
            errors[str(error)] = None  # both splits may raise the same error; list it once
    if errors:
        raise DataError("\n".join(errors))
    train_slices, val_slices = slices
    for note in [*source.notes, *train_slices.notes, *val_slices.notes]:
        print(f"note: {note}")
    if val_slices.constant.all():
        raise UserError(
            f"all {len(val_slices)} validation slices are constant, so no best checkpoint can be "
            "selected; use other validation data"
        )
    return train_slices, val_slices


# ---------------------------------------------------------------- a trained run


def newest_run(runs_dir: Path, file: str = "best.pt", missing: str = "") -> Path:
    """Return the folder of the run with the newest `file`, whether the run has finished or not.

    Args:
        runs_dir: folder of all runs, which may be in subfolders (see `find_runs`).
        file: path within a run, such as "best.pt" or "prior/best.pt".
        missing: the error message if no run has the file.

    Raises:
        UserError: if no run has the file.
    """
    runs = find_runs(runs_dir, file)
    if not runs:
        default = (
            f"no run in {runs_dir} has a best.pt; train one with train.py, or name a run with --run"
        )
        raise UserError(missing or default)
    return max(runs, key=lambda run: (run / file).stat().st_mtime)


def read_config(run: Path) -> TrainConfig:
    """Return the configuration of a run of this or an earlier version of train.py."""
    return resolve_config(read_arguments(run, TrainConfig))


def read_arguments(folder: Path, config_class: type) -> dict:
    """Return the arguments in a run's config.json; ignore those that this version does not have.

    Raises:
        UserError: if the file is missing or corrupt, or an argument has the wrong type.
    """
    path = folder / "config.json"
    arguments = utils.read_json(path).get("arguments", {})
    if not isinstance(arguments, dict):
        raise UserError(
            f"{path} has arguments of type {type(arguments).__name__}, expected dict; restore the "
            "file that train.py wrote"
        )
    fields = {field.name for field in dataclasses.fields(config_class)}
    arguments = {name: value for name, value in arguments.items() if name in fields}
    check_types(config_class, arguments, path)
    return arguments


def read_preprocessing(run: Path, source: Source) -> Preprocessing:
    """Return the preprocessing of a run.

    If `source` has another form (2D, 3D or scans) than the run's data, the preprocessing is
    resolved for this form, with the run's size, fit, axis, planes and `nan_value`.

    Raises:
        UserError: if the preprocessing in config.json is not in the format that train.py writes.
    """
    config = read_config(run)
    stored = utils.read_json(run / "config.json").get("preprocessing")
    if stored is None:  # a run of an earlier version
        return Preprocessing.resolve(
            source, config.size, config.fit, config.axis, config.planes, config.nan_value
        )
    try:
        preprocessing = Preprocessing(**stored | {"size": tuple(stored["size"])})
        rows, columns = preprocessing.size
        valid = type(rows) is type(columns) is type(preprocessing.planes) is int
        valid &= type(preprocessing.nan_value) in (int, float, type(None))
    except (TypeError, ValueError, KeyError):
        valid = False
    if not valid:
        raise UserError(
            f"{run / 'config.json'} has invalid preprocessing {stored!r:.80}; restore the file "
            "that train.py wrote"
        )
    if preprocessing.form == source.form:
        return preprocessing
    return Preprocessing.resolve(
        source,
        preprocessing.size,
        preprocessing.fit,
        preprocessing.axis,
        config.planes,
        preprocessing.nan_value,
    )


def read_manifest(run: Path) -> dict[str, dict[str, list[str]]] | None:
    """Return a run's manifest, {split: {subject: [path]}}, or None if it has none.

    Raises:
        UserError: if the manifest is not in the format of `mri.splits.to_manifest`.
    """
    manifest = utils.read_json(run / "config.json").get("scans")
    if manifest is None or _is_manifest(manifest):
        return manifest
    raise UserError(
        f"{run / 'config.json'} has invalid scans {manifest!r:.80}; restore the file that train.py "
        "wrote"
    )


def _is_manifest(value: object) -> bool:
    """Return whether a value has the type {split: {subject: [path]}}."""
    if not isinstance(value, dict) or not value.keys() <= set(SPLITS):
        return False
    for subjects in value.values():
        if not isinstance(subjects, dict):
            return False
        for paths in subjects.values():
            if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
                return False
    return True


def training_files(run: Path) -> FileSet | None:
    """Return the resolved paths of a run's training files, or None if its data cannot be found.

    `FileSet.has_copy` also recognises copies of these files elsewhere.
    """
    try:
        config = read_config(run)
        source = splits.find_source(
            config.data or "",
            config.axis,
            config.split,
            config.seed,
            config.subjects,
            read_manifest(run),
            include_new_subjects=False,
        )
    except (UserError, OSError):
        return None
    return FileSet(real_path(file) for file in source.splits.get("train", []))


def load_run_data(
    run: Path,
    split: str,
    data: str | None = None,
    cache_dir: str | None = None,
    skip_bad_files: bool = False,
    data_run: Path | None = None,
) -> tuple[dataset.SliceDataset, str]:
    """Load a split with the preprocessing of the run's training data, and print notes about it.

    Args:
        run: folder of the run.
        split: "train", "validate" or "test".
        data: folder of the data (default: the data of the run).
        cache_dir: folder of the cache (default: that of the run).
        skip_bad_files: whether to skip unusable files, even if the run did not.
        data_run: folder of another run whose config.json names `data`; None if the user typed it.

    Returns:
        The slices, and the folder that contains their files.

    Raises:
        UserError: if the data cannot be found or read.
    """
    config = read_config(run)
    root, description = splits.find_data(data or config.data, data_run if data else run)
    if root is None:
        raise UserError(f"{run / 'config.json'} does not name the data folder; give it with --data")
    is_recorded = data is None and config.data is not None
    print(f"data: {root} (from the run's config.json)" if is_recorded else description)
    manifest = read_manifest(run)
    source = splits.find_source(
        root,
        config.axis,
        None if manifest else config.split,
        config.seed,
        config.subjects,
        manifest,
    )
    slices = dataset.load_split(
        source,
        split,
        read_preprocessing(run, source),
        cache_dir=cache_dir or config.cache_dir,
        skip_bad_files=skip_bad_files or config.skip_bad_files,
    )
    for note in [*source.notes, *slices.notes]:
        print(f"note: {note}")
    return slices, str(source.root)
