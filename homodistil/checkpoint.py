"""Checkpoints: sharded, verified, and written so that a kill at any moment costs at most one interval.

Every rank writes its own fragments; a checkpoint exists once rank 0 has written its manifest, after all of them.
Owns the order of writing, finding and retiring. The record is manifest.py's, the tensors are fragments.py's.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from homodistil.config import RunConfig
from homodistil.engine import StudentEngine
from homodistil.errors import CheckpointError
from homodistil.files import sha256, write_durably, write_text_durably
from homodistil.fragments import SavedState, Shares, write_fragments
from homodistil.manifest import FILE, FragmentFile, Manifest, differences
from homodistil.metrics import Progress
from homodistil.models.shape import StudentShape
from homodistil.pruning.coordinator import PruningCoordinator
from homodistil.ranks import Ranks
from homodistil.state import StudentState

logger = logging.getLogger(__name__)

GIB = 1024**3
BYTES_PER_PARAMETER = 12
"""A master and two moments, fp32."""
LATEST = "latest"
SET_ASIDE = "set_aside_"

FREE = (
    *("recipe", "run.name", "run.directory", "run.log_every", "teacher.path", "teacher.recipe", "teacher.sharding"),
    *("data.shards", "data.source", "data.micro_batch", "data.prefetch", "data.on_bad_shard"),
    *("validation", "checkpoint", "health", "performance"),
)
"""What may change when a run goes on: it decides where and how fast, not what is computed. Teacher, tokenizer and
corpus may move, because their contents are compared."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands, but for the tensors, which stay on disk until their owners ask for them."""

    update: int
    """Completed updates."""
    shape: StudentShape
    student: SavedState | None = None
    """None before the first update: the student is still to be made."""
    observed: int = 0
    bad_shards: tuple[str, ...] = ()
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def saved(cls, manifest: Manifest, directory: Path) -> RunState:
        return cls(
            update=manifest.update,
            shape=manifest.student_shape,
            student=manifest.saved_state(directory),
            observed=manifest.observed,
            bad_shards=tuple(manifest.bad_shards),
            progress=manifest.progress,
        )

    def shares(self, ranks: Ranks) -> Shares:
        """This rank's share of the importance scores."""
        return self.student.shares(ranks.rank, ranks.world_size) if self.student else {}

    @property
    def resumed_from(self) -> int | None:
        """The update that an earlier process left off at; None in a run that begins here."""
        return self.update if self.student else None


@dataclass(frozen=True)
class _Pending:
    """A checkpoint on its way to disk."""

    directory: Path
    record: Manifest
    file: Future[FragmentFile]


