"""GPT-2 and DeBERTa shrink in live engines as BERT does: the same numbers and units on any ranks and stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from tests import fixtures, runs
from tests.stages import slow

FAMILIES = {"gpt2": ("clm", AutoModelForCausalLM), "deberta": ("mlm", AutoModelForMaskedLM)}
OTHERS = [(2, 3), slow(2, 2), slow(1, 3), slow(2, 1), slow(4, 2)]
"""(ranks, ZeRO stage) that must do as one rank does at stage 2."""


def save_teacher(directory: Path, model: PreTrainedModel) -> None:
    model.save_pretrained(directory)
    fixtures.save_tokenizer(directory)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Its name, and a folder with a teacher of it, shards for its kind of text, and DeepSpeed's files."""
    folder = runs.prepare(tmp_path_factory.mktemp(request.param))
    save_teacher(folder / "teacher", fixtures.gpt2() if request.param == "gpt2" else fixtures.deberta())
    if request.param == "gpt2":
        index = fixtures.save_shards(folder / "shards", shards=8)
        index.task, index.special_tokens.eos = "clm", fixtures.SEP
        index.save(folder / "shards")
    return request.param, folder


@pytest.fixture(scope="module")
def alone(family: tuple[str, Path], pool: Any) -> str:
    return shrink(family, pool, 1, 2)


def shrink(family: tuple[str, Path], pool: Any, ranks: int, stage: int) -> str:
    """A whole run, three prunes and all; its name."""
    name, folder = f"{ranks}-{stage}", family[1]
    task, _ = FAMILIES[family[0]]
    values = runs.configuration(folder, name, task__name=task)
    pool(ranks).run(runs.execute, values, folder, stage)
    return name


@pytest.mark.parametrize(("ranks", "stage"), OTHERS)
def test_prunes_and_losses_are_those_of_one_rank(
    family: tuple[str, Path], pool: Any, alone: str, ranks: int, stage: int
) -> None:
    other, folder = shrink(family, pool, ranks, stage), family[1]
    assert runs.kept(folder, other) == runs.kept(folder, alone)
    expected = runs.losses(folder, alone)
    assert len(expected) == runs.UPDATES
    for update, losses in runs.losses(folder, other).items():
        assert losses == pytest.approx(expected[update], rel=5e-4, abs=1e-5), update


def test_a_student_begins_as_its_teacher_and_ends_as_a_stock_model(family: tuple[str, Path], alone: str) -> None:
    name, folder = family
    first = runs.losses(folder, alone)[1]
    assert (first["loss/kl"], first["loss/hidden"], first["loss/attention"]) == (0.0, 0.0, 0.0)
    student = folder / "runs" / alone / "student"
    loaded, report = FAMILIES[name][1].from_pretrained(student, output_loading_info=True)
    assert not any(report.values()) and loaded.config.hidden_size == 42
    kept = json.loads((student / "homodistil.json").read_text())["shape"]["kept"]
    assert len(kept["hidden"]) == 42 and len(kept["layers.0.ffn"]) == 69
    assert all(torch.isfinite(weight).all() for weight in load_file(student / "model.safetensors").values())


@pytest.mark.parametrize("family", [slow("deberta"), "gpt2"], indirect=True)
def test_a_run_that_was_killed_within_a_prune_goes_on_bit_for_bit(family: tuple[str, Path], pool: Any) -> None:
    name, folder = family
    values = runs.configuration(folder, "cut", task__name=FAMILIES[name][0])
    whole = shrink(family, pool, 2, 2)
    pool(2).run(runs.execute, values, folder, 2, ("within_a_prune", runs.PRUNES[0]))
    pool(2).run(runs.execute, values, folder, 2)
    assert runs.losses(folder, "cut") == runs.losses(folder, whole)
