"""Real runs, whole or interrupted, of `homodistil.train.train` in the ranks of a pool: the awkward teacher on disk,
shards on disk, fp32, clipping and accumulation, checkpoints every other update.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests import fixtures

UPDATES = 16
PRUNES = (5, 6, 11)
GLOBAL_BATCH = 8

JSON = {
    "bf16": {"enabled": False},
    "communication_data_type": "fp32",
    "gradient_clipping": 0.5,
    "optimizer": {
        "type": "AdamW",
        "params": {"torch_adam": True, **dict.fromkeys(("fused", "lr", "betas", "eps", "weight_decay"), "auto")},
    },
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
}
ZERO: dict[int, dict[str, Any]] = {
    1: {"reduce_bucket_size": 5000, "allgather_bucket_size": 5000},
    2: {"reduce_bucket_size": 5000, "allgather_bucket_size": 5000},
    3: {"stage3_param_persistence_threshold": 200},
}


class Killed(BaseException):
    """As if the process had ended here: the run itself does nothing more."""


def prepare(folder: Path) -> Path:
    """Teacher, shards and DeepSpeed JSONs in `folder`."""
    fixtures.save_bert(folder / "teacher")
    fixtures.save_shards(folder / "shards", shards=8)
    for stage, settings in ZERO.items():
        values = {**JSON, "zero_optimization": {"stage": stage, "overlap_comm": False, **settings}}
        (folder / f"zero{stage}.json").write_text(json.dumps(values))
    teacher = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": False}}
    (folder / "teacher.json").write_text(json.dumps({**teacher, "train_micro_batch_size_per_gpu": "auto"}))
    return folder


def configuration(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A run's values; `changes` are dotted keys with double underscores for dots."""
    values: dict[str, Any] = {
        "run": {"name": name, "directory": str(folder / "runs"), "updates": UPDATES, "log_every": 1},
        "teacher": {"path": str(folder / "teacher")},
        "data": {"shards": str(folder / "shards"), "lanes": 4, "global_batch": GLOBAL_BATCH, "micro_batch": 2},
        "optimizer": {"learning_rate": 3e-3, "warmup": 0.1},
        "pruning": {
            "target": {"hidden": 42, "ffn": 69, "heads": 6, "head_width": 7},
            "events": 3,
            "start": 0.2,
            "end": 0.7,
            "smoothing_window": 2,
            "ffn_multiple": 1,
        },
        "validation": {"every": 8, "sequences": 8},
        "checkpoint": {"every": 2, "keep": 3, "background": False},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
    return values


def execute(values: dict[str, Any], folder: Path, stage: int, fault: tuple[str, int] | None = None) -> dict[str, Any]:
    """In a rank: run until the end, or until a fault, named and with its update, kills it. Collective.

    Returns what was seen on the way: the rows' numbers by update, and this rank's state when the engine was open.
    """
    from homodistil import train
    from homodistil.errors import Preempted
    from homodistil.preemption import Preemption
    from homodistil.ranks import Ranks

    ranks = Ranks.current()
    seen: dict[str, Any] = {"samples": {}}
    try:
        plan, teacher = planned(values, folder, stage)
        kind, at = fault or ("none", 0)
        with _witnessed(seen), FAULTS[kind](at), Preemption() as preemption:
            train.train(plan, teacher, ranks, preemption)
    except (Killed, Preempted):
        seen["killed"] = True
        _release_engines()  # while the frames that were left still know them
    finally:
        _release_engines()
    return seen


def record(values: dict[str, Any], folder: Path) -> None:
    """In a rank: write the cache of a run. Collective."""
    from homodistil.caching import record
    from homodistil.ranks import Ranks

    try:
        record(*planned(values, folder, stage=2), Ranks.current())
    finally:
        _release_engines()


def planned(values: dict[str, Any], folder: Path, stage: int) -> tuple[Any, Any]:
    """In a rank: a run's plan, and the settings of its teacher. Collective."""
    from homodistil.config import RunConfig
    from homodistil.data.shards import ShardIndex
    from homodistil.ds_config import DeepSpeedConfig
    from homodistil.opening import provide_data
    from homodistil.ranks import Ranks
    from homodistil.run_plan import plan_run

    ranks, run = Ranks.current(), RunConfig.model_validate(copy.deepcopy(values))
    student = DeepSpeedConfig.load(folder / f"zero{stage}.json")
    is_text = run.task.task.is_language_modeling
    source = ShardIndex.load(run.data.shards, check_files=False) if is_text else provide_data(run, ranks)
    return plan_run(run, source, student, ranks.world_size), DeepSpeedConfig.load_teacher(
        folder / "teacher.json", student
    )


@contextmanager
def _witnessed(seen: dict[str, Any]) -> Iterator[None]:
    from homodistil import opening

    open_student, updates = opening.open_student, opening.Stream.updates

    def opened(*arguments: Any) -> Any:
        engine = open_student(*arguments)
        seen["state"] = engine.export()
        return engine

    def watched(stream: Any, start: int, stop: int) -> Iterator[Any]:
        for update, batch in updates(stream, start, stop):
            seen["samples"][update] = batch.samples.tolist()
            yield update, batch

    with patch.object(opening, "open_student", opened), patch.object(opening.Stream, "updates", watched):
        yield


@contextmanager
def _none(at: int) -> Iterator[None]:
    yield


@contextmanager
def _between_backward_and_step(at: int) -> Iterator[None]:
    def killed() -> None:
        raise Killed

    with _before_the_step(at, killed):
        yield


@contextmanager
def _preempted(at: int) -> Iterator[None]:
    """Rank 1 gets SIGTERM in the midst of update `at`."""
    from homodistil.ranks import Ranks

    with _before_the_step(at, lambda: Ranks.current().rank == 1 and os.kill(os.getpid(), signal.SIGTERM)):
        yield


@contextmanager
def _before_the_step(at: int, happens: Callable[[], object]) -> Iterator[None]:
    from homodistil import train

    rate = train.learning_rate

    def watched(config: Any, update: int, updates: int) -> float:
        if update == at:
            happens()
        return rate(config, update, updates)

    with patch.object(train, "learning_rate", watched):
        yield


@contextmanager
def _within_a_prune(at: int) -> Iterator[None]:
    """At the first prune, after update `at`: the wide engine is gone, the narrow one not yet there."""
    from homodistil.engine import StudentEngine

    with _killed_after(StudentEngine, "close", at):
        yield


@contextmanager
def _after_a_prune(at: int) -> Iterator[None]:
    """After the first prune, which follows update `at`."""
    from homodistil.pruning.coordinator import PruningCoordinator

    with _killed_after(PruningCoordinator, "rebase", at):
        yield


@contextmanager
def _killed_after(kind: type, method: str, at: int) -> Iterator[None]:
    """Once the first prune, after update `at`, has called this method."""
    assert at == PRUNES[0]
    called = getattr(kind, method)

    def killed(*arguments: Any) -> None:
        called(*arguments)
        raise Killed

    with patch.object(kind, method, killed):
        yield


@contextmanager
def _while_writing(at: int) -> Iterator[None]:
    """Rank 0's fragments are there, the last rank's file is half written, and no manifest."""
    from homodistil.checkpoint import Checkpoints
    from homodistil.manifest import step_name

    write = Checkpoints.write

    def killed(checkpoints: Checkpoints, update: int, student: Any, pruner: Any, *others: Any) -> None:
        if update != at:
            return write(checkpoints, update, student, pruner, *others)
        checkpoints.settle()
        directory = checkpoints._root / step_name(update)
        file = checkpoints._save(directory, student.export(), pruner.shares())
        if checkpoints._ranks.rank == checkpoints._ranks.world_size - 1:
            path = directory / file.name
            path.rename(path.with_name(path.name + ".partial"))
            path.with_name(path.name + ".partial").write_bytes(b"cut short")
        checkpoints._ranks.barrier()
        raise Killed

    with patch.object(Checkpoints, "write", killed):
        yield


@contextmanager
def _no_space_left(at: int) -> Iterator[None]:
    """Rank 1's disk is full when it writes the checkpoint after update `at`: /dev/full says so, as a disk would."""
    from homodistil import checkpoint
    from homodistil.checkpoint import Checkpoints
    from homodistil.fragments import write_fragments

    save = Checkpoints._save

    def onto_a_full_disk(checkpoints: Checkpoints, directory: Path, *others: Any) -> Any:
        full = checkpoints._ranks.rank == 1 and directory.name.endswith(f"{at:08d}")
        target = (lambda path, *rest: Path("/dev/full").write_bytes(b"fragments")) if full else write_fragments
        with patch.object(checkpoint, "write_fragments", target):
            return save(checkpoints, directory, *others)

    with patch.object(Checkpoints, "_save", onto_a_full_disk):
        yield


@contextmanager
def _not_a_number(at: int) -> Iterator[None]:
    """On rank 1, KL is NaN in update `at` and all that follow."""
    with _poisoned(lambda update: update >= at):
        yield


@contextmanager
def _once_not_a_number(at: int) -> Iterator[None]:
    """On rank 1, KL is NaN in update `at` alone."""
    with _poisoned(lambda update: update == at):
        yield


@contextmanager
def _poisoned(when: Callable[[int], bool]) -> Iterator[None]:
    from homodistil.engine import StudentEngine
    from homodistil.objective import objective
    from homodistil.ranks import Ranks

    accumulate, losses = StudentEngine.accumulate, objective.cross_entropy_and_divergence
    update = [0]

    def counted(engine: StudentEngine, *arguments: Any) -> Any:
        update[0] += 1
        return accumulate(engine, *arguments)

    def broken(*arguments: Any) -> Any:
        bad = when(update[0]) and Ranks.current().rank == 1
        mlm, kl = losses(*arguments)
        return mlm, kl * (float("nan") if bad else 1.0)

    replaced = patch.object(objective, "cross_entropy_and_divergence", broken)
    with patch.object(StudentEngine, "accumulate", counted), replaced:
        yield


@contextmanager
def _drifted(at: int) -> Iterator[None]:
    """After update `at`, one weight of rank 1's working copy has another bit."""
    from homodistil.engine import StudentEngine
    from homodistil.ranks import Ranks

    update, done = StudentEngine.update, [0]

    def drifting(engine: StudentEngine, rate: float) -> None:
        update(engine, rate)
        done[0] += 1
        if done[0] == at and Ranks.current().rank == 1:
            weight = dict(engine._engine.module.named_parameters())["model.bert.encoder.layer.1.output.dense.weight"]
            weight.data[0, 0] *= 1.0000002

    with patch.object(StudentEngine, "update", drifting):
        yield


FAULTS: dict[str, Callable[[int], Any]] = {
    "none": _none,
    "no_space_left": _no_space_left,
    "not_a_number": _not_a_number,
    "once_not_a_number": _once_not_a_number,
    "drifted": _drifted,
    "preempted": _preempted,
    "between_backward_and_step": _between_backward_and_step,
    "within_a_prune": _within_a_prune,
    "after_a_prune": _after_a_prune,
    "while_writing": _while_writing,
}


def _release_engines() -> None:
    """Close what a killed run left open, in the same order on all ranks, and wait for its writer."""
    from homodistil.checkpoint import Checkpoints
    from homodistil.engine import StudentEngine, TeacherEngine

    kinds = (StudentEngine, TeacherEngine, Checkpoints)
    left = [thing for thing in gc.get_objects() if type(thing) in kinds]
    for thing in sorted(left, key=lambda thing: kinds.index(type(thing))):
        if type(thing) is Checkpoints or hasattr(thing, "_engine"):
            thing.close()
    gc.collect()


def losses(folder: Path, name: str) -> dict[int, dict[str, float]]:
    """Update -> every loss that the run logged, as text would show it: all digits."""
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    points = [(line["update"], {k: v for k, v in line.items() if k.startswith("loss/")}) for line in lines]
    return {update: point for update, point in points if point}


def kept(folder: Path, name: str) -> dict[str, list[int]]:
    """The teacher's units that the finished student has."""
    provenance = json.loads((folder / "runs" / name / "student" / "homodistil.json").read_text())
    units: dict[str, list[int]] = provenance["shape"]["kept"]
    return units


def global_batches(seen: list[dict[str, Any]]) -> dict[int, list[int]]:
    """Update -> the numbers of its sequences over all ranks, ascending."""
    return {update: sorted(n for rank in seen for n in rank["samples"][update]) for update in seen[0]["samples"]}
