"""CachedTeacher: a teacher that was asked beforehand, behind the same question as a live one.

Owns the manifest of a cache and finding its rows. What a row holds is recording.py's, how files hold rows
data/records.py's, how a cache is written caching.py's.
"""

# B sequences

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from homodistil.batch import VALIDATION, Batch, Piece
from homodistil.data.records import Numbers, RecordFile, Records
from homodistil.errors import CacheError, first_fault
from homodistil.knowledge.recording import Recording, inputs
from homodistil.models.base import ModelFamily
from homodistil.signals import Knowledge

FILE, WRITING, HEAD = "manifest.json", "writing.json", "head.safetensors"
FORMAT_VERSION = 1
WRITE = "deepspeed launchers/cache_teacher.py"


class Manifest(BaseModel):
    """manifest.json: whose knowledge a cache holds, of what, and in which files."""

    format_version: int = FORMAT_VERSION
    identity: dict[str, Any]
    """What a run must have in common with it, by the keys of its configuration."""
    teacher_parameters: int
    maskings: int
    """Maskings of each training sequence."""
    bytes_per_record: int
    head: str | None = None
    """XXH3-128 of the teacher's head, where there is one."""
    files: dict[str, list[RecordFile]] = {}
    """By split: `validation`, `masking-0`, `masking-1`, ...; in order of their records."""

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Of a complete cache. Raises `CacheError`."""
        path = folder / FILE
        if (folder / WRITING).is_file() and not path.is_file():
            raise CacheError(f"cache.path {folder}: it was not written to its end. Go on with: {WRITE}")
        if not path.is_file():
            raise CacheError(f"cache.path {folder}: there is no {FILE}, so no cache. Write one with: {WRITE}")
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Of a cache that is there, or being written. Raises `CacheError`."""
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            fault = first_fault(error)
        else:
            if manifest.format_version == FORMAT_VERSION:
                return manifest
            fault = f"format_version is {manifest.format_version}, expected {FORMAT_VERSION}"
        raise CacheError(f"{path}: {fault}. Restore it, or remove {path.parent} and write it anew with: {WRITE}")

    def check_files(self, folder: Path) -> None:
        """Raise `CacheError` unless every file is there at its size."""
        for file in (file for files in self.files.values() for file in files):
            path = folder / file.name
            size = path.stat().st_size if path.is_file() else None
            if size != file.bytes:
                found = "it is missing" if size is None else f"it has {size} bytes"
                raise CacheError(
                    f"{path}: {found}, expected {file.bytes} bytes. Run cache_teacher.py again: it writes what is "
                    "missing."
                )

    def check(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Raise `CacheError`, naming keys and values, unless this is a cache for a run of this identity."""
        then, now = self.identity, _plain(identity)
        changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
        if changed:
            both = [key for key in changed if key in then and key in now]  # what else differs follows from these
            listed = "; ".join(f"{key} is {now.get(key)!r}, the cache's {then.get(key)!r}" for key in both or changed)
            raise CacheError(
                f"cache.path {folder}: it holds other knowledge than this run asks for: {listed}. Set it to what the "
                "cache has, or give another cache.path and write that with cache_teacher.py."
            )


def split_of(masking: int) -> str:
    """Name of the files with one masking's records."""
    return "validation" if masking == VALIDATION else f"masking-{masking}"


@dataclass(frozen=True)
class Cache:
    """A complete cache, open for reading."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any]) -> Cache:
        """Raises `CacheError` for one that is not complete, or another run's."""
        manifest = Manifest.load(folder)
        manifest.check(folder, identity)
        manifest.check_files(folder)
        return cls(folder, manifest)

    def check_pieces(self, pieces: Iterable[Piece]) -> None:
        """Raise `CacheError` unless it says something of all that a run reads."""
        files, maskings = self.manifest.files, self.manifest.maskings
        for masking, _, _, stop in pieces:
            known = sum(file.records for file in files.get(split_of(masking), []))
            if known < stop:
                is_held_out = masking == VALIDATION
                key, most = ("validation.sequences", known) if is_held_out else ("data.maskings", maskings)
                found = f"{known} held-out sequences" if is_held_out else f"{maskings} maskings of each sequence"
                raise CacheError(
                    f"cache.path {self.folder}: it has {found}, but this run reads more. Set {key} to {most}, or run "
                    "cache_teacher.py with this recipe: it adds what is missing."
                )

    def attach(self, batch: Batch) -> Batch:
        """`batch`, on the host, with its rows: what the stream does in the background. Raises `CacheError`."""
        rows = self._rows(batch.masking, batch.samples.numpy())
        expected = inputs(batch, tokens=rows["input_ids"].shape[1])
        same_B = np.all([(rows.pop(name) == array).all(axis=1) for name, array in expected.items()], axis=0)
        if not same_B.all():
            sample = int(batch.samples[int(np.argmin(same_B))])
            raise CacheError(
                f"cache.path {self.folder}: what it holds of sequence {sample} ({split_of(batch.masking)}) was said of "
                "another input. Write the cache again, from this run's data."
            )
        return replace(batch, recorded={name: torch.from_numpy(array) for name, array in rows.items()})

    def _rows(self, masking: int, samples: Numbers) -> dict[str, NDArray[Any]]:
        files = self._open.get(split_of(masking))
        if files is None or samples.max(initial=-1) >= files[1][-1]:
            raise CacheError(
                f"cache.path {self.folder}: it has no record of sequence {samples.max()} ({split_of(masking)}). Run "
                "cache_teacher.py with this recipe: it adds what is missing."
            )
        records, ends = files
        file_of = np.searchsorted(ends, samples, side="right")
        found: dict[str, NDArray[Any]] = {}
        for number in np.unique(file_of):
            here = file_of == number
            first = ends[number - 1] if number else 0
            for name, array in records[number].rows(samples[here] - first).items():
                if name not in found:
                    found[name] = np.empty((len(samples), *array.shape[1:]), array.dtype)
                found[name][here] = array
        return found

    @cached_property
    def _open(self) -> dict[str, tuple[list[Records], Numbers]]:
        """Split -> its files, and the number after each one's last record."""
        return {
            split: ([Records(self.folder / f.name, f) for f in files], np.cumsum([f.records for f in files]))
            for split, files in self.manifest.files.items()
        }


class CachedTeacher:
    """Knowledge out of the rows that the stream has attached to a batch. No model is in memory, at most its head."""

    def __init__(
        self,
        cache: Cache,
        family: ModelFamily,
        training: Recording,
        validation: Recording,
        head: nn.Module | None,
    ) -> None:
        """training, validation: the layouts of the two kinds of rows. head: the teacher's, where rows hold its last
        hidden states."""
        self.cache, self.parameters = cache, cache.manifest.teacher_parameters
        self.attach: Callable[[Batch], Batch] = cache.attach
        self._family, self._training, self._validation, self._head = family, training, validation, head

    @torch.no_grad()
    def knowledge(self, batch: Batch) -> Knowledge:
        """What the teacher said of a batch that has been through `attach`."""
        assert batch.recorded is not None, "the stream attaches what was recorded"
        recording = self._validation if batch.masking == VALIDATION else self._training
        found = recording.decode(batch.recorded, batch)
        if found.final_states is None:
            return found
        assert self._head is not None
        return replace(found, logits=self._logits(found.final_states, batch), final_states=None)

    def _logits(self, final_BSD: Tensor, batch: Batch) -> Tensor:
        """The head sees the slots alone, in order, so each slot is now its own position."""
        slots_S = torch.arange(final_BSD.shape[1], device=final_BSD.device)
        rows = replace(batch, scored_positions=slots_S.expand(len(final_BSD), -1))
        return self._family.logits(self._head, final_BSD, rows)  # type: ignore[arg-type]

    def close(self) -> None:
        """Nothing runs."""


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As a manifest gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain
