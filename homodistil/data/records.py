"""Records: rows of named arrays in webdataset tars, read a few rows at a time from anywhere in them.

A file is a run of blocks, each one .npy member per array; all arrays have a row for each record. Nothing is compressed,
so that a row is found by arithmetic and read through the page cache. What the arrays mean is knowledge/'s.
"""

from __future__ import annotations

import io
import math
import os
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from homodistil.errors import CacheError
from homodistil.files import PARTIAL, checksum, sync

BLOCK = 256
"""Records of a block: what is held in memory while writing."""

Arrays = Mapping[str, NDArray[Any]]
Numbers = NDArray[np.int64]


class RecordFile(BaseModel):
    """One file of records, as a manifest knows it."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    records: int
    bytes: int
    checksum: str
    """XXH3-128 of its bytes."""


class RecordWriter:
    """A file of records in the making: whole after `finish`, and not there before. Raises `OSError`."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(path.name + PARTIAL)
        self._file = self._partial.open("wb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w")
        self._waiting: list[Arrays] = []
        self._records = self._blocks = 0

    def add(self, rows: Arrays) -> None:
        """Any number of rows, which come to lie in blocks of `BLOCK`."""
        self._waiting.append(rows)
        if sum(map(_length, self._waiting)) >= BLOCK:
            joined = _joined(self._waiting)
            whole = _length(joined) // BLOCK * BLOCK
            for start in range(0, whole, BLOCK):
                self._write({name: array[start : start + BLOCK] for name, array in joined.items()})
            self._waiting = [{name: array[whole:] for name, array in joined.items()}]

    def finish(self) -> RecordFile:
        """Equal rows give equal bytes."""
        if rest := _joined(self._waiting):
            self._write(rest)
        self._tar.close()
        self._file.close()
        sync(self._partial)
        os.replace(self._partial, self._path)
        sync(self._path.parent)
        size = self._path.stat().st_size
        return RecordFile(name=self._path.name, records=self._records, bytes=size, checksum=checksum(self._path))

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._partial.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk refuses what was not written yet once more
            self._file.close()

    def _write(self, block: Arrays) -> None:
        if rows := _length(block):
            for name, array in block.items():
                content = io.BytesIO()
                np.save(content, array, allow_pickle=False)
                member = tarfile.TarInfo(f"{self._path.stem}-{self._blocks:05d}.{name}.npy")
                member.size = content.tell()
                content.seek(0)
                self._tar.addfile(member, content)
            self._records, self._blocks = self._records + rows, self._blocks + 1


@dataclass(frozen=True)
class Records:
    """A file of records, for reading. It stays closed between two reads: a corpus has more files than a process may
    have open."""

    path: Path
    file: RecordFile
    _verified: dict[str, Any] = field(default_factory=dict)
    """Where the arrays lie, and in which state of the file."""

    def rows(self, numbers: Numbers) -> dict[str, NDArray[Any]]:
        """Every array's rows of these numbers, in this order. Raises `CacheError` for a file that is not what was
        written; it is compared with its checksum when it is first read, and whenever it was touched since."""
        try:
            stat = self.path.stat()
            places = self._places(stat.st_ino, stat.st_mtime_ns, stat.st_size)
            whole = np.memmap(self.path, np.uint8, "r")
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from None
        block, within = np.divmod(numbers, BLOCK)
        return {name: place.rows(whole, place.starts[block] + within * place.size) for name, place in places.items()}

    def _places(self, *state: int) -> dict[str, _Place]:
        """Where each array lies in the file. state: of the file, on which the answer depends."""
        if self._verified.get("state") != state:
            if (found := checksum(self.path)) != self.file.checksum:
                raise self._error(f"its checksum is {found}, expected {self.file.checksum}")
            self._verified.update(state=state, places=_places(self.path))
        return self._verified["places"]

    def _error(self, fault: str) -> CacheError:
        mend = "Remove it, and run cache_teacher.py again: it writes what is missing."
        return CacheError(f"{self.path}: {fault}. {mend}")


class _Place(NamedTuple):
    """One array of a file: where each block's first row begins, and what a row is."""

    starts: Numbers
    """(blocks,), in bytes."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Of a row, in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)

    def rows(self, whole: NDArray[np.uint8], starts: Numbers) -> NDArray[Any]:
        """Copies of the rows that begin at these bytes."""
        windows = np.ndarray((len(whole) - self.size + 1, self.size), np.uint8, whole, strides=(1, 1))
        return windows[starts].view(self.dtype).reshape(-1, *self.shape)


def _length(rows: Arrays) -> int:
    return len(next(iter(rows.values())))


def _joined(parts: list[Arrays]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _places(path: Path) -> dict[str, _Place]:
    """Where the arrays of a file lie: uncompressed .npy members, one for each array and block."""
    found: dict[str, _Place] = {}
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            _, name, _ = member.name.split(".")
            file.seek(member.offset_data)
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            before = found[name].starts if name in found else np.zeros(0, dtype=np.int64)
            found[name] = _Place(np.append(before, file.tell()), shape[1:], dtype)
    return found
