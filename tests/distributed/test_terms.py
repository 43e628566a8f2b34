"""Stages of a run: terms that count one after another train as in plain PyTorch, where some weights get no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from homodistil.ranks import Ranks
from tests import fixtures, twin
from tests.distributed import harness
from tests.stages import STAGES

UPDATES = 3
"""Of each of two stages: hidden states alone, then predictions alone."""
ORDER = [("hidden",)] * UPDATES + [("kl",)] * UPDATES

IDLE = {("hidden",): "model.cls", ("kl",): "aligners"}
"""What gets no gradient then."""


def two_stages(stage: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """In a rank: losses update by update, and the weights at the end."""
    ranks, engine = Ranks.current(), harness.student_engine(stage, seed=1)
    teacher = harness.teacher_engine(sharded=stage == 3)
    seen = []
    for update, terms in enumerate(ORDER):
        parts = engine.accumulate(harness.local_batch(update), teacher, terms)
        seen.append({name: ranks.sum(part).item() for name, part in parts.items()})
        idle = [f.gradient for f in engine.fragments() if f.name.startswith(IDLE[terms])]
        assert ranks.any(bool(idle)), "some rank holds them"
        assert not any(gradient.any() for gradient in idle if gradient is not None)
        engine.update(twin.LR)
    weights = dict(engine.replica().named_parameters())
    found = {name: parameter.detach().clone() for name, parameter in weights.items()}
    engine.close()
    teacher.close()
    return seen, found


@pytest.fixture(scope="module")
def expected() -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """One process, stock models. A weight without a gradient has one of zeros: it decays as all others do."""
    plain = twin.Twin.start(fixtures.bert(0), fixtures.bert(1))
    seen = []
    for update, (term,) in enumerate(ORDER):
        plain.optimizer.zero_grad(set_to_none=False)
        parts = twin.losses(plain.student, plain.teacher, plain.aligners, harness.global_batch(update))
        (twin.WEIGHTS[term] * parts[term]).backward()
        for parameter in plain.named().values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        seen.append({term: parts[term].item()})
        plain.step()
    return seen, {name: parameter.detach() for name, parameter in plain.named().items()}


@STAGES
def test_terms_that_count_one_after_another_train_as_in_plain_pytorch(
    pool: Any, stage: int, expected: tuple[list[dict[str, float]], dict[str, Tensor]]
) -> None:
    losses, weights = expected
    for seen, found in pool(2).run(two_stages, stage):
        for ours, wanted in zip(seen, losses, strict=True):
            assert ours == pytest.approx(wanted, rel=2e-5)
        names = {name.removeprefix("model.").replace(".projection.", "."): value for name, value in found.items()}
        assert names.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(
                names[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
            )
