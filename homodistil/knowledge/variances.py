"""Variances of a teacher's hidden states: what the right weight of the hidden term depends on, and, where no LayerNorm
has standardised them, what their squared differences are divided by (ours: docs/architecture.md, "Decisions")."""

# B sequences, n compared tokens, u compared units, E teacher's width

from __future__ import annotations

import torch
from torch import Tensor

from homodistil.batch import Batch
from homodistil.knowledge.teacher import Teacher
from homodistil.ranks import Ranks
from homodistil.signals import Kept


@torch.no_grad()
def hidden_variances(teacher: Teacher, batches: list[Batch], ranks: Ranks, width: int) -> tuple[float, ...]:
    """Of each compared state over the compared tokens of held-out text: a unit's variance, on average over the `width`
    units, each as often as it was kept. Rows that only fill up a rank's share don't count. Collective."""
    sums: Tensor | None = None
    for batch in batches:
        rows = batch.to(ranks.device)
        knowledge, real_B1 = teacher.knowledge(rows), rows.weights.sum(dim=1, keepdim=True) > 0
        parts = knowledge.kept or (Kept(rows.attention_mask),) * len(knowledge.hidden_states)
        both = zip(knowledge.hidden_states, parts, strict=True)
        moments = torch.stack([_moments(state, kept, kept.counted.bool() & real_B1, width) for state, kept in both])
        sums = moments if sums is None else sums + moments
    assert sums is not None
    count, total, squares = ranks.sum(sums).unbind(dim=1)  # (states, E) each
    spread = squares - total.square() / count.clamp(min=1)
    return tuple((spread.sum(dim=1) / count.sum(dim=1).clamp(min=1)).tolist())


def _moments(values_Bnu: Tensor, kept: Kept, valid_Bn: Tensor, width: int) -> Tensor:
    """(3, E) float64: of each unit how often it was kept, its sum, its sum of squares."""
    values = values_Bnu[valid_Bn].double()
    powers = torch.stack([torch.ones_like(values), values, values.square()])
    if kept.units is None:
        return powers.sum(dim=1)
    units = (kept.units if kept.units.ndim == 1 else kept.units[valid_Bn]).expand_as(values)
    return powers.new_zeros(3, width).index_add_(1, units.flatten(), powers.flatten(1))
