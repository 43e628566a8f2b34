"""TED in live ZeRO engines: frozen models stay what they were, filters survive stages, checkpoints and prunes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from homodistil.ranks import Ranks
from homodistil.state import Range
from tests import runs
from tests.distributed import harness
from tests.stages import STAGES, slow

LEARNING = {
    "run__updates": 6,
    "pruning__target": {},
    "filters__of": "teacher",
    "filters__layers": [0, 1, 2],
    "objective__attention": {"weight": 0},
}
COMPARING = {
    "objective__hidden": {"aligner": "filter", "weight": 2.0},
    "checkpoint__every": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare(tmp_path_factory.mktemp("ted"))


def learning(folder: Path, name: str) -> dict[str, Any]:
    """Stage I of the awkward teacher."""
    return runs.configuration(folder, name, **LEARNING, teacher__path="none", student__path=str(folder / "teacher"))


def comparing(folder: Path, name: str, filters: Path) -> dict[str, Any]:
    """Stage II of a student that starts as that teacher, and shrinks."""
    return runs.configuration(folder, name, **COMPARING, teacher__filters=str(filters))


@pytest.fixture(scope="module")
def filters(folder: Path, pool: Any) -> Path:
    pool(2).run(runs.execute, learning(folder, "filters"), folder, 2)
    return folder / "runs" / "filters" / "filters"


def frozen_and_learned(stage: int, folder: Path) -> tuple[bool, bool, list[str]]:
    """In a rank: whether the frozen model's working weights are those from before to the last bit, whether every filter
    moved, and what the engine's state holds."""
    from homodistil.config import RunConfig
    from homodistil.engine import StudentEngine
    from homodistil.models.loading import load_model

    run = RunConfig.model_validate(learning(folder, "in memory"))
    plan, ranks = harness.blueprint(run), Ranks.current()
    model = load_model(folder / "teacher", torch.float32, plan.attention)
    settings = harness.settings(stage, ranks.world_size)
    engine = StudentEngine.build(plan, settings, ranks, model=model, shape=plan.full_shape)

    def working() -> dict[str, torch.Tensor]:
        named = dict(engine._engine.module.named_parameters())
        frozen = {name: p for name, p in named.items() if name.startswith(("model.", "heads."))}
        return {name: held(p).detach().clone() for name, p in frozen.items()}

    def held(parameter: Any) -> torch.Tensor:
        """This rank's part at stage 3, without what fills up the last one: memory that nobody wrote."""
        if stage < 3:
            return parameter
        part = parameter.ds_tensor
        return part[: max(0, min(part.numel(), parameter.ds_numel - ranks.rank * part.numel()))]

    def learned() -> dict[str, torch.Tensor]:
        everything = {name: Range(0, shape.numel()) for name, shape in engine._zero.shapes.items()}
        moved = engine.export().moved(everything, torch.device("cpu"))
        return {name: piece.values["master"].clone() for name, piece in moved}

    before, start = working(), learned()
    for update in range(1, 4):
        engine.accumulate(harness.local_batch(update), None)
        engine.update(1e-2)
    after, end = working(), learned()
    engine.close()
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    return same and len(before) > 20, all(not torch.equal(start[n], end[n]) for n in start), sorted(start)


@STAGES
def test_stage_one_trains_filters_and_leaves_the_model_bit_identical(ranks_pool: Any, folder: Path, stage: int) -> None:
    for same, moved, names in ranks_pool.run(frozen_and_learned, stage, folder):
        assert same and moved
        assert names == [f"filters.{layer}.linear.{kind}" for layer in range(3) for kind in ("bias", "weight")]


@pytest.mark.parametrize("stage", [slow(1), 3])
def test_filters_learned_at_any_stage_are_the_same(folder: Path, pool: Any, filters: Path, stage: int) -> None:
    name = f"filters-{stage}"
    pool(2).run(runs.execute, learning(folder, name), folder, stage)
    ours, theirs = (load_file(path / "filters.safetensors") for path in (folder / "runs" / name / "filters", filters))
    assert ours.keys() == theirs.keys() and len(ours) == 6
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)
    log = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/filter_01", "loss/filter_02", "loss/filter_03"} <= set().union(*log)


def test_an_interrupted_stage_one_goes_on_bit_for_bit(folder: Path, pool: Any, filters: Path) -> None:
    values = learning(folder, "filters-cut")
    pool(2).run(runs.execute, values, folder, 2, ("between_backward_and_step", 4))
    pool(2).run(runs.execute, values, folder, 2)
    cut = load_file(folder / "runs" / "filters-cut" / "filters" / "filters.safetensors")
    assert all(torch.equal(cut[key], value) for key, value in load_file(filters / "filters.safetensors").items())
    assert runs.losses(folder, "filters-cut") == runs.losses(folder, "filters")


@pytest.mark.parametrize("stage", [slow(1), slow(2), 3])
def test_filters_of_a_shrinking_student_survive_prunes_and_checkpoints(
    folder: Path, pool: Any, filters: Path, stage: int
) -> None:
    whole, cut = (comparing(folder, f"{kind}-{stage}", filters) for kind in ("shrunk", "shrunk-cut"))
    pool(2).run(runs.execute, whole, folder, stage)
    pool(2).run(runs.execute, cut, folder, stage, ("after_a_prune", runs.PRUNES[0]))
    pool(2).run(runs.execute, cut, folder, stage)
    assert runs.losses(folder, f"shrunk-cut-{stage}") == runs.losses(folder, f"shrunk-{stage}")
    losses = runs.losses(folder, f"shrunk-{stage}")
    assert losses[1]["loss/hidden"] == 0.0 and losses[runs.UPDATES]["loss/hidden"] > 0
    student = folder / "runs" / f"shrunk-{stage}" / "student"
    assert not [name for name in load_file(student / "model.safetensors") if "filter" in name]
    loaded, report = AutoModelForMaskedLM.from_pretrained(student, output_loading_info=True)
    assert not any(report.values()) and loaded.config.hidden_size == 42


@pytest.mark.slow
def test_stages_of_zero_agree_on_a_shrinking_students_filters(folder: Path, pool: Any, filters: Path) -> None:
    for stage in (2, 3):
        name = f"agree-{stage}"
        pool(2).run(runs.execute, comparing(folder, name, filters), folder, stage)
    two, three = (runs.losses(folder, f"agree-{stage}") for stage in (2, 3))
    for update, losses in two.items():
        assert three[update] == pytest.approx(losses, rel=2e-4, abs=1e-6), update
    assert runs.kept(folder, "agree-2") == runs.kept(folder, "agree-3")
