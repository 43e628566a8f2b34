"""Which of the teacher's heads and head columns each of a student layer's is compared with, from the shape."""

# B sequences, T tokens, A / a teacher's / student's heads, e / d teacher's / student's head width

from __future__ import annotations

import torch
from torch import Tensor, nn

from homodistil.kernels.gram_attention import QueriesKeys
from homodistil.models.shape import StudentShape, heads, qk


class HeadPairing(nn.Module):
    """One layer's teacher queries and keys, in the order of the student's heads and columns."""

    columns: Tensor
    """(a * e,) int64, into the teacher's A * e columns: head by head, kept ones first, then the lost."""

    def __init__(self, shape: StudentShape, layer: int) -> None:
        super().__init__()
        width = shape.teacher.head_width
        columns = [head * width + column for head in shape.kept[heads(layer)] for column in _order(shape, layer, head)]
        self.is_identity = columns == list(range(shape.teacher.heads * width))
        self.head_width = width
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, teacher: QueriesKeys) -> QueriesKeys:
        """(B, A, T, e) -> (B, a, T, e) each. The scores of the heads that stay are unchanged."""
        return teacher if self.is_identity else (self._paired(teacher[0]), self._paired(teacher[1]))

    def _paired(self, states: Tensor) -> Tensor:
        beside_each_other = states.transpose(1, 2).flatten(2)  # (B, T, A * e)
        return beside_each_other.index_select(2, self.columns).unflatten(2, (-1, self.head_width)).transpose(1, 2)


def _order(shape: StudentShape, layer: int, head: int) -> list[int]:
    kept = shape.kept[qk(layer, head)]
    return [*kept, *sorted(set(range(shape.teacher.head_width)) - set(kept))]
