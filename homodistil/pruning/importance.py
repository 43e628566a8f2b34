"""Importance: one score per unit of every group, the same on all ranks, from what each rank sees of its shards.

The metric decides what is summed per axis position; here it is agreed over ranks, weighed across the tensors of a
group and added up per unit. Choosing units by score is coordinator.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from homodistil.config import PruningConfig
from homodistil.models.groups import Member, Positions, PrunableGroup
from homodistil.pruning.metrics import build_metric
from homodistil.pruning.sums import AxisSums
from homodistil.ranks import Ranks
from homodistil.state import Fragment

# N positions over all scored (parameter, axis), U units of a group

Across = Literal["per_matrix", "none", "per_parameter"]
Bucket = tuple[tuple[str, int] | None, int]


class Importance:
    """Observes every update; scores only when a plan is made."""

    def __init__(self, config: PruningConfig, groups: Sequence[PrunableGroup], ranks: Ranks, seed: int) -> None:
        self._across: Across = config.across
        self._ranks = ranks
        self._groups = list(groups)
        self._axes = AxisSums(groups, ranks.device)
        self._metric = build_metric(config, self._axes, seed)

    @property
    def observed(self) -> int:
        """Updates scored so far, the same on all ranks."""
        return self._metric.observed

    @torch.no_grad()
    def observe(self, fragments: Iterable[Fragment]) -> None:
        """Take in one update, unless any rank's gradient is not finite. Collective.

        The ranks agree on that by one all-reduced number: a rank that skipped alone would score other updates
        than the rest, and per-weight buffers cannot be undone once a later collective reveals it.
        """
        fragments = list(fragments)
        self._metric.attach(fragments, self._axes)
        largest = get_total_norm([f.gradient for f in fragments if f.gradient is not None], norm_type=inf)
        broken = (~torch.isfinite(largest)).float().to(self._ranks.device)
        if not self._ranks.sum(broken.reshape(1)).any():
            self._metric.observe(fragments, self._axes)

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Group name -> (U,) float64. Collective: one all-reduce."""
        totals = self._ranks.sum(self._metric.totals(self._axes))
        return {group.name: self._score(group, totals) for group in self._groups}

    def rebase(self, groups: Sequence[PrunableGroup], positions: Positions) -> None:
        """Go on with a narrowed student: its groups, and the positions that were kept of the old ones."""
        self._metric.narrow(self._axes, positions)
        self._groups = list(groups)
        self._axes = AxisSums(groups, self._ranks.device)

    def shares(self) -> dict[str, Tensor]:
        """Name -> (N,): this rank's share of each global total, copied; per-weight buffers travel with the weights."""
        return {name: vector.clone() for name, vector in self._metric.vectors.items()}

    def load(self, shares: Mapping[str, Tensor], observed: int) -> None:
        """Go on after `observed` updates; a share that no rank left to this one is zero."""
        self._metric.observed = observed
        for name, vector in self._metric.vectors.items():
            vector.copy_(shares.get(name, torch.zeros_like(vector)))

    def _score(self, group: PrunableGroup, totals: Tensor) -> Tensor:
        buckets: dict[Bucket, Tensor] = {}
        for member in group.members:
            if member.scored_with is not None:
                units = self._axes.units(totals, group, member)
                bucket = _bucket(member, self._across)
                buckets[bucket] = buckets[bucket] + units if bucket in buckets else units
        weighed = [vector if self._across == "none" else _normalised(vector) for vector in buckets.values()]
        return torch.stack(weighed).sum(dim=0)


def _bucket(member: Member, across: Across) -> Bucket:
    """What a member's vector is added to before it is normalised. Matrices that lie side by side in one tensor, as
    GPT-2's queries, keys and values do, are told apart by their offsets."""
    buckets: dict[Across, Bucket] = {
        "per_matrix": (member.scored_with, member.offset),
        "per_parameter": ((member.parameter, member.axis), 0),
        "none": (None, 0),
    }
    return buckets[across]


def _normalised(vector: Tensor) -> Tensor:
    """Scaled to sum 1; a tensor without any importance stays zero."""
    total = vector.sum()
    return vector / torch.where(total > 0, total, 1.0)
