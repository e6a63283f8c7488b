"""Recognise segmentations by their name or header, and read their labels.

    is_segmentation(Path("labelsTr/prostate_01.nii.gz"))     # True, because of the folder
    is_segmentation(Path("sub-01_desc-brain_mask.nii.gz"))   # True, because of the name
    has_label_intent(path)                                   # True if the header says so
    labels = read_labels(path, shape, axis="coronal")        # (N, rows, columns) uint8

A name is divided into words at punctuation and at capitals within a word. Only whole words count,
so that `Seger`, `masked` and `unlabelled` are not taken for `seg`, `mask` and `label`.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mri import nifti
from mri.files import HIPMRI_NAME, NIFTI_NAME

LABEL_INTENTS = (1002, 1003)  # NIFTI_INTENT_LABEL and NIFTI_INTENT_NEURONAME

# Prefixes of "seg", "mask" and "label" within a word: "brainmask", "aseg" (FreeSurfer), "dseg" and
# "probseg" (BIDS), "pveseg" and "firstseg" (FSL).
_PREFIXES = (
    "a|d|prob|pve|first|synth|auto|manual|gt|brain|head|body|skull|organ|tissue|lesion|tumou?r|"
    "prostate|heart|liver|kidney|lung|vessel|bone"
)
# Whole words that mark a segmentation, in lower case. Digits may follow ("seg35"); most words may
# also have a prefix that ends with a digit ("p0seg").
_WORD = re.compile(
    rf"(?:.*\d)?(?:(?:{_PREFIXES})?(?:segs?|segmentations?|masks?|labels?)|segmask|segmented|msks?|"
    r"labelmaps?|groundtruths?|truth|annots?|annotations?|contours?|delineations?|rtstruct|"
    r"parcellations?|aparc|wmparc|ribbon|pve|[gcp]tv[a-z]?)\d*|gts?\d*"
)
_GROUND_TRUTH = re.compile(r"ground[\W_]*truth", re.I)
_NEGATIONS = {"no", "non", "not", "without", "un"}
# Words that mark a folder of segmentations as the first or last word of its name: "prostate_masks".
_FOLDER_WORD = re.compile(
    rf"(?:{_PREFIXES})?(?:segs|segmentations|masks|labels)|labelmaps|annotations|contours|"
    "delineations|parcellations|groundtruths?"
)
# Words that do so only as the last word: "prostate_mask".
_FOLDER_LAST_WORD = re.compile(rf"(?:{_PREFIXES})?(?:seg|mask)|gt")
# Other words that the name of a folder of segmentations may contain: "labelsTr", "seg_train".
_FOLDER_QUALIFIER = re.compile(
    "tr|ts|va|te|train|training|val|valid|validate|validation|test|testing|all|auto|automatic|"
    "manual|expert|reader|binary|final|corrected|anon|semantic|keras|slices|data|files|maps?|nii|"
    "nifti|.",
)
_IMAGE_WORDS = {"image", "images", "img", "imgs", "imaging", "scan", "scans"}
_BIDS_LABELS = re.compile(r"(?:^|(?<=_))(?:sub|ses)-[A-Za-z0-9]+")  # subjects and sessions


# ---------------------------------------------------------------- names


def is_segmentation(path: Path) -> bool:
    """Return whether the name of a file, or of a folder in its path, marks it as a segmentation.

    Args:
        path: path relative to the folder that is searched, whose own name is not examined.
    """
    if _is_segmentation_file(path.name):
        return True
    for folder in path.parents:  # innermost first: prostate_masks/images/ contains images
        if NIFTI_NAME.search(folder.name):  # a folder `x.nii.gz` counts as the file inside it
            if _is_segmentation_file(folder.name):
                return True
            continue
        if _is_image_folder(folder.name):
            return False
        if is_segmentation_folder(folder.name):
            return True
    return False


def _is_segmentation_file(name: str) -> bool:
    """Return whether a file name marks a segmentation."""
    words = _words(NIFTI_NAME.sub("", name))
    return "semantic" in words or _has_segmentation_word(words)


@functools.lru_cache(1024)  # called for each file
def is_segmentation_folder(name: str) -> bool:
    """Return whether a folder's name says that it contains only segmentations.

    Names of whole data sets often contain such a word, too ("brain_tumor_segmentation"). The word
    must therefore be a plural or the last word ("prostate_masks", "prostate_mask"), or all other
    words must be qualifiers ("labelsTr", "seg_train").
    """
    words = _words(name)
    if not _has_segmentation_word(words) or _is_image_folder(name):
        return False
    if not {"and", "with"}.isdisjoint(words):
        return False
    if _FOLDER_WORD.fullmatch(words[0]) or _FOLDER_WORD.fullmatch(words[-1]):
        return True
    if _FOLDER_LAST_WORD.fullmatch(words[-1]):
        return True
    others = [word for word in words if not _WORD.fullmatch(word)]
    return all(_FOLDER_QUALIFIER.fullmatch(word) for word in others)


@functools.lru_cache(1024)
def _is_image_folder(name: str) -> bool:
    """Return whether a folder's name says that it contains images."""
    return not _IMAGE_WORDS.isdisjoint(_words(name))


