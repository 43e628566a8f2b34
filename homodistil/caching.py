"""Caching: a teacher is asked once about every sequence and masking, and what it says is written down.

The ranks share the files of a cache: each writes whole ones, so that any number of ranks goes on with what another
number began. What rows hold is knowledge/recording.py's, who reads them knowledge/cached.py's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from homodistil.batch import VALIDATION, Batch, Piece
from homodistil.cache_plan import Layouts, held_out, identity, layouts, maskings, recorded, save_head
from homodistil.checks import is_sharded
from homodistil.config import RunConfig
from homodistil.data.examples import TaskStream
from homodistil.data.records import RecordFile, RecordWriter
from homodistil.data.stream import Stream
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import TeacherEngine, started_ranks
from homodistil.errors import CacheError, ConfigError, ModelError
from homodistil.files import PARTIAL, write_text_durably
from homodistil.knowledge.cached import FILE, WRITING, Manifest, split_of
from homodistil.models.loading import load_model
from homodistil.opening import live_teacher, open_stream, provide_data
from homodistil.progress import progress_bar
from homodistil.ranks import Ranks
from homodistil.run_plan import Plan, plan_run
from homodistil.signals import Knowledge

ENTRY = ".json"
"""Beside a finished file: its entry in the manifest to be."""
SPARE = 0.02
"""Share of a disk's free space that stays free."""