class Checkpoints:
    """A run's checkpoints on disk. One at a time is being written."""

    def __init__(self, run: RunConfig, identity: Mapping[str, str | int | float | None], ranks: Ranks) -> None:
        """identity: whatever else, besides the configuration, a run must share with its checkpoints."""
        self._run, self._config, self._identity, self._ranks = run, run.checkpoint, dict(identity), ranks
        self._root = run.run.path / "checkpoints"
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self.held_seconds = 0.0
        """How long the last write held up the training."""

    def latest(self) -> RunState | None:
        """Where to go on: the newest checkpoint that is whole, or the one asked for; None to start from nothing.

        Raises `CheckpointError` if there are checkpoints but none can be used, or if they are another run's. What the
        run will write anew is set aside. Collective.
        """
        self._ranks.once(self._check_place)
        directory, manifest = self._newest_whole()
        if manifest is not None:
            self._check_same_run(directory, manifest)
        self._ranks.once(lambda: self._set_aside(directory, manifest.update if manifest else 0))
        if manifest is None:
            return None
        if self._ranks.is_first:
            print(f"going on from {directory}: {manifest.update} of {self._run.run.updates} updates", file=sys.stderr)
        return RunState.saved(manifest, directory)

    def check_room(self, parameters: int) -> None:
        """Raise `CheckpointError` unless checkpoints of so many parameters, as many as are kept and the one being
        written, have room. Collective."""
        self._ranks.once(lambda: self._check_room(parameters * BYTES_PER_PARAMETER * (self._config.keep + 1)))

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
        """Save where the run stands after `update`; in the background if so configured. Collective.

        Raises `CheckpointError` on all ranks if any of them could not write; earlier checkpoints stay as they are.
        """
        started = time.perf_counter()
        self.settle()
        state, shares = student.export(), pruner.shares()
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
        self._pending = _Pending(directory, record, self._writer.submit(self._save, directory, _on_cpu(state), shares))
        if not self._config.background:
            self.settle()
        self.held_seconds = time.perf_counter() - started

    def advance(self) -> None:
        """Let a checkpoint that all ranks have written exist. Collective while one is being written."""
        if self._pending and not self._ranks.any(not self._pending.file.done()):
            self.settle()

    def settle(self) -> None:
        """Wait until nothing is being written any more. Raises `CheckpointError`. Collective."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        error = pending.file.exception()
        outcomes = self._ranks.gather(_words(error) if error else pending.file.result())
        faults = [f"rank {rank}: {words}" for rank, words in enumerate(outcomes) if isinstance(words, str)]
        if faults:
            self._ranks.once(lambda: shutil.rmtree(pending.directory, ignore_errors=True))
            raise CheckpointError(
                f"{pending.directory}: cannot be written ({'; '.join(faults)}). The run stops; what it goes on from is "
                f"{self._newest_name()}. Mend the cause, then run the same command again."
            ) from error
        files = [outcome for outcome in outcomes if isinstance(outcome, FragmentFile)]
        record = pending.record.model_copy(update={"files": files})
        self._ranks.once(lambda: self._complete(pending.directory, record))

    def close(self) -> None:
        """End the writer's thread. What it had begun is not made to exist."""
        self._writer.shutdown(wait=True)

    def _save(self, directory: Path, state: StudentState, shares: Shares) -> FragmentFile:
        """This rank's part, on disk."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"fragments-{self._ranks.rank:05d}-of-{self._ranks.world_size:05d}.safetensors"
        write_durably(path, lambda partial: write_fragments(partial, state, shares))
        ranges = {name: (held.start, held.numel) for name, held in state.layout.items()}
        return FragmentFile(name=path.name, bytes=path.stat().st_size, sha256=sha256(path), ranges=ranges)

    def _complete(self, directory: Path, record: Manifest) -> None:
        """All fragments are there: manifest, `latest`, and the end of what is no longer kept. On rank 0."""
        for file in record.files:
            path = directory / file.name
            if not path.is_file() or path.stat().st_size != file.bytes:
                raise CheckpointError(
                    f"{path}: another rank wrote it, but rank 0 does not see it. Set run.directory to storage that all "
                    "nodes share."
                )
        record.write(directory)
        write_text_durably(self._root / LATEST, directory.name + "\n")
        complete = self._complete_ones()
        kept_for_good = self._config.keep_every
        for old in complete[self._config.keep :]:
            if not kept_for_good or _update_of(old) % kept_for_good:
                (old / FILE).unlink()  # from here on it does not exist, whatever happens next
                shutil.rmtree(old, ignore_errors=True)

    def _check_place(self) -> None:
        probe = self._root / "writable"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            write_text_durably(probe, "")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"{self._root}: cannot be written ({error.strerror}), and checkpoints go there. Set run.directory to a "
                "folder with room that you may write to."
            ) from None

    def _check_room(self, needed: int) -> None:
        held = sum(file.stat().st_size for path in self._complete_ones() for file in path.iterdir())
        free = shutil.disk_usage(self._root).free
        if free + held < needed:
            raise CheckpointError(
                f"{self._root}: {free / GIB:.2f} GiB are free, but checkpoints will take up to {needed / GIB:.2f} GiB "
                f"(checkpoint.keep is {self._config.keep}). Make room, or set run.directory to where there is some."
            )

    def _newest_whole(self) -> tuple[Path, Manifest | None]:
        """The first of the candidates whose every byte is as it was written. Collective."""
        candidates = self._ranks.once(self._candidates)
        faults: list[str] = []
        for directory in candidates:
            manifest, fault = self._verified(directory)
            if manifest:
                for passed_over in faults if self._ranks.is_first else ():
                    logger.warning("%s Going on from %s instead.", passed_over, directory)
                return directory, manifest
            faults.append(fault)
        if faults:
            mend = "No checkpoint is whole. Restore one, or start over with --checkpoint.resume never."
            raise CheckpointError("\n".join([*faults, mend]))
        return self._root, None

    def _candidates(self) -> list[Path]:
        """Checkpoints to try, newest first. On rank 0."""
        if self._config.resume == "never":
            return []
        if self._config.resume == "auto":
            return self._complete_ones()
        path = Path(self._config.resume)
        if not (path / FILE).is_file():
            raise CheckpointError(
                f"checkpoint.resume {path}: it has no {FILE}, so it is no complete checkpoint. Give auto, never, or a "
                f"folder such as {self._newest_name()}."
            )
        return [path]

    def _verified(self, directory: Path) -> tuple[Manifest | None, str]:
        """The manifest of a whole checkpoint, or what is wrong with it. The ranks share the reading. Collective."""
        manifest, fault = self._ranks.broadcast(_read(directory) if self._ranks.is_first else (None, ""))
        if manifest is None:
            return None, fault
        mine = manifest.files[self._ranks.rank :: self._ranks.world_size]
        faults = [found for file in mine if (found := manifest.fault(directory, file))]
        everyone = [found for share in self._ranks.gather(faults) for found in share]
        return (None, f"{'; '.join(everyone)}.") if everyone else (manifest, "")

    def _check_same_run(self, directory: Path, manifest: Manifest) -> None:
        changed = differences(
            {**manifest.run, **manifest.identity}, {**self._run.model_dump(mode="json"), **self._identity}, FREE
        )
        if changed:
            listed = "; ".join(f"{key} was {then!r} and is {now!r}" for key, then, now in changed)
            raise CheckpointError(
                f"{directory}: is from a run that computes something else: {listed}. Set it back, give this run "
                "another --run.name, or start over with --checkpoint.resume never."
            )

    def _set_aside(self, taken: Path, update: int) -> None:
        """What lies beyond the place where the run goes on is another history, or damaged: rename it, so that it is
        neither taken for this one's nor lost. What never became whole goes. On rank 0."""
        for directory in self._root.glob("step_*"):
            if not (directory / FILE).is_file():
                shutil.rmtree(directory)
            elif _update_of(directory) > update or taken.resolve().parent != self._root.resolve():
                number = sum(1 for _ in self._root.glob(f"{SET_ASIDE}{directory.name}*"))
                directory.rename(self._root / f"{SET_ASIDE}{directory.name}{f'_{number}' if number else ''}")

    def _complete_ones(self) -> list[Path]:
        """Newest first."""
        found = [path.parent for path in self._root.glob(f"step_*/{FILE}")]
        return sorted(found, key=_update_of, reverse=True)

    def _newest_name(self) -> str:
        return next((str(path) for path in self._complete_ones()), "nothing, as there is no checkpoint yet")


def step_name(update: int) -> str:
    """Folder of the checkpoint after an update."""
    return f"step_{update:08d}"


def _update_of(directory: Path) -> int:
    return int(directory.name.rpartition("_")[2])


def _read(directory: Path) -> tuple[Manifest | None, str]:
    try:
        return Manifest.read(directory), ""
    except CheckpointError as error:
        return None, str(error)


def _on_cpu(state: StudentState) -> StudentState:
    cpu = torch.device("cpu")
    pieces: dict[str, Any] = {}
    for name, piece in state.pieces.items():
        values = {kind: part.to(cpu) for kind, part in piece.values.items()}
        pieces[name] = type(piece)(piece.shape, piece.start, values)
    return StudentState(pieces, state.shapes, state.step)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
