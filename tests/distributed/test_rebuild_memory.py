"""Twenty prunes leave one engine's memory behind, not twenty: what live ZeRO rebuilds are known to get wrong."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import DeepSpeedEngine

from homodistil.engine import StudentEngine
from homodistil.models import family_of
from homodistil.models.attention import attention_implementation
from homodistil.models.loading import new_model
from homodistil.models.shape import StudentShape, Widths
from homodistil.pruning.coordinator import PrunePlan, PruningCoordinator
from homodistil.pruning.ladder import Ladder, Rung
from homodistil.ranks import Ranks
from homodistil.student import Blueprint
from tests import fixtures, twin
from tests.distributed import harness
from tests.stages import NAMES, slow

PRUNES, REBUILDS = 20, 15
START = Widths(hidden=240, ffn=960, heads=6, head_width=40)


def engine_of_two_million(stage: int) -> StudentEngine:
    """Large enough that one per cent of it is more than buckets and index tensors."""
    ranks, run = Ranks.current(), harness.run_config()
    config = fixtures.bert_config(hidden_size=START.hidden, intermediate_size=START.ffn)
    blueprint = Blueprint(family_of(config), config, run, attention_implementation("sdpa"))
    model = new_model(config, blueprint.attention)
    settings = harness.settings(stage, ranks.world_size)
    return StudentEngine.build(blueprint, settings, ranks, model=model, shape=blueprint.full_shape)


def live_bytes() -> int:
    """Bytes of all storages that any reachable tensor holds."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.device.type == "cpu"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def resident_bytes() -> int:
    """Of this process, without the free pages that the C allocator holds back: how many is chance, not a leak."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def analytic_bytes(engine: StudentEngine, pruner: PruningCoordinator, stage: int) -> float:
    """fp32 working weights, whole or sharded, a share of master and two moments, and the smoothed sums; stage 3
    keeps its gradient partitions besides."""
    sums = sum(vector.nbytes for vector in pruner._importance._metric.vectors.values())
    elements = sum(shape.numel() for shape in engine._zero.shapes.values())
    world_size = Ranks.current().world_size
    working = 8 * elements / world_size if stage == 3 else 4 * elements
    return working + 12 * elements / world_size + sums


def twenty_prunes(stage: int) -> list[tuple[float, int, int]]:
    """(live over analytic bytes, engines reachable, hidden width) after each prune."""
    teacher_free = live_bytes()
    engine = engine_of_two_million(stage)
    rungs = [Rung(k, Widths(240 - 6 * k, 960 - 13 * k, 6, 40 - k)) for k in range(1, PRUNES + 1)]
    pruner = PruningCoordinator(harness.run_config().pruning, Ladder(tuple(rungs)), engine.groups, Ranks.current(), 0)
    seen = []
    for update in range(1, PRUNES + 1):
        engine.accumulate(harness.local_batch(update), None)
        pruner.observe(engine.fragments())
        engine.update(twin.LR)
        plan = pruner.plan(update)
        assert plan is not None
        engine = engine.shrunk(plan)
        pruner.rebase(engine.groups)
        live = live_bytes() - teacher_free
        engines = sum(isinstance(o, DeepSpeedEngine) for o in gc.get_objects())
        seen.append((live / analytic_bytes(engine, pruner, stage), engines, engine.shape.widths.hidden))
    engine.close()
    return seen


@pytest.mark.parametrize("stage", [slow(1), slow(2), slow(3)], ids=NAMES)
def test_after_each_of_twenty_prunes_only_the_narrower_engine_is_alive(pool: Any, stage: int) -> None:
    for rank in pool(2).run(twenty_prunes, stage, timeout=400):
        assert [hidden for _, _, hidden in rank] == [240 - 6 * k for k in range(1, PRUNES + 1)]
        assert {engines for _, engines, _ in rank} == {1}
        assert all(abs(ratio - 1) < 0.01 for ratio, _, _ in rank), rank


def growth_per_rebuild(stage: int) -> float:
    """Resident bytes that a rebuild at constant width adds, on average after the first three."""
    engine = engine_of_two_million(stage)
    for rebuild in range(3 + REBUILDS):
        if rebuild == 3:
            before = resident_bytes()
        engine.accumulate(harness.local_batch(rebuild), None)
        engine.update(twin.LR)
        engine = engine.shrunk(everything(engine.shape))
    grown = resident_bytes() - before
    engine.close()
    return grown / REBUILDS


def everything(shape: StudentShape) -> PrunePlan:
    kept = {name: tuple(range(len(units))) for name, units in shape.kept.items()}
    return PrunePlan(update=0, widths=shape.widths, kept=kept)


@pytest.mark.parametrize("stage", [slow(1), slow(2), slow(3)], ids=NAMES)
def test_a_rebuild_at_constant_width_leaks_less_than_a_megabyte(pool: Any, stage: int) -> None:
    for grown in pool(2).run(growth_per_rebuild, stage, timeout=400):
        assert grown < 2**20
