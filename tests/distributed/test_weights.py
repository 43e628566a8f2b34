"""Measured weights: the gradients of whole updates, however they are cut into ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import BertForMaskedLM

from tests import runs
from tests.pool import RankPool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare(tmp_path_factory.mktemp("weights"))


def norms(values: dict[str, Any], folder: Path) -> dict[str, float]:
    """In a rank: of each term, two updates after the first rung. Collective."""
    from homodistil import weights
    from homodistil.ranks import Ranks

    try:
        with patch.object(weights, "SETTLING", 2):
            return weights.settled_norms(*runs.planned(values, folder, stage=2), Ranks.current())
    finally:
        runs._release_engines()


def test_gradients_are_those_of_whole_updates(folder: Path, pool: Callable[[int], RankPool]) -> None:
    found = [
        pool(ranks).run(norms, runs.configuration(folder, "weights", data__micro_batch=size), folder)
        for ranks, size in ((1, 8), (1, 2), (2, 1))
    ]
    assert found[2][0] == found[2][1]
    for one in found:
        assert one[0].keys() == {"task", "kl", "hidden", "attention"}
        assert one[0] == pytest.approx(found[0][0], rel=1e-3)
        assert min(one[0].values()) > 0


def task_norm(values: dict[str, Any], folder: Path) -> tuple[float, float]:
    """In a rank: the measured norm of the task's gradient for a student that is still its teacher, and stock BERT's."""
    from homodistil import opening, weights
    from homodistil.models.loading import load_model
    from homodistil.ranks import Ranks
    from homodistil.resume import RunState
    from homodistil.student import Student

    ranks, (plan, settings) = Ranks.current(), runs.planned(values, folder, stage=2)
    try:
        teacher, stream = opening.open_teacher_and_stream(plan, settings, ranks)
        batches = [batch for _, batch in stream.updates(0, 2)]
        student = opening.open_student(plan, RunState(0, plan.start), ranks)
        module: Student = student.replica()
        assert teacher is not None
        measured = weights.gradient_norms(module, teacher, plan.run.objective, batches, 2, ranks)["task"]
        teacher.close()
        student.close()
        stock = load_model(folder / "teacher", torch.float32)
        assert isinstance(stock, BertForMaskedLM)
        for batch in batches:
            logits = stock.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            rows = torch.arange(len(batch)).unsqueeze(1).expand_as(batch.scored_positions)
            right = logits[rows, batch.scored_positions].log_softmax(-1).gather(-1, batch.labels.unsqueeze(-1))
            (-(right.squeeze(-1) * batch.weights).sum() / batch.weights.sum()).backward()
        gradients = [p.grad.double().square().sum() for p in stock.parameters() if p.grad is not None]
        return measured, float(torch.stack(gradients).sum().sqrt()) / len(batches)
    finally:
        runs._release_engines()


def test_the_tasks_gradient_is_that_of_a_stock_model(folder: Path, pool: Callable[[int], RankPool]) -> None:
    ((measured, expected),) = pool(1).run(task_norm, runs.configuration(folder, "plain"), folder)
    assert measured == pytest.approx(expected, rel=1e-4)
