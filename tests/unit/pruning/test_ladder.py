"""The ladder against docs/methods.md, "When", in exact fractions, scanned update by update."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest

from homodistil.config import PruningConfig, TargetShape
from homodistil.errors import ShapeError
from homodistil.models.shape import Widths
from homodistil.pruning.ladder import Ladder, target_widths

BASE = Widths(hidden=768, ffn=3072, heads=12, head_width=64)
SIZES = {
    "base": (576, 2304, 12),
    "small": (256, 1024, 8),
    "xsmall": (240, 960, 12),
    "tiny": (224, 896, 8),
    "unaligned": (252, 1021, 9),
}


def config(hidden: int, ffn: int, heads: int, **changes: object) -> PruningConfig:
    target = TargetShape(hidden=hidden, ffn=ffn, heads=heads)
    return PruningConfig.model_validate({"target": target, **changes})


def twin(settings: PruningConfig, updates: int, start: Widths) -> list[tuple[int, Widths]]:
    """r(t) evaluated at every update; every rung it has passed is climbed down at once."""
    goal = Widths(
        settings.target.hidden,
        settings.target.ffn,
        settings.target.heads,
        settings.target.hidden // settings.target.heads,
    )
    first = max(1, round(settings.start * updates))
    last = first if settings.schedule == "one_shot" else round(settings.end * updates)
    rungs, now = [], start
    for t in range(1, updates + 1):
        if t < first:
            remaining = Fraction(1)
        elif t >= last:
            remaining = Fraction(0)
        else:
            remaining = (1 - Fraction(t - first, last - first)) ** (3 if settings.schedule == "cubic" else 1)
        passed = math.floor((1 - remaining) * settings.events)  # rungs with r(t) <= r_k
        rho = 1 - Fraction(passed, settings.events)
        wanted = {}
        for group, multiple in (("hidden", settings.hidden_multiple), ("ffn", 8), ("heads", 1), ("head_width", 1)):
            n0, n1 = getattr(start, group), getattr(goal, group)
            aligned = multiple * math.ceil((n1 + (n0 - n1) * rho) / multiple)
            wanted[group] = n1 if passed == settings.events else max(n1, min(n0, aligned))
        if goal.heads == start.heads:
            wanted["hidden"] = wanted["heads"] * wanted["head_width"]
        if Widths(**wanted) != now:
            now = Widths(**wanted)
            rungs.append((t, now))
    return rungs


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("schedule", ["cubic", "linear", "one_shot"])
@pytest.mark.parametrize(("events", "updates"), [(16, 2801), (7, 311), (24, 20), (1, 50)])
def test_rungs_fire_when_and_as_wide_as_the_schedule_says(size: str, schedule: str, events: int, updates: int) -> None:
    settings = config(*SIZES[size], schedule=schedule, events=events)
    rungs = [(rung.update, rung.widths) for rung in Ladder.plan(settings, updates, BASE).rungs]
    assert rungs == twin(settings, updates, BASE)


def test_the_published_base_size_takes_sixteen_rungs_between_two_and_seventy_percent() -> None:
    rungs = Ladder.plan(config(576, 2304, 12), 28_000, BASE).rungs
    assert len(rungs) == 16
    assert (rungs[0].update, rungs[-1].update) == (966, 19_600)  # (1 - s)^3 <= 15/16 from s = 0.02128 on
    assert rungs[-1].widths == Widths(576, 2304, 12, 48)


@pytest.mark.parametrize("size", ["base", "xsmall"])
def test_with_a_constant_head_count_every_rung_is_a_stock_model(size: str) -> None:
    rungs = Ladder.plan(config(*SIZES[size], events=31), 5000, BASE).rungs
    assert rungs and all(rung.widths.is_stock and rung.widths.heads == 12 for rung in rungs)


@pytest.mark.parametrize("size", SIZES)
def test_rungs_descend_strictly_and_no_group_ever_grows(size: str) -> None:
    rungs = Ladder.plan(config(*SIZES[size], events=64), 400, BASE).rungs
    widths = [BASE, *(rung.widths for rung in rungs)]
    for before, after in itertools.pairwise(widths):
        assert after != before
        assert all(
            getattr(after, group) <= getattr(before, group) for group in ("hidden", "ffn", "heads", "head_width")
        )
    updates = [rung.update for rung in rungs]
    assert updates == sorted(set(updates))


def test_rungs_that_alignment_makes_equal_merge() -> None:
    start = Widths(hidden=12, ffn=24, heads=6, head_width=2)
    rungs = Ladder.plan(config(6, 16, 6, events=16), 1000, start).rungs
    assert [rung.widths for rung in rungs] == [Widths(6, 16, 6, 1)] and rungs[0].update == 700


def test_a_descent_from_the_start_begins_after_the_first_update() -> None:
    rungs = Ladder.plan(config(256, 1024, 8, start=0.0, schedule="one_shot"), 100, BASE).rungs
    assert [(rung.update, rung.widths) for rung in rungs] == [(1, Widths(256, 1024, 8, 32))]


def test_a_target_that_is_the_start_has_no_rungs() -> None:
    assert Ladder.plan(PruningConfig(), 100, BASE).rungs == ()


def test_widths_are_due_only_after_an_update_that_fires_a_rung() -> None:
    ladder = Ladder.plan(config(576, 2304, 12), 1000, BASE)
    due = [update for update in range(1001) if ladder.widths_after(update)]
    assert due == [rung.update for rung in ladder.rungs]


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ({"hidden": 764}, r"hidden 764 .* 768 \(12 x 64\) or 756 \(12 x 63\)"),
        ({"heads": 8}, r"hidden 512 \(8 x 64\)"),
        ({"hidden": 400, "head_width": 32}, r"hidden 384 \(12 x 32\)"),
        ({"hidden": 804}, r"pruning\.target\.hidden: 804 .* 768"),
        ({"ffn": 4096}, r"pruning\.target\.ffn: 4096 .* 3072"),
        ({"heads": 16}, r"pruning\.target\.heads: 16 .* 12"),
    ],
)
def test_a_target_that_no_student_can_have_names_the_nearest_that_one_can(
    target: dict[str, int], complaint: str
) -> None:
    with pytest.raises(ShapeError, match=complaint):
        Ladder.plan(PruningConfig(target=TargetShape(**target)), 100, BASE)


def test_the_head_width_follows_from_hidden_and_heads() -> None:
    assert target_widths(TargetShape(hidden=240), BASE) == Widths(240, 3072, 12, 20)
    assert target_widths(TargetShape(hidden=224, ffn=896, heads=8), BASE) == Widths(224, 896, 8, 28)
