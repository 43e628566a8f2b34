"""What zero.py relies on in DeepSpeed's private parts, held to per ZeRO stage on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from homodistil.engine import StudentEngine
from homodistil.ranks import Ranks
from tests import fixtures, twin
from tests.distributed import harness
from tests.stages import STAGES


def tiles(stage: int) -> list[tuple[str, int, int, int]]:
    engine = harness.student_engine(stage)
    found = [(f.name, f.start, len(f.weight), f.shape.numel()) for f in engine.fragments(gradients=False)]
    engine.close()
    return found


@STAGES
def test_the_fragments_of_all_ranks_tile_every_parameter_once(pool: Any, stage: int) -> None:
    owned: dict[str, list[tuple[int, int, int]]] = {}
    for rank in pool(2).run(tiles, stage):
        for name, start, count, whole in rank:
            owned.setdefault(name, []).append((start, count, whole))
    expected = {f"model.{name}" for name, _ in fixtures.bert().named_parameters()}
    assert expected < set(owned)
    for name, parts in owned.items():
        end = 0
        for start, count, _ in sorted(parts):
            assert start == end, name
            end += count
        assert end == parts[0][2], name


def gradients(stage: int) -> dict[str, list[tuple[int, torch.Tensor]]]:
    engine, teacher = harness.student_engine(stage, seed=1), harness.teacher_engine(sharded=True)
    engine.accumulate(harness.local_batch(0), teacher)
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for f in engine.fragments():
        assert f.gradient is not None
        found.setdefault(f.name, []).append((f.start, f.gradient.clone()))
    engine.close()
    teacher.close()
    return found


@STAGES
def test_gradients_are_the_unclipped_mean_of_the_whole_global_batch(pool: Any, stage: int) -> None:
    plain = twin.Twin.start(fixtures.bert(0), fixtures.bert(1))
    plain.accumulate(harness.global_batch(0))
    norms = torch.stack([p.grad.norm() for p in plain.named().values()])  # type: ignore[union-attr]
    assert norms.norm() > twin.CLIP, "clipping must be active for this test to mean anything"
    expected = {_engine_name(n): p.grad.flatten() for n, p in plain.named().items()}  # type: ignore[union-attr]
    for rank in pool(2).run(gradients, stage):
        for name, parts in rank.items():
            for start, found in parts:
                torch.testing.assert_close(found, expected[name][start : start + len(found)], rtol=2e-4, atol=2e-6)


def rebuilt_losses(stage: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Two more updates, uninterrupted, and the same two after a rebuild from the exported state."""
    teacher = harness.teacher_engine(sharded=True)
    runs = []
    for rebuild in (False, True):
        engine, losses = harness.student_engine(stage, seed=1), []
        for update in range(5):
            if rebuild and update == 3:
                state, plan, settings = engine.export(), engine._blueprint, engine._settings
                shape = engine.shape
                engine.close()
                engine = type(engine).build(plan, settings, Ranks.current(), shape=shape, state=state)
            parts = engine.accumulate(harness.local_batch(update), teacher)
            losses.append({name: part.item() for name, part in parts.items()})
            engine.update(twin.LR)
        assert engine.step == 5
        engine.close()
        runs.append(losses)
    teacher.close()
    return runs[0], runs[1]


@STAGES
def test_a_rebuilt_engine_goes_on_bit_for_bit(pool: Any, stage: int) -> None:
    for uninterrupted, rebuilt in pool(2).run(rebuilt_losses, stage):
        assert rebuilt == uninterrupted


def _engine_name(twin_name: str) -> str:
    if twin_name.startswith("aligners"):
        _, index, kind = twin_name.split(".")
        return f"aligners.{index}.projection.{kind}"
    return f"model.{twin_name}"


def norm_and_step(stage: int, bf16: bool) -> tuple[float, float]:
    """The engine's norm of one update's gradients, and how many steps it took on gradients that are not finite."""
    run, ranks = harness.run_config(), Ranks.current()
    settings = harness.settings(stage, ranks.world_size)
    if bf16:
        accumulation = {} if stage == 1 else {"data_types": {"grad_accum_dtype": "fp32"}}
        settings |= {"bf16": {"enabled": True}, **accumulation}
    plan = harness.blueprint(run)
    model = harness.live_bert(1).train()
    engine = StudentEngine.build(plan, settings, ranks, model=model, shape=plan.full_shape)
    teacher = harness.teacher_engine(sharded=False)
    engine.accumulate(harness.local_batch(0), teacher)
    engine.update(twin.LR)
    norm = float(engine.gradient_norm)  # type: ignore[arg-type]
    hook = None
    if ranks.is_first:  # of one rank alone, as the last of its micro-batches
        bias = next(p for n, p in engine._engine.module.named_parameters() if n.endswith("query.bias"))
        hook = bias.register_hook(lambda gradient: gradient * float("inf"))
    before = engine.step
    engine.accumulate(harness.local_batch(1), teacher)
    engine.update(twin.LR)
    taken = engine.step - before
    if hook is not None:
        hook.remove()
    engine.close()
    teacher.close()
    return norm, taken


@pytest.mark.parametrize(("stage", "bf16"), [(1, False), (2, False), (1, True), (2, True)])
def test_the_norm_is_the_whole_gradients_and_one_that_is_not_finite_stops_the_step(
    pool: Any, stage: int, bf16: bool
) -> None:
    plain = twin.Twin.start(fixtures.bert(0), fixtures.bert(1))
    plain.accumulate(harness.global_batch(0))
    expected = torch.stack([p.grad.norm() for p in plain.named().values()]).norm().item()  # type: ignore[union-attr]
    for norm, taken in pool(2).run(norm_and_step, stage, bf16):
        assert norm == pytest.approx(expected, rel=0.05 if bf16 else 1e-4)
        assert taken == 0
