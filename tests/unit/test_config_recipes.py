"""Recipes: all load, all lead to models that stock transformers expresses, and the published numbers stand in them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from homodistil.config import RunConfig, TargetShape
from homodistil.errors import ConfigError
from homodistil.models.shape import Widths
from homodistil.pruning.ladder import Ladder
from homodistil.recipe import RECIPES, recipe_names

BERT_BASE = Widths(hidden=768, ffn=3072, heads=12, head_width=64)
TEACHERS = {
    **dict.fromkeys(("minilm_real", "hsk_live", "hsk_cached"), Widths(hidden=384, ffn=1536, heads=12, head_width=32)),
    **{f"homobert_{size}": BERT_BASE for size in ("base", "small", "xsmall", "tiny")},
}
HOMOBERTS = [name for name in recipe_names() if name.startswith("homobert_")]
PUBLISHED_MILLIONS = {"homobert_base": 65, "homobert_small": 17.3, "homobert_xsmall": 15.6, "homobert_tiny": 14.1}
VOCABULARY = 30522


def trained_from_nothing(name: str) -> Widths:
    config = RunConfig.load(name).student.config
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return Widths(hidden, config["intermediate_size"], heads, hidden // heads)


def ladder(name: str) -> Ladder:
    run = RunConfig.load(name)
    assert run.teacher.path
    start = trained_from_nothing(run.teacher.recipe) if run.teacher.recipe else TEACHERS[name]
    return Ladder.plan(run.pruning, run.run.updates, start)


def parameters(target: Widths) -> int:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=target.hidden,
        num_attention_heads=target.heads,
        intermediate_size=target.ffn,
    )
    with torch.device("meta"):
        return BertForMaskedLM(config).num_parameters()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_explains_every_line_that_sets_a_value(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#")
    values = [line for line in lines if ": " in line and not line.startswith("#")]
    assert sum("#" in line for line in values) > len(values) / 2


PRUNED = [name for name in recipe_names() if RunConfig.load(name).pruning.target != TargetShape()]


@pytest.mark.parametrize("name", PRUNED)
def test_a_recipe_ends_at_a_shape_that_stock_transformers_expresses(name: str) -> None:
    assert ladder(name).rungs[-1].widths.is_stock


@pytest.mark.parametrize("name", [name for name in recipe_names() if RunConfig.load(name).teacher.recipe])
def test_a_teacher_made_on_the_way_is_left_where_the_recipe_looks_for_it(name: str) -> None:
    teacher = RunConfig.load(name).teacher
    made = RunConfig.load(str(teacher.recipe))
    assert str(made.run.path / "student") == teacher.path
    assert made.teacher.path is None
    assert made.data.shards == RunConfig.load(name).data.shards


ON_TEXT = [name for name in recipe_names() if RunConfig.load(name).task.task.is_language_modeling]


@pytest.mark.parametrize("name", ON_TEXT)
def test_as_many_ranks_as_lanes_can_share_the_global_batch(name: str) -> None:
    data = RunConfig.load(name).data
    assert data.global_batch % data.lanes == 0 and data.lanes % 8 == 0


@pytest.mark.parametrize("name", HOMOBERTS)
def test_a_homobert_has_the_published_settings(name: str) -> None:
    run = RunConfig.load(name)
    assert (run.run.updates, run.data.global_batch) == (28_000, 4096)
    assert (run.optimizer.betas, run.optimizer.eps, run.optimizer.schedule) == ((0.9, 0.999), 1e-6, "linear")
    assert run.optimizer.learning_rate == (3e-4 if name == "homobert_base" else 6e-4)
    assert (run.pruning.metric, run.pruning.schedule) == ("sensitivity", "cubic")


@pytest.mark.parametrize("name", HOMOBERTS)
def test_a_homobert_has_the_published_size(name: str) -> None:
    """The paper counts word embeddings and encoder; the MLM head and positions make the few per cent more."""
    millions = parameters(ladder(name).rungs[-1].widths) / 1e6
    assert math.isclose(millions, PUBLISHED_MILLIONS[name], rel_tol=0.02)
    assert millions > PUBLISHED_MILLIONS[name]


PUBLISHED = {
    "mnli": (5, 7500, 7e-5, 64, 3, 256, 1500, 392_702),
    "qqp": (20, 1000, 6e-5, 64, 8, 256, 5000, 363_846),
    "qnli": (20, 100, 5e-5, 32, 3, 256, 500, 104_743),
    "sst2": (20, 20, 4e-5, 32, 6, 256, 0, 67_349),
    "rte": (20, 50, 6e-5, 16, 6, 256, 0, 2_490),
    "cola": (0, 10, 6e-5, 32, 6, 256, 0, 8_551),
    "mrpc": (20, 100, 7e-5, 32, 6, 256, 0, 3_668),
    "stsb": (20, 50, 1e-4, 16, 6, 128, 100, 5_749),
    "squad2": (10, 5000, 5e-5, 8, 3, 384, 0, 131_000),
}
"""a1, a2, rate, batch, epochs, length, updates of warm-up (TED's released code), and GLUE's training examples."""


@pytest.mark.parametrize("task", PUBLISHED)
def test_ted_on_a_task_has_the_published_settings(task: str) -> None:
    run = RunConfig.load(f"ted_deberta_{task}")
    a1, a2, rate, batch, epochs, length, warmup, examples = PUBLISHED[task]
    assert (run.task.name, run.task.epochs, run.task.max_length) == (task, epochs, length)
    assert (run.optimizer.learning_rate, run.data.global_batch, run.optimizer.weight_decay) == (rate, batch, 0)
    objective = run.objective
    assert (objective.kl.weight, objective.kl.temperature, objective.hidden.weight) == (a1, 2, a2)
    assert (objective.hidden.aligner, objective.attention.weight) == ("filter", 0)
    assert run.optimizer.warmup * epochs * examples / batch == pytest.approx(warmup, rel=0.01)
    assert run.student.dropout == (0.0 if task == "rte" else 0.1)
    assert run.student.head_dropout == (0.0 if task == "cola" else None)


def test_a_recipe_that_extends_another_has_what_it_does_not_say_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: minilm_real\npruning: {target: {ffn: 400}}\n")
    mine, base = RunConfig.load(str(tmp_path / "mine.yaml")), RunConfig.load("minilm_real")
    assert (mine.pruning.target.ffn, mine.pruning.target.hidden) == (400, base.pruning.target.hidden)
    assert (mine.run.name, mine.run.updates) == ("mine", base.run.updates)


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text(f"extends: {other}\n")
    other.write_text(f"extends: {one}\n")
    with pytest.raises(ConfigError, match="comes back"):
        RunConfig.load(str(one))


HSK_TASKS = [name for name in recipe_names() if name.startswith("hsk_task_")]


@pytest.mark.parametrize("name", HSK_TASKS)
def test_a_task_is_distilled_in_two_stages_from_little_of_the_teacher(name: str) -> None:
    run = RunConfig.load(name)
    run.run.updates = 1000
    assert len(HSK_TASKS) == 8 and name == f"hsk_task_{run.task.name}"
    first, last = run.stage(1), run.stage(1000)
    assert (first.terms, last.terms) == (("hidden",), ("kl",))
    assert (first.updates, last.update, last.updates) == (750, 250, 250)
    assert run.knowledge.share == (1, 10, 0.1) and run.objective.kl.temperature == 1
