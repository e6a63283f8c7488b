"""Find HipMRI's 2D and 3D versions, and other 2D slices in the layout of the 2D version.

    source = find_hipmri("/data/keras_slices_data")

In the 2D version, each split is a folder. The volumes of the 3D version are split by HIPMRI_CASES.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from dataclasses import replace
from pathlib import Path

from mri.files import (
    HIPMRI_NAME,
    SPLITS,
    Source,
    format_listing,
    split_of_folder,
    stem_of,
)
from mri.folders import (
    LeftOut,
    describe_folder,
    describe_left_out,
    list_folder,
    select_images,
    unique_folders,
)
from mri.formats import describe_archive
from mri.segmentations import is_segmentation, is_segmentation_folder
from mri.subjects import find_subjects, note_on_unnamed, report_splits
from utils import DataError

# The cases of each split in HipMRI's 2D version. They determine the splits of the 3D version only;
# in the 2D version, the folders determine the splits.
HIPMRI_CASES = {"train": range(4, 36), "validate": range(36, 40), "test": range(40, 43)}
EXPECTED = """expected one of
  keras_slices_train/ keras_slices_validate/ keras_slices_test/  (HipMRI's 2D version)
  semantic_MRs_anon/Case_004_Week0_LFOV.nii.gz ...               (HipMRI's 3D version)
  semantic_MRs/B006_Week0_LFOV.nii.gz ...                        (HipMRI's 3D version)
  train/ validate/ test/                                         (your own 2D slices)
  any folder of scans, or one scan, with --axis coronal, sagittal or axial"""

# Possible positions of the data relative to the given folder. In the public download, for example,
# the volumes are three levels below the top folder.
LEVELS = (
    "",
    "one level below",
    "two levels below",
    "three levels below",
    "four levels below",
)


def find_hipmri(root: str | Path) -> Source:
    """Find the splits in a folder, or up to four levels below it.

    The data set at the nearest level is used. However, 2D slices at any level take precedence over
    volumes, because they define HipMRI's splits. If nothing is found and the folder itself is part
    of a data set, such as `keras_slices_test`, its parent folder is searched, too.

    Raises:
        DataError: if there is no data set, if there are several of the same version (2D or 3D) at
            one level, or if one cannot be read.
    """
    root = Path(os.path.abspath(Path(root).expanduser()))
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{root} {problem}; {describe_archive(root) or EXPECTED}")
    unreadable: list[str] = []
    folders = [root]
    volumes: list[Source] = []  # the data sets of volumes at the nearest level that has any
    volumes_level = ""
    for level in LEVELS:
        sources, folders, errors = _search(folders)
        unreadable += errors
        slices = [source for source in sources if source.form == "2D"]
        if not volumes:
            volumes = [source for source in sources if source.form == "3D"]
            volumes_level = level
        if slices:
            return _finish(slices, root, level, volumes)
    if volumes:
        return _finish(volumes, root, volumes_level)
    if split_of_folder(root) or root.name.lower().startswith(("keras_slices_", "semantic_")):
        sources, _, errors = _search([root.parent])
        unreadable += errors
        form = "3D" if root.name.lower().startswith("semantic_") else "2D"
        same_form = [source for source in sources if source.form == form]
        if sources:
            return _finish(same_form or sources, root, "one level above")
    lines = [f"no slices found in {root}:", *describe_layout(root), *unreadable, EXPECTED]
    lines.append("Rename the folders, or point --data at the folder that contains them.")
    raise DataError("\n".join(lines))


def _search(folders: list[Path]) -> tuple[list[Source], list[Path], list[str]]:
    """Find the data sets at the top level of each folder.

    An unreadable folder is an error only if no data set is found elsewhere.

    Returns:
        The data sets, the subfolders of all folders, and a line for each unreadable folder.
    """
    sources: list[Source] = []
    all_subfolders: list[Path] = []
    errors = []
    for folder in unique_folders(folders):
        try:
            subfolders, files = list_folder(folder)
        except OSError as error:
            errors.append(f"  {folder} cannot be read: {error.strerror}")
            continue
        sources += _recognise(folder, subfolders, files)
        all_subfolders += [path for path in subfolders if not is_segmentation_folder(path.name)]
    return sources, all_subfolders, errors


def _recognise(folder: Path, subfolders: list[Path], files: list[Path]) -> list[Source]:
    """Return the data sets at the top level of a folder; `_finish` refuses more than one.

    Raises:
        DataError: if a subfolder of a data set cannot be read, or two belong to the same split.
    """
    sources = []
    left_out: LeftOut = {}
    # Split folders contain slices, and segmentation folders contain labels.
    may_hold_volumes = not split_of_folder(folder) and not is_segmentation_folder(folder.name)
    volumes = [file for file in files if is_volume(file) and not is_segmentation(Path(file.name))]
    if may_hold_volumes and volumes:
        sources.append(_volumes_source(folder, files))
    splits: dict[str, list[Path]] = {}
    for subfolder in subfolders:
        split = split_of_folder(subfolder)
        is_3d = subfolder.name.lower().startswith("semantic_mrs")
        if not split and not is_3d:
            continue
        try:
            images, skipped = select_images(list_folder(subfolder)[1], folder)
        except OSError as error:
            raise DataError(
                f"{subfolder} cannot be read: {error.strerror}. Expected a readable folder."
            ) from error
        if not images:
            continue
        if is_3d:
            sources.append(_volumes_source(subfolder, images))
        elif split in splits:
            first = splits[split][0].relative_to(folder).parts[0]
            raise DataError(
                f"{folder} contains two folders for the {split} split, {first} and "
                f"{subfolder.name}; expected one. Move one of them elsewhere."
            )
        else:
            splits[split] = images
            for reason, paths in skipped.items():
                left_out.setdefault(reason, []).extend(paths)
    if splits:
        in_order = {split: splits[split] for split in SPLITS if split in splits}
        notes = describe_left_out(left_out, folder)
        sources.append(Source(folder, "2D", in_order, notes))
    return sources


def is_volume(path: Path) -> bool:
    """Return whether a file's name has a case and a week but no slice, as HipMRI's volumes do."""
    match = HIPMRI_NAME.match(stem_of(path))
    return bool(match and match["week"] and not match["slice"])


def _volumes_source(folder: Path, files: list[Path]) -> Source:
    """Return HipMRI's volumes as a data set, with a note on how they differ from the 2D version."""
    note = (
        "the volumes (3D version) are cut into coronal slices; these are not the 12,660 slices of "
        "the 2D version, so the scores cannot be compared with published ones"
    )
    images, left_out = select_images(files, folder)
    notes = [note, *describe_left_out(left_out, folder)]
    return Source(folder, "3D", splits_from_cases(folder, images), notes)


def splits_from_cases(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Split volumes by their HipMRI case, as in the 2D version.

    Raises:
        DataError: if the name of a volume has no case, or the case is not one of HipMRI's.
    """
    splits: dict[str, list[Path]] = {split: [] for split in SPLITS}
    others = []
    for file in files:
        split = _split_of_volume(file)
        if split:
            splits[split].append(file)
        else:
            others.append(file.name)
    if others:
        raise DataError(
            f"{len(others)} of the {len(files)} volumes in {folder} belong to no split:\n"
            f"{format_listing(others)}\n"
            "expected HipMRI's cases: 004-035 train, 036-039 validate, 040-042 test.\n"
            "Move these volumes elsewhere, cut them into slices in train/ validate/ test/, or\n"
            "split all volumes by subject, at random, with --axis coronal."
        )
    return {split: volumes for split, volumes in splits.items() if volumes}


def _split_of_volume(path: Path) -> str | None:
    """Return the split that the case of a HipMRI volume belongs to, or None."""
    match = HIPMRI_NAME.match(stem_of(path))
    for split, cases in HIPMRI_CASES.items():
        if match and int(match["number"]) in cases:
            return split
    return None


def _finish(
    sources: list[Source], root: Path, level: str, volumes: list[Source] | None = None
) -> Source:
    """Return the only data set, completed with its subjects and notes.

    Args:
        sources: the data sets that were found.
        root: the folder that the user gave.
        level: position of the data sets relative to `root`, such as "one level below".
        volumes: HipMRI's volumes in the same folder, which are not used.

    Raises:
        DataError: if there are several data sets.
    """
    if len(sources) > 1:
        names = "\n".join(f"  {source.root} ({source.form} version)" for source in sources)
        raise DataError(
            f"{root} contains {len(sources)} data sets, expected one:\n{names}\n"
            "Point --data at one of them."
        )
    source = sources[0]
    files = [file for split_files in source.splits.values() for file in split_files]
    subjects, unnamed = find_subjects(files, source.root)
    unit = "slices" if source.form == "2D" else "volumes"
    counts, *warnings = report_splits(source.splits, subjects, unit)
    place = f" ({level} the given folder)" if level else ""
    notes = [f"{source.root}{place}: {counts}", *source.notes, *warnings]
    for other in volumes or []:
        notes.append(
            f"the volumes (3D version) in {other.root} are not used, because the 2D slices define "
            f"HipMRI's splits; --data {shlex.quote(str(other.root))} selects the volumes"
        )
    notes += note_on_unnamed(unnamed, subjects, unit)
    return replace(source, notes=notes, subjects=subjects)


def describe_layout(root: Path) -> list[str]:
    """Describe the content of a folder and its subfolders, as lines for an error message."""
    lines = []
    with contextlib.suppress(OSError):  # the message lists unreadable folders already
        subfolders, files = list_folder(root)
        images, _ = select_images(files, root)
        lines.append(
            f"  {len(images)} NIfTI image(s), not counting segmentations, and "
            f"{len(subfolders)} folder(s)"
        )
        for subfolder in subfolders[:10]:
            images, _ = select_images(list_folder(subfolder)[1], root)
            lines.append(f"  {subfolder.name}/: {len(images)} NIfTI image(s)")
    return lines + describe_folder(root)
