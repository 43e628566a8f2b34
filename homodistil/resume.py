"""Where a run stands, and the checkpoint it resumes from: found, verified, and compared with the run's configuration.

Writing checkpoints is checkpoint.py's, what one holds manifest.py's and fragments.py's.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from homodistil.config import RunConfig
from homodistil.errors import CheckpointError
from homodistil.files import write_text_durably
from homodistil.fragments import SavedState, Shares
from homodistil.manifest import FILE, LATEST, Manifest, complete_checkpoints, differences, update_of
from homodistil.metrics import Progress
from homodistil.models.shape import StudentShape
from homodistil.ranks import Ranks
from homodistil.recipe import merge

logger = logging.getLogger(__name__)

SET_ASIDE = "set_aside_"

MAY_CHANGE = (
    *("recipe", "run.name", "run.directory", "run.log_every", "teacher.path", "teacher.recipe", "teacher.sharding"),
    *("teacher.filters", "student.path", "student.filters", "filters.teacher", "task.path", "cache.path"),
    *("data.shards", "data.source", "data.micro_batch", "data.prefetch", "data.on_bad_shard"),
    *("validation", "checkpoint", "health", "performance"),
)
"""What may change when a run resumes: it decides where and how fast, not what is computed. Models, filters,
tokenizer and examples may move, because their contents are compared."""

Identity = Mapping[str, str | int | float | None]


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
    def from_manifest(cls, manifest: Manifest, directory: Path) -> RunState:
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


def resume(run: RunConfig, identity: Identity, ranks: Ranks) -> RunState | None:
    """The state that the run resumes from: the newest intact checkpoint, or the one asked for; None to begin.

    What the run will write anew is set aside. identity: whatever else, besides the configuration, a run must share
    with its checkpoints. Raises `CheckpointError` if there are checkpoints but none is intact, or if they are another
    run's. Collective.
    """
    root = run.run.checkpoints
    found = _newest_intact(ranks.once(lambda: _candidates(run)), ranks)
    if found is None:
        ranks.once(lambda: _set_aside(root, None, 0))
        return None
    directory, manifest = found
    _check_same_run(run, identity, directory, manifest)
    ranks.once(lambda: _set_aside(root, directory, manifest.update))
    if ranks.is_first:
        print(f"resuming from {directory}: {manifest.update} of {run.run.updates} updates", file=sys.stderr)
    return RunState.from_manifest(manifest, directory)


def _candidates(run: RunConfig) -> list[Path]:
    """Checkpoints to try, newest first. On rank 0."""
    asked, complete = run.checkpoint.resume, [path for _, path in complete_checkpoints(run.run.checkpoints)]
    if asked in ("auto", "never"):
        return complete if asked == "auto" else []
    if not (Path(asked) / FILE).is_file():
        such = f", such as {complete[0]}" if complete else ""
        raise CheckpointError(
            f"checkpoint.resume {asked}: it has no {FILE}, so it is no complete checkpoint. Give auto, never, or the "
            f"folder of one{such}."
        )
    return [Path(asked)]


def _newest_intact(candidates: list[Path], ranks: Ranks) -> tuple[Path, Manifest] | None:
    """The first of the candidates whose every byte is as it was written; None if there are none. Collective."""
    faults: list[str] = []
    for directory in candidates:
        manifest, fault = _verified(directory, ranks)
        if manifest:
            for passed_over in faults if ranks.is_first else ():
                logger.warning("%s Resuming from %s instead.", passed_over, directory)
            return directory, manifest
        faults.append(fault)
    if faults:
        hint = "No checkpoint is intact. Restore one, or start over with --checkpoint.resume never."
        raise CheckpointError("\n".join([*faults, hint]))
    return None


def _verified(directory: Path, ranks: Ranks) -> tuple[Manifest | None, str]:
    """The manifest of an intact checkpoint, or what is wrong with it. The ranks share the reading. Collective."""
    manifest, fault = ranks.broadcast(_read(directory) if ranks.is_first else (None, ""))
    if manifest is None:
        return None, fault
    mine = manifest.faults(directory, slice(ranks.rank, None, ranks.world_size))
    faults = [found for share in ranks.gather(mine) for found in share]
    return (None, f"{'; '.join(faults)}.") if faults else (manifest, "")


def _read(directory: Path) -> tuple[Manifest | None, str]:
    try:
        return Manifest.read(directory), ""
    except CheckpointError as error:
        return None, str(error)


def _check_same_run(run: RunConfig, identity: Identity, directory: Path, manifest: Manifest) -> None:
    defaults = RunConfig().model_dump(mode="json")  # a key that is newer than the checkpoint was what it is by default
    then, now = {**merge(defaults, manifest.run), **manifest.identity}, {**run.model_dump(mode="json"), **identity}
    changed = differences(then, now, (*MAY_CHANGE, *run.checkpoint.allow_changes))
    if not changed:
        return
    listed = "; ".join(f"{key} was {before!r} and is {after!r}" for key, before, after in changed)
    allowable = [key for key, _, _ in changed if key.startswith(("optimizer.", "objective."))]
    allow = f" If that is what you want, --checkpoint.allow_changes {','.join(allowable)}." if allowable else ""
    raise CheckpointError(
        f"{directory}: is from a run that computes something else: {listed}. Set it back, give this run another "
        f"--run.name, or start over with --checkpoint.resume never.{allow}"
    )


def _set_aside(root: Path, taken: Path | None, update: int) -> None:
    """What is not `taken`, the checkpoint after `update` that the run resumes from, nor an earlier one beside it, is
    another history, or damaged: rename it, so that it is neither taken for this one's nor lost. What never became
    complete goes. On rank 0."""
    beside = taken is not None and taken.resolve().parent == root.resolve()
    for directory in sorted(root.glob("step_*")):
        of = update_of(directory)
        if of is None or (taken is not None and directory.resolve() == taken.resolve()):
            continue
        if not (directory / FILE).is_file():
            shutil.rmtree(directory)
        elif not beside or of >= update:
            directory.rename(_free_name(root / f"{SET_ASIDE}{directory.name}"))
    if left := complete_checkpoints(root):
        write_text_durably(root / LATEST, left[0][1].name + "\n")
    else:
        (root / LATEST).unlink(missing_ok=True)


def _free_name(path: Path) -> Path:
    """`path`, or the first of path_1, path_2, ... that does not exist."""
    name, number = path, 0
    while name.exists():
        number += 1
        name = path.with_name(f"{path.name}_{number}")
    return name