def cache_teacher(
    run: RunConfig, ds_config: DeepSpeedConfig, teacher_ds_config: DeepSpeedConfig, dry_run: bool = False
) -> None:
    """What `launchers/cache_teacher.py` does: write the knowledge that a run asks for to `cache.path`, going on with
    what is there. dry_run: only say how large it is. Raises `CacheError`. Collective."""
    if run.cache.path is None or run.teacher.path is None:
        key = "cache.path, the folder to write" if run.teacher.path else "teacher.path, whose knowledge it is"
        raise ConfigError(f"recipe {run.recipe}: nothing to write without {key}. Set it.")
    run = run.with_filter_folders()
    with started_ranks() as ranks:
        plan = plan_run(run, provide_data(run, ranks), ds_config, ranks.world_size)
        stream = open_stream(plan, ranks)
        work = Work.of(plan, stream)
        ranks.once(lambda: work.show())
        if not dry_run and not ranks.broadcast((work.folder / FILE).is_file() and work.is_complete()):
            write(work, plan, stream, teacher_ds_config, ranks)


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
        """Of a file that is whole."""
        path = self.folder / self.name(piece)
        note = path.with_name(path.name + ENTRY)
        if not (path.is_file() and note.is_file()):
            return None
        entry = RecordFile.model_validate_json(note.read_bytes())
        return entry if path.stat().st_size == entry.bytes else None

    @property
    def missing(self) -> list[Piece]:
        return [piece for piece in self.pieces if self.entry(piece) is None]

    def is_complete(self) -> bool:
        """Whether the cache is there and is this one. Raises `CacheError` for another one."""
        there = Manifest.load(self.folder)
        there.check(self.folder, self.manifest.identity)
        return there.maskings >= self.manifest.maskings and not self.missing

    def bytes(self, pieces: list[Piece]) -> int:
        """That the records of these pieces take."""
        held = sum(p.stop - p.start for p in pieces if p.masking == VALIDATION)
        trained = sum(p.stop - p.start for p in pieces) - held
        return held * self.layouts.validation.bytes_per_record + trained * self.layouts.training.bytes_per_record

    def show(self) -> None:
        """What a token takes and what for, the whole, and the room that there is. On rank 0."""
        rows = self.layouts.training
        table = Table("part", "bytes a token", "share", title=f"cache {self.folder}")
        for name, size in rows.parts.items():
            if size:
                table.add_row(name, f"{size / self.tokens:.1f}", f"{size / rows.bytes_per_record:.0%}")
        table.add_section()
        table.add_row("together", f"{rows.bytes_per_record / self.tokens:.1f}", "", style="bold")
        console = Console()
        console.print(table)
        records = sum(p.stop - p.start for p in self.pieces if p.masking != VALIDATION)
        console.print(
            f"{records:,} records of {self.manifest.maskings} masking(s), and held-out text: "
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


def write(work: Work, plan: Plan, stream: Stream | TaskStream, teacher_ds: DeepSpeedConfig, ranks: Ranks) -> None:
    """Write what is missing, then the manifest. Raises `CacheError` on all ranks if one cannot write; what is whole
    stays, and the same command goes on with the rest. Collective."""
    ranks.once(lambda: _begin(work))
    model = load_model(str(plan.run.teacher.path), plan.dtype, plan.blueprint.attention, plan.task)
    if plan.task.is_language_modeling:
        ranks.once(lambda: save_head(plan, model, work.folder))
    teacher = live_teacher(recorded(plan), model, teacher_ds, ranks, recorded=True)
    missing = ranks.broadcast(work.missing)
    total = sum(piece.stop - piece.start for piece in missing)
    with progress_bar("caching", total, "sequence", shown=ranks.is_first) as bar:
        for start in range(0, len(missing), ranks.world_size):
            together = missing[start : start + ranks.world_size]
            fault = _write_together(work, plan, stream, teacher, together, ranks)
            if faults := [words for words in ranks.gather(fault) if words]:
                done = len(work.pieces) - len(missing) + start
                raise CacheError(
                    f"cache.path {work.folder}: cannot be written ({'; '.join(faults)}); {done} of {len(work.pieces)} "
                    "files are whole. Remove the cause, then run the same command again."
                )
            bar.update(sum(piece.stop - piece.start for piece in together))
    teacher.close()
    ranks.once(lambda: _complete(work, teacher.parameters))


def _write_together(
    work: Work, plan: Plan, stream: Stream | TaskStream, teacher: TeacherEngine, pieces: list[Piece], ranks: Ranks
) -> str:
    """A file each, by as many ranks as there are pieces; what went wrong, in words. The ranks of a sharded teacher ask
    equally often: who has no more to ask repeats itself. Collective."""
    size, mine = plan.run.data.micro_batch, pieces[ranks.rank] if ranks.rank < len(pieces) else None
    own = 0 if mine is None else _turns(mine, size)
    turns = max(_turns(piece, size) for piece in pieces) if is_sharded(plan.run, ranks.world_size) else own
    batches, file = stream.examples(mine or pieces[0], size), _File(work, mine)
    batch = None
    for turn in range(turns):
        batch = next(batches, batch)
        assert batch is not None
        rows = batch.to(ranks.device)
        knowledge = teacher.knowledge(rows)
        if turn < own:
            file.add(knowledge, rows)
    fault = file.finish()
    return f"rank {ranks.rank}: {fault}" if fault else ""


def _turns(piece: Piece, size: int) -> int:
    return -(-(piece.stop - piece.start) // size)


class _File:
    """One piece's file and its entry, by one rank. What goes wrong is kept until `finish`, since the other ranks count
    on this one's part in the teacher."""

    def __init__(self, work: Work, piece: Piece | None) -> None:
        self._work, self._piece, self._fault = work, piece, ""
        self._writer: RecordWriter | None = None
        if piece is not None:
            self._attempt(self._open)

    def _open(self) -> None:
        assert self._piece is not None
        self._writer = RecordWriter(self._work.folder / self._work.name(self._piece))

    def add(self, knowledge: Knowledge, rows: Batch) -> None:
        layouts, writer = self._work.layouts, self._writer
        layout = layouts.validation if rows.masking == VALIDATION else layouts.training
        if writer is not None and not self._fault:
            self._attempt(lambda: writer.add(layout.encode(knowledge, rows)))

    def finish(self) -> str:
        """What went wrong, in words; nothing is left behind then."""
        if self._writer is not None and not self._fault:
            self._attempt(self._close)
        if self._writer is not None and self._fault:
            self._writer.abandon()
        return self._fault

    def _close(self) -> None:
        assert self._writer is not None and self._piece is not None
        entry = self._writer.finish()
        note = self._work.folder / (entry.name + ENTRY)
        write_text_durably(note, entry.model_dump_json() + "\n")

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except (OSError, ModelError) as error:
            self._fault = str(error) or type(error).__name__


def _begin(work: Work) -> None:
    """A folder that says whose cache is being written there, without what was begun and not finished. On rank 0."""
    folder, note = work.folder, work.folder / WRITING
    if note.is_file():
        Manifest.model_validate_json(note.read_bytes()).check(folder, work.manifest.identity)
    elif (folder / FILE).is_file():
        Manifest.load(folder).check(folder, work.manifest.identity)
    elif folder.is_dir() and any(folder.iterdir()):
        raise CacheError(f"cache.path {folder}: something else lies there. Give an empty folder, or one to be made.")
    work.check_room()
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(f"*{PARTIAL}"):
        partial.unlink()
    write_text_durably(note, work.manifest.model_dump_json(indent=1) + "\n")
    (folder / FILE).unlink(missing_ok=True)


def _complete(work: Work, parameters: int) -> None:
    """Everything is there: the manifest. On rank 0."""
    files: dict[str, list[RecordFile]] = {}
    for piece in work.pieces:
        entry = work.entry(piece)
        if entry is None:
            path = work.folder / work.name(piece)
            raise CacheError(f"{path}: rank 0 does not see it. Set cache.path to storage that all nodes share.")
        files.setdefault(split_of(piece.masking), []).append(entry)
    manifest = work.manifest.model_copy(update={"files": files, "teacher_parameters": parameters})
    write_text_durably(work.folder / FILE, manifest.model_dump_json(indent=1) + "\n")
    (work.folder / WRITING).unlink()


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
