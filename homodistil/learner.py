"""FilterLearner: a frozen model with task-aware filters beside its layers, each with a head of its own (TED, stage I).

One module whose forward gives the losses, like student.py's: the same engine trains it, the same story runs it. What
the filters are afterwards compared for is the student's affair.
"""

# B sequences, T tokens, D / E width of the model / of a filter's output, S scored slots, V logits a slot

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from homodistil.batch import Batch, Counts
from homodistil.knowledge.filters import Filter, FilterDescription
from homodistil.models.groups import PrunableGroup
from homodistil.models.loading import load_model, model_hash, new_model
from homodistil.models.shape import StudentShape
from homodistil.objective.losses import task_loss
from homodistil.objective.measures import loss_and_hits
from homodistil.objective.objective import over
from homodistil.student import Blueprint, prepare_for_training

FILTERS = "filters"


class FilterLearner(nn.Module):
    """The model is frozen, its dropout stays on; only filters and new heads learn, from the true labels alone.

    The loss is the mean over the filters of the task's loss (TED, section 3.1). What scores a filter's output is, in
    language modelling, the teacher's own frozen head, since that is the width a filter leads to; a benchmark's task, or
    `filters.head: new`, gives every filter a new one.
    """

    exported: ClassVar[str] = FILTERS
    groups: tuple[PrunableGroup, ...] = ()
    """Nothing of it is pruned."""

    def __init__(self, model: PreTrainedModel, blueprint: Blueprint, shape: StudentShape) -> None:
        """model: whole, with the head of the task. Draws filters and heads from torch's global generator."""
        super().__init__()
        config = blueprint.run.filters
        self.family, self.shape = blueprint.family, shape
        self.layers = tuple(config.layers or ())
        blueprint.family.configure(model, shape)
        prepare_for_training(model, blueprint.run)
        self.model = model.requires_grad_(False)
        widths = blueprint.family.widths(blueprint.config).hidden, blueprint.teacher_width
        made = {str(layer): Filter(*widths, config.hidden, config.activation) for layer in self.layers}
        self.filters = nn.ModuleDict(made)
        if config.init == "identity":
            for module in self.filters.values():
                module.start_as_identity()  # type: ignore[operator]
        self.heads = nn.ModuleList(_new_heads(blueprint, model, len(self.layers)))

    @property
    def loss_weights(self) -> dict[str, float]:
        """Of the terms that `forward` names: a mean over the filters."""
        return {name: 1 / len(self.layers) for name in map(_term, self.layers)}

    def forward(
        self, batch: tuple[Tensor, ...], knowledge: object, counts: Tensor | None, terms: object = None
    ) -> object:
        """With `counts`: (mean over the filters, {filter: its task loss}); without: the sums over scored slots of
        slots and the filters' mean loss and hits, as measures.measure gives them."""
        rows = Batch(*batch)  # type: ignore[arg-type]
        with torch.no_grad():
            states = self.family.signals(self.model, rows, with_logits=False).hidden_states
        logits = [
            self.family.logits(head, filter_(states[layer + 1]), rows)
            for layer, filter_, head in zip(self.layers, self.filters.values(), self._heads(), strict=True)
        ]
        if counts is None:
            return _measured(torch.stack([torch.stack(loss_and_hits(z, rows, self.family.kind)) for z in logits]), rows)
        losses = [task_loss(self.family.kind, z, rows.labels, rows.weights) for z in logits]
        parts = {_term(k): over(loss, Counts(counts).scored) for k, loss in zip(self.layers, losses, strict=True)}
        return torch.stack(list(parts.values())).mean(), {name: part.detach() for name, part in parts.items()}

    def _heads(self) -> list[nn.Module]:
        """One for each filter: its own, or the one that all share."""
        return list(self.heads) * (1 if len(self.heads) == len(self.layers) else len(self.layers))


def describe(blueprint: Blueprint) -> FilterDescription:
    """What the filters of a learner fit."""
    run, config = blueprint.run, blueprint.run.filters
    assert run.student.path is not None
    return FilterDescription(
        model=run.student.path,
        model_sha256=model_hash(run.student.path),
        task=run.task.name,
        layers=list(config.layers or ()),
        width_in=blueprint.family.widths(blueprint.config).hidden,
        width_out=blueprint.teacher_width,
        inner=config.hidden,
        activation=config.activation,
    )


def _new_heads(blueprint: Blueprint, model: PreTrainedModel, count: int) -> list[nn.Module]:
    run, family, task = blueprint.run, blueprint.family, blueprint.run.task.task
    if task.is_language_modeling and run.filters.head == "shared":
        other = run.filters.teacher
        owner = load_model(other, torch.float32, blueprint.attention, task) if other else model
        return [family.head(owner).requires_grad_(False)]
    slim = family.with_layers(blueprint.teacher_config, 1)  # a head does not depend on depth
    owners = [new_model(slim, blueprint.attention, family.kind) for _ in range(count)]
    for owner in owners:
        prepare_for_training(owner, run)
    return [family.head(owner) for owner in owners]


def _term(layer: int) -> str:
    """As its loss is called: layers count from 1 where people read them."""
    return f"filter_{layer + 1:02d}"


def _measured(sums_F2: Tensor, rows: Batch) -> Tensor:
    loss, hits = sums_F2.mean(dim=0)
    return torch.stack([rows.weights.sum().double(), loss.double(), hits.double()])
