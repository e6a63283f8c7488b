"""Find the files that predict.py is to read, from the paths on its command line."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from mri.files import NIFTI_NAME
from mri.folders import files_outside, find_images, search_folder
from mri.formats import describe_formats, missing_content
from utils import UserError


def find_files(paths: Sequence[str | Path], out: Path, file_type: str) -> list[Path]:
    """List the files to read, in the order of `paths`, and print notes on files that are left out.

    Folders are searched recursively. Segmentations and outputs of predict.py in them are left out.

    Args:
        paths: files of any name, folders, and patterns such as `*.nii.gz`, which not every shell
            expands.
        out: the output folder; files in it are skipped, unless `out` itself is one of `paths`.
        file_type: type of the files to look for in folders, "nifti" or "codes".

    Raises:
        UserError: if a path does not exist, or a folder contains no file to read.
    """
    named: list[Path] = []
    inputs: list[Path] = []
    for path in _expand_patterns(paths):
        if not path.is_dir():
            named.append(path)
            inputs.append(path)
        elif file_type == "codes":
            inputs += _find_codes(path, out)
        else:
            images, notes = find_images(path, out=out)
            inputs += sorted(images)
            for note in notes:
                print(f"note: {path}: {note}")
    are_all_named = len(named) == len(inputs)
    if are_all_named and not any(NIFTI_NAME.search(file.name) for file in named):
        other_formats = describe_formats(named, read_files=True)
        if other_formats:
            raise UserError(f"no NIfTI file to reconstruct: {'; '.join(other_formats)}")
    return inputs


def _find_codes(folder: Path, out: Path) -> list[Path]:
    """Return the files of codes at any depth of a folder; raise UserError if there are none."""
    files = files_outside(search_folder(folder).files, out, folder)
    codes = sorted(file for file in files if file.name.lower().endswith((".npz", ".vqc")))
    if not codes:
        raise UserError(
            f"no .npz or .vqc file in {folder}; name a file of codes (predict.py --export-codes "
            "writes them), or its folder"
        )
    return codes


def _expand_patterns(paths: Sequence[str | Path]) -> list[Path]:
    """Expand patterns to the paths that match them, as a Unix shell does; keep existing paths.

    Raises:
        UserError: if a path does not exist, or no file matches a pattern.
    """
    expanded: list[Path] = []
    for path in paths:
        path = Path(os.path.expanduser(path))
        if path.exists():
            expanded.append(path)
            continue
        matches = sorted(map(Path, glob.glob(str(path))))
        if path.is_symlink() or not matches:
            reason = missing_content(path) if path.is_symlink() else "does not exist"
            raise UserError(f"{path} {reason}; name an existing file or a folder of files")
        expanded += matches
    return expanded
