"""Opening a run that was planned: what must exist first (examples, a teacher), where it stands, and its engines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from homodistil.batch import Attach, Batch, unchanged
from homodistil.cache_plan import SMALLEST_HELD_OUT, identity, layouts, load_head, pieces_read
from homodistil.checkpoint import Checkpoints
from homodistil.checks import Source, is_sharded
from homodistil.config import RunConfig
from homodistil.data.build import build_shards
from homodistil.data.examples import TaskData, TaskStream
from homodistil.data.shards import ShardIndex
from homodistil.data.stream import Stream
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import StudentEngine, TeacherEngine
from homodistil.hardware import matrix_product_flops
from homodistil.health import Health
from homodistil.knowledge.cached import Cache, CachedTeacher
from homodistil.knowledge.teacher import Teacher
from homodistil.knowledge.variances import hidden_variances
from homodistil.metrics import Metrics
from homodistil.models.loading import load_model, new_model
from homodistil.objective.measures import Measures
from homodistil.pruning.coordinator import PruningCoordinator
from homodistil.ranks import Ranks
from homodistil.resume import RunState, resume
from homodistil.run_plan import Plan, tokenizer_directory
from homodistil.summary import FILE as SUMMARY
from homodistil.tasks import LanguageTask


def provide_data(run: RunConfig, ranks: Ranks) -> Source:
    """What the run reads: a benchmark's examples, or the index of `data.shards`, which are built from `data.source`
    first if they do not exist. Collective."""
    if not run.task.task.is_language_modeling:
        return ranks.together(lambda: TaskData.open(run.task, tokenizer_directory(run)))
    data = run.data
    source, task = data.source, cast(LanguageTask, run.task.name)
    if source and not ranks.broadcast((data.shards / "index.json").is_file()):
        ranks.once(lambda: build_shards(source, data.shards, task=task, shards=data.lanes, progress=True))
    check_files = data.on_bad_shard == "stop"  # else whoever reads a bad one says so
    return ranks.together(lambda: ShardIndex.load(data.shards, check_files=check_files))


def missing_teacher(run: RunConfig, ranks: Ranks) -> RunConfig | None:
    """The run of `teacher.recipe`, where `teacher.path` does not exist yet. Collective."""
    if ranks.broadcast(run.teacher.path is None or Path(run.teacher.path).exists()) or run.teacher.recipe is None:
        return None
    return RunConfig.load(run.teacher.recipe, {"data": run.data.model_dump(include={"shards", "source", "lanes"})})


@dataclass
class Training:
    """A run under way: what the story's verbs act on. The student changes with every prune."""

    plan: Plan
    ranks: Ranks
    start: int
    """Updates that earlier processes completed."""
    update: int
    """Completed updates."""
    stream: Stream | TaskStream
    teacher: TeacherEngine | CachedTeacher | None
    student: StudentEngine
    pruner: PruningCoordinator
    checkpoints: Checkpoints
    health: Health
    metrics: Metrics
    held_out: list[Batch]
    hidden_variances: tuple[float, ...]
    """Of each of the teacher's compared states: what the right weight of the hidden term depends on."""
    validation: Measures | None = None
    """Of the latest held-out measurement."""


def open_training(plan: Plan, teacher_ds: DeepSpeedConfig, ranks: Ranks) -> Training:
    """Everything that a run needs, where its newest intact checkpoint left off, or at the beginning. Collective."""
    run = plan.run
    ranks.once(lambda: forget_ending(run))
    identity = ranks.once(lambda: plan.identity)
    state = resume(run, identity, ranks) or RunState(update=0, shape=plan.start)
    ranks.once(lambda: run.save(run.run.path / "run.yaml"))
    teacher, stream = open_teacher_and_stream(plan, teacher_ds, ranks, state.bad_shards)
    held_out = stream.validation(run.validation.sequences, run.data.micro_batch)
    plan, variances = with_variances(plan, teacher, stream, ranks)
    student = open_student(plan, state, ranks)
    checkpoints = Checkpoints(run, identity, ranks, state.update)
    checkpoints.check_room(student.trained_parameters)
    pruner = PruningCoordinator(run.pruning, plan.ladder, student.groups, ranks, run.run.seed)
    pruner.load(state.shares(ranks), state.observed)
    peak_flops = matrix_product_flops(plan.dtype, ranks.device)
    return Training(
        plan=plan,
        ranks=ranks,
        start=state.update,
        update=state.update,
        stream=stream,
        teacher=teacher,
        student=student,
        pruner=pruner,
        checkpoints=checkpoints,
        health=Health(run.health, ranks, state.progress.skipped_in_a_row),
        metrics=Metrics(run, ranks, peak_flops, state.update, state.progress, student.loss_weights),
        held_out=held_out,
        hidden_variances=variances,
    )


def forget_ending(run: RunConfig) -> None:
    """From now on the run's folder does not say how an earlier process ended. On rank 0."""
    (run.run.path / SUMMARY).unlink(missing_ok=True)


