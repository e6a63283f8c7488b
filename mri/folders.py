"""Find the images in a folder, and describe the files that are left out.

contents = search_folder(Path("/data/scans"))            # the files at any depth
images, left_out = select_images(contents.nifti_files, contents.root)
notes = describe_left_out(left_out, contents.root) + contents.problems()
lines = describe_folder(root)                            # for an error about missing images
"""

from __future__ import annotations

import os
import re
import textwrap
import zlib
from collections import Counter, deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mri.copies import has_same_content
from mri.files import NIFTI_NAME, file_inside, format_listing, is_output, natural_key, printable
from mri.formats import describe_archives, describe_formats, is_annex_link, missing_content
from mri.segmentations import has_label_intent, is_segmentation
from utils import DataError

# Reasons to leave out files. Each one completes "files are left out because ...".
NAMED_SEGMENTATION = "they are named like segmentations"
LABEL_INTENT = "their headers mark them as label maps (NIfTI intent code 1002 or 1003)"
NAMED_OUTPUT = "they are named like outputs of predict.py"
SAME_SCAN = (
    "the same scan is next to them, with another ending, as the target of a link, or as the "
    "original of a copy"
)

# Prefixes of hidden entries, and of folders that operating systems and network drives create.
_SYSTEM_FOLDERS = (".", "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN")
# Marks that file managers and browsers append to names of copies: " (1)", " - Copy (2)", " copy 2".
_COPY_NUMBER = r"\(\d+\)"
_COPY_WORD = "copy|copie|copia|kopie"
_COPY_MARK = re.compile(
    rf" ?{_COPY_NUMBER}$|(?: -)? (?:{_COPY_WORD})(?: {_COPY_NUMBER}| \d+)?$", re.I
)

LeftOut = dict[str, list[Path]]  # reason -> files

# ---------------------------------------------------------------- one folder


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the subfolders and the NIfTI files of a folder, each in natural order.

    Hidden entries are left out. In some copies of HipMRI, a folder called `x.nii.gz` contains a
    .nii file; such a folder is replaced by the file inside it.

    Raises:
        OSError: if the folder cannot be read.
    """
    folders, files = [], []
    for entry in sorted(_visible_entries(folder), key=lambda entry: natural_key(entry.name)):
        path = folder / entry.name
        is_folder = _type_of(entry) == "folder"
        if not NIFTI_NAME.search(entry.name):
            if is_folder:
                folders.append(path)
        else:
            files.append(file_inside(path) if is_folder else path)
    return folders, files


def unique_folders(folders: list[Path]) -> list[Path]:
    """Drop each link whose target is already in the list, or is the target of an earlier link."""
    visited = {os.path.realpath(folder) for folder in folders if not folder.is_symlink()}
    unique = []
    for folder in folders:
        if folder.is_symlink():
            target = os.path.realpath(folder)
            if target in visited:
                continue
            visited.add(target)
        unique.append(folder)
    return unique


def _visible_entries(folder: Path) -> list[os.DirEntry]:
    """Return the entries of a folder, without hidden ones and those in _SYSTEM_FOLDERS."""
    with os.scandir(folder) as scan:
        return [entry for entry in scan if not entry.name.startswith(_SYSTEM_FOLDERS)]


def _type_of(entry: os.DirEntry) -> str:
    """Classify an entry, or the target of a link: "folder", "file", "broken link" or "special"."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        entry.stat()
    except OSError:  # includes a link to itself
        return "broken link"
    return "special"


# ---------------------------------------------------------------- all depths


