"""The story of a run, on one page: a student starts as its teacher and is narrowed while it is distilled."""

from __future__ import annotations

import time

from homodistil.batch import Batch
from homodistil.checkpoint import Checkpoints, RunState
from homodistil.closing import begin, finish, leave
from homodistil.config import RunConfig
from homodistil.data.stream import Stream
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import StudentEngine, TeacherEngine, started_ranks
from homodistil.errors import Preempted, Stopped
from homodistil.forecast import show_forecast, update_flops
from homodistil.hardware import matrix_product_flops
from homodistil.health import Health
from homodistil.metrics import Metrics, Work
from homodistil.objective.measures import Measures
from homodistil.opening import Plan, open_student, open_teacher, plan_run, provide_shards, provide_teacher
from homodistil.preemption import Preemption
from homodistil.pruning.coordinator import PrunePlan, PruningCoordinator
from homodistil.ranks import Ranks
from homodistil.schedule import learning_rate
from homodistil.summary import RunSummary
from homodistil.watchdog import Watchdog


def pretrain(
    run: RunConfig, ds_config: DeepSpeedConfig, teacher_ds_config: DeepSpeedConfig, dry_run: bool = False
) -> None:
    """What `launchers/pretrain.py` does: provide what is missing, check everything, then train. Collective."""
    with started_ranks() as ranks:
        index = provide_shards(run, ranks)

        def train_teacher(first: RunConfig) -> None:
            train(plan_run(ds_config.adopted_by(first), index, ds_config, ranks.world_size), teacher_ds_config, ranks)

        plan = plan_run(run, index, ds_config, ranks.world_size)  # all that can be refused, before any training
        if dry_run:
            show_forecast(plan, ranks)
        else:
            provide_teacher(run, ranks, train_teacher)
            train(plan, teacher_ds_config, ranks)


def train(plan: Plan, teacher_ds_config: DeepSpeedConfig, ranks: Ranks) -> RunSummary:
    """Shrink a student out of its teacher while distilling it, going on from a checkpoint if there is one; without a
    teacher, plain training. Collective."""
    run = plan.run
    checkpoints = Checkpoints(run, ranks.once(lambda: plan.identity), ranks)
    state = checkpoints.latest() or RunState(update=0, shape=plan.start)
    ranks.once(lambda: begin(run))
    stream = Stream(run.data, run.run.seed, ranks, state.bad_shards)
    teacher = open_teacher(plan, teacher_ds_config, ranks)
    student = open_student(plan, state, ranks)  # shape first: it decides every tensor
    checkpoints.check_room(student.parameters)
    pruner = PruningCoordinator(run.pruning, plan.ladder, student.groups, ranks, run.run.seed)
    pruner.load(state.shares(ranks), state.observed)
    health = Health(run.health, ranks)
    held_out = stream.validation(run.validation.sequences, run.data.micro_batch)
    speed = matrix_product_flops(plan.dtype, ranks.device)

    metrics = Metrics(run, ranks, speed, state.update, state.progress)
    preemption, watchdog = Preemption(), Watchdog(ranks, run.health.patience_seconds)
    with metrics, preemption, watchdog:
        metrics.shape(state.update, vars(student.shape.widths), student.parameters)
        validation = validate(state.update, student, held_out, teacher, metrics)  # at update 0, KL is 0
        for update, batch in stream.updates(start=state.update, stop=run.run.updates):
            ranks.seed(run.run.seed, update)
            losses = student.accumulate(batch, teacher)  # forward and backward, micro-batches inside
            pruner.observe(student.fragments())  # |w * g|, on this rank's shards only
            rate = learning_rate(run.optimizer, update, run.run.updates)
            student.update(rate)  # left out by the engine if a gradient is not finite
            stop: Stopped | None = health.check(update, losses, student)
            work = Work(plan.tokens_per_update, update_flops(plan, student.shape.widths))
            metrics.record(update, losses, work, rate, student.gradient_norm, len(stream.bad_shards))
            if prune := pruner.plan(update):  # collective: one plan, agreed by all
                student = shrink(student, prune, batch.rows(0, run.data.micro_batch), teacher, metrics)
                pruner.rebase(student.groups)
            if update % run.validation.every == 0 or update == run.run.updates:
                validation = validate(update, student, held_out, teacher, metrics)
            if ranks.any(preemption.requested):
                stop = stop or Preempted(update)
            if checkpoints.due(update) or stop:
                checkpoints.write(update, student, pruner, stream.bad_shards, metrics.progress)
                metrics.checkpointed(update, checkpoints.held_seconds)
            checkpoints.advance()
            watchdog.progress(update)
            if stop:
                checkpoints.settle()
                leave(stop, update, plan, student, teacher, metrics, ranks)
        checkpoints.settle()
    return finish(plan, student, teacher, validation, held_out, metrics, ranks)


def validate(
    update: int, student: StudentEngine, held_out: list[Batch], teacher: TeacherEngine | None, metrics: Metrics
) -> Measures:
    """Teacher and student on the held-out text, logged; it does not count against the throughput. Collective."""
    with metrics.paused():
        measures = student.validate(held_out, teacher)
    metrics.validation(update, vars(measures))
    return measures


def shrink(
    student: StudentEngine, plan: PrunePlan, probe: Batch, teacher: TeacherEngine | None, metrics: Metrics
) -> StudentEngine:
    """The narrower student; the jump in KL that the prune alone caused, on one batch, is logged. Collective."""
    started = time.perf_counter()
    before = student.validate([probe], teacher)
    student = student.shrunk(plan)
    after, seconds = student.validate([probe], teacher), time.perf_counter() - started
    if before.kl is not None and after.kl is not None:
        metrics.pruned(plan.update, vars(plan.widths), student.parameters, before.kl, after.kl, seconds)
    return student
