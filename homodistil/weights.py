"""Measuring the weights of the objective's terms: the factors that make their gradients equally long.

At the first update KL, attention and indexed hidden losses are exactly zero (docs/methods.md, "The objective"), so the
student that is measured is the one after the first rung and `SETTLING` updates more.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from homodistil.batch import Batch
from homodistil.config import ObjectiveConfig, RunConfig
from homodistil.ds_config import DeepSpeedConfig, micro_batch_size
from homodistil.engine import StudentEngine, started_ranks
from homodistil.errors import ConfigError
from homodistil.knowledge.teacher import Teacher
from homodistil.opening import open_student, open_teacher_and_stream, provide_data, with_variances
from homodistil.progress import Bar, progress_bar
from homodistil.pruning.coordinator import PruningCoordinator
from homodistil.pruning.ladder import Ladder
from homodistil.ranks import Ranks
from homodistil.resume import RunState
from homodistil.run_plan import Plan, plan_run
from homodistil.schedule import learning_rate
from homodistil.student import Student, as_tuple

SETTLING = 50
"""Updates between the first rung and the measurement."""
UPDATES = 4
"""Updates whose batches the gradients are averaged over."""


def measure_weights(run: RunConfig, ds_config: DeepSpeedConfig, teacher_ds_config: DeepSpeedConfig) -> None:
    """What `homodistil measure-weights` does: print |gradient of task| / |gradient of the term|. Raises `ConfigError`
    without a teacher or a ladder. Collective."""
    run = run.with_filter_folders()
    with started_ranks() as ranks:
        source = provide_data(run, ranks)
        plan = ranks.together(lambda: plan_run(run, source, ds_config, ranks.world_size))
        if not plan.ladder.rungs or run.teacher.path is None:
            raise ConfigError(f"recipe {run.recipe}: measure-weights needs teacher.path and a narrower pruning.target.")
        needed = plan.ladder.rungs[0].update + SETTLING + UPDATES
        if needed > run.run.updates:
            raise ConfigError(f"run.updates is {run.run.updates}: too short to measure, which takes {needed} updates.")
        norms = settled_norms(plan, teacher_ds_config, ranks)
        if ranks.is_first:
            _show(norms)


def settled_norms(plan: Plan, teacher_ds_config: DeepSpeedConfig, ranks: Ranks) -> dict[str, float]:
    """Gradient norm of each term for the student after the first rung and `SETTLING` updates. Collective."""
    teacher, stream = open_teacher_and_stream(plan, teacher_ds_config, ranks)
    assert teacher is not None
    settling = plan.ladder.rungs[0].update + SETTLING
    plan, _ = with_variances(plan, teacher, stream, ranks)
    batches = stream.updates(0, settling + UPDATES)
    with progress_bar("settling", settling, "update", shown=ranks.is_first) as bar:
        student = _settled(plan, ranks, teacher, islice(batches, settling), bar)
    module = student.replica()
    student.close()
    size = micro_batch_size(plan.run.data.global_batch, plan.run.data.micro_batch, ranks.world_size)
    norms = gradient_norms(module, teacher, plan.run.objective, [batch for _, batch in batches], size, ranks)
    teacher.close()
    return norms


def _settled(
    plan: Plan, ranks: Ranks, teacher: Teacher, batches: Iterable[tuple[int, Batch]], bar: Bar
) -> StudentEngine:
    """train.py's loop, the ladder cut after its first rung."""
    run, ladder = plan.run, Ladder(plan.ladder.rungs[:1])
    student = open_student(plan, RunState(0, plan.start), ranks)
    pruner = PruningCoordinator(run.pruning, ladder, student.groups, ranks, run.run.seed)
    for update, batch in batches:
        stage = run.stage(update)
        student.accumulate(batch, teacher, stage.terms)
        pruner.observe(student.fragments())
        student.update(learning_rate(run.optimizer, stage.update, stage.updates))
        if prune := pruner.plan(update):
            student = student.shrunk(prune)
            pruner.rebase(student.groups)
        bar.update()
    return student


def gradient_norms(
    module: Student, teacher: Teacher, config: ObjectiveConfig, batches: list[Batch], micro_batch: int, ranks: Ranks
) -> dict[str, float]:
    """Norm of the gradient of each term that has a weight, unweighted, with respect to the student's model, over all
    `batches` and ranks. `module`: a whole fp32 student in each rank. micro_batch: sequences at a time. Collective."""
    parameters = list(module.model.parameters())
    norms = {}
    for term in (name for name in ObjectiveConfig.model_fields if getattr(config, name).weight > 0):
        module.objective.weights = {name: float(name == term) for name in ObjectiveConfig.model_fields}
        gradients = [torch.zeros_like(p) for p in parameters]
        for batch in batches:
            counts = ranks.sum(batch.counts(module.selection.count(batch)).vector.to(ranks.device))
            for rows in batch.micro_batches(micro_batch):
                _add_gradients(gradients, module, parameters, rows.to(ranks.device), teacher, counts)
        squares = torch.stack([ranks.sum(g).double().square().sum() for g in gradients])
        norms[term] = float(squares.sum().sqrt()) / len(batches)
    return norms


def _add_gradients(
    gradients: list[Tensor],
    module: Student,
    parameters: list[torch.nn.Parameter],
    batch: Batch,
    teacher: Teacher,
    counts: Tensor,
) -> None:
    total, _ = module(as_tuple(batch), as_tuple(teacher.knowledge(batch)), counts)
    for sum_, gradient in zip(gradients, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
        if gradient is not None:
            sum_ += gradient


def _show(norms: dict[str, float]) -> None:
    """The first term, the task unless it has no weight, is what the others are made as strong as."""
    table, (first, *_) = Table("term", "gradient norm", "weight", title="equal gradient norms"), norms.values()
    for term, norm in norms.items():
        table.add_row(term, f"{norm:.4g}", f"{first / norm:.3g}")
    Console().print(table)
