"""Plans: which units stay, agreed by all ranks, and the shape that follows."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from homodistil.config import PruningConfig, TargetShape
from homodistil.errors import ConfigError, DivergenceError
from homodistil.models.bert import BertFamily
from homodistil.models.groups import PrunableGroup, kept_positions
from homodistil.models.shape import StudentShape, Widths
from homodistil.pruning.coordinator import PrunePlan, PruningCoordinator, select
from homodistil.pruning.ladder import Ladder
from homodistil.pruning.surgery import narrow
from homodistil.ranks import Ranks
from homodistil.state import Fragment
from tests.fixtures import bert
from tests.pool import RankPool
from tests.unit.pruning.shards import ALONE, shattered, whole

FAMILY = BertFamily()
FULL = StudentShape.full(2, Widths(72, 136, 6, 12))


def settings(**changes: object) -> PruningConfig:
    target = TargetShape(hidden=28, ffn=56, heads=4)
    return PruningConfig.model_validate({"target": target, "events": 2, "start": 0.1, "end": 0.5, **changes})


def gradients(model: torch.nn.Module, update: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(update)
    return {name: torch.randn(p.shape, generator=random) for name, p in model.named_parameters()}


def best(scores: Tensor, count: int) -> tuple[int, ...]:
    ranked = sorted(range(len(scores)), key=lambda unit: (-float(scores[unit]), unit))
    return tuple(sorted(ranked[:count]))


def test_heads_go_first_and_then_dimensions_inside_the_heads_that_stay() -> None:
    random = torch.Generator().manual_seed(0)
    groups = FAMILY.groups(FULL)[::-1]  # heads after their dimensions
    scores = {group.name: torch.rand(group.size, generator=random) for group in groups}
    kept = select(groups, scores, Widths(40, 64, 4, 9))
    assert FULL.narrowed(kept).widths == Widths(40, 64, 4, 9)
    for layer in range(2):
        alive = best(scores[f"layers.{layer}.heads"], 4)
        assert kept[f"layers.{layer}.heads"] == alive
        for head in range(6):
            for kind in ("qk", "vo"):
                name = f"layers.{layer}.heads.{head}.{kind}"
                assert kept.get(name) == (best(scores[name], 9) if head in alive else None)
    assert kept["hidden"] == best(scores["hidden"], 40) and kept["layers.1.ffn"] == best(scores["layers.1.ffn"], 64)


def test_ties_go_to_the_lower_index() -> None:
    group = PrunableGroup("hidden", 6, ())
    kept = select([group], {"hidden": torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 1.0])}, Widths(4, 1, 1, 1))
    assert kept["hidden"] == (0, 1, 2, 3)


@pytest.mark.parametrize("metric", ["sensitivity", "magnitude", "platon", "random"])
def test_a_whole_descent_prunes_a_model_to_its_target(metric: str) -> None:
    model, shape = bert(num_hidden_layers=2), FULL
    ladder = Ladder.plan(settings(metric=metric), 20, FULL.widths)
    pruner = PruningCoordinator(settings(metric=metric), ladder, FAMILY.groups(shape), ALONE, seed=0)
    plans = []
    for update in range(1, 21):
        pruner.observe(whole(dict(model.named_parameters()), gradients(model, update)))
        if plan := pruner.plan(update):
            groups = FAMILY.groups(shape)
            narrow(model, kept_positions(groups, plan.kept))
            shape = shape.narrowed(plan.kept)
            pruner.rebase(FAMILY.groups(shape))
            plans.append(plan)
            assert shape.widths == plan.widths
    assert [plan.update for plan in plans] == [rung.update for rung in ladder.rungs]
    assert shape.widths == Widths(28, 56, 4, 7)
    FAMILY.configure(model, shape)
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_nothing_is_read_once_the_target_is_reached() -> None:
    def explode() -> object:
        raise AssertionError("read")
        yield

    groups = FAMILY.groups(FULL.first(Widths(28, 56, 4, 7)))
    ladder = Ladder.plan(settings(), 20, FULL.widths)
    PruningCoordinator(settings(), ladder, groups, ALONE, seed=0).observe(explode())  # type: ignore[arg-type]
    PruningCoordinator(settings(), Ladder(()), FAMILY.groups(FULL), ALONE, seed=0).observe(explode())  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="read"):
        PruningCoordinator(settings(), ladder, FAMILY.groups(FULL), ALONE, seed=0).observe(explode())  # type: ignore[arg-type]


def test_a_prune_without_a_single_scored_update_is_refused() -> None:
    ladder = Ladder.plan(settings(), 20, FULL.widths)
    pruner = PruningCoordinator(settings(), ladder, FAMILY.groups(FULL), ALONE, seed=0)
    with pytest.raises(ConfigError, match=f"update {ladder.rungs[0].update}.*finite"):
        pruner.plan(ladder.rungs[0].update)


def test_a_plans_digest_changes_with_any_of_its_parts() -> None:
    plan = PrunePlan(3, Widths(4, 2, 1, 4), {"hidden": (0, 1), "layers.0.ffn": (0, 2)})
    assert plan.digest == copy.deepcopy(plan).digest
    others = [
        dataclasses.replace(plan, update=4),
        dataclasses.replace(plan, widths=Widths(4, 2, 2, 2)),
        dataclasses.replace(plan, kept={"hidden": (0, 1), "layers.0.ffn": (1, 2)}),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 4


def plan_of_a_rank() -> PrunePlan:
    """In a rank: its share of one update's fragments."""
    ranks, model = Ranks.current(), bert(num_hidden_layers=2)
    ladder = Ladder.plan(settings(), 20, FULL.widths)
    pruner = PruningCoordinator(settings(), ladder, FAMILY.groups(FULL), ranks, seed=0)
    pieces: list[Fragment] = shattered(dict(model.named_parameters()), gradients(model, 1), seed=5)
    pruner.observe(pieces[ranks.rank :: ranks.world_size])
    plan = pruner.plan(ladder.rungs[0].update)
    assert plan is not None
    return plan


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_rank_gets_the_plan_that_one_process_would_make(pool: Callable[[int], RankPool], world_size: int) -> None:
    model = bert(num_hidden_layers=2)
    ladder = Ladder.plan(settings(), 20, FULL.widths)
    alone = PruningCoordinator(settings(), ladder, FAMILY.groups(FULL), ALONE, seed=0)
    alone.observe(whole(dict(model.named_parameters()), gradients(model, 1)))
    expected = alone.plan(ladder.rungs[0].update)
    assert all(plan == expected for plan in pool(world_size).run(plan_of_a_rank))


def disagreeing_rank() -> None:
    """In a rank: rank 1 believes in another student."""
    ranks = Ranks.current()
    groups = FAMILY.groups(FULL)
    ladder = Ladder.plan(settings(metric="random"), 20, FULL.widths)
    pruner = PruningCoordinator(settings(metric="random"), ladder, groups, ranks, seed=0)
    pruner.observe([])
    if ranks.rank == 1:
        pruner._groups = groups[:-1]
    pruner.plan(ladder.rungs[0].update)


def test_ranks_that_hold_different_students_are_told_so(pool: Callable[[int], RankPool]) -> None:
    with pytest.raises(DivergenceError, match=r"rank\(s\) \[1\]"):
        pool(2).run(disagreeing_rank)
