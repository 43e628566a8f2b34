"""AxisSums: one flat float64 vector that holds, for every scored (parameter, axis), one number per position.

Made by reducing flat fragments over all other axes. What the numbers mean is the metric's business, and how they
become scores is importance.py's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from homodistil.models.groups import Member, Positions, PrunableGroup
from homodistil.pruning.rows import whole_rows

# N positions over all scored (parameter, axis), n elements of a fragment, R rows it touches, U units of a group


class AxisSums:
    """Layout of the flat vectors: the same on every rank, whatever the rank owns."""

    def __init__(self, groups: Iterable[PrunableGroup], device: torch.device) -> None:
        lengths: dict[tuple[str, int], int] = {}
        for group in groups:
            for member in group.members:
                if member.scored_with is not None:
                    key, end = (member.parameter, member.axis), member.offset + group.size * member.width
                    lengths[key] = max(lengths.get(key, 0), end)
        self._slots: dict[tuple[str, int], slice] = {}
        self.size = 0
        for key in sorted(lengths):
            self._slots[key] = slice(self.size, self.size + lengths[key])
            self.size += lengths[key]
        self._parameters = {parameter for parameter, _ in self._slots}
        self._device = device

    def zeros(self) -> Tensor:
        """(N,) float64."""
        return torch.zeros(self.size, dtype=torch.float64, device=self._device)

    def covers(self, parameter: str) -> bool:
        """Whether any axis of a parameter is scored."""
        return parameter in self._parameters

    def add(self, totals: Tensor, parameter: str, shape: torch.Size, start: int, values: Tensor) -> None:
        """Add a fragment's per-weight values (n,), elements [start, start + n) of the parameter, to totals (N,)."""
        axes = [axis for axis in range(len(shape)) if (parameter, axis) in self._slots]
        if not axes or len(values) == 0:
            return
        first, rows = whole_rows(values, shape, start)
        for axis in axes:
            others = [other for other in range(rows.ndim) if other != axis]
            sums = rows.sum(dim=others, dtype=torch.float64) if others else rows
            slot = totals[self._slots[parameter, axis]]
            (slot[first : first + len(sums)] if axis == 0 else slot).add_(sums)

    def units(self, totals: Tensor, group: PrunableGroup, member: Member) -> Tensor:
        """(U,): each unit's sum over the positions that it owns through `member`."""
        owned = totals[self._slots[member.parameter, member.axis]].narrow(0, member.offset, group.size * member.width)
        return owned.view(group.size, member.width).sum(dim=1)

    def narrow(self, totals: Tensor, positions: Positions) -> Tensor:
        """totals (N,) at the kept positions, in the layout of the narrowed groups."""
        return torch.cat([totals[slot][positions[key].to(totals.device)] for key, slot in self._slots.items()])
