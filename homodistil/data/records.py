"""Records: rows of named arrays in webdataset tars, read a few rows at a time from anywhere in them.

A file is a run of blocks, each one .npy member per array; all arrays have a row for each record. Nothing is compressed,
so that a row is found by arithmetic and read through the page cache. What the arrays mean is knowledge/'s.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from homodistil.errors import CacheError
from homodistil.files import checksum, write_durably

Arrays = Mapping[str, NDArray[Any]]
Numbers = NDArray[np.int64]


class RecordFile(BaseModel):
    """One file of records, as a manifest knows it."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    records: int
    bytes: int
    checksum: str
    """XXH3-128 of its bytes."""


def write_records(path: Path, blocks: Iterable[Arrays]) -> RecordFile:
    """Write blocks of equally many rows, but for the last one. Equal blocks give equal bytes; a file is whole or not
    there."""
    records = 0

    def write(partial: Path) -> None:
        nonlocal records
        with partial.open("wb") as file, wds.TarWriter(file, mtime=0) as tar:
            for number, block in enumerate(blocks):
                members = {f"{name}.npy": array for name, array in block.items()}
                tar.write({"__key__": f"{path.stem}-{number:05d}", **members})
                records += len(next(iter(block.values())))

    write_durably(path, write)
    return RecordFile(name=path.name, records=records, bytes=path.stat().st_size, checksum=checksum(path))


@dataclass(frozen=True)
class Records:
    """An open file of records."""

    path: Path
    file: RecordFile

    def rows(self, numbers: Numbers) -> dict[str, NDArray[Any]]:
        """Every array's rows of these numbers, in this order. Raises `CacheError`."""
        blocks = self._blocks
        size = len(next(iter(blocks[0].values())))
        block_of, within = np.divmod(numbers, size)
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
                key, name, _ = member.name.rsplit(".", 2)
                blocks.setdefault(key, {})[name] = _mapped(self.path, member.offset_data)
        return list(blocks.values())


def _mapped(path: Path, offset: int) -> NDArray[Any]:
    """The array of an uncompressed .npy member that begins at a byte of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        return np.memmap(path, dtype, "r", file.tell(), shape)
