"""The story of a run, on one page: a student starts as its teacher and is narrowed while it is distilled."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from homodistil.batch import Batch
from homodistil.closing import finish, leave
from homodistil.config import RunConfig
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import started_ranks
from homodistil.errors import Stopped
from homodistil.forecast import show_forecast, update_flops
from homodistil.metrics import Work
from homodistil.opening import Plan, Training, open_training, plan_run, provide_shards, provide_teacher
from homodistil.preemption import Preemption
from homodistil.pruning.coordinator import PrunePlan
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
    """Shrink a student out of its teacher while distilling it, from the newest checkpoint on if there is one; without
    a teacher, plain training. Collective."""
    run, last = plan.run, plan.run.run.updates
    stop: Stopped | None = None
    with Preemption() as preemption:
        training = open_training(plan, teacher_ds_config, ranks)
        with training.metrics, Watchdog(ranks, run.health.hang_timeout_seconds) as watchdog:
            validate(training, training.start)  # before the first update the student is the teacher: KL is 0
            for update, batch in training.stream.updates(training.start, last):
                ranks.seed(run.run.seed, update)
                losses = training.student.accumulate(batch, training.teacher)  # forward and backward, in micro-batches
                training.pruner.observe(training.student.fragments())  # |w * g|, on this rank's shards only
                rate = learning_rate(run.optimizer, update, last)
                training.student.update(rate)  # the engine skips it if a gradient is not finite
                record(training, update, losses, rate)
                stop = training.health.check(update, losses, training.student)
                if prune := training.pruner.plan(update):  # collective: one plan, agreed by all
                    shrink(training, prune, batch)
                if update % run.validation.every == 0 or update == last:
                    validate(training, update)
                stop = stop or preemption.check(update, ranks)
                if stop or training.checkpoints.due(update):
                    save(training, update)
                training.checkpoints.advance()
                watchdog.progress(update)
                if stop:
                    break
            training.checkpoints.settle()
        return leave(training, update, stop) if stop else finish(training)


def record(training: Training, update: int, losses: Mapping[str, Tensor], rate: float) -> None:
    """Log the update's losses, rate and throughput. Collective when a point is due."""
    plan, student = training.plan, training.student
    work = Work(plan.tokens_per_update, update_flops(plan, student.shape.widths))
    training.metrics.record(update, losses, work, rate, student.gradient_norm, len(training.stream.bad_shards))


def validate(training: Training, update: int) -> None:
    """Teacher and student on the held-out text, logged; it does not count against the throughput. Collective."""
    with training.metrics.paused():
        training.validation = training.student.validate(training.held_out, training.teacher)
    training.metrics.validation(update, vars(training.validation))


def shrink(training: Training, plan: PrunePlan, batch: Batch) -> None:
    """The narrower student in place of the wider one; the jump in KL that the prune alone caused, on one batch, is
    logged. Collective."""
    started, probe, teacher = time.perf_counter(), batch.rows(0, training.plan.run.data.micro_batch), training.teacher
    before = training.student.validate([probe], teacher)
    training.student = training.student.shrunk(plan)
    training.pruner.rebase(training.student.groups)
    after, seconds = training.student.validate([probe], teacher), time.perf_counter() - started
    if before.kl is not None and after.kl is not None:
        widths, parameters = vars(plan.widths), training.student.parameters
        training.metrics.pruned(plan.update, widths, parameters, before.kl, after.kl, seconds)


def save(training: Training, update: int) -> None:
    """A checkpoint of where the run stands after `update`. Collective."""
    t = training
    held = t.checkpoints.write(update, t.student, t.pruner, t.stream.bad_shards, t.metrics.progress)
    t.metrics.checkpointed(update, held)
