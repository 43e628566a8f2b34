"""Files that are whole or not there: written beside their place, synced to disk, then renamed into it. And hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash

PARTIAL = ".partial"
CHUNK_BYTES = 1 << 20


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then make it `path`, surviving a loss of power from then on.

    An earlier `path` is replaced; after an error it is as it was, and nothing is left beside it.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.touch()
        permissions = partial.stat().st_mode  # of any new file: safetensors lets only its owner read what it writes
        write(partial)
        partial.chmod(permissions)
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text_durably(path: Path, text: str) -> None:
    """`text` as a whole file, in UTF-8."""
    write_durably(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(*paths: Path) -> str:
    """Hex digest of the bytes of a file, or of several one after the other: what something *is*, whoever made it."""
    digest = hashlib.sha256()
    for chunk in _chunks(paths):
        digest.update(chunk)
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """XXH3-128, in hex, of a file's bytes: whether it is still what was written. Several times as fast as a disk, which
    SHA-256 is not."""
    digest = xxhash.xxh3_128()
    for chunk in _chunks([path]):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
