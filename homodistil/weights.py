"""Measuring the weights of the objective's terms: the factors that make their gradients equally long.

At the first update KL, attention and indexed hidden losses are exactly zero, so the student that is measured is the
one after the first rung and `SETTLING` updates more (SPEC 1.1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from homodistil.batch import Batch
from homodistil.config import ObjectiveConfig
from homodistil.data.stream import Stream
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import StudentEngine, TeacherEngine
from homodistil.errors import ConfigError
from homodistil.objective.objective import Objective
from homodistil.opening import Plan, open_student, open_teacher
from homodistil.pruning.coordinator import PruningCoordinator
from homodistil.ranks import Ranks
from homodistil.schedule import learning_rate
from homodistil.student import as_tuple

SETTLING = 50
"""Updates between the first rung and the measurement."""
UPDATES = 4
"""Updates whose batches the gradients are averaged over."""


def measure_weights(plan: Plan, teacher_ds: DeepSpeedConfig, ranks: Ranks) -> dict[str, float]:
    """Term -> weight: |gradient of mlm| / |gradient of the term|. Raises `ConfigError` without a ladder. Collective."""
    if not plan.ladder.rungs or plan.run.teacher.path is None:
        raise ConfigError("measure-weights needs a teacher and a pruning target: give a distillation recipe.")
    stream = Stream(plan.run.data, plan.run.run.seed, ranks)
    teacher = open_teacher(plan, teacher_ds, ranks)
    assert teacher is not None
    first = plan.ladder.rungs[0].update
    batches = stream.updates(start=0, stop=first + SETTLING + UPDATES)
    student = _settled(plan, ranks, teacher, batches, until=first + SETTLING)
    norms = gradient_norms(student, teacher, plan.run.objective, [batch for _, batch in batches], ranks)
    if ranks.is_first:
        _show(norms)
    return {term: norms["mlm"] / norm for term, norm in norms.items()}


def _settled(
    plan: Plan,
    ranks: Ranks,
    teacher: TeacherEngine,
    batches: Iterator[tuple[int, Batch]],
    until: int,
) -> StudentEngine:
    """train.py's loop up to the measuring student, the ladder cut after its first rung."""
    run = plan.run
    student = open_student(plan, ranks)
    pruner = PruningCoordinator(run.pruning, plan.ladder, student.groups, ranks, run.run.seed)
    for update, batch in batches:
        student.accumulate(batch, teacher)
        pruner.observe(student.fragments())
        student.update(learning_rate(run.optimizer, update, run.run.updates))
        if update == plan.ladder.rungs[0].update and (prune := pruner.plan(update)):
            student = student.shrunk(prune)
            pruner.rebase(student.groups)
        if update == until:
            break
    return student


def gradient_norms(
    student: StudentEngine, teacher: TeacherEngine, config: ObjectiveConfig, batches: list[Batch], ranks: Ranks
) -> dict[str, float]:
    """Norm of each unweighted term's gradient with respect to the student's model, over all `batches` and ranks.
    Holds a whole fp32 student in each rank. Collective."""
    module = student.replica()
    parameters = list(module.model.parameters())
    norms = {}
    for term in ObjectiveConfig.model_fields:
        module.objective = Objective(_only(term, config), student.shape, "auto").to(ranks.device)
        gradients = [torch.zeros_like(p) for p in parameters]
        for batch in batches:
            _add_gradients(gradients, module, parameters, batch.to(ranks.device), teacher, ranks)
        squares = torch.stack([ranks.sum(g).double().square().sum() for g in gradients])
        norms[term] = float(squares.sum().sqrt()) / len(batches)
    return norms


def _add_gradients(
    gradients: list[Tensor],
    module: torch.nn.Module,
    parameters: list[torch.nn.Parameter],
    batch: Batch,
    teacher: TeacherEngine,
    ranks: Ranks,
) -> None:
    counts = ranks.sum(batch.counts().vector)
    total, _ = module(as_tuple(batch), as_tuple(teacher.knowledge(batch)), counts)
    for sum_, gradient in zip(gradients, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
        if gradient is not None:
            sum_ += gradient


def _only(term: str, config: ObjectiveConfig) -> ObjectiveConfig:
    alone = config.model_copy(deep=True)
    for name in ObjectiveConfig.model_fields:
        getattr(alone, name).weight = float(name == term)
    return alone


def _show(norms: dict[str, float]) -> None:
    table = Table("term", "gradient norm", "weight", title="equal gradient norms")
    for term, norm in norms.items():
        table.add_row(term, f"{norm:.4g}", f"{norms['mlm'] / norm:.3g}")
    Console().print(table)
