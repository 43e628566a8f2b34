"""Records: rows of named arrays in webdataset tars, read a few rows at a time from anywhere in them.

A file is a run of blocks, each one .npy member per array; all arrays have a row for each record. Nothing is compressed,
so that a row is found by arithmetic and read through the page cache. What the arrays mean is knowledge/'s.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
        """Every block's arrays, in the file's mapping; the file was compared with its checksum first."""
        try:
            found = checksum(self.path)
            if found == self.file.checksum:
                return _mapped(self.path)
            fault = f"its checksum is {found}, expected {self.file.checksum}"
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        raise CacheError(f"{self.path}: {fault}. Remove it, and run cache_teacher.py again: it writes what is missing.")


def _length(rows: Arrays) -> int:
    return len(next(iter(rows.values())))


def _joined(parts: list[Arrays]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _mapped(path: Path) -> list[dict[str, NDArray[Any]]]:
    """Every block's arrays, as views of one mapping that keeps no file open. With `np.memmap`, which keeps one open for
    each array, a large cache would need more open files, and more mappings, than a process may have."""
    whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    blocks: dict[str, dict[str, NDArray[Any]]] = {}
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            key, name, _ = member.name.split(".")
            file.seek(member.offset_data)
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            blocks.setdefault(key, {})[name] = np.ndarray(shape, dtype, whole, file.tell())
    return list(blocks.values())
