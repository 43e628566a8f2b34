"""Forecasts against sums done by hand, on a machine of round numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from homodistil.cli import DS_CONFIGS, main
from homodistil.costs import micro_batch_cost
from homodistil.ds_config import DeepSpeedConfig
from homodistil.machines import GPUS, Machine, gpu_machine
from homodistil.planning import GRADIENT_BYTES, SCORING_BYTES, STEP_BYTES, Planner, bound_by_communication
from homodistil.pruning.ladder import Ladder
from tests.unit.test_costs import FULL, LENGTH, NARROW, blueprint

ROUND = Machine(
    name="round",
    products=1e9,
    batched=5e8,
    attention=2e8,
    elementwise=1e9,
    bandwidth=2e9,
    latency=0.0,
    host_computes=True,
    link=1e8,
    network=1e7,
    per_node=4,
    hop=0.0,
)


def planner(stage: int = 2, machine: Machine = ROUND, rungs: Ladder | None = None, **sections: Any) -> Planner:
    values: dict[str, Any] = {"data": {"global_batch": 32, "micro_batch": 4}, "run": {"updates": 100}, **sections}
    ds_config = DeepSpeedConfig.load(DS_CONFIGS / f"zero{stage}.json")
    return Planner(blueprint(**values), rungs or Ladder(()), FULL, LENGTH, machine, ds_config, torch.float32)


def test_an_update_on_one_rank_is_the_sum_of_its_work_over_the_machines_speeds() -> None:
    cost = micro_batch_cost(planner().blueprint, FULL, 4, LENGTH, torch.float32, maps=True)
    update = planner().update(FULL)
    arithmetic = cost.products / 1e9 + cost.batched / 5e8 + cost.attention / 2e8
    assert update.arithmetic == pytest.approx(8 * arithmetic)
    assert update.elementwise == pytest.approx(8 * cost.traffic / 1e9, rel=0.05)  # the vocabulary goes in chunks
    assert update.optimizer == pytest.approx(cost.parameters * (8 * GRADIENT_BYTES + STEP_BYTES) / 2e9)
    assert (update.starting, update.scoring, update.communication) == (0, 0, 0)


@pytest.mark.parametrize(("stage", "halves", "gathers"), [(1, 2, 1), (2, 4, 1), (3, 2, 2)])
def test_gradients_and_weights_travel_in_a_ring(stage: int, halves: int, gathers: int) -> None:
    """Four ranks, two micro-batches each: stage 1 reduces once an update, stage 2 after each micro-batch; stage 3
    scatters after each, which is half an all-reduce, and gathers its weights for each."""
    whole = planner(stage)
    weights = whole.update(FULL, 4)
    count = micro_batch_cost(whole.blueprint, FULL, 1, LENGTH, torch.float32).parameters
    sharded = 2 * 3 / 4 * micro_batch_cost(whole.blueprint, FULL, 1, LENGTH, torch.float32).teacher_parameters * 4 / 1e8
    scattered, gathered = 3 / 4 * 4 * count / 1e8 * halves, 3 / 4 * 4 * count / 1e8 * gathers
    cost = micro_batch_cost(whole.blueprint, FULL, 4, LENGTH, torch.float32, maps=True)
    hidden = 2 * cost.backward / cost.flops * (weights.arithmetic + weights.elementwise) / 2 if stage == 3 else 0.0
    expected = max(0.0, scattered - hidden) + gathered + sharded  # only zero3.json asks for overlap
    assert weights.communication == pytest.approx(expected, rel=1e-3)


def test_beyond_one_node_the_network_is_the_bottleneck() -> None:
    assert ROUND.gather(1e6, 4) == pytest.approx(3 / 4 * 1e6 / 1e8)
    assert ROUND.gather(1e6, 8) == pytest.approx(7 / 8 * 1e6 / 1e7)
    assert ROUND.gather(1e6, 1) == 0


@pytest.mark.parametrize(("stage", "student", "optimizer", "gradients"), [(1, 4, 3, 4), (2, 4, 3, 1), (3, 4, 3, 1)])
def test_memory_is_cut_as_the_stage_says(stage: int, student: int, optimizer: int, gradients: int) -> None:
    memory = planner(stage).outlook(4).memory
    cost = micro_batch_cost(planner().blueprint, FULL, 1, LENGTH, torch.float32)
    count = cost.parameters
    assert memory["student"] == count * student
    assert memory["masters and moments"] == count * optimizer
    assert memory["gradients"] == count * gradients
    assert memory["teacher"] == cost.teacher_parameters  # fp32 over four ranks


def test_a_run_is_its_stretches_and_only_those_before_the_last_prune_are_scored() -> None:
    target = {"hidden": NARROW.hidden, "ffn": NARROW.ffn, "heads": NARROW.heads}
    whole = planner(pruning={"target": target, "events": 1, "schedule": "one_shot", "start": 0.3})
    rungs = Ladder.plan(whole.blueprint.run.pruning, 100, FULL)
    whole = planner(rungs=rungs)
    assert [rung.update for rung in rungs.rungs] == [30]
    wide, narrow = whole.update(FULL), whole.update(NARROW)
    count = micro_batch_cost(whole.blueprint, FULL, 1, LENGTH, torch.float32).parameters
    scoring = 30 * count * SCORING_BYTES / ROUND.bandwidth
    outlook = whole.outlook(1)
    assert outlook.hours * 3600 == pytest.approx(30 * wide.seconds + 70 * narrow.seconds + scoring)
    assert outlook.update.seconds == pytest.approx(outlook.hours * 36)


def test_a_slow_network_binds_as_soon_as_it_is_used_and_a_fast_one_never() -> None:
    fast = Machine(**{**vars(ROUND), "link": 1e15, "network": 1e15})
    slow = Machine(**{**vars(ROUND), "link": 1e15, "network": 1e3})
    assert bound_by_communication(planner(machine=fast).doubling(32)) is None
    assert bound_by_communication(planner(machine=slow).doubling(32)) == 8


def test_a_gpu_waits_for_the_host_only_where_kernels_are_shorter_than_their_start() -> None:
    slow_host = Machine(**{**vars(ROUND), "host_computes": False, "latency": 1.0})
    update = planner(machine=slow_host).update(FULL)
    cost = micro_batch_cost(planner().blueprint, FULL, 1, LENGTH, torch.float32)
    assert update.arithmetic + update.elementwise + update.starting == pytest.approx(8 * cost.operations)
    assert (
        planner(machine=Machine(**{**vars(ROUND), "host_computes": False, "latency": 1e-9})).update(FULL).starting == 0
    )


def test_this_machine_is_measured() -> None:
    here = Machine.here(torch.device("cpu"), torch.float32)
    speeds = here.products, here.batched, here.attention, here.elementwise, here.bandwidth
    assert all(1e8 < speed < 1e15 for speed in speeds)
    assert 1e-8 < here.latency < 1e-3 and here.host_computes


def test_the_command_names_hours_memory_and_the_stretch_that_does_not_scale(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    curve = tmp_path / "curve.png"
    few = ("--pruning.events", "1", "--data.shards", str(tmp_path))
    main(["plan", "--recipe", "homobert_base", "--gpus", "64", "--network", "100", "--curve", str(curve), *few])
    said = capsys.readouterr().out
    for word in ("109,514,298", "66,107,514", "64 x a100-80gb", "ZeRO stage 2", "GiB", "hours on 64 rank(s)", "1024"):
        assert word in said
    assert "communication-bound from" in " ".join(said.split())
    assert curve.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gpus", "3"), ["global_batch", "3 rank(s)"]),
        (("--length", "513"), ["513 tokens", "512 positions"]),
        (("--data.mask_probability", "0.001"), ["mask_probability", "not one"]),
        (("--curve", "plan.foo"), ["--curve", ".png"]),
        (("--curve", "nowhere/plan.png"), ["--curve", "nowhere"]),
        (("--student.layers", "0,12"), ["student.layers", "0 to 11"]),
        (("--gpu", "v100"), ["gpu", "v100", "a100-80gb"]),
    ],
)
def test_what_cannot_be_planned_is_said_before_anything_is_counted(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", "--recipe", "homobert_base", "--data.shards", "/x", *flags])
    assert end.value.code == 2
    said = capsys.readouterr()
    assert all(word in said.err for word in words), said.err
    assert "Traceback" not in said.err and not said.out


def test_a_teacher_that_is_nowhere_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", "--recipe", "homobert_base", "--teacher.path", str(tmp_path / "none"), "--data.shards", "/x"])
    assert end.value.code == 2
    assert "none: no such directory" in capsys.readouterr().err


def test_every_gpu_of_the_table_can_be_asked_for() -> None:
    assert {gpu_machine(name).name for name in GPUS} == set(GPUS)
    assert gpu_machine("a100-80gb", gigabits=100).network == 12.5e9
