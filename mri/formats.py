"""Recognise files that are not NIfTI images: other formats, archives, and files without content.

lines = describe_formats(files)      # "3 DICOM file(s) are not read; convert them ..."
reason = missing_content(path)       # "is a git-annex link; its content is missing ..."
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mri.files import NIFTI_NAME, printable

_NIBABEL = "python -c \"import nibabel; nibabel.save(nibabel.load('{0}'), 'scan.nii.gz')\""
_SIMPLE_ITK = (
    "python -c \"import SimpleITK as itk; itk.WriteImage(itk.ReadImage('{0}'), 'scan.nii.gz')\""
)
# Other formats: pattern of the ending, name, and conversion command for file {0} in folder {1}.
_FORMATS = (
    (r"\.(dcm|dicom|ima)", "DICOM", "dcm2niix -z y -o OUT '{1}'"),
    (r"\.(hdr|img)(\.gz)?", ".hdr/.img", _NIBABEL),
    (r"\.mg[hz]", "FreeSurfer", _NIBABEL),
    (r"\.(mha|mhd|nrrd|nhdr)", ".mha/.mhd/.nrrd", _SIMPLE_ITK),
    (r"\.mnc", "MINC", _NIBABEL),
    (r"\.nii\.bz2", ".nii.bz2", "bzcat '{0}' | gzip > scan.nii.gz"),
    (r"\.nii\.xz", ".nii.xz", "xzcat '{0}' | gzip > scan.nii.gz"),
    (r"\.nii\.zst", ".nii.zst", "zstdcat '{0}' | gzip > scan.nii.gz"),
)
_DICOM_NAME = re.compile(r"[^.]*|[\d.]+|DICOMDIR", re.I)  # names without an ending, and UIDs

ARCHIVE_COMMANDS = {  # pattern of the ending -> the command that unpacks the archive
    re.compile(r"\.zip$", re.I): "unzip {file} -d {folder}",
    re.compile(r"\.(tar|tgz|tbz2|txz|tar\.(gz|bz2|xz|zst))$", re.I): (
        "mkdir {folder} && tar -xf {file} -C {folder}"
    ),
    re.compile(r"\.7z$", re.I): "7z x {file} -o{folder}",
}
_ANNEX_ADVICE = "its content is missing; fetch it with `datalad get` or `git annex get`"
_LFS_ADVICE = "its content is missing; fetch it with `git lfs pull`"


def is_annex_link(path: Path) -> bool:
    """Return whether a path is a link into git-annex's object store."""
    try:
        return "annex/objects" in os.readlink(path).replace(os.sep, "/")
    except OSError:
        return False


def missing_content(path: Path) -> str:
    """Return the reason why a file cannot be opened or lacks its content; "" if there is none.

    If the content of a file was not fetched, git-annex and Git LFS leave a broken link or a small
    text file in its place.
    """
    try:
        status = os.stat(path)
        if not NIFTI_NAME.search(path.name) or not stat.S_ISREG(status.st_mode):
            return ""
        start = path.read_bytes() if status.st_size < 1024 else b""
    except OSError as error:
        if is_annex_link(path):
            return f"is a git-annex link; {_ANNEX_ADVICE}"
        if path.is_symlink():
            return f"is a link to {os.readlink(path)}, which cannot be opened ({error.strerror})"
        return f"cannot be opened ({error.strerror})"
    if start.startswith(b"/annex/objects/"):
        return f"is a git-annex pointer; {_ANNEX_ADVICE}"
    if start.startswith(b"version https://git-lfs"):
        return f"is a Git LFS pointer; {_LFS_ADVICE}"
    return ""


def describe_formats(files: Iterable[Path], read_files: bool = False) -> list[str]:
    """Return one line for each image format other than NIfTI, with the command to convert it.

    Args:
        files: files of any type.
        read_files: also open files without an ending, to recognise DICOM by its content.
    """
    examples: dict[str, Path] = {}
    counts: Counter[str] = Counter()
    commands = {name: command for _, name, command in _FORMATS}
    for file in files:
        name = _format_of(file, read_files)
        if name and not file.name.lower().endswith((".img", ".img.gz")):  # one file of each pair
            counts[name] += 1
            examples.setdefault(name, file)
    lines = []
    for name, count in counts.items():
        example = examples[name]
        command = commands[name].format(example, example.parent)
        lines.append(
            f"{count:,} {name} file(s) are not read; convert them to .nii.gz: {printable(command)}"
        )
    return lines


def _format_of(file: Path, read_files: bool) -> str:
    """Return the name of a file's format in _FORMATS, or "" if it has none of these formats."""
    for ending, name, _ in _FORMATS:
        if re.search(ending + "$", file.name, re.I):
            return name
    if read_files and _DICOM_NAME.fullmatch(file.name) and file.is_file():
        try:
            with open(file, "rb") as opened:
                start = opened.read(132)
        except OSError:
            return ""
        return "DICOM" if start[128:] == b"DICM" else ""
    return ""


# ---------------------------------------------------------------- archives


def describe_archive(path: Path) -> str:
    """Return advice on unpacking an archive, such as data.zip; "" if a path is not an archive."""
    for ending, command in ARCHIVE_COMMANDS.items():
        folder = ending.sub("", path.name)
        if folder != path.name:
            file, target = shlex.quote(str(path)), shlex.quote(str(path.with_name(folder)))
            return (
                "expected a folder. Unpack it first, and point --data at the new folder:\n"
                f"  {command.format(file=file, folder=target)}"
            )
    return ""


def describe_archives(files: Iterable[Path]) -> list[str]:
    """Return one line for each archive among the files, for an error message."""
    lines = []
    for file in files:
        if describe_archive(file):
            lines.append(f"{file.name} is a file; {describe_archive(file)}")
    return lines
