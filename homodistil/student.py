"""Student: the model, its aligners and its objective as one module whose forward gives the losses.

One module, because ZeRO-3 gathers parameters only inside the forward of the module that owns them, and because
activation checkpointing recomputes a forward. How it is sharded and stepped is engine.py's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from homodistil.batch import Batch, Counts
from homodistil.config import RunConfig
from homodistil.knowledge.aligners import build_aligners, hidden_members
from homodistil.models.base import ModelFamily
from homodistil.models.groups import PrunableGroup, kept_positions
from homodistil.models.loading import materialise, skeleton
from homodistil.models.shape import HIDDEN, StudentShape
from homodistil.objective.measures import measure
from homodistil.objective.objective import Objective
from homodistil.pruning.surgery import narrow
from homodistil.signals import Signals

MODEL, ALIGNERS = "model", "aligners"


@dataclass(frozen=True)
class Blueprint:
    """All that a student of any shape is built from, besides its weights."""

    family: ModelFamily
    config: PretrainedConfig
    """The original, unpruned model's."""
    run: RunConfig
    attention: str
    """Name of the registered attention function."""

    @property
    def architecture_sha256(self) -> str:
        """Of the original model's config, less what says nothing of how it computes."""
        silent = ("transformers_version", "_name_or_path", "dtype", "architectures")
        fields = {key: value for key, value in self.config.to_dict().items() if key not in silent}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def source(self) -> tuple[int, ...]:
        """The original's layers that the student has."""
        chosen = self.run.student.layers
        return tuple(range(self.family.layers(self.config)) if chosen is None else chosen)

    @property
    def matched(self) -> tuple[int, ...]:
        """For each of the student's layers, the original's that it is compared with."""
        chosen, layers, all_layers = self.run.knowledge.layers, len(self.source), self.family.layers(self.config)
        return tuple((k + 1) * all_layers // layers - 1 for k in range(layers)) if chosen is None else tuple(chosen)

    @property
    def student_config(self) -> PretrainedConfig:
        """The original's, with as many layers as the student has."""
        return self.family.with_layers(self.config, len(self.source))

    @property
    def full_shape(self) -> StudentShape:
        """Of a student that has lost nothing but layers."""
        return StudentShape.full(len(self.source), self.family.widths(self.config))


class Student(nn.Module):
    """A dense model of `shape`, with what is needed to compare it with its teacher."""

    def __init__(self, model: PreTrainedModel, blueprint: Blueprint, shape: StudentShape) -> None:
        super().__init__()
        self.family, self.shape = blueprint.family, shape
        self.family.configure(model, shape)
        _prepare_for_training(model, blueprint.run)
        self.model = model
        objective = blueprint.run.objective
        if blueprint.run.teacher.path is None or objective.hidden.weight == 0:
            self.aligners = nn.ModuleList()
        else:
            self.aligners = build_aligners(objective.hidden, shape, shape.layers + 1)
        self.objective = Objective(objective, shape, blueprint.run.performance, blueprint.matched, self.family.causal)

    @classmethod
    def unfilled(cls, blueprint: Blueprint, shape: StudentShape) -> Student:
        """A student of `shape` whose weights are still to be loaded."""
        model = skeleton(blueprint.student_config, blueprint.attention, blueprint.family.kind)
        full = blueprint.full_shape
        narrow(model, kept_positions(blueprint.family.groups(full), shape.kept))
        materialise(model)
        return cls(model, blueprint, shape)

    @property
    def groups(self) -> list[PrunableGroup]:
        """Prunable groups by this module's parameter names; the hidden group owns the aligners' student side."""
        groups = [_prefixed(group, MODEL) for group in self.family.groups(self.shape)]
        extra = hidden_members(self.aligners, ALIGNERS)
        return [replace(g, members=g.members + extra) if g.name == HIDDEN else g for g in groups]

    def forward(self, batch: tuple[Tensor, ...], knowledge: tuple[object, ...] | None, counts: Tensor | None) -> object:
        """With `counts`: (weighted total, {term: unweighted loss}); without: the sums of measures.measure.

        Takes and gives plain tuples, the only containers ZeRO-3's hooks can walk.
        """
        rows, teacher = Batch(*batch), Signals(*knowledge) if knowledge else None  # type: ignore[arg-type]
        signals = self.family.signals(self.model, rows)
        if counts is None:
            return measure(signals, teacher, rows)
        # Past its hooks: it has no parameters to gather, and ZeRO-3's hooks cannot walk signals.
        losses = self.objective.forward(signals, teacher, rows, Counts(counts), self.aligners)
        return losses.total, losses.parts


def as_tuple(value: Batch | Signals | None) -> tuple[object, ...] | None:
    """The fields of a batch or of signals, in order."""
    return None if value is None else tuple(getattr(value, field.name) for field in fields(value))


def _prepare_for_training(model: PreTrainedModel, run: RunConfig) -> None:
    """A distilled student has no dropout: with it, KL is above zero before anything happened (SPEC 1.1)."""
    if run.teacher.path is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    if run.performance.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _prefixed(group: PrunableGroup, prefix: str) -> PrunableGroup:
    members = tuple(
        replace(
            m,
            parameter=f"{prefix}.{m.parameter}",
            scored_with=m.scored_with and (f"{prefix}.{m.scored_with[0]}", m.scored_with[1]),
        )
        for m in group.members
    )
    return replace(group, members=members)
