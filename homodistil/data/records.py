"""Records: rows of named arrays in webdataset tars, read a few rows at a time from anywhere in them.

A file is a run of blocks, each one .npy member per array; all arrays have a row for each record. Nothing is compressed,
so that a row is found by arithmetic and read through the page cache. What the arrays mean is knowledge/'s.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
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
    """A file of records in the making: whole after `finish`, and not there before."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(path.name + PARTIAL)
        self._file = self._partial.open("wb")
        self._tar = wds.TarWriter(self._file, mtime=0)
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
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write(self, block: Arrays) -> None:
        if rows := _length(block):
            members = {f"{name}.npy": np.ascontiguousarray(array) for name, array in block.items()}
            self._tar.write({"__key__": f"{self._path.stem}-{self._blocks:05d}", **members})
            self._records, self._blocks = self._records + rows, self._blocks + 1


@dataclass(frozen=True)
class Records:
    """An open file of records."""

    path: Path
    file: RecordFile

    def rows(self, numbers: Numbers) -> dict[str, NDArray[Any]]:
        """Every array's rows of these numbers, in this order. Raises `CacheError`."""
        blocks = self._blocks
        block_of, within = np.divmod(numbers, BLOCK)
        found: dict[str, NDArray[Any]] = {}
        for block in np.unique(block_of):
            here = block_of == block
            for name, array in blocks[block].items():
                if name not in found:
                    found[name] = np.empty((len(numbers), *array.shape[1:]), array.dtype)
                found[name][here] = array[within[here]]
        return found

    @cached_property
    def _blocks(self) -> list[dict[str, NDArray[Any]]]:
        """Every block's arrays, mapped from the file, which was compared with its checksum first."""
        found = checksum(self.path) if self.path.is_file() else "none: it is missing"
        if found != self.file.checksum:
            raise CacheError(
                f"{self.path}: its checksum is {found}, expected {self.file.checksum}. Remove it, and run "
                "cache_teacher.py again: it writes what is missing."
            )
        blocks: dict[str, dict[str, NDArray[Any]]] = {}
        with tarfile.open(self.path) as tar:
            for member in tar:
                key, name, _ = member.name.split(".")
                blocks.setdefault(key, {})[name] = _mapped(self.path, member.offset_data)
        return list(blocks.values())


def _length(rows: Arrays) -> int:
    return len(next(iter(rows.values())))


def _joined(parts: list[Arrays]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _mapped(path: Path, offset: int) -> NDArray[Any]:
    """The array of an uncompressed .npy member that begins at a byte of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        return np.memmap(path, dtype, "r", file.tell(), shape)
