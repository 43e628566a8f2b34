"""Checkpoints: sharded, and written so that a kill at any moment costs at most one interval.

Every rank writes its own fragments; a checkpoint exists once rank 0 has written its manifest, after all of them.
Owns the order of writing and of retiring. Finding and verifying one is resume.py's.
"""

from __future__ import annotations

import logging
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from homodistil.config import RunConfig
from homodistil.engine import StudentEngine
from homodistil.errors import CheckpointError, CheckpointWriteError
from homodistil.files import checksum, write_durably, write_text_durably
from homodistil.fragments import Shares, write_fragments
from homodistil.manifest import FILE, LATEST, FragmentFile, Manifest, complete_checkpoints, step_name
from homodistil.metrics import Progress
from homodistil.pruning.coordinator import PruningCoordinator
from homodistil.ranks import Ranks
from homodistil.resume import Identity
from homodistil.state import StudentState

logger = logging.getLogger(__name__)

GIB = 1024**3


@dataclass(frozen=True)
class _Pending:
    """A checkpoint on its way to disk."""

    directory: Path
    record: Manifest
    """Complete but for the files."""
    file: Future[FragmentFile]
    """This rank's."""


class Checkpoints:
    """Writes a run's checkpoints, one at a time, beside the training if so configured."""

    def __init__(self, run: RunConfig, identity: Identity, ranks: Ranks, newest: int = 0) -> None:
        """identity: whatever else, besides the configuration, a run must share with its checkpoints. newest: the
        update that this process resumed from."""
        self._run, self._config, self._identity, self._ranks = run, run.checkpoint, dict(identity), ranks
        self._root = run.run.checkpoints
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._newest, self._held = newest, 0.0

    def check_room(self, parameters: int) -> None:
        """Raise `CheckpointError` unless there is room for checkpoints of `parameters` trained parameters: for as many
        as are kept and the one being written. Collective."""
        tensors = 5 if self._run.pruning.metric == "platon" else 3  # master, moments; PLATON's mean and uncertainty
        self._ranks.once(lambda: self._check_room(4 * tensors * parameters * (self._config.keep + 1)))

    def due(self, update: int) -> bool:
        """Whether the schedule asks for a checkpoint after this update."""
        return update % self._config.every == 0 or update == self._run.run.updates

    def write(
        self,
        update: int,
        student: StudentEngine,
        pruner: PruningCoordinator,
        bad_shards: list[str],
        progress: Progress,
    ) -> None:
        """Save where the run stands after `update`, unless the newest checkpoint is of it. Collective.

        Raises `CheckpointWriteError`, here or when the next one is written, on all ranks if any of them could not
        write; earlier checkpoints stay as they are.
        """
        if update == self._newest:
            return
        self.settle()
        started, self._newest = time.perf_counter(), update
        state, shares = student.export(on_cpu=True), pruner.shares()
        record = Manifest(
            update=update,
            step=state.step,
            world_size=self._ranks.world_size,
            zero_stage=student.zero_stage,
            shape=student.shape.as_dict(),
            parameters={name: tuple(shape) for name, shape in state.shapes.items()},
            observed=pruner.observed,
            bad_shards=bad_shards,
            progress=progress,
            identity=self._identity,
            run=self._run.model_dump(mode="json"),
            versions={package: version(package) for package in ("torch", "deepspeed", "transformers")},
            files=[],
        )
        directory = self._root / step_name(update)
        self._pending = _Pending(directory, record, self._writer.submit(self._save, directory, state, shares))
        self._held = time.perf_counter() - started

    def advance(self) -> float | None:
        """Let a checkpoint that all ranks have written exist: if that happened, the seconds that it held up the
        training in all. Raises `CheckpointWriteError`. Collective while one is being written."""
        wait = not self._config.background
        if self._pending and (wait or self._ranks.all(self._pending.file.done())):
            self.settle()
            return self._held
        return None

    def settle(self) -> None:
        """Wait until nothing is being written any more. Raises `CheckpointWriteError`. Collective."""
        if self._pending is None:
            return
        started = time.perf_counter()
        pending, self._pending = self._pending, None
        error = pending.file.exception()
        outcomes = self._ranks.gather(_words(error) if error else pending.file.result())
        faults = [f"rank {rank}: {words}" for rank, words in enumerate(outcomes) if isinstance(words, str)]
        files = [outcome for outcome in outcomes if isinstance(outcome, FragmentFile)]
        record = pending.record.model_copy(update={"files": files})
        fault = "; ".join(faults) or self._ranks.once(lambda: self._complete(pending.directory, record))
        if fault:
            self._ranks.once(lambda: shutil.rmtree(pending.directory, ignore_errors=True))
            complete = self._ranks.once(lambda: complete_checkpoints(self._root))
            where = f"it will resume from {complete[0][1]}" if complete else "no checkpoint is complete yet"
            raise CheckpointWriteError(
                f"{pending.directory}: cannot be written ({fault}). The run stops; {where}. Remove the cause, then run "
                "the same command again."
            ) from error
        self._held += time.perf_counter() - started

    def close(self) -> None:
        """End the writer's thread. What it had begun is not made to exist."""
        self._writer.shutdown(wait=True)

    def _save(self, directory: Path, state: StudentState, shares: Shares) -> FragmentFile:
        """This rank's part, on disk."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"fragments-{self._ranks.rank:05d}-of-{self._ranks.world_size:05d}.safetensors"
        write_durably(path, lambda partial: write_fragments(partial, state, shares))
        ranges = {name: (held.start, held.numel) for name, held in state.layout.items()}
        return FragmentFile(name=path.name, bytes=path.stat().st_size, checksum=checksum(path), ranges=ranges)

    def _complete(self, directory: Path, record: Manifest) -> str | None:
        """All fragments are there: manifest, `latest`, and, beside the training, the end of what is no longer kept.
        What went wrong, in words. On rank 0."""
        for file in record.files:
            path = directory / file.name
            if not path.is_file() or path.stat().st_size != file.bytes:
                return f"{path}: rank 0 does not see it. Set run.directory to storage that all nodes share"
        try:
            record.write(directory)
        except OSError as error:
            return _words(error)
        try:
            write_text_durably(self._root / LATEST, directory.name + "\n")
        except OSError as error:
            logger.warning("%s is complete, but `latest` cannot be changed: %s", directory, _words(error))
        self._writer.submit(self._retire)
        return None

    def _retire(self) -> None:
        kept_for_good = self._config.keep_every
        for update, old in complete_checkpoints(self._root)[self._config.keep :]:
            if not kept_for_good or update % kept_for_good:
                try:
                    (old / FILE).unlink()  # from here on it does not exist, whatever happens next
                    shutil.rmtree(old)
                except OSError as error:
                    logger.warning("%s is no longer kept, but cannot be deleted: %s", old, _words(error))

    def _check_room(self, needed: int) -> None:
        newest = complete_checkpoints(self._root)[: self._config.keep]
        held = sum(file.stat().st_size for _, path in newest for file in path.iterdir())
        free = shutil.disk_usage(self._root).free
        if free + held < needed:
            raise CheckpointError(
                f"{self._root}: {free / GIB:.2f} GiB are free, but checkpoints will take up to {needed / GIB:.2f} GiB "
                f"(checkpoint.keep is {self._config.keep}). Make room, or set run.directory to where there is some."
            )


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
