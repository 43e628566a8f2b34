"""Aligners: the map through which one hidden state of the student is compared with the teacher's.

The hidden group owns a map's student side: it is sliced with the student and never scored. A narrower student gets
newly built aligners; their weights are carried over like all others. The comparison itself is objective/'s, and what
a teacher's own filters let through teacher.py's.
"""

# B sequences, T tokens, D / E student's / teacher's hidden width

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from homodistil.config import HiddenTerm
from homodistil.knowledge.filters import Filter, FilterSet
from homodistil.models.groups import Member
from homodistil.models.shape import HIDDEN, StudentShape


class Aligner(Protocol):
    """(B, T, D) and (B, T, E) -> two tensors of one shape, to be compared."""

    def __call__(self, student_BTD: Tensor, teacher_BTE: Tensor) -> tuple[Tensor, Tensor]: ...

    def members(self, prefix: str) -> tuple[Member, ...]:
        """What the hidden group owns of the parameters below `prefix`."""
        ...


class ProjectionAligner(nn.Module):
    """A learned linear map from the student's width to the teacher's (HomoDistil; TED's LWD baseline).

    `identity` starts with each kept dimension mapped to itself and the lost ones to 0, so that an unpruned student
    begins with no loss; `random` is torch's own start for a linear layer. The bias starts at 0 in both.
    """

    def __init__(self, kept: Sequence[int], teacher_width: int, init: Literal["identity", "random"]) -> None:
        super().__init__()
        self.projection = nn.Linear(len(kept), teacher_width)
        nn.init.zeros_(self.projection.bias)
        if init == "identity":
            nn.init.zeros_(self.projection.weight)
            with torch.no_grad():
                self.projection.weight[list(kept), range(len(kept))] = 1.0

    def forward(self, student_BTD: Tensor, teacher_BTE: Tensor) -> tuple[Tensor, Tensor]:
        return self.projection(student_BTD), teacher_BTE

    def members(self, prefix: str) -> tuple[Member, ...]:
        return (Member(f"{prefix}.projection.weight", axis=1, scored_with=None),)


class IndexedAligner(nn.Module):
    """The teacher's own kept dimensions: no parameters, no arithmetic."""

    kept: Tensor
    """(D,) int64."""

    def __init__(self, kept: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor(kept), persistent=False)

    def forward(self, student_BTD: Tensor, teacher_BTE: Tensor) -> tuple[Tensor, Tensor]:
        return student_BTD, teacher_BTE.index_select(-1, self.kept)

    def members(self, prefix: str) -> tuple[Member, ...]:
        return ()


class FilterAligner(nn.Module):
    """The student's task-aware filter, which goes on learning; what it faces has been through the teacher's (TED)."""

    def __init__(self, filter_: Filter) -> None:
        super().__init__()
        self.filter = filter_

    def forward(self, student_BTD: Tensor, teacher_BTE: Tensor) -> tuple[Tensor, Tensor]:
        return self.filter(student_BTD), teacher_BTE

    def members(self, prefix: str) -> tuple[Member, ...]:
        return (Member(f"{prefix}.filter.{self.filter.entrance}", axis=1, scored_with=None),)


def build_aligners(
    term: HiddenTerm, shape: StudentShape, states: int, teacher_width: int | None = None
) -> nn.ModuleList:
    """One aligner for each of `states` hidden states that are compared, for a student of `shape`. teacher_width: by
    default that of the model which the student was pruned out of."""
    kept, teacher_width = shape.kept[HIDDEN], teacher_width or shape.teacher.hidden
    if term.aligner == "indexed":
        return nn.ModuleList(IndexedAligner(kept) for _ in range(states))
    return nn.ModuleList(ProjectionAligner(kept, teacher_width, term.projection_init) for _ in range(states))


def filter_aligners(filters: FilterSet, layers: Sequence[int], shape: StudentShape) -> nn.ModuleList:
    """The filters at these layers, as far as they read what a student of `shape` still has."""
    kept = shape.kept[HIDDEN]
    return nn.ModuleList(FilterAligner(narrowed(filters.filter(layer), kept)) for layer in layers)


def narrowed(filter_: Filter, kept: Sequence[int]) -> Filter:
    """A filter less the inputs that its model has lost, in place."""
    first = filter_.inner or filter_.linear
    first.weight = nn.Parameter(first.weight.detach()[:, list(kept)].contiguous())
    first.in_features = len(kept)
    return filter_


def hidden_members(aligners: nn.ModuleList, prefix: str) -> tuple[Member, ...]:
    """What the hidden group owns besides the model's tensors, when `aligners` are the module called `prefix`."""
    return tuple(
        member for k, aligner in enumerate(aligners) for member in cast(Aligner, aligner).members(f"{prefix}.{k}")
    )
