"""A student compiled along a ladder: one graph per shape, each of them run, or an error; never eager in silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from homodistil.config import RunConfig
from homodistil.kernels.compiling import compile_encoder
from homodistil.models.attention import attention_implementation
from homodistil.models.bert import BertFamily
from homodistil.models.shape import Widths
from homodistil.student import Blueprint, Student
from tests import fixtures

RUNGS = [Widths(heads * width, 16 * heads, heads, width) for heads in (6, 5, 4, 3) for width in (12, 11, 10)]
"""More than the eight recompilations after which dynamo by default gives up with a log line."""


class Graphs:
    """A compiler that counts what it is given and how often that runs."""

    def __init__(self) -> None:
        self.compiled = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.compiled += 1

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return graph.forward(*arguments)

        return run


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    counted = Graphs()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    return counted


def students() -> list[Student]:
    run = RunConfig.model_validate({"teacher": {"path": "in memory"}})
    blueprint = Blueprint(BertFamily(), fixtures.bert_config(), run, attention_implementation("sdpa"))
    return [Student.unfilled(blueprint, blueprint.full_shape.first(widths)) for widths in RUNGS]


def test_every_rung_of_a_ladder_is_one_graph_and_every_forward_runs_one(graphs: Graphs) -> None:
    rows = fixtures.batch()
    for done, student in enumerate(students(), start=1):
        compile_encoder(student.model)
        for _ in range(3):
            logits = student.family.signals(student.model, rows).logits
            logits.sum().backward()
        assert (graphs.compiled, graphs.runs) == (done, 3 * done)


def test_full_batches_and_evaluation_have_a_graph_of_their_own(graphs: Graphs) -> None:
    padded, student = fixtures.batch(), students()[0]
    full = replace(padded, attention_mask=torch.ones_like(padded.attention_mask), padded=False)
    compile_encoder(student.model)
    for _ in range(2):
        for rows in (padded, full):
            student.family.signals(student.model, rows)
            with torch.no_grad():
                student.family.signals(student.model.eval(), rows)
            student.model.train()
    assert (graphs.compiled, graphs.runs) == (4, 8)


def test_code_that_no_graph_can_hold_is_an_error(graphs: Graphs) -> None:
    student = students()[0]
    layer: Any = student.model.base_model.encoder.layer[1]  # type: ignore[union-attr]
    layer.register_forward_hook(lambda module, inputs, output: print("a graph cannot print"))
    compile_encoder(student.model)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        student.family.signals(student.model, fixtures.batch())


def test_a_shape_that_changes_under_one_module_stops_at_the_limit(graphs: Graphs) -> None:
    student = students()[0]
    compile_encoder(student.model)
    limit = torch._dynamo.config.patch(recompile_limit=2)
    with limit, pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for sequences in (2, 3, 4, 5):
            student.family.signals(student.model, fixtures.batch(sequences))