def open_teacher_and_stream(
    plan: Plan, teacher_ds: DeepSpeedConfig, ranks: Ranks, bad_shards: Iterable[str] = ()
) -> tuple[TeacherEngine | CachedTeacher | None, Stream | TaskStream]:
    """The run's teacher, and its batches, which bring along what was recorded of it. Collective."""
    teacher = open_teacher(plan, teacher_ds, ranks)
    attach = teacher.attach if isinstance(teacher, CachedTeacher) else unchanged
    stream = open_stream(plan, ranks, bad_shards, attach)
    if isinstance(teacher, CachedTeacher):
        teacher.cache.check_pieces(pieces_read(plan.run, stream))
    return teacher, stream


def open_stream(
    plan: Plan, ranks: Ranks, bad_shards: Iterable[str] = (), attach: Attach = unchanged
) -> Stream | TaskStream:
    """The run's batches, in its own order. attach: what is done with each at last."""
    run = plan.run
    if isinstance(plan.source, TaskData):
        return TaskStream(
            plan.source, run.data, run.run.seed, ranks, plan.family.causal, attach, run.task.group_by_length
        )
    return Stream(run.data, run.run.seed, ranks, bad_shards, run.mask_seed, attach)


def open_teacher(plan: Plan, teacher_ds: DeepSpeedConfig, ranks: Ranks) -> TeacherEngine | CachedTeacher | None:
    """The frozen engine beside the student's, or what was recorded of it; None for plain training. Collective."""
    run = plan.run
    if run.teacher.path is None:
        return None
    if run.cache.path is not None:
        return cached_teacher(plan, ranks)
    path = run.teacher.path
    model = ranks.together(lambda: load_model(path, plan.dtype, plan.blueprint.attention, plan.task))
    return live_teacher(plan, model, teacher_ds, ranks)


def live_teacher(
    plan: Plan, model: PreTrainedModel, teacher_ds: DeepSpeedConfig, ranks: Ranks, recorded: bool = False
) -> TeacherEngine:
    """An engine over the run's teacher. recorded: for a cache. Collective."""
    run, blueprint = plan.run, plan.blueprint
    sharded = is_sharded(run, ranks.world_size)
    return TeacherEngine(
        model,
        plan.family,
        ranks,
        teacher_ds.resolved(run, ranks.world_size) if sharded else None,
        compiled=run.performance.compile,
        compared=blueprint.compared,
        filters=blueprint.teacher_filters,
        selection=blueprint.selection,
        recorded=recorded,
    )


def cached_teacher(plan: Plan, ranks: Ranks) -> CachedTeacher:
    """What cache_teacher.py wrote for this run. Raises `CacheError` on all ranks. Collective."""
    folder, rows = plan.run.cache.path, layouts(plan)
    assert folder is not None
    cache, head = ranks.once(lambda: Cache.open(folder, identity(plan))), None
    if plan.task.is_language_modeling:
        head = ranks.together(lambda: load_head(plan, cache, ranks.device))
    return CachedTeacher(cache, plan.family, rows.training, rows.validation, head)


def open_student(plan: Plan, state: RunState, ranks: Ranks) -> StudentEngine:
    """The student where the run stands: from a checkpoint, or as it is before the first update. Collective."""
    settings = plan.ds_config.resolved(plan.run, ranks.world_size)
    is_frozen = plan.run.filters.of is not None  # and so in no checkpoint
    model = ranks.together(lambda: first_model(plan)) if is_frozen or state.student is None else None
    return StudentEngine.build(plan.blueprint, settings, ranks, model=model, shape=state.shape, state=state.student)


def first_model(plan: Plan) -> PreTrainedModel:
    """The student before the first update: cut out of what it starts as, or drawn at random."""
    run, blueprint = plan.run, plan.blueprint
    torch.manual_seed(run.run.seed)
    if run.student.init == "teacher" and (path := run.student.path or run.teacher.path):
        new_head = not plan.task.is_language_modeling and path == run.student.path and run.filters.of is None
        model = load_model(path, torch.float32, blueprint.attention, plan.task, new_head)
        plan.family.keep_layers(model, blueprint.source)
        return model
    stock = plan.family.stock_config(blueprint.student_config, plan.start.widths)
    return new_model(stock, blueprint.attention, plan.task.kind)


def with_variances(
    plan: Plan, teacher: Teacher | None, stream: Stream | TaskStream, ranks: Ranks
) -> tuple[Plan, tuple[float, ...]]:
    """The variances of the teacher's compared states, and the plan that divides by them, for pre-norm families.
    Measured on the same held-out examples whatever the run validates on, so that a resume does as before. Collective.
    """
    if teacher is None or plan.run.objective.hidden.weight == 0:
        return plan, ()
    batches = stream.validation(SMALLEST_HELD_OUT, plan.run.data.micro_batch)
    variances = hidden_variances(teacher, batches, ranks, plan.blueprint.teacher_width)
    if plan.family.pre_norm:
        plan = replace(plan, blueprint=replace(plan.blueprint, hidden_variances=variances))
    return plan, variances
