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

PLAIN = {"fused_adamw": False, "attention": "eager", "gram_attention": "off", "fused_vocabulary": False}
Kept = dict[str, tuple[int, ...]]


def outcome(
    stage: int, performance: dict[str, Any], sharded: bool = True, bf16: bool = False
) -> tuple[list[dict[str, float]], Kept]:
    """Losses of two updates, a prune, two updates; the units kept."""
    run, ranks = harness.run_config(), Ranks.current()
    run.performance = type(run.performance)(**{**PLAIN, **performance})
    config, attention = fixtures.bert_config(), attention_implementation(run.performance.attention)
    blueprint = Blueprint(family_of(config), config, run, attention)
    model = fixtures.bert(1).train()
    model.set_attn_implementation(attention)
    settings = harness.settings(stage, ranks.world_size, fused=run.performance.fused_adamw)
    settings |= {"bf16": {"enabled": bf16}, "data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}
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
    kept = dict(engine.shape.kept)
    engine.close()
    teacher.close()
    return seen, kept


SWITCHES: dict[str, dict[str, Any]] = {
    "fused_adamw": {"fused_adamw": True},
    "sdpa": {"attention": "sdpa"},
    "gram": {"gram_attention": "on"},
    "fused_vocabulary": {"fused_vocabulary": True},
    "activation_checkpointing": {"activation_checkpointing": True},
    "teacher_ahead": {"teacher_ahead": True},
}
EVERYTHING = {name: value for switch in SWITCHES.values() for name, value in switch.items()}


@pytest.fixture(scope="module")
def plain(pool: Any) -> Any:
    """`plain(stage)`: the outcome with every switch off."""
    return cache(lambda stage: pool(2).run(outcome, stage, {})[0])


@STAGES
@pytest.mark.parametrize("switch", [*SWITCHES, "everything"])
def test_a_switch_changes_the_speed_and_not_the_losses_or_kept_units(
    pool: Any, plain: Any, stage: int, switch: str
) -> None:
    losses, kept = pool(2).run(outcome, stage, SWITCHES.get(switch, EVERYTHING))[0]
    expected, expected_units = plain(stage)
    assert_close(losses, expected, 5e-5)
    assert kept == expected_units


def test_with_every_switch_on_bf16_changes_little(pool: Any) -> None:
    plain, fast = (pool(2).run(outcome, 2, switches, bf16=True)[0] for switches in ({}, EVERYTHING))
    assert_close(fast[0], plain[0], 2**-7)  # two roundings of eight bits
    units = [({(name, unit) for name, kept in run[1].items() for unit in kept}) for run in (plain, fast)]
    assert len(units[0] & units[1]) >= 0.98 * len(units[0])


@pytest.mark.slow
def test_a_compiled_student_and_its_plain_twin_have_the_same_losses(pool: Any) -> None:
    plain, _ = pool(1).run(outcome, 2, {"attention": "sdpa"}, sharded=False)[0]
    compiled, _ = pool(1).run(outcome, 2, {"attention": "sdpa", "compile": True}, sharded=False, timeout=400)[0]
    assert_close(compiled, plain, 5e-5)


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
