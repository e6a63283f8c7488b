"""Helpers for tests of splits: make folders of files, and read the splits of a source."""

from __future__ import annotations

from pathlib import Path


def make_files(root: Path, *names: str) -> Path:
    """Make empty files `<name>.nii.gz`: splits depend on names only."""
    for name in names:
        path = root / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def subjects_of(source) -> dict[str, set[str]]:
    """Return the subjects of each split."""
    subjects = {}
    for split, files in source.splits.items():
        subjects[split] = {source.subjects[file] for file in files}
    return subjects


def names_of(source) -> dict[str, set[str]]:
    """Return the files of each split, relative to the root and without .nii.gz."""
    names = {}
    for split, files in source.splits.items():
        paths = [file.relative_to(source.root).as_posix() for file in files]
        names[split] = {path.removesuffix(".nii.gz") for path in paths}
    return names
