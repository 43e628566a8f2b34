"""Teacher heads and columns in the student's order."""

from __future__ import annotations

import torch

from homodistil.objective.pairing import HeadPairing
from tests.unit.objective.made_up import FULL, TEACHER, narrow_shape

ROWS, TOKENS = 2, 5


def _teacher() -> tuple[torch.Tensor, torch.Tensor]:
    """Each entry of (B, A, T, e) says which head and column it belongs to."""
    head, column = torch.arange(TEACHER.heads)[:, None, None] * 10, torch.arange(TEACHER.head_width)
    queries = (head + column).expand(ROWS, TEACHER.heads, TOKENS, TEACHER.head_width)
    return queries, queries + 100


def test_kept_heads_come_in_order_each_with_its_kept_columns_first() -> None:
    for layer, expected in enumerate([[[1, 2, 3, 0], [20, 21, 23, 22]], [[10, 11, 13, 12], [20, 21, 22, 23]]]):
        queries, keys = HeadPairing(narrow_shape(), layer)(_teacher())
        assert queries.shape == (ROWS, 2, TOKENS, TEACHER.head_width)
        assert queries[1, :, 3].tolist() == expected
        assert torch.equal(keys, queries + 100)


def test_the_scores_of_kept_heads_are_the_teachers_own() -> None:
    query, key = torch.randn(2, ROWS, TEACHER.heads, TOKENS, TEACHER.head_width, dtype=torch.float64)
    paired_query, paired_key = HeadPairing(narrow_shape(), layer=1)((query, key))
    torch.testing.assert_close(paired_query @ paired_key.mT, (query @ key.mT)[:, 1:3], rtol=1e-12, atol=1e-12)


def test_an_unpruned_student_is_compared_with_the_teacher_as_it_is() -> None:
    teacher = _teacher()
    assert HeadPairing(FULL, layer=0)(teacher) is teacher


def test_the_columns_move_with_the_module_but_are_not_saved() -> None:
    pairing = HeadPairing(narrow_shape(), layer=0)
    assert pairing.state_dict() == {}
    assert pairing.to("meta").columns.device.type == "meta"
