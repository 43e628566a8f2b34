"""Before the first update the student is the teacher, in value and not in storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from homodistil.ranks import Ranks
from tests.distributed import harness
from tests.stages import STAGES


def losses_before_and_after_a_change(
    stage: int, sharded: bool, aligner: str
) -> tuple[dict[str, float], dict[str, float], float]:
    """Losses of the untouched student; those after one weight moved; KL as validation measures it."""
    run = harness.run_config()
    run.objective.hidden.aligner = aligner  # type: ignore[assignment]
    ranks = Ranks.current()
    engine, teacher = harness.student_engine(stage, run), harness.teacher_engine(sharded)
    batch = harness.local_batch(0)
    untouched = {name: ranks.sum(part).item() for name, part in engine.accumulate(batch, teacher).items()}
    kl = engine.validate([batch], teacher).kl
    assert kl is not None
    shares_storage = storages(engine._engine.module) & storages(teacher._module)
    assert not shares_storage
    state = engine.export()
    word = "model.bert.embeddings.word_embeddings.weight"
    if word in state.pieces and state.pieces[word].start == 0:
        state.pieces[word].values["master"][72 * 5 :] += 0.5
    blueprint, settings, shape = engine._blueprint, engine._settings, engine.shape
    engine.close()
    engine = type(engine).build(blueprint, settings, ranks, shape=shape, state=state)
    changed = {name: ranks.sum(part).item() for name, part in engine.accumulate(batch, teacher).items()}
    engine.close()
    teacher.close()
    return untouched, changed, kl


def storages(module: torch.nn.Module) -> set[int]:
    tensors = [getattr(p, "ds_tensor", p) for p in module.parameters()]
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


@STAGES
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded_teacher", "replicated_teacher"])
@pytest.mark.parametrize("aligner", ["projection", "indexed"])
def test_every_distillation_loss_is_zero_until_a_weight_changes(
    pool: Any, stage: int, sharded: bool, aligner: str
) -> None:
    for untouched, changed, kl in pool(2).run(losses_before_and_after_a_change, stage, sharded, aligner):
        assert [untouched[name] for name in ("kl", "hidden", "attention")] == [0, 0, 0]
        assert kl == 0
        assert all(changed[name] > 0 for name in ("kl", "hidden", "attention"))