def _has_segmentation_word(words: list[str]) -> bool:
    """Return whether a word marks a segmentation and does not follow a negation."""
    for previous, word in zip(["", *words], words, strict=False):
        if _WORD.fullmatch(word) and previous not in _NEGATIONS:
            return True
    return False


def _words(name: str) -> list[str]:
    """Split a name into words in lower case: "p0_brainMask" -> ["p0", "brain", "mask"]."""
    name = _BIDS_LABELS.sub("", _GROUND_TRUTH.sub("groundtruth", name))
    words = []
    for part in re.findall(r"[^\W_]+", name):
        if not part.isupper():  # "A0GT2S" is an identifier
            part = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", part)
        words += part.lower().split()
    return [word for word in words if not word.isdecimal()]


# ---------------------------------------------------------------- headers


def has_label_intent(path: Path) -> bool:
    """Return whether the header of a NIfTI file marks it as a label map, by its intent code.

    Only the start of the file is read (thousands of files per second). Files with HipMRI's names
    are not opened. If a file cannot be read, the result is False; decoding will report the file.
    """
    match = HIPMRI_NAME.match(NIFTI_NAME.sub("", path.name))
    if match and match["week"]:
        return False
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe could block
            return False
        with open(path, "rb", buffering=0) as file:
            start = file.read(4096)
        if start[:2] == b"\x1f\x8b":
            start = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(start, 1024)
    except (OSError, zlib.error):
        return False
    for byteorder in ("little", "big"):
        header_size = int.from_bytes(start[:4], byteorder)
        if header_size == 348:
            return int.from_bytes(start[68:70], byteorder) in LABEL_INTENTS
        if header_size == 540:
            return int.from_bytes(start[504:508], byteorder) in LABEL_INTENTS
    return False


# ---------------------------------------------------------------- labels


def read_labels(
    path: Path,
    shape: tuple[int, int, int],
    axis: str | int,
    dimensions: int | None = None,
    planes: Sequence[int] | None = None,
) -> np.ndarray:
    """Read planes of a segmentation.

    Args:
        path: the segmentation.
        shape: (N, rows, columns) of the planes of the segmented image.
        axis, dimensions: how the image is cut into planes (see `nifti.stored_planes`).
        planes: indices of the M planes to read; None for all of them.

    Returns:
        (M, rows, columns) uint8. Values are rounded, because a label that was saved with a scale
        factor may be read as 2.9999999993.

    Raises:
        ValueError: if the file cannot be used, its shape differs from that of its image, or a value
            is not a whole number from 0 to 255 (`mri.nifti_file` describes the message).
    """
    header, data = nifti.read_nifti(path)
    stored, scale = nifti.stored_planes(header, data, dimensions, axis)
    if stored.shape != tuple(shape):
        sizes = [" x ".join(map(str, planes_shape)) for planes_shape in (stored.shape, shape)]
        raise ValueError(f"and its image differ in shape: {sizes[0]} and {sizes[1]} planes")
    values = scale(stored if planes is None else stored[list(planes)])
    if not np.isfinite(values).all():
        raise ValueError("has NaN or infinite values, expected labels from 0 to 255")
    labels = np.rint(values) if values.dtype.kind == "f" else values
    distance = np.abs(values - labels).max(initial=0)
    if distance > 0.05:  # scaling to 8 bits shifts labels by less; interpolation, by more
        example = values.flat[np.abs(values - labels).argmax()]
        raise ValueError(
            f"has values that are not whole, such as {example:.4g}; expected labels from 0 to 255"
        )
    low, high = labels.min(initial=0), labels.max(initial=0)
    if low < 0 or high > 255:
        raise ValueError(f"has labels from {low:,.0f} to {high:,.0f}, expected 0 to 255")
    return labels.astype(np.uint8)
