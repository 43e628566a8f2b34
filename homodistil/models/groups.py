"""Which slices of which tensors go together: the one vocabulary that scoring and slicing share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Member:
    """Unit u of a group owns positions [offset + u * width, offset + (u + 1) * width) of an axis.

    `scored_with` names the (matrix, axis) whose vector these positions' sums are added to before it is
    normalised: a bias counts with its matrix's rows, a LayerNorm with the matrix that writes it. None: the
    tensor is sliced, never scored.
    """

    parameter: str
    axis: int
    scored_with: tuple[str, int] | None
    offset: int = 0
    width: int = 1


@dataclass(frozen=True)
class PrunableGroup:
    """Units that live and die together. `parent` is a head's (group, unit): without it, the group is gone."""

    name: str
    size: int
    members: tuple[Member, ...]
    parent: tuple[str, int] | None = None


def rows(linear: str, offset: int = 0, width: int = 1) -> tuple[Member, ...]:
    """Outputs of a linear map: its rows, with their biases."""
    matrix = (f"{linear}.weight", 0)
    return Member(*matrix, matrix, offset, width), Member(f"{linear}.bias", 0, matrix, offset, width)


def columns(linear: str, offset: int = 0, width: int = 1) -> tuple[Member, ...]:
    """Inputs of a linear map, or the dimensions of an embedding."""
    matrix = (f"{linear}.weight", 1)
    return (Member(*matrix, matrix, offset, width),)


def norm(layer_norm: str, written_by: tuple[str, int]) -> tuple[Member, ...]:
    """Gain and bias of a LayerNorm, scored with the matrix (and axis) that writes what it standardises."""
    return Member(f"{layer_norm}.weight", 0, written_by), Member(f"{layer_norm}.bias", 0, written_by)


Positions = Mapping[tuple[str, int], torch.Tensor]
"""(parameter, axis) -> kept positions along that axis, ascending, int64."""


def kept_positions(groups: Iterable[PrunableGroup], kept: Mapping[str, tuple[int, ...]]) -> Positions:
    """What a plan leaves of every axis it touches. `kept`: group -> kept units, ascending.

    Members of one axis must tile it from 0; a group missing from `kept` lost all its units (a pruned
    head's dimensions). A position stays when every group that owns it keeps it.
    """
    groups = list(groups)
    lengths: dict[tuple[str, int], int] = {}
    for group in groups:
        for m in group.members:
            key, end = (m.parameter, m.axis), m.offset + group.size * m.width
            lengths[key] = max(lengths.get(key, 0), end)
    alive = {key: torch.ones(length, dtype=torch.bool) for key, length in lengths.items()}
    for group in groups:
        lost = torch.ones(group.size, dtype=torch.bool)
        lost[list(kept.get(group.name, ()))] = False
        for m in group.members:
            owned = alive[m.parameter, m.axis][m.offset : m.offset + group.size * m.width]
            owned.view(group.size, m.width)[lost] = False
    return {key: mask.nonzero().flatten() for key, mask in alive.items()}