@dataclass
class Contents:
    """The result of `search_folder`. All paths start with `root`."""

    root: Path
    files: list[Path] = field(default_factory=list)  # in no particular order
    unreadable: dict[Path, str] = field(default_factory=dict)  # path -> reason ("is a pipe ...")
    repeated: list[Path] = field(default_factory=list)  # links to folders that are searched anyway

    @property
    def nifti_files(self) -> list[Path]:
        """The .nii and .nii.gz files, in natural order."""
        files = [path for path in self.files if NIFTI_NAME.search(path.name)]
        return sorted(files, key=lambda path: natural_key(str(path)))

    def problems(self) -> list[str]:
        """Return notes on unreadable files and folders, and on links that are not followed."""
        notes = []
        if self.unreadable:
            lines = [f"{self._relative(path)} {why}" for path, why in self.unreadable.items()]
            listing = format_listing(sorted(lines, key=natural_key), most=5)
            count = len(self.unreadable)
            notes.append(f"warning: {count:,} file(s) or folder(s) cannot be read:\n{listing}")
        if self.repeated:
            notes.append(
                f"{len(self.repeated):,} link(s) are not followed because their folders are "
                f"searched anyway; for example, {self._relative(self.repeated[0])}"
            )
        return notes

    def _relative(self, path: Path) -> str:
        """Return a path relative to `root`, safe to print."""
        return printable(str(path.relative_to(self.root)))


def search_folder(root: Path, max_files: float = float("inf")) -> Contents:
    """Find the files at any depth of a folder.

    Links to files and folders are followed, except links to a folder that contains the link. A
    folder that can be reached by several paths is searched once, if possible by a path without
    links. Hidden files and folders are left out, as are system folders such as `__MACOSX`.

    Args:
        root: the folder.
        max_files: number of files after which the search ends.
    """
    contents = Contents(root)
    folders, links = deque([root]), deque()
    visited = set()
    while (folders or links) and len(contents.files) < max_files:
        folder = folders.popleft() if folders else links.popleft()
        real = os.path.realpath(folder)
        if real in visited:
            contents.repeated.append(folder)
            continue
        visited.add(real)
        try:
            entries = sorted(_visible_entries(folder), key=lambda entry: entry.name)
        except OSError as error:
            contents.unreadable[folder] = f"cannot be read ({error.strerror})"
            continue
        for entry in entries:
            path = folder / entry.name
            kind = _type_of(entry)
            if kind == "folder" and not entry.is_symlink():
                folders.append(path)
            elif kind == "folder":
                if not _is_inside(os.path.realpath(folder), os.path.realpath(path)):
                    links.append(path)
            elif kind == "file":
                reason = missing_content(path)
                if reason:
                    contents.unreadable[path] = reason
                else:
                    contents.files.append(path)
            elif NIFTI_NAME.search(path.name):
                reason = missing_content(path) or "is a pipe, a socket or a device"
                contents.unreadable[path] = reason
            elif kind == "broken link" and not path.suffix and not is_annex_link(path):
                contents.unreadable[path] = missing_content(path)  # it may have been a folder
    return contents


def _is_inside(path: str, folder: str) -> bool:
    """Return whether a path is `folder` itself or inside it; links must be resolved in both."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


# ---------------------------------------------------------------- images and left-out files


def select_images(
    files: Iterable[Path], root: Path, included: Container[Path] = ()
) -> tuple[list[Path], LeftOut]:
    """Select the files that are images; leave out segmentations, outputs, and copies.

    Args:
        files: NIfTI files.
        root: the folder that was searched; only folder names below it are examined.
        included: files that always count as images, such as those of an earlier run.

    Returns:
        The images in the order of `files`, and the left-out files by reason.
    """
    files = list(files)
    copies = _copies(files)
    images: list[Path] = []
    left_out: LeftOut = {}
    for file in files:
        relative = file.relative_to(root)
        reason = ""
        if file not in included:
            if is_output(relative):
                reason = NAMED_OUTPUT
            elif is_segmentation(relative):
                reason = NAMED_SEGMENTATION
            elif file in copies:
                reason = SAME_SCAN
            elif has_label_intent(file):
                reason = LABEL_INTENT
        if reason:
            left_out.setdefault(reason, []).append(file)
        else:
            images.append(file)
    return images, left_out


def _copies(files: list[Path]) -> set[Path]:
    """Return the files that duplicate another file in the same folder.

    A duplicate is `x.nii` next to `x.nii.gz`, a link to another file of the folder, or
    `x (1).nii.gz` or `x - Copy.nii.gz` with the content of `x.nii.gz`.
    """
    others = set(files)
    compressed: dict[str, Path] = {}  # path without the ending -> file
    for file in files:
        if file.suffix.lower() == ".gz":
            compressed[NIFTI_NAME.sub("", str(file))] = file
    copies = set()
    for file in files:
        other = compressed.get(NIFTI_NAME.sub("", str(file)), file)
        if other == file and file.is_symlink():
            target = file.parent / os.readlink(file)
            other = target if target.parent == file.parent and target in others else file
        if other == file:
            other = _original_of(file, others)
        if other != file and other.exists():
            copies.add(file)
    return copies


def _original_of(file: Path, others: Container[Path]) -> Path:
    """Return the original if a file's name and content mark it as a copy, else the file itself."""
    ending = NIFTI_NAME.search(file.name)[0]
    stem = file.name.removesuffix(ending)
    original = file.with_name(_COPY_MARK.sub("", stem) + ending)
    if original == file or original not in others:
        return file
    try:
        are_files = file.is_file() and original.is_file()  # reading a pipe could block
        return original if are_files and has_same_content(file, original) else file
    except (OSError, EOFError, zlib.error):  # decoding will report it
        return file


