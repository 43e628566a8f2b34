"""A prune of a live ZeRO engine against the plain twin: which units, which numbers, and the updates that follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from homodistil.models.shape import StudentShape, Widths
from homodistil.pruning.coordinator import PrunePlan, PruningCoordinator
from homodistil.pruning.ladder import Ladder, Rung
from homodistil.ranks import Ranks
from tests import fixtures, twin
from tests.distributed import harness
from tests.stages import STAGES

METRICS = ("sensitivity", "magnitude", "platon")
LADDER = Ladder((Rung(3, Widths(50, 101, 5, 9)), Rung(6, Widths(41, 69, 5, 7))))
"""Odd widths, the first rung losing heads; windows of two updates, so that each prune comes inside one."""
UPDATES = 8

State = dict[str, dict[str, torch.Tensor]]


def run_engine(stage: int) -> dict[str, Any]:
    """Losses per update, plans per metric, and the whole state on both sides of the first prune."""
    run = harness.run_config()
    engine, teacher = harness.student_engine(stage, run, seed=1), harness.teacher_engine(sharded=True)
    ranks = Ranks.current()
    pruners = {
        m: PruningCoordinator(harness.run_config(metric=m).pruning, LADDER, engine.groups, ranks, 0) for m in METRICS
    }
    losses, plans, states, rates = [], [], [], []
    for update in range(1, UPDATES + 1):
        parts = engine.accumulate(harness.local_batch(update), teacher)
        losses.append({name: ranks.sum(part.clone()).item() for name, part in parts.items()})
        for pruner in pruners.values():
            pruner.observe(engine.fragments())
        engine.update(twin.LR)
        found = {metric: pruner.plan(update) for metric, pruner in pruners.items()}
        if plan := found["sensitivity"]:
            before = whole_state(engine)
            steps, names = engine.step, {group.name for group in engine.groups}
            engine = engine.shrunk(plan)
            assert engine.step == steps
            plans.append(found)
            states.append((before, whole_state(engine)))
            for pruner in pruners.values():
                pruner._latest = plan  # every metric goes on with the student that sensitivity chose
                pruner.rebase(engine.groups)
            assert names != {group.name for group in engine.groups} or update > 3
    rates = [group["lr"] for group in engine._engine.optimizer.param_groups]
    engine.close()
    teacher.close()
    return {"losses": losses, "plans": plans, "states": states, "rates": rates}


def whole_state(engine: Any) -> State:
    """Masters and moments, whole, on every rank, by the twin's names."""
    layout = engine._zero.shapes
    from homodistil.state import Range

    everything = {name: Range(0, shape.numel()) for name, shape in layout.items()}
    moved = engine.export().moved(everything, torch.device("cpu"))
    kinds = ("master", "exp_avg", "exp_avg_sq")
    return {_twin_name(n): {kind: p.values[kind].view(p.shape).clone() for kind in kinds} for n, p in moved}


@STAGES
def test_two_prunes_of_a_live_engine_equal_those_of_the_plain_twin(ranks_pool: Any, stage: int) -> None:
    result = ranks_pool.run(run_engine, stage)[0]
    twins = {m: twin.Twin.start(fixtures.bert(0), fixtures.bert(1), m) for m in METRICS}
    plain, prunes = twins["sensitivity"], 0
    shape = StudentShape.full(3, Widths(72, 136, 6, 12))
    for update in range(1, UPDATES + 1):
        expected = {metric: other.accumulate(harness.global_batch(update)) for metric, other in twins.items()}
        assert result["losses"][update - 1] == pytest.approx(expected["sensitivity"], rel=5e-5), update
        for other in twins.values():
            other.observe()
            other.step()
        if LADDER.widths_after(update):
            for metric, other in twins.items():
                assert_same_units(result["plans"][prunes][metric], other.unit_scores(), shape)
            plan = result["plans"][prunes]["sensitivity"]
            keep = keep_of(plan, shape)
            before, after = result["states"][prunes]
            for name, kinds in before.items():
                for kind, values in kinds.items():
                    assert torch.equal(keep.cut(name, values), after[name][kind]), (name, kind)
            shape = shape.narrowed(plan.kept)
            twins = {metric: other.narrowed(keep) for metric, other in twins.items()}
            prunes += 1
    assert prunes == 2
    assert result["rates"] == [twin.LR] * 2
    assert plain is not twins["sensitivity"]


def assert_same_units(plan: PrunePlan, scores: dict[str, torch.Tensor], shape: StudentShape) -> None:
    """Equal but for units within 1e-5 of the cut."""
    for group, kept in plan.kept.items():
        score = scores[_twin_group(group, shape)]
        order = torch.sort(score, descending=True, stable=True).indices
        cut = score[order[len(kept) - 1]]
        for unit in set(kept) ^ set(order[: len(kept)].tolist()):
            assert abs(score[unit] - cut) <= 1e-5 * cut, (group, unit)


def keep_of(plan: PrunePlan, shape: StudentShape) -> twin.Keep:
    layers = range(shape.layers)
    heads = [list(plan.kept[f"layers.{layer}.heads"]) for layer in layers]
    teacher_heads = [[shape.kept[f"layers.{layer}.heads"][head] for head in heads[layer]] for layer in layers]

    def dims(kind: str) -> list[list[list[int]]]:
        return [[list(plan.kept[f"layers.{la}.heads.{h}.{kind}"]) for h in teacher_heads[la]] for la in layers]

    return twin.Keep(
        hidden=list(plan.kept["hidden"]),
        ffn=[list(plan.kept[f"layers.{layer}.ffn"]) for layer in layers],
        heads=heads,
        qk=dims("qk"),
        vo=dims("vo"),
        head_width=shape.widths.head_width,
        teacher_heads=teacher_heads,
    )


def _twin_group(group: str, shape: StudentShape) -> str:
    """The twin numbers heads by their present place, homodistil by their place in the teacher."""
    parts = group.split(".")
    if len(parts) == 5:
        parts[3] = str(shape.kept[".".join(parts[:3])].index(int(parts[3])))
    return ".".join(parts)


def _twin_name(name: str) -> str:
    return name.removeprefix("model.").replace(".projection.", ".")
