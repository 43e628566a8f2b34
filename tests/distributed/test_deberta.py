"""DeBERTa under ZeRO: tables that stock code reads past the modules that own them are gathered all the same."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from homodistil.engine import StudentEngine, TeacherEngine
from homodistil.knowledge.teacher import FrozenModel
from homodistil.models import family_of
from homodistil.ranks import Ranks
from homodistil.student import Blueprint, Student, as_tuple
from tests import fixtures
from tests.distributed import harness
from tests.stages import STAGE_2_AND_3

VARIANTS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v2": {"share_att_key": False, "conv_kernel_size": 3, "legacy": False},
}


def blueprint(changes: dict[str, Any]) -> Blueprint:
    run = harness.run_config()
    run = run.model_copy(update={"performance": run.performance.model_copy(update={"activation_checkpointing": True})})
    config = fixtures.deberta_config(**changes)
    return Blueprint(family_of(config), config, run, "its own")


def gradients(stage: int, changes: dict[str, Any]) -> dict[str, list[tuple[int, Tensor]]]:
    """Of this rank's fragments, after one global batch beside a sharded teacher."""
    ranks, plan = Ranks.current(), blueprint(changes)
    settings = harness.settings(stage, ranks.world_size)
    model = fixtures.deberta(1, **changes).train()
    engine = StudentEngine.build(plan, settings, ranks, model=model, shape=plan.full_shape)
    sharded = {"zero_optimization": {"stage": 3, "memory_efficient_linear": False}, "train_micro_batch_size_per_gpu": 1}
    teacher = TeacherEngine(fixtures.deberta(**changes), plan.family, ranks, sharded)
    engine.accumulate(harness.local_batch(0), teacher)
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for f in engine.fragments():
        assert f.gradient is not None
        found.setdefault(f.name, []).append((f.start, f.gradient.clone()))
    engine.close()
    teacher.close()
    gc.collect()
    assert not any(isinstance(thing, DeepSpeedEngine) for thing in gc.get_objects()), "an engine outlives its end"
    return found


def plain_gradients(changes: dict[str, Any]) -> dict[str, Tensor]:
    """Of one process without engines, on the whole batch at once, from a stock model's parameters."""
    plan, rows = blueprint(changes), harness.global_batch(0)
    student = Student(fixtures.deberta(1, **changes).train(), plan, plan.full_shape)
    knowledge = FrozenModel(fixtures.deberta(**changes), plan.family)(*as_tuple(rows) or ())
    total, _ = student(as_tuple(rows), knowledge, rows.counts().vector)
    total.backward()
    return {name: p.grad.flatten() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@STAGE_2_AND_3
def test_gradients_of_two_ranks_are_those_of_one_process(pool: Any, stage: int, changes: dict[str, Any]) -> None:
    expected = plain_gradients(changes)
    seen = set()
    for rank in pool(2).run(gradients, stage, changes):
        for name, parts in rank.items():
            seen.add(name)
            for start, gradient in parts:
                torch.testing.assert_close(
                    gradient.flatten(), expected[name][start : start + gradient.numel()], rtol=1e-4, atol=1e-5
                )
    assert seen == set(expected)
