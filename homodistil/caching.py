"""Caching: a teacher is asked once about every sequence and masking, and what it says is written down.

The ranks share the files of a cache: each writes whole ones, so that any number of ranks goes on with what another
number began. What rows hold is knowledge/recording.py's, who reads them knowledge/cached.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from homodistil.batch import VALIDATION, Batch, Piece
from homodistil.cache_folder import ENTRY, Work
from homodistil.cache_plan import recorded, save_head
from homodistil.checks import is_sharded
from homodistil.claim import Claim
from homodistil.config import RunConfig
from homodistil.data.examples import TaskStream
from homodistil.data.records import RecordWriter
from homodistil.data.stream import Stream
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import TeacherEngine, started_ranks
from homodistil.errors import CacheError, ConfigError, ModelError
from homodistil.files import write_text_durably
from homodistil.models.loading import load_model
from homodistil.opening import live_teacher, open_stream, provide_data
from homodistil.progress import progress_bar
from homodistil.ranks import Ranks
from homodistil.run_plan import Plan, plan_run
from homodistil.signals import Knowledge

T = TypeVar("T")


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
        source = provide_data(run, ranks)
        plan = ranks.together(lambda: plan_run(run, source, ds_config, ranks.world_size))
        record(plan, teacher_ds_config, ranks, dry_run)


def record(plan: Plan, teacher_ds_config: DeepSpeedConfig, ranks: Ranks, dry_run: bool = False) -> None:
    """Say how large the run's cache is, and write what of it is missing. Raises `CacheError`. Collective."""
    stream = open_stream(plan, ranks)
    work = ranks.once(lambda: Work.of(plan, stream))
    ranks.once(work.show)
    if not dry_run and not ranks.once(work.is_complete):
        _write(work, plan, stream, teacher_ds_config, ranks)


def _write(work: Work, plan: Plan, stream: Stream | TaskStream, teacher_ds: DeepSpeedConfig, ranks: Ranks) -> None:
    """Write what is missing, then the manifest. Raises `CacheError` on all ranks if one cannot write; what is
    whole stays, and the same command goes on with the rest. Collective."""
    ranks.once(work.check_place)
    with Claim(work.folder, ranks, key="cache.path", error=CacheError):
        ranks.once(lambda: _tried(work, work.begin))
        path = str(plan.run.teacher.path)
        model = ranks.together(lambda: load_model(path, plan.dtype, plan.blueprint.attention, plan.task))
        head = None
        if plan.task.is_language_modeling:
            head = ranks.once(lambda: _tried(work, lambda: save_head(plan, model, work.folder)))
        teacher = live_teacher(recorded(plan), model, teacher_ds, ranks, recorded=True)
        _write_missing(work, plan, stream, teacher, ranks)
        teacher.close()
        ranks.once(lambda: _tried(work, lambda: work.complete(teacher.parameters, head)))


def _write_missing(work: Work, plan: Plan, stream: Stream | TaskStream, teacher: TeacherEngine, ranks: Ranks) -> None:
    """All files that are missing, as many at a time as there are ranks. Collective."""
    missing = ranks.once(lambda: work.missing)
    total = sum(piece.stop - piece.start for piece in missing)
    with progress_bar("caching", total, "sequence", shown=ranks.is_first) as bar:
        for start in range(0, len(missing), ranks.world_size):
            together = missing[start : start + ranks.world_size]
            fault = _write_together(work, plan, stream, teacher, together, ranks)
            if faults := [words for words in ranks.gather(fault) if words]:
                raise CacheError(_fault(work, "; ".join(faults)))
            bar.update(sum(piece.stop - piece.start for piece in together))


def _write_together(
    work: Work, plan: Plan, stream: Stream | TaskStream, teacher: TeacherEngine, pieces: list[Piece], ranks: Ranks
) -> str:
    """A file each, by as many ranks as there are pieces; what went wrong, in words. The ranks of a sharded teacher ask
    equally often: who has no more to ask repeats itself. Raises `ShardError` on all ranks if one cannot read its
    examples. Collective."""
    size, mine = plan.run.data.micro_batch, pieces[ranks.rank] if ranks.rank < len(pieces) else None
    own = turns = 0 if mine is None else _turns(mine, size)
    asked = mine
    if is_sharded(plan.run, ranks.world_size):
        asked, turns = mine or pieces[0], max(_turns(piece, size) for piece in pieces)
    batches = iter(()) if asked is None else stream.examples(asked, size)
    batch = ranks.together(lambda: next(batches, None))  # reads a whole piece
    file = _File(work, mine)
    for turn in range(turns):
        assert batch is not None
        rows = batch.to(ranks.device)
        knowledge = teacher.knowledge(rows)
        if turn < own:
            file.add(knowledge, rows)
        batch = next(batches, batch)
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


def _tried(work: Work, step: Callable[[], T]) -> T:
    """What `step` returns; a `CacheError` where it cannot write. On rank 0."""
    try:
        return step()
    except OSError as error:
        raise CacheError(_fault(work, str(error))) from None


def _fault(work: Work, cause: str) -> str:
    done = len(work.pieces) - len(work.missing)
    return (
        f"cache.path {work.folder}: cannot be written ({cause}); {done} of {len(work.pieces)} files are whole. Remove "
        "the cause, then run the same command again."
    )
