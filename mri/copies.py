"""Recognise copies of files by their uncompressed content, whatever their folder or compression."""

from __future__ import annotations

import contextlib
import functools
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from mri.files import real_path

BLOCK_SIZE = 1 << 20  # bytes


class FileSet(frozenset):
    """A set of files (resolved paths) that can be searched for copies of a file.

    Files are compared by their uncompressed size, then by the CRC-32 of their content, then byte by
    byte. A gzip file ends with its uncompressed size and CRC-32, so it is unpacked only for the
    last comparison. Files of several gzip streams are not recognised as copies.
    """

    def has_copy(self, file: Path) -> bool:
        """Return whether the set contains a file or a copy of it.

        Args:
            file: a file; the result is False if it cannot be read.
        """
        if real_path(file) in self:
            return True
        if not file.is_file():
            return False
        try:
            candidates = self._files_of_size.get(content_size(file), [])
            checksum = content_checksum(file) if candidates else 0
            for candidate in candidates:
                if self._checksum(candidate) == checksum and has_same_content(candidate, file):
                    return True
        except (OSError, EOFError, zlib.error):  # a damaged file has no copies
            return False
        return False

    @functools.cached_property
    def _files_of_size(self) -> dict[int, list[Path]]:
        """Map the uncompressed size in bytes to files; leave out unreadable files."""
        files: dict[int, list[Path]] = {}
        for file in self:
            with contextlib.suppress(OSError):
                if file.is_file():  # opening a FIFO would block
                    files.setdefault(content_size(file), []).append(file)
        return files

    @functools.cached_property
    def _checksums(self) -> dict[Path, int]:
        """Checksums that `_checksum` has computed: file -> CRC-32."""
        return {}

    def _checksum(self, file: Path) -> int:
        """Return `content_checksum(file)`, computed once per file."""
        if file not in self._checksums:
            self._checksums[file] = content_checksum(file)
        return self._checksums[file]


def content_size(file: Path) -> int:
    """Return the uncompressed size of a file in bytes, modulo 2^32."""
    size = file.stat().st_size
    if _is_gzip(file):
        return int.from_bytes(_trailer(file, size)[4:], "little")
    return size % 2**32


def content_checksum(file: Path) -> int:
    """Return the CRC-32 of a file's uncompressed content."""
    if _is_gzip(file):
        return int.from_bytes(_trailer(file, file.stat().st_size)[:4], "little")
    checksum = 0
    for block in content_blocks(file):
        checksum = zlib.crc32(block, checksum)
    return checksum


def has_same_content(one: Path, other: Path) -> bool:
    """Return whether two files have the same uncompressed content."""
    other_blocks = content_blocks(other)
    for block in content_blocks(one):
        if block != next(other_blocks, b""):
            return False
    return not next(other_blocks, b"")


def content_blocks(file: Path) -> Iterator[bytes]:
    """Yield the uncompressed content of a file in blocks of at most BLOCK_SIZE bytes."""
    with gzip.open(file) if _is_gzip(file) else open(file, "rb") as stream:
        while block := stream.read(BLOCK_SIZE):
            yield block


def _is_gzip(file: Path) -> bool:
    """Return whether a file starts with gzip's magic number."""
    with open(file, "rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _trailer(file: Path, size: int) -> bytes:
    """Return the last 8 bytes of a gzip file of `size` bytes: CRC-32 and uncompressed size."""
    with open(file, "rb") as stream:
        stream.seek(max(0, size - 8))
        return stream.read(8)
