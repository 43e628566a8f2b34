"""The story of a run, on one page: a student starts as its teacher and is narrowed while it is distilled."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from homodistil.claim import Claim
from homodistil.closing import finish, leave
from homodistil.config import RunConfig
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import started_ranks
from homodistil.errors import ShardError, Stopped
from homodistil.forecast import show_forecast, update_flops
from homodistil.knowledge.selection import shared_units
from homodistil.metrics import Work
from homodistil.models.shape import HIDDEN
from homodistil.opening import Training, forget_ending, missing_teacher, open_training, provide_data
from homodistil.preemption import Preemption
from homodistil.pruning.coordinator import PrunePlan
from homodistil.pruning.record import record_prune
from homodistil.ranks import Ranks
from homodistil.run_plan import Plan, plan_run
from homodistil.schedule import learning_rate
from homodistil.summary import RunSummary
from homodistil.watchdog import Watchdog


def pretrain(
    run: RunConfig, ds_config: DeepSpeedConfig, teacher_ds_config: DeepSpeedConfig, dry_run: bool = False
) -> None:
    """What `launchers/pretrain.py` does: provide what is missing, check everything, then train. Collective."""
    run = run.with_filter_folders()
    with started_ranks() as ranks:
        if not dry_run:
            ranks.once(lambda: forget_ending(run))
        source = provide_data(run, ranks)
        plan = ranks.together(lambda: plan_run(run, source, ds_config, ranks.world_size))  # before any training
        if dry_run:
            return show_forecast(plan, ranks)
        with Preemption() as preemption:
            if first := missing_teacher(run, ranks):
                first = ds_config.adopted_by(first)
                made = ranks.together(lambda: plan_run(first, source, ds_config, ranks.world_size))
                train(made, teacher_ds_config, ranks, preemption)
            train(plan, teacher_ds_config, ranks, preemption)


def train(plan: Plan, teacher_ds_config: DeepSpeedConfig, ranks: Ranks, preemption: Preemption) -> RunSummary:
    """A whole run, from its newest checkpoint on if there is one. Collective."""
    run, timeout = plan.run, plan.run.health.hang_timeout_seconds
    if asked := preemption.check(None, ranks):  # while an earlier run was ending
        raise asked
    with Claim(run.run.checkpoints, ranks):
        with Watchdog(ranks, timeout) as watchdog:
            training = open_training(plan, teacher_ds_config, ranks)
            with training.metrics as metrics:
                metrics.shape(training.update, vars(training.student.shape.widths), training.student.parameters)
                metrics.knowledge(training.update, training.hidden_variances)
                share_units(training)
                validate(training)  # before the first update the student is the teacher: KL is 0
                stop = distil(training, preemption, watchdog)
                if stop:
                    save(training)
                training.checkpoints.settle()
        # Unwatched: a benchmark's development set, on one rank, may take longer than a run may hang.
        return leave(training, stop) if stop else finish(training)


def distil(training: Training, preemption: Preemption, watchdog: Watchdog) -> Stopped | None:
    """Shrink the student out of its teacher, update by update; without a teacher, plain training. Returns the reason
    to stop before the end, if there is one. Collective."""
    run, ranks, last = training.plan.run, training.ranks, training.plan.run.run.updates
    stop: Stopped | None = None
    try:
        for update, batch in training.stream.updates(training.update, last):
            ranks.seed(run.run.seed, update)
            stage = run.stage(update)
            losses = training.student.accumulate(batch, training.teacher, stage.terms)  # forward and backward
            training.health.compare(update, training.student)
            training.pruner.observe(training.student.fragments())  # |w * g|, on this rank's shards only
            rate = learning_rate(run.optimizer, stage.update, stage.updates)
            training.student.update(rate)  # the engine skips it if a gradient is not finite
            training.update = update
            record(training, losses, rate)
            stop = training.health.check(update, losses, training.student.gradient_norm)
            if prune := training.pruner.plan(update):  # collective: one plan, agreed by all
                shrink(training, prune)
            if update % run.validation.every == 0 or update == last:
                validate(training)
            stop = stop or preemption.check(update, ranks)
            if training.checkpoints.due(update):
                save(training)
            if (held := training.checkpoints.advance()) is not None:
                training.metrics.checkpointed(update, held)
            watchdog.progress(update)
            if stop:
                break
    except ShardError as error:  # on all ranks, before any of them computed on that update
        stop = error
    return stop


def record(training: Training, losses: Mapping[str, Tensor], rate: float) -> None:
    """Log the update's losses, rate and throughput. Collective when a point is due."""
    plan, student = training.plan, training.student
    work = Work(plan.tokens_per_update, update_flops(plan, student.shape.widths))
    bad_shards = len(training.stream.bad_shards)
    training.metrics.record(training.update, losses, work, rate, student.gradient_norm, bad_shards)


def validate(training: Training) -> None:
    """Teacher and student on the held-out text, logged; it does not count against the throughput. Collective."""
    with training.metrics.paused():
        training.validation = training.student.validate(training.held_out, training.teacher)
    training.metrics.validation(training.update, vars(training.validation))


def shrink(training: Training, plan: PrunePlan) -> None:
    """The narrower student in place of the wider one; the jump in KL that the prune alone caused, on one held-out
    batch, is logged. Collective."""
    started, probe, teacher = time.perf_counter(), training.held_out[0], training.teacher
    before, shape = training.student.validate([probe], teacher), training.student.shape
    training.ranks.once(lambda: record_prune(training.plan.run.run.path, plan, shape))
    training.student = training.student.shrunk(plan)
    training.pruner.rebase(training.student.groups)
    after, seconds = training.student.validate([probe], teacher), time.perf_counter() - started
    if before.kl is not None and after.kl is not None:
        widths, parameters = vars(plan.widths), training.student.parameters
        training.metrics.pruned(plan.update, widths, parameters, before.kl, after.kl, seconds)
    share_units(training)


def share_units(training: Training) -> None:
    """Log how many of the teacher's kept units the student still has, where it is compared in its own dimensions.
    Collective."""
    plan, teacher, term = training.plan, training.teacher, training.plan.run.objective.hidden
    if teacher is None or term.weight == 0 or term.aligner != "indexed" or plan.blueprint.selection.units is None:
        return
    knowledge = teacher.knowledge(training.held_out[0].to(training.ranks.device))
    share = shared_units(knowledge.kept, training.student.shape.kept[HIDDEN], plan.blueprint.teacher_width)
    if share is not None:
        training.metrics.shared_units(training.update, float(share))


def save(training: Training) -> None:
    """Begin a checkpoint of where the run stands, unless it is the newest already. Collective."""
    t = training
    counted = t.metrics.progress.model_copy(update={"skipped_in_a_row": t.health.skipped_in_a_row})
    t.checkpoints.write(t.update, t.student, t.pruner, t.stream.bad_shards, counted)
