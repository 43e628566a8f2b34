"""Work: all that a cache will hold, what of it is there, and the folder that it is written to.

Who writes the files is caching.py's, what a run asks of a cache cache_plan.py's, how one is read knowledge/cached.py's.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from homodistil.batch import VALIDATION, Piece
from homodistil.cache_plan import Layouts, held_out, identity, layouts, maskings
from homodistil.claim import LOCK
from homodistil.data.examples import TaskStream
from homodistil.data.records import RecordFile
from homodistil.data.stream import Stream
from homodistil.errors import CacheError
from homodistil.files import PARTIAL, checksum, write_text_durably
from homodistil.knowledge.cached import FILE, HEAD, WRITING, Manifest, split_of
from homodistil.run_plan import Plan

ENTRY = ".json"
"""Beside a finished file: its entry in the manifest to be."""
SPARE = 0.02
"""Share of a disk's free space that stays free."""
OURS = {LOCK, WRITING + PARTIAL}
"""What lies in a folder where a cache was hardly begun."""


@dataclass(frozen=True)
class Work:
    """All that a cache will hold, and what of it is there."""

    folder: Path
    pieces: list[Piece]
    layouts: Layouts
    manifest: Manifest
    tokens: int
    """Of a record."""

    @classmethod
    def of(cls, plan: Plan, stream: Stream | TaskStream) -> Work:
        run = plan.run
        assert run.cache.path is not None
        count, rows = maskings(run, stream), layouts(plan)
        manifest = Manifest(
            identity=identity(plan),
            teacher_parameters=0,
            maskings=count,
            bytes_per_record=rows.training.bytes_per_record,
        )
        pieces = stream.pieces(count, held_out(run))
        return cls(run.cache.path, pieces, rows, manifest, plan.source.sequence_length)

    def name(self, piece: Piece) -> str:
        return f"{split_of(piece.masking)}-{piece.number:05d}.tar"

    def entry(self, piece: Piece) -> RecordFile | None:
        """Of a file that is whole, with all of the piece."""
        path = self.folder / self.name(piece)
        try:
            entry = RecordFile.model_validate_json(path.with_name(path.name + ENTRY).read_bytes())
            is_whole = path.stat().st_size == entry.bytes and entry.records >= piece.stop - piece.start
        except (OSError, ValidationError):
            return None
        return entry if is_whole else None

    @property
    def missing(self) -> list[Piece]:
        return [piece for piece in self.pieces if self.entry(piece) is None]

    def is_complete(self) -> bool:
        """Whether the cache is there and is this one. Raises `CacheError` for another one."""
        if not (self.folder / FILE).is_file() or (self.folder / WRITING).is_file():
            return False
        there, head = Manifest.load(self.folder), self.folder / HEAD
        there.check(self.folder, self.manifest.identity)
        has_head = there.head is None or (head.is_file() and checksum(head) == there.head)
        return there.maskings >= self.manifest.maskings and has_head and not self.missing

    def bytes(self, pieces: list[Piece]) -> int:
        """That the records of these pieces take."""
        held = sum(p.stop - p.start for p in pieces if p.masking == VALIDATION)
        trained = sum(p.stop - p.start for p in pieces) - held
        return held * self.layouts.validation.bytes_per_record + trained * self.layouts.training.bytes_per_record

    def show(self) -> None:
        """What a token takes and what for, the whole, and the room that there is. On rank 0."""
        rows = self.layouts.training
        table = Table("part", "bytes a token", "share", title="cache")
        for name, size in rows.parts.items():
            if size:
                table.add_row(name, f"{size / self.tokens:.1f}", f"{size / rows.bytes_per_record:.0%}")
        table.add_section()
        table.add_row("together", f"{rows.bytes_per_record / self.tokens:.1f}", "", style="bold")
        console = Console()
        console.print(table)
        records = sum(p.stop - p.start for p in self.pieces if p.masking != VALIDATION)
        console.print(
            f"{self.folder}: {records:,} records of {self.manifest.maskings} masking(s), and held-out text: "
            f"{_size(self.bytes(self.pieces))}, of which {_size(self.bytes(self.missing))} are still to be written; "
            f"{_size(self._free())} are free",
            highlight=False,
            soft_wrap=True,
        )

    def check_room(self) -> None:
        """Raise `CacheError` unless what is missing fits. On rank 0."""
        needed, free = self.bytes(self.missing), self._free()
        if needed > free * (1 - SPARE):
            raise CacheError(
                f"cache.path {self.folder}: {_size(needed)} are to be written, but {_size(free)} are free. Keep less "
                "(knowledge.keep), store it smaller (cache.values, cache.top_k), lower data.maskings, or give another "
                "cache.path."
            )

    def _free(self) -> int:
        existing = next(p for p in (self.folder.absolute(), *self.folder.absolute().parents) if p.exists())
        return shutil.disk_usage(existing).free

    def check_place(self) -> None:
        """Raise `CacheError` where another cache lies, or anything else. On rank 0."""
        folder = self.folder
        if there := [folder / name for name in (WRITING, FILE) if (folder / name).is_file()]:
            Manifest.read(there[0]).check(folder, self.manifest.identity)
        elif folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - OURS):
            raise CacheError(
                f"cache.path {folder}: something else lies there. Give an empty folder, or one to be made."
            )

    def begin(self) -> None:
        """From now on the folder says whose cache is being written there; what was half written goes. On rank 0."""
        for partial in self.folder.glob(f"*{PARTIAL}"):
            partial.unlink()
        self.check_room()
        write_text_durably(self.folder / WRITING, self.manifest.model_dump_json(indent=1) + "\n")
        (self.folder / FILE).unlink(missing_ok=True)

    def complete(self, parameters: int, head: str | None) -> None:
        """Everything is there: the manifest. On rank 0."""
        files: dict[str, list[RecordFile]] = {}
        for piece in self.pieces:
            entry = self.entry(piece)
            if entry is None:
                path = self.folder / self.name(piece)
                raise CacheError(f"{path}: rank 0 does not see it. Set cache.path to storage that all nodes share.")
            files.setdefault(split_of(piece.masking), []).append(entry)
        manifest = self.manifest.model_copy(update={"files": files, "teacher_parameters": parameters, "head": head})
        write_text_durably(self.folder / FILE, manifest.model_dump_json(indent=1) + "\n")
        (self.folder / WRITING).unlink()


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