def describe_left_out(left_out: LeftOut, root: Path) -> list[str]:
    """Return one line for each reason, with the number of files and an example."""
    notes = []
    for reason, files in left_out.items():
        example = printable(str(files[0].relative_to(root)))
        notes.append(
            f"{len(files):,} file(s) are left out because {reason}; for example, {example}"
        )
    return notes


# ---------------------------------------------------------------- search and select


def files_outside(files: list[Path], out: Path, root: Path) -> list[Path]:
    """Drop the files inside `out`, unless `out` is the searched folder `root` itself."""
    folder = out.resolve()
    if folder == root.resolve():
        return files
    return [file for file in files if folder not in file.resolve().parents]


def find_images(
    root: Path, included: Container[Path] = (), out: Path | None = None
) -> tuple[list[Path], list[str]]:
    """Return the images at any depth of a folder in natural order, and notes on other files.

    Args:
        root: the folder.
        included: files that always count as images (see `select_images`).
        out: folder whose files are ignored, unless it is `root` itself.

    Raises:
        DataError: if there are no images.
    """
    contents = search_folder(root)
    if out:
        contents.files = files_outside(contents.files, out, root)
    images, left_out = select_images(contents.nifti_files, root, included)
    if not images:
        problem = f"no .nii or .nii.gz file in {root}, at any depth"
        if contents.nifti_files:
            count = len(contents.nifti_files)
            problem = f"none of the {count:,} .nii or .nii.gz file(s) in {root} is an image"
        lines = [f"{problem}:", *describe_folder(root, contents)]
        raise DataError("\n".join([*lines, "Name a folder of images, or one image."]))
    notes = describe_left_out(left_out, root) + contents.problems()
    return images, notes + describe_formats(contents.files)


def describe_folder(root: Path, contents: Contents | None = None) -> list[str]:
    """Describe the content of a folder without usable images, as indented lines for an error.

    Args:
        root: the folder.
        contents: the result of `search_folder`, if it has been called already.
    """
    if contents is None:
        contents = search_folder(root, max_files=20_000)  # the folder may be a whole disk
    images, left_out = select_images(contents.nifti_files, root)
    notes = []
    if images:
        example = printable(str(images[0].relative_to(root)))
        notes.append(f"{len(images):,} NIfTI image(s) at any depth; for example, {example}")
    notes += describe_left_out(left_out, root)
    notes += contents.problems()
    notes += describe_formats(contents.files, read_files=True)
    notes += describe_archives(contents.files)
    endings = Counter(file.suffix.lower() for file in contents.files)
    endings -= Counter(file.suffix.lower() for file in contents.nifti_files)
    if endings:
        counts = [f"{n:,} {ending or 'no ending'}" for ending, n in endings.most_common(5)]
        notes.append(f"files with other endings: {', '.join(counts)}")
    return textwrap.indent("\n".join(notes), "  ").splitlines()
