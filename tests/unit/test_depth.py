"""A student of fewer layers than its teacher: which it starts with, which it is compared with, what comes out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, BertForMaskedLM

from homodistil.config import RunConfig
from homodistil.export import export_student
from homodistil.knowledge.teacher import FrozenModel
from homodistil.models.attention import attention_implementation
from homodistil.models.bert import BertFamily
from homodistil.models.shape import Widths
from homodistil.student import Blueprint, Student, as_tuple
from tests import fixtures, twin

SOURCE, MATCHED = [0, 1], [1, 2]
HIDDEN, PAIRED = [0, 2, 3], [1, 2]
"""The teacher's hidden states, embeddings first, and layers that the student's stand beside."""


def blueprint(layers: list[int] | None = None, matched: list[int] | None = None) -> Blueprint:
    values = {
        "teacher": {"path": "in memory"},
        "student": {"layers": layers},
        "knowledge": {"layers": matched},
        "objective": {name: {"weight": weight} for name, weight in twin.WEIGHTS.items()},
    }
    run, attention = RunConfig.model_validate(values), attention_implementation("sdpa")
    return Blueprint(BertFamily(), fixtures.bert_config(), run, attention)


def cut(model: BertForMaskedLM) -> BertForMaskedLM:
    """By hand: a stock model of two layers with the first two's weights."""
    small = BertForMaskedLM(fixtures.bert_config(num_hidden_layers=2)).eval()
    whole = model.state_dict()
    small.load_state_dict({name: whole[name] for name in small.state_dict()})
    return small


def expected_losses(student: BertForMaskedLM, teacher: BertForMaskedLM) -> dict[str, Tensor]:
    """The twin's vocabulary losses, and the two others of the layers that stand beside each other."""
    rows = fixtures.batch()
    _, hidden, scores = twin.signals(student, rows)
    with torch.no_grad():
        _, t_hidden, t_scores = twin.signals(teacher, rows)
    mask = rows.attention_mask.bool()
    states = zip(hidden, (t_hidden[k] for k in HIDDEN), strict=True)
    between = torch.stack([(s - t).square().mean(-1)[mask].mean() for s, t in states]).mean()
    pairs = mask.unsqueeze(1) & mask.unsqueeze(2)
    maps = zip(scores, (t_scores[k] for k in PAIRED), strict=True)
    attended = torch.stack([((s - t) / math.sqrt(12)).square().mean(1)[pairs].mean() for s, t in maps]).mean()
    return {"hidden": between, "attention": attended}


def test_losses_and_gradients_are_those_of_the_layers_that_stand_beside_each_other() -> None:
    plan, rows = blueprint(SOURCE, MATCHED), fixtures.batch()
    models = [fixtures.bert(seed, attn_implementation=plan.attention) for seed in (1, 0)]
    plan.family.keep_layers(models[0], plan.source)
    student = Student(models[0], plan, plan.full_shape)
    teacher = FrozenModel(models[1], plan.family, plan.compared)
    total, parts = student(as_tuple(rows), teacher(*as_tuple(rows) or ()), rows.counts().vector)
    plain = twin.scaled(cut(fixtures.bert(1)), 12)
    wanted = expected_losses(plain, twin.scaled(fixtures.bert(0), 12))
    for name, value in wanted.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-5), name
    (twin.WEIGHTS["hidden"] * wanted["hidden"] + twin.WEIGHTS["attention"] * wanted["attention"]).backward()
    only = blueprint(SOURCE, MATCHED)
    for term in ("task", "kl"):
        student.objective.weights[term] = 0.0
    total, _ = student(as_tuple(rows), teacher(*as_tuple(rows) or ()), rows.counts().vector)
    total.backward()
    ours = dict(student.model.named_parameters())
    compared = [name for name, parameter in plain.named_parameters() if parameter.grad is not None]
    assert len(compared) > 20 and only.compared.teacher == tuple(MATCHED)
    for name in compared:
        gradient = dict(plain.named_parameters())[name].grad
        torch.testing.assert_close(ours[name].grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("layers", "matched"), [(None, (0, 1, 2)), ([0], (2,)), ([0, 1], (1, 2)), ([1, 2], (1, 2))])
def test_layers_are_compared_evenly_spaced_up_to_the_last(layers: list[int] | None, matched: tuple[int, ...]) -> None:
    assert blueprint(layers).compared.teacher == matched


def test_a_narrowed_student_of_two_layers_is_a_stock_model(tmp_path: Path) -> None:
    plan = blueprint(SOURCE)
    shape = plan.full_shape.first(Widths(36, 64, 6, 6))
    student = Student.unfilled(plan, shape)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.normal_(std=0.05)
    plan.run.teacher.path = str(fixtures.save_bert(tmp_path / "teacher"))
    weights = dict(student.model.named_parameters())
    export_student(weights, plan, shape, tmp_path / "student", tmp_path / "teacher")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    assert (loaded.config.num_hidden_layers, loaded.config.hidden_size) == (2, 36)
    rows = fixtures.batch()
    expected = student.eval().family.signals(student.model, rows).logits
    found = loaded(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    at_slots = found[torch.arange(len(rows)).unsqueeze(1), rows.scored_positions]
    torch.testing.assert_close(at_slots, expected, rtol=1e-5, atol=1e-5)
