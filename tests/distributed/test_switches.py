"""Every switch under `performance:` computes what its plain twin computes, across a prune of a live engine."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from homodistil.engine import StudentEngine
from homodistil.models import family_of
from homodistil.models.attention import attention_implementation
from homodistil.models.shape import Widths
from homodistil.pruning.coordinator import PruningCoordinator
from homodistil.pruning.ladder import Ladder, Rung
from homodistil.ranks import Ranks
from homodistil.student import Blueprint
from tests import fixtures, twin
from tests.distributed import harness
from tests.stages import STAGES

PLAIN = {"fused_adamw": False, "attention": "eager", "gram_attention": "off"}


def losses(stage: int, performance: dict[str, Any], sharded: bool = True) -> list[dict[str, float]]:
    """Two updates, a prune, two updates."""
    run, ranks = harness.run_config(), Ranks.current()
    run.performance = type(run.performance)(**{**PLAIN, **performance})
    config, attention = fixtures.bert_config(), attention_implementation(run.performance.attention)
    blueprint = Blueprint(family_of(config), config, run, attention)
    model = fixtures.bert(1).train()
    model.set_attn_implementation(attention)
    settings = harness.settings(stage, ranks.world_size, fused=run.performance.fused_adamw)
    engine = StudentEngine.build(blueprint, settings, ranks, model=model, shape=blueprint.full_shape)
    teacher = harness.teacher_engine(sharded)
    ladder = Ladder((Rung(2, Widths(41, 69, 5, 7)),))
    pruner = PruningCoordinator(run.pruning, ladder, engine.groups, ranks, 0)
    seen = []
    for update in range(1, 5):
        parts = engine.accumulate(harness.local_batch(update), teacher)
        seen.append({name: ranks.sum(part).item() for name, part in parts.items()})
        pruner.observe(engine.fragments())
        engine.update(twin.LR)
        if plan := pruner.plan(update):
            engine = engine.shrunk(plan)
            pruner.rebase(engine.groups)
    engine.close()
    teacher.close()
    return seen


SWITCHES = {
    "fused_adamw": {"fused_adamw": True},
    "sdpa": {"attention": "sdpa"},
    "gram": {"gram_attention": "on"},
    "activation_checkpointing": {"activation_checkpointing": True},
}


@pytest.fixture(scope="module")
def plain(pool: Any) -> Any:
    """`plain(stage)`: the losses with every switch off."""
    return cache(lambda stage: pool(2).run(losses, stage, {})[0])


@STAGES
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_the_speed_and_not_the_losses(pool: Any, plain: Any, stage: int, switch: str) -> None:
    for fast, expected in zip(pool(2).run(losses, stage, SWITCHES[switch])[0], plain(stage), strict=True):
        assert fast == pytest.approx(expected, rel=5e-5)


@pytest.mark.slow
def test_a_compiled_student_and_its_plain_twin_have_the_same_losses(pool: Any) -> None:
    plain = pool(1).run(losses, 2, {"attention": "sdpa"}, sharded=False)[0]
    compiled = pool(1).run(losses, 2, {"attention": "sdpa", "compile": True}, sharded=False, timeout=400)[0]
    for fast, expected in zip(compiled, plain, strict=True):
        assert fast == pytest.approx(expected, rel=5e-5)
