"""Aligners: where they start, what they compare, and how they follow a prune."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from homodistil.config import HiddenTerm
from homodistil.knowledge.aligners import build_aligners, hidden_members
from homodistil.models.groups import Member, PrunableGroup, kept_positions
from homodistil.models.shape import HIDDEN, StudentShape, Widths

TEACHER = Widths(hidden=6, ffn=8, heads=2, head_width=3)
FULL = StudentShape.full(2, TEACHER)
KEPT = (0, 2, 5)
NARROW = FULL.narrowed({**FULL.kept, HIDDEN: KEPT})


def _states(width: int, seed: int) -> Tensor:
    return torch.randn(2, 4, width, generator=torch.Generator().manual_seed(seed))


def _term(aligner: str, init: str = "identity") -> HiddenTerm:
    return HiddenTerm.model_validate({"aligner": aligner, "projection_init": init})


@pytest.mark.parametrize("aligner", ["projection", "indexed"])
def test_an_unpruned_student_starts_at_no_difference(aligner: str) -> None:
    (align,) = build_aligners(_term(aligner), FULL, states=1)
    states = _states(6, seed=0)
    student, teacher = align(states, states.clone())
    assert torch.equal(student, teacher)


def test_an_identity_projection_puts_each_dimension_where_it_came_from() -> None:
    (align,) = build_aligners(_term("projection"), NARROW, states=1)
    states = _states(3, seed=0)
    student, teacher = align(states, _states(6, seed=1))
    assert torch.equal(teacher, _states(6, seed=1))
    assert torch.equal(student[..., list(KEPT)], states)
    assert student[..., [1, 3, 4]].count_nonzero() == 0


def test_a_random_projection_starts_elsewhere_with_a_zero_bias() -> None:
    (align,) = build_aligners(_term("projection", "random"), FULL, states=1)
    student, teacher = align(_states(6, seed=0), _states(6, seed=0))
    assert not torch.allclose(student, teacher, atol=0.1)
    assert align.projection.bias.count_nonzero() == 0


def test_indexed_units_in_bf16_differ_by_what_the_states_differ_by() -> None:
    wide, kept, generator = 512, 384, torch.Generator().manual_seed(0)
    shape = StudentShape.full(1, Widths(hidden=wide, ffn=8, heads=2, head_width=wide // 2))
    narrow = shape.narrowed({**shape.kept, HIDDEN: tuple(range(kept))})
    (align,) = build_aligners(_term("indexed"), narrow, states=1)
    teacher = torch.randn(2, 8, wide, generator=generator)
    student = (teacher[..., :kept] + 0.01 * torch.randn(2, 8, kept, generator=generator)).bfloat16()
    units = teacher.abs().topk(64, dim=-1).indices.sort(dim=-1).values
    handed = teacher.bfloat16().gather(-1, units)
    ours, theirs = align(student, handed, units)
    found = (ours - theirs).double().square().sum()
    exact = torch.zeros((), dtype=torch.float64)
    for row, token in ((r, t) for r in range(2) for t in range(8)):
        here = [unit for unit in units[row, token].tolist() if unit < kept]
        pairs = student[row, token, here].double() - teacher[row, token, here].bfloat16().double()
        exact += pairs.square().sum() * 64 / len(here)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)


def test_indexed_compares_the_teachers_own_dimensions_and_owns_nothing() -> None:
    aligners = build_aligners(_term("indexed"), NARROW, states=1)
    student, teacher = aligners[0](_states(3, seed=0), _states(6, seed=1))
    assert torch.equal(student, _states(3, seed=0))
    assert torch.equal(teacher, _states(6, seed=1)[..., list(KEPT)])
    assert list(aligners.parameters()) == [] and aligners.state_dict() == {}
    assert hidden_members(aligners, "aligners") == ()


def test_each_hidden_state_has_an_aligner_whose_student_side_the_hidden_group_owns() -> None:
    aligners = build_aligners(_term("projection"), FULL, states=3)
    members = hidden_members(aligners, "aligners")
    assert members == tuple(Member(f"aligners.{k}.projection.weight", axis=1, scored_with=None) for k in range(3))
    shapes = {f"aligners.{name}": p.shape for name, p in aligners.named_parameters()}
    assert all(shapes[m.parameter][m.axis] == FULL.widths.hidden for m in members)


def test_a_sliced_projection_fits_the_narrower_students_and_maps_as_before() -> None:
    wide, narrow = (build_aligners(_term("projection", "random"), shape, states=2) for shape in (FULL, NARROW))
    group = PrunableGroup(HIDDEN, FULL.widths.hidden, hidden_members(wide, "aligners"))
    positions = kept_positions([group], {HIDDEN: KEPT})
    weights = wide.state_dict(prefix="aligners.")
    for (parameter, axis), kept in positions.items():
        weights[parameter] = weights[parameter].index_select(axis, kept)
    narrow.load_state_dict({name.removeprefix("aligners."): weight for name, weight in weights.items()})
    states = _states(6, seed=0)
    without_the_lost = torch.zeros_like(states)
    without_the_lost[..., list(KEPT)] = states[..., list(KEPT)]
    expected, _ = wide[1](without_the_lost, states)
    torch.testing.assert_close(narrow[1](states[..., list(KEPT)], states)[0], expected)
