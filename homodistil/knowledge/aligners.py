"""Aligners: the map through which one hidden state of the student is compared with the teacher's.

The hidden group owns a map's student side: it is sliced with the student and never scored. A narrower student gets
newly built aligners; their weights are carried over like all others. The comparison itself is objective/'s, and what
a teacher's own filters let through teacher.py's.
"""

# B sequences, n compared tokens, D / E student's / teacher's hidden width, u compared units of the teacher's

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from homodistil.config import HiddenTerm
from homodistil.knowledge.filters import Filter, FilterSet
from homodistil.knowledge.selection import at_units
from homodistil.models.groups import Member
from homodistil.models.shape import HIDDEN, StudentShape


class Aligner(Protocol):
    """(B, n, D) and (B, n, E) -> two tensors of one shape, to be compared. With units, (u,) or (B, n, u), the
    teacher's are those alone, (B, n, u)."""

    def __call__(
        self, student_BnD: Tensor, teacher_Bnu: Tensor, units: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

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

    def forward(self, student_BnD: Tensor, teacher_Bnu: Tensor, units: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _of_units(self.projection(student_BnD), units), teacher_Bnu

    def members(self, prefix: str) -> tuple[Member, ...]:
        return (Member(f"{prefix}.projection.weight", axis=1, scored_with=None),)


class IndexedAligner(nn.Module):
    """The teacher's own kept dimensions: no parameters, no arithmetic.

    Where only some units are compared, they meet the kept dimensions: a token is compared in those that are both, and
    scaled so that the mean over its u units is the mean over these. In fp32: a rounded factor on both sides would
    cost more than their difference.
    """

    kept: Tensor
    """(D,) int64."""
    places: Tensor
    """(E,) int64: where the student has a teacher's dimension; -1 for one it has lost."""

    def __init__(self, kept: Sequence[int], teacher_width: int) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor(kept), persistent=False)
        places = torch.full((teacher_width,), -1)
        places[self.kept] = torch.arange(len(kept))
        self.register_buffer("places", places, persistent=False)

    def forward(self, student_BnD: Tensor, teacher_Bnu: Tensor, units: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if units is None:
            return student_BnD, teacher_Bnu.index_select(-1, self.kept)
        places = self.places[units]
        shared = (places >= 0).float()
        scale = shared * (places.shape[-1] / shared.sum(dim=-1, keepdim=True).clamp(min=1)).sqrt()
        return at_units(student_BnD, places.clamp(min=0)) * scale, teacher_Bnu * scale

    def members(self, prefix: str) -> tuple[Member, ...]:
        return ()


class FilterAligner(nn.Module):
    """The student's task-aware filter, which goes on learning; what it faces has been through the teacher's (TED)."""

    def __init__(self, filter_: Filter) -> None:
        super().__init__()
        self.filter = filter_

    def forward(self, student_BnD: Tensor, teacher_Bnu: Tensor, units: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _of_units(self.filter(student_BnD), units), teacher_Bnu

    def members(self, prefix: str) -> tuple[Member, ...]:
        return (Member(f"{prefix}.filter.{self.filter.entrance}", axis=1, scored_with=None),)


def build_aligners(
    term: HiddenTerm, shape: StudentShape, states: int, teacher_width: int | None = None
) -> nn.ModuleList:
    """One aligner for each of `states` hidden states that are compared, for a student of `shape`. teacher_width: by
    default that of the model which the student was pruned out of."""
    kept, teacher_width = shape.kept[HIDDEN], teacher_width or shape.teacher.hidden
    if term.aligner == "indexed":
        return nn.ModuleList(IndexedAligner(kept, teacher_width) for _ in range(states))
    return nn.ModuleList(ProjectionAligner(kept, teacher_width, term.projection_init) for _ in range(states))


def filter_aligners(filters: FilterSet, layers: Sequence[int], shape: StudentShape) -> nn.ModuleList:
    """The filters at these layers, as far as they read what a student of `shape` still has."""
    kept = shape.kept[HIDDEN]
    return nn.ModuleList(FilterAligner(narrowed(filters.filter(layer), kept)) for layer in layers)


def _of_units(aligned_BnE: Tensor, units: Tensor | None) -> Tensor:
    return aligned_BnE if units is None else at_units(aligned_BnE, units)


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
