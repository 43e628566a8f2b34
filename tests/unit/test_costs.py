"""Counted work against the same work written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from homodistil.config import RunConfig
from homodistil.costs import Cost, micro_batch_cost
from homodistil.models.attention import attention_implementation
from homodistil.models.bert import BertFamily
from homodistil.models.shape import Widths
from homodistil.student import Blueprint
from tests import fixtures, twin

LENGTH, SLOTS, LAYERS = 48, 7, 3
FULL, NARROW = Widths(72, 136, 6, 12), Widths(40, 64, 5, 8)


def blueprint(teacher: bool = True, **sections: Any) -> Blueprint:
    objective = {name: {"weight": weight} for name, weight in twin.WEIGHTS.items()}
    values = {"objective": objective, "teacher": {"path": "in memory" if teacher else None}, **sections}
    run = RunConfig.model_validate(values)
    return Blueprint(BertFamily(), fixtures.bert_config(), run, attention_implementation("sdpa"))


def counted(widths: Widths, sequences: int = 4, plan: Blueprint | None = None, maps: bool = False) -> Cost:
    return micro_batch_cost(plan or blueprint(), widths, sequences, LENGTH, torch.float32, maps)


def forward(widths: Widths, sequences: int) -> float:
    """FLOP of all linear layers and of the vocabulary at scored positions."""
    inner = widths.heads * widths.head_width
    layer = 4 * widths.hidden * inner + 2 * widths.hidden * widths.ffn
    head = SLOTS * (widths.hidden + fixtures.VOCABULARY) * widths.hidden
    return 2 * sequences * (LENGTH * LAYERS * layer + head)


@pytest.mark.parametrize("widths", [FULL, NARROW])
def test_products_are_a_forward_of_the_teacher_and_three_of_the_student_and_its_projections(widths: Widths) -> None:
    projections = 2 * 4 * LENGTH * (LAYERS + 1) * widths.hidden * FULL.hidden
    assert counted(widths).products == forward(FULL, 4) + 3 * (forward(widths, 4) + projections)


def test_only_kept_tokens_of_kept_states_are_projected() -> None:
    states, tokens = 2, 5
    plan = blueprint(knowledge={"keep": f"{states}l_{tokens}t_0.2h"}, objective={"attention": {"weight": 0}})
    projections = 2 * 4 * tokens * states * NARROW.hidden * FULL.hidden
    assert counted(NARROW, plan=plan).products == forward(FULL, 4) + 3 * (forward(NARROW, 4) + projections)


def test_without_a_teacher_there_is_only_the_student() -> None:
    cost = counted(FULL, plan=blueprint(teacher=False))
    assert cost.products == 3 * forward(FULL, 4)
    assert cost.teacher_parameters == 0


def test_attention_is_counted_whole_or_map_by_map() -> None:
    whole, maps = counted(FULL), counted(FULL, maps=True)
    one = 4 * 4 * LENGTH * LENGTH * FULL.hidden * LAYERS
    assert maps.batched - whole.batched == (1 + 3) * one
    assert maps.attention == 0 and whole.attention > 3 * one
    assert maps.traffic > whole.traffic


def test_parameters_are_those_of_the_modules_and_tied_ones_count_once() -> None:
    cost = counted(FULL)
    model = sum(p.numel() for p in fixtures.bert().parameters())
    assert cost.teacher_parameters == model
    assert cost.parameters == model + (LAYERS + 1) * (72 * 72 + 72)


def test_work_is_a_straight_line_in_the_sequences() -> None:
    one, two, five = (counted(NARROW, sequences) for sequences in (1, 2, 5))
    for name in ("products", "batched", "attention", "traffic"):
        first, second, fifth = (getattr(cost, name) for cost in (one, two, five))
        assert fifth == pytest.approx(first + 4 * (second - first), rel=0.02), name


def test_recomputing_activations_holds_less_and_multiplies_more() -> None:
    plain = counted(FULL, 16)
    recomputed = counted(FULL, 16, blueprint(performance={"activation_checkpointing": True}))
    assert recomputed.activations < plain.activations
    assert recomputed.products > plain.products
