"""TED against plain PyTorch written from its paper (section 3): where filters stand, what stage I learns and from what,
and what stage II compares."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForMaskedLM, BertForSequenceClassification

from homodistil.batch import Batch
from homodistil.config import RunConfig
from homodistil.costs import micro_batch_cost
from homodistil.knowledge.filters import FilterDescription, FilterSet, save_filters
from homodistil.knowledge.teacher import FrozenModel
from homodistil.learner import FilterLearner
from homodistil.models import family_of
from homodistil.models.attention import attention_implementation
from homodistil.models.loading import model_hash
from homodistil.models.shape import StudentShape, Widths
from homodistil.stage_one import stage_one
from homodistil.student import Blueprint, Student, as_tuple
from tests import fixtures

TEACHER_LAYERS, INTERVAL = 4, 2
WIDE, NARROW = 72, 42
"""Of the teacher, and of a student that is none of it: seven dimensions a head instead of twelve."""


def save(directory: Path, kind: type[nn.Module], seed: int, **changes: Any) -> Path:
    """A trained model: no tensor is left constant."""
    torch.manual_seed(seed)
    model = kind(fixtures.bert_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(directory)  # type: ignore[operator]
    fixtures.save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module", params=["mlm", "rte"])
def models(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A teacher of four layers and a narrower student of two, both masked language models or both classifiers."""
    folder, kind = (
        tmp_path_factory.mktemp(request.param),
        {"mlm": BertForMaskedLM, "rte": BertForSequenceClassification},
    )
    return {
        "task": request.param,
        "kind": kind[request.param],
        "teacher": save(folder / "teacher", kind[request.param], 1, num_hidden_layers=TEACHER_LAYERS),
        "student": save(folder / "student", kind[request.param], 2, num_hidden_layers=2, hidden_size=NARROW),
    }


def run_config(models: dict[str, Any], **sections: Any) -> RunConfig:
    values = {
        "task": {"name": models["task"]},
        "teacher": {"path": str(models["teacher"])},
        "student": {"path": str(models["student"])},
        "objective": {
            "hidden": {"aligner": "filter", "weight": 3.0},
            "kl": {"weight": 2.0},
            "attention": {"weight": 0},
        },
    }
    return RunConfig.model_validate({**values, **sections})


def blueprint(run: RunConfig, models: dict[str, Any], of: str = "student") -> Blueprint:
    teacher, student = (models["kind"].from_pretrained(models[name]).config for name in ("teacher", "student"))
    own = teacher if of == "teacher" else student
    family = family_of(own, run.task.task.kind)
    return Blueprint(family, own, run, attention_implementation("sdpa"), None if of == "teacher" else teacher)


def rows(models: dict[str, Any]) -> Batch:
    """Masked sequences, or the same with a class each."""
    batch = fixtures.batch()
    if models["task"] == "mlm":
        return batch
    count = len(batch)
    slot = torch.zeros(count, 1, dtype=torch.int64)
    values = {**vars(batch), "scored_positions": slot, "labels": torch.arange(count).view(-1, 1) % 2}
    return Batch(**{**values, "weights": torch.ones(count, 1)})


def learner(models: dict[str, Any], of: str, **filters: Any) -> FilterLearner:
    """Stage I of the run, for its teacher or its student; nothing is dropped, so that a twin can follow."""
    run = run_config(models, filters=filters)
    first = stage_one(run, of, blueprint(run, models))  # type: ignore[arg-type]
    first.student.dropout = 0.0
    plan = blueprint(first, models, of)
    model = models["kind"].from_pretrained(models[of], attn_implementation=plan.attention)
    torch.manual_seed(0)
    return FilterLearner(model, plan, plan.full_shape)


def states(model: Any, batch: Batch) -> tuple[Tensor, ...]:
    out = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    return out.hidden_states


def task_loss(task: str, logits: Tensor, batch: Batch) -> Tensor:
    """Mean over masked words, or over sequences. logits: (B, T, V) or (B, C)."""
    if task == "rte":
        return F.cross_entropy(logits, batch.labels[:, 0])
    picked = logits[torch.arange(len(batch)).unsqueeze(1), batch.scored_positions]
    losses = F.cross_entropy(picked.flatten(0, 1), batch.labels.flatten(), reduction="none").view_as(batch.weights)
    return (losses * batch.weights).sum() / batch.weights.sum()


