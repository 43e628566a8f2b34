"""Student: the model, its aligners and its objective as one module whose forward gives the losses.

One module, because ZeRO-3 gathers parameters only inside the forward of the module that owns them, and because
activation checkpointing recomputes a forward. How it is sharded and stepped is engine.py's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from homodistil.batch import Batch, Counts
from homodistil.config import RunConfig
from homodistil.errors import ConfigError
from homodistil.knowledge.aligners import build_aligners, filter_aligners, hidden_members
from homodistil.knowledge.filters import HOW_TO_LEARN, FilterSet
from homodistil.knowledge.selection import Selection
from homodistil.models.base import ModelFamily
from homodistil.models.groups import PrunableGroup, kept_positions
from homodistil.models.loading import materialise, skeleton
from homodistil.models.shape import HIDDEN, StudentShape
from homodistil.objective.measures import measure
from homodistil.objective.objective import Objective
from homodistil.pruning.surgery import narrow
from homodistil.signals import Compared, Signals

MODEL, ALIGNERS = "model", "aligners"


@dataclass(frozen=True)
class Blueprint:
    """All that a student of any shape is built from, besides its weights."""

    family: ModelFamily
    config: PretrainedConfig
    """The model's that the student is cut and pruned out of: its teacher's, or that of student.path."""
    run: RunConfig
    attention: str
    """Name of the registered attention function."""
    teacher: PretrainedConfig | None = None
    """The teacher's, where the student starts as another model."""
    hidden_variances: tuple[float, ...] | None = None
    """What each compared state's squared differences are divided by, for families whose states no LayerNorm has
    standardised: the teacher's variance."""
    sep: int | None = None
    """Id of the token between segments, where the run's tokenizer has one."""

    @property
    def architecture_sha256(self) -> str:
        """Of the models' configs, less what says nothing of how they compute."""
        silent = ("transformers_version", "_name_or_path", "dtype", "architectures")
        configs = [self.config] if self.teacher is None else [self.config, self.teacher]
        fields = [{key: value for key, value in c.to_dict().items() if key not in silent} for c in configs]
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def source(self) -> tuple[int, ...]:
        """The original's layers that the student has."""
        chosen = self.run.student.layers
        return tuple(range(self.family.layers(self.config)) if chosen is None else chosen)

    @property
    def teacher_config(self) -> PretrainedConfig:
        return self.teacher or self.config

    @property
    def teacher_width(self) -> int:
        """Hidden width of the states that the student's are compared with."""
        return self.family.widths(self.teacher_config).hidden

    @property
    def compared(self) -> Compared:
        """The k-th of so many of the student's layers with the k-th of as many of the teacher's, spaced evenly up to
        `top` of its depth (Liu et al. 2021); fewer if `keep` says so, the lowest dropped first."""
        knowledge, layers = self.run.knowledge, len(self.source)
        own = tuple(range(knowledge.interval - 1, layers, knowledge.interval))
        top, count = round(knowledge.top * self.family.layers(self.teacher_config)), len(own)
        spaced = tuple(round((k + 1) * top / count) - 1 for k in range(count))
        matched = spaced if knowledge.layers is None else tuple(knowledge.layers)
        embeddings = knowledge.embeddings and self.run.objective.hidden.aligner != "filter"
        return Compared(own, matched, embeddings).topmost(knowledge.share.states)

    @property
    def selection(self) -> Selection:
        """Which tokens and units of these states."""
        return Selection(self.run.knowledge, self.teacher_width, self.run.mask_seed, self.sep, self.family.causal)

    @property
    def teacher_filters(self) -> Path | None:
        """Folder of the filters that the teacher's states go through."""
        return self.run.teacher.filters if self.run.filters_are_compared else None

    @property
    def student_filters(self) -> Path | None:
        """Folder of the filters that the student starts with."""
        return self.run.student.filters or self.run.teacher.filters

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

    exported: ClassVar[str] = MODEL
    """Of its parts, the one that a run leaves behind."""

    def __init__(self, model: PreTrainedModel, blueprint: Blueprint, shape: StudentShape) -> None:
        super().__init__()
        self.family, self.shape = blueprint.family, shape
        self.compared, self.selection = blueprint.compared, blueprint.selection
        self.family.configure(model, shape)
        prepare_for_training(model, blueprint.run)
        self.model = model
        self.aligners = _aligners(blueprint, shape)
        self.objective = Objective(
            blueprint.run.objective,
            shape,
            blueprint.run.performance,
            layers=self.compared.student,
            kind=self.family.kind,
            causal=self.family.causal,
            hidden_variances=blueprint.hidden_variances,
        )

    @property
    def loss_weights(self) -> dict[str, float]:
        """Of the terms that `forward` names."""
        return self.objective.weights

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

    def forward(
        self,
        batch: tuple[Tensor, ...],
        knowledge: tuple[object, ...] | None,
        counts: Tensor | None,
        terms: tuple[str, ...] | None = None,
    ) -> object:
        """With `counts`: (weighted total, {term: unweighted loss}) of `terms`, or of all that have a weight; without:
        the sums of measures.measure.

        Takes and gives plain tuples, the only containers ZeRO-3's hooks can walk.
        """
        rows, teacher = Batch(*batch), Signals(*knowledge) if knowledge else None  # type: ignore[arg-type]
        signals = self.family.signals(self.model, rows)
        if counts is None:
            return measure(signals, teacher, rows, self.family.kind)
        # Past its hooks: it has no parameters to gather, and ZeRO-3's hooks cannot walk signals.
        seen = signals.at(self.compared.student, self.compared.embeddings)
        losses = self.objective.forward(seen, teacher, rows, Counts(counts), self.aligners, terms)
        return losses.total, losses.parts


def as_tuple(value: Batch | Signals | None) -> tuple[object, ...] | None:
    """The fields of a batch or of signals, in order; what a cached teacher said of a batch is not a model's input."""
    if value is None:
        return None
    return tuple(getattr(value, field.name) for field in fields(value) if field.name != "recorded")


def _aligners(blueprint: Blueprint, shape: StudentShape) -> nn.ModuleList:
    run, compared = blueprint.run, blueprint.compared
    if run.teacher.path is None or run.objective.hidden.weight == 0:
        return nn.ModuleList()
    if run.objective.hidden.aligner != "filter":
        return build_aligners(run.objective.hidden, shape, compared.states, blueprint.teacher_width)
    directory = blueprint.student_filters
    if directory is None:
        raise ConfigError(f"objective.hidden.aligner: filter, but teacher.filters is not set. {HOW_TO_LEARN}.")
    # The teacher's own filters are the student's, where it starts as its teacher.
    layers = compared.student if run.student.filters else compared.teacher
    return filter_aligners(FilterSet.load(directory), layers, shape)


def prepare_for_training(model: PreTrainedModel, run: RunConfig) -> None:
    """A student that is distilled on text has no dropout: with it, KL is above zero before anything happened (ours).
    Whatever else is trained has the model's own, or what the recipe says."""
    distilled = run.teacher.path is not None and run.task.task.is_language_modeling
    chosen = run.student.dropout if run.student.dropout is not None else 0.0 if distilled else None
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            is_head = "." not in name or name.startswith("pooler.")
            own = run.student.head_dropout if is_head and run.student.head_dropout is not None else chosen
            if own is not None and (own == 0 or not name.startswith("pooler.")):  # DeBERTa's drops nothing by itself
                module.p = own
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
