"""Choose and reserve the folder of a new run, and find existing runs.

All runs are in one folder (--runs-dir). A run may be in a subfolder, such as runs/exp/seed0
(`--name exp/seed0`), but not inside another run.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import utils
from training.config import TrainConfig
from utils import UserError

RUN_FILES = ("config.json", "best.pt", "last.pt")  # a folder with any of these is a run
# Folders that train_prior.py creates in a run, by --model; they do not count as runs
PRIORS = {"flow": "prior", "causal": "causal_prior"}

# ---------------------------------------------------------------- a new run


def new_run_folder(config: TrainConfig) -> Path:
    """Return the folder of a new run, named by `--name` or by the current time and the recipe.

    Without `--name`, runs that start in the same second get the same name; `reserve_folder` then
    appends a number.

    Raises:
        UserError: if the folder already contains a run, or if `find_runs` could not find it there.
    """
    runs_dir = Path(config.runs_dir)
    name = config.name
    if not name:
        return runs_dir / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{config.recipe}"
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise UserError(
            f"--name is {name}; expected the name of a folder inside --runs-dir {runs_dir}, such "
            "as seed0 or exp/seed0"
        )
    folder = runs_dir / name
    if (folder / "config.json").exists() or (folder / "last.pt").exists():
        raise UserError(f"{folder} exists; add --resume to continue it, or choose another --name")
    for parent in folder.parents[: len(parts) - 1]:
        if is_run(parent):
            raise UserError(
                f"--name {name} is inside the run {parent}; choose a --name outside of it"
            )
    for reserved in PRIORS.values():
        if reserved in parts[1:]:
            raise UserError(
                f"--name is {name}; choose one without {reserved}, which is reserved for "
                "train_prior.py"
            )
    for file in RUN_FILES:
        for run in find_runs(folder, file)[:1]:
            raise UserError(f"{folder} contains other runs, such as {run}; choose another --name")
    return folder


@contextlib.contextmanager
def reserve_folder(folder: Path, numbered: bool) -> Iterator[Path]:
    """Create a folder at the start of the block, and delete it at the end if it is still empty.

    The folder of a run that failed before its training started is empty.

    Args:
        folder: the folder to create.
        numbered: if the folder exists, append _2, _3 and so on, so that no two processes get the
            same folder. Otherwise, an existing folder is used.

    Yields:
        The folder.
    """
    created = []
    for path in (folder, *folder.parents):
        if not path.exists():
            created.append(path)
    utils.make_folder(folder.parent)
    if numbered:
        folder = _create_numbered(folder)
        created[:1] = [folder]
    else:
        utils.make_folder(folder)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


def _create_numbered(folder: Path) -> Path:
    """Create a folder, or the first of folder_2, folder_3 and so on that does not exist."""
    for number in itertools.count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        with contextlib.suppress(FileExistsError):
            candidate.mkdir(parents=True)
            return candidate


# ---------------------------------------------------------------- existing runs


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run, that is, contains one of RUN_FILES."""
    return any((folder / name).exists() for name in RUN_FILES)


def find_runs(runs_dir: Path, file: str = "config.json") -> list[Path]:
    """Return the folders in `runs_dir` that contain `file`, at any depth, sorted by name.

    Folders inside a run, such as its prior, are not searched. Links to folders are followed.

    Args:
        runs_dir: folder of all runs.
        file: path within a run, such as "best.pt" or "prior/best.pt".
    """
    runs = []
    visited = set()
    pending = [runs_dir]
    while pending:
        for folder in _subfolders(pending.pop()):
            target = os.path.realpath(folder)
            if target in visited:  # following a link to a parent folder would never end
                continue
            visited.add(target)
            if folder.name in PRIORS.values() and folder.parent != runs_dir:
                continue
            if (folder / file).exists():
                runs.append(folder)
            elif not is_run(folder):
                pending.append(folder)
    return sorted(runs)


def _subfolders(folder: Path) -> list[Path]:
    """Return the subfolders of a folder; none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [folder / entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []


def resolve_run(path: str | Path) -> Path:
    """Return the folder of the run that `--run` names.

    Args:
        path: the run's folder, its best.pt, last.pt or config.json, its folder prior/ or
            causal_prior/, or one of these files there.

    Raises:
        UserError: if the path is any other file.
    """
    folder = Path(path).expanduser()
    if folder.name in RUN_FILES and not folder.is_dir():  # even if it does not exist (yet)
        folder = folder.parent
    elif folder.is_file():
        raise UserError(
            f"--run is {path}, which is a file; expected the folder of a run, or its best.pt"
        )
    if folder.name in ("", ".."):  # the current folder, or one above it
        folder = folder.resolve()
    if folder.name in PRIORS.values() and is_run(folder.parent):
        folder = folder.parent
    return folder