def head(task: str, model: Any, x: Tensor) -> Tensor:
    """The model's own, written out: transform, activation, LayerNorm, tied decoder; or pooler and classifier."""
    if task == "rte":
        return model.classifier(torch.tanh(model.bert.pooler.dense(x[:, 0])))
    transform, predictions = model.cls.predictions.transform, model.cls.predictions
    x = transform.LayerNorm(F.gelu(transform.dense(x)))
    return x @ model.bert.embeddings.word_embeddings.weight.T + predictions.bias


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_stage_one_is_the_mean_task_loss_of_filters_of_a_frozen_model(models: dict[str, Any], of: str) -> None:
    module, batch = learner(models, of), rows(models)
    total, parts = module(as_tuple(batch), None, batch.counts().vector)
    total.backward()
    placed = [1, 3] if of == "teacher" else [0, 1]  # 0-based: i such that (i + 1) % interval == 0
    assert list(module.filters) == [str(layer) for layer in placed]

    task, frozen = models["task"], models["kind"].from_pretrained(models[of]).eval()
    scorer = models["kind"].from_pretrained(models["teacher"])
    hidden, filters, owners, wanted = states(frozen, batch), [], [], []
    for position, layer in enumerate(placed):
        plain = nn.Linear(frozen.config.hidden_size, WIDE)
        plain.load_state_dict(module.filters[str(layer)].linear.state_dict())  # type: ignore[union-attr]
        owner = copy.deepcopy(scorer)
        if task == "rte":  # a new head for each
            pooler, _, classifier = module.heads[position]  # type: ignore[misc]
            owner.bert.pooler.load_state_dict(pooler.state_dict())
            owner.classifier.load_state_dict(classifier.state_dict())
        wanted.append(task_loss(task, head(task, owner, plain(hidden[layer + 1].detach())), batch))
        filters.append(plain)
        owners.append(owner)
    torch.stack(wanted).mean().backward()

    assert total.item() == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-6)
    assert [part.item() for part in parts.values()] == pytest.approx([w.item() for w in wanted], rel=1e-6)
    for position, layer in enumerate(placed):
        for ours, theirs in zip(module.filters[str(layer)].parameters(), filters[position].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
        if task == "rte":
            ours = [p.grad for p in module.heads[position].parameters()]
            own = owners[position]
            theirs = [p.grad for p in (*own.bert.pooler.parameters(), *own.classifier.parameters())]
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_stage_one_gives_gradients_to_filters_and_new_heads_alone(models: dict[str, Any], of: str) -> None:
    module, batch = learner(models, of), rows(models)
    module(as_tuple(batch), None, batch.counts().vector)[0].backward()
    learns = {name.split(".")[0] for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert learns == {"filters", "heads"} if models["task"] == "rte" else learns == {"filters"}
    assert all(not p.requires_grad for p in module.model.parameters())
    new_heads = 2 if models["task"] == "rte" else 1
    assert len(module.heads) == new_heads


def test_a_new_head_per_filter_is_an_option_in_language_modelling(models: dict[str, Any]) -> None:
    module = learner(models, "student", head="new")
    assert len(module.heads) == 2 and all(p.requires_grad for p in module.heads.parameters())


def test_an_inner_layer_and_its_activation_are_an_option(models: dict[str, Any]) -> None:
    module = learner(models, "student", hidden=30, activation="tanh")
    made = module.filters["0"]
    x = torch.randn(2, 5, NARROW)
    inner, last = made.inner, made.linear  # type: ignore[union-attr]
    plain = torch.tanh(x @ inner.weight.T + inner.bias) @ last.weight.T + last.bias  # type: ignore[union-attr]
    torch.testing.assert_close(made(x), plain)  # type: ignore[operator]


def test_square_filters_may_start_at_the_identity(models: dict[str, Any]) -> None:
    module, x = learner(models, "teacher", init="identity"), torch.randn(2, 5, WIDE)
    assert torch.equal(module.filters["1"](x), x)  # type: ignore[operator]


def save_some(directory: Path, path: Path, layers: list[int], width: int, task: str, seed: int) -> Path:
    torch.manual_seed(seed)
    made = {layer: nn.Linear(width, WIDE) for layer in layers}
    weights = {
        f"{layer}.linear.{name}": p.detach() for layer, lin in made.items() for name, p in lin.named_parameters()
    }
    values = {"model": str(path), "model_sha256": model_hash(path), "task": task, "layers": layers}
    return save_filters(directory, weights, FilterDescription(**values, width_in=width, width_out=WIDE))


@pytest.fixture
def stage_two(models: dict[str, Any], tmp_path: Path) -> tuple[RunConfig, Blueprint]:
    task = models["task"]
    own = save_some(tmp_path / "of_student", models["student"], [0, 1], NARROW, task, 3)
    teachers = save_some(tmp_path / "of_teacher", models["teacher"], [1, 3], WIDE, task, 4)
    run = run_config(
        models,
        teacher={"path": str(models["teacher"]), "filters": teachers},
        student={"path": str(models["student"]), "filters": own, "dropout": 0.0},
    )
    return run, blueprint(run, models)


def test_stage_two_compares_the_kth_filtered_states_with_each_other(
    models: dict[str, Any], stage_two: tuple[RunConfig, Blueprint]
) -> None:
    (run, plan), batch, task = stage_two, rows(models), models["task"]
    model, other = (
        models["kind"].from_pretrained(models[n], attn_implementation=plan.attention) for n in ("student", "teacher")
    )
    module = Student(model, plan, plan.full_shape)
    teacher = FrozenModel(other, plan.family, plan.compared, run.teacher.filters)
    total, parts = module(as_tuple(batch), teacher(*as_tuple(batch) or ()), batch.counts().vector)
    total.backward()

    plain, plain_teacher = (models["kind"].from_pretrained(models[n]).eval() for n in ("student", "teacher"))
    sets = {name: FilterSet.load(getattr(run, name).filters) for name in ("student", "teacher")}
    ours = [sets["student"].filter(k).linear for k in (0, 1)]
    theirs = [sets["teacher"].filter(k).linear for k in (1, 3)]
    mask = batch.attention_mask.bool()
    h_s = states(plain, batch)
    with torch.no_grad():
        h_t = states(plain_teacher, batch)
        z_t = head(task, plain_teacher, h_t[-1])
    z_s = head(task, plain, h_s[-1])
    pairs = zip(ours, h_s[1:], theirs, (h_t[2], h_t[4]), strict=True)
    mse = torch.stack([F.mse_loss(f(s)[mask], g(t)[mask].detach()) for f, s, g, t in pairs]).mean()
    kl = 4 * _kl(task, z_s / 2, z_t / 2, batch)
    loss = task_loss(task, z_s, batch)
    (loss + 2 * kl + 3 * mse).backward()

    assert {name: part.item() for name, part in parts.items()} == pytest.approx(
        {"task": loss.item(), "kl": kl.item(), "hidden": mse.item()}, rel=2e-6
    )
    for aligner, plain_filter in zip(module.aligners, ours, strict=True):
        for a, b in zip(aligner.parameters(), plain_filter.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
    mine = dict(module.model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=2e-5, atol=1e-6)


def _kl(task: str, z_s: Tensor, z_t: Tensor, batch: Batch) -> Tensor:
    p, log_p, log_q = z_t.softmax(-1), z_t.log_softmax(-1), z_s.log_softmax(-1)
    each = (p * (log_p - log_q)).sum(-1)
    if task == "rte":
        return each.mean()
    picked = each[torch.arange(len(batch)).unsqueeze(1), batch.scored_positions]
    return (picked * batch.weights).sum() / batch.weights.sum()


def test_the_teachers_filters_cost_something(
    stage_two: tuple[RunConfig, Blueprint], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan = stage_two
    whole = micro_batch_cost(plan, plan.full_shape.widths, 4, 10, torch.float32)
    monkeypatch.setattr(Blueprint, "teacher_filters", None)
    without = micro_batch_cost(plan, plan.full_shape.widths, 4, 10, torch.float32)
    assert whole.products - without.products == 2 * 2 * 4 * 10 * WIDE * WIDE  # two layers, multiply and add


def test_a_narrower_student_has_filters_that_read_what_it_still_has(
    models: dict[str, Any], stage_two: tuple[RunConfig, Blueprint]
) -> None:
    run, plan = stage_two
    shape = plan.full_shape.first(Widths(36, 60, 6, 6))
    module = Student.unfilled(plan, shape)
    whole = FilterSet.load(run.student.filters).filter(1).linear  # type: ignore[arg-type]
    assert torch.equal(module.aligners[1].filter.linear.weight, whole.weight[:, :36])  # type: ignore[union-attr]
    hidden = next(group for group in module.groups if group.name == "hidden")
    sliced = {(m.parameter, m.axis) for m in hidden.members if m.parameter.startswith("aligners")}
    assert sliced == {(f"aligners.{k}.filter.linear.weight", 1) for k in (0, 1)}


def test_a_student_that_starts_as_its_teacher_has_its_filters_and_no_loss_between_them(
    models: dict[str, Any], tmp_path: Path
) -> None:
    task = models["task"]
    folder = save_some(tmp_path / "filters", models["teacher"], [0, 1, 2, 3], WIDE, task, 4)
    teacher = {"path": str(models["teacher"]), "filters": folder}
    run = run_config(models, teacher=teacher, student={"dropout": 0.0})
    plan, batch = blueprint(run, models, "teacher"), rows(models)
    both = [models["kind"].from_pretrained(models["teacher"], attn_implementation=plan.attention) for _ in range(2)]
    module = Student(both[0], plan, plan.full_shape)
    frozen = FrozenModel(both[1], plan.family, plan.compared, folder)
    _, parts = module(as_tuple(batch), frozen(*as_tuple(batch) or ()), batch.counts().vector)
    assert parts["hidden"].item() == 0.0 and len(module.aligners) == TEACHER_LAYERS
    assert math.isclose(parts["kl"].item(), 0.0, abs_tol=1e-6)


def test_shape_of_a_student_is_told_apart_from_its_teachers(stage_two: tuple[RunConfig, Blueprint]) -> None:
    _, plan = stage_two
    assert plan.teacher_width == WIDE
    assert plan.full_shape == StudentShape.full(2, Widths(NARROW, 136, 6, 7))
