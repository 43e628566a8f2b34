"""The weighted, normalised objective against a twin that walks over sequences, heads and pairs one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from homodistil.batch import Batch, Counts
from homodistil.config import HiddenTerm, ObjectiveConfig, PerformanceConfig
from homodistil.errors import ConfigError
from homodistil.knowledge.aligners import build_aligners
from homodistil.models.shape import HIDDEN, StudentShape, heads
from homodistil.objective.objective import Losses, Objective
from homodistil.signals import Signals
from tests import fixtures
from tests.unit.objective.made_up import (
    FULL,
    LAYERS,
    SCALE,
    TEACHER,
    VOCABULARY,
    cropped,
    leaves,
    narrow_shape,
    signals,
)

FORMS = pytest.mark.parametrize("form", ["scores", "scores_centred", "probabilities"])
FORMS_AND_GRAMS = pytest.mark.parametrize(
    ("form", "gram"),
    [(form, gram) for form in ("scores", "scores_centred") for gram in ("off", "auto", "on")]
    + [("probabilities", "auto")],
)
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
WEIGHTS = {"task": 1.0, "kl": 0.7, "hidden": 0.3, "attention": 0.2}


def _batch(sequences: int = 5, tokens: int = 9) -> Batch:
    return fixtures.batch(sequences, tokens, slots=3, vocabulary=VOCABULARY)


def _config(form: str = "scores", aligner: str = "indexed", **weights: float) -> ObjectiveConfig:
    values: dict[str, dict[str, Any]] = {name: {"weight": weight} for name, weight in {**WEIGHTS, **weights}.items()}
    values["attention"]["form"], values["hidden"]["aligner"] = form, aligner
    return ObjectiveConfig.model_validate(values)


def _aligners(config: ObjectiveConfig, shape: StudentShape) -> nn.ModuleList:
    return build_aligners(config.hidden, shape, LAYERS + 1).double()


def _losses(
    config: ObjectiveConfig, gram: str, shape: StudentShape, rows: Batch, counts: Counts, seed: int = 0
) -> Losses:
    student, teacher = signals(rows, shape.widths, seed), signals(rows, TEACHER, seed=99)
    performance = PerformanceConfig.model_validate({"gram_attention": gram})
    return Objective(config, shape, performance)(student, teacher, rows, counts, _aligners(config, shape))


def _twin(
    student: Signals, teacher: Signals, batch: Batch, shape: StudentShape, form: str, causal: bool = False
) -> dict[str, Tensor]:
    """All terms at T = 2 with indexed hidden states, unpadded sequence by sequence, head by head; of a causal model,
    query by query besides."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    zero = torch.zeros((), dtype=torch.float64)
    mlm, kl, hidden, attention = zero, zero, zero, zero
    for b, n in enumerate(lengths):
        for s in batch.weights[b].nonzero().flatten().tolist():
            mlm = mlm - student.logits[b, s].log_softmax(0)[batch.labels[b, s]]
            p_t, p_s = (of.logits[b, s].div(2).softmax(0) for of in (teacher, student))
            kl = kl + 4 * (p_t * (p_t / p_s).log()).sum()
        for h_s, h_t in zip(student.hidden_states, teacher.hidden_states, strict=True):
            difference = h_s[b, :n] - h_t[b, :n][:, list(shape.kept[HIDDEN])]
            hidden = hidden + difference.pow(2).sum() / len(shape.kept[HIDDEN])
        for layer in range(LAYERS):
            for position, head in enumerate(shape.kept[heads(layer)]):
                maps = []
                for of, number in ((student, position), (teacher, head)):
                    query, key = (states[b, number, :n] for states in of.queries_keys[layer])
                    scores = SCALE * query @ key.T
                    maps.append([_seen(row[: i + 1 if causal else n], form) for i, row in enumerate(scores)])
                attention = attention + sum((ours - theirs).pow(2).sum() for ours, theirs in zip(*maps, strict=True))
    slots, tokens = batch.weights.sum(), sum(lengths)
    pairs = sum(n * (n + 1) / 2 if causal else n * n for n in lengths)
    return {
        "task": mlm / slots,
        "kl": kl / slots,
        "hidden": hidden / tokens / (LAYERS + 1),
        "attention": attention / pairs / LAYERS / shape.widths.heads,
    }


def _seen(scores: Tensor, form: str) -> Tensor:
    """What is compared of the scores that a query gives the keys it sees."""
    if form == "scores_centred":
        return scores - scores.mean()
    return scores.softmax(dim=0) if form == "probabilities" else scores


@FORMS
@pytest.mark.parametrize("shape", [FULL, narrow_shape()], ids=["full", "narrow"])
def test_a_causal_models_attention_is_compared_up_to_the_diagonal(form: str, shape: StudentShape) -> None:
    rows, config = _batch(), _config(form, task=0, kl=0, hidden=0, attention=1)
    student, teacher = signals(rows, shape.widths, seed=0), signals(rows, TEACHER, seed=1)
    objective = Objective(config, shape, PerformanceConfig(), causal=True)
    found = objective(student, teacher, rows, rows.counts(), _aligners(config, shape)).total
    expected = _twin(student, teacher, rows, shape, form, causal=True)["attention"]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    wanted = [states for layer in student.queries_keys for states in layer]
    for ours, theirs in zip(*(torch.autograd.grad(loss, wanted) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_each_hidden_state_is_compared_in_units_of_its_variance() -> None:
    rows, config = _batch(), _config(task=0, kl=0, hidden=1, attention=0)
    student, teacher = signals(rows, TEACHER, seed=0), signals(rows, TEACHER, seed=1)
    variances = [0.5, 3.0, 40.0]
    objective = Objective(config, FULL, PerformanceConfig(), hidden_variances=variances)
    found = objective(student, teacher, rows, rows.counts(), _aligners(config, FULL)).total
    real = rows.attention_mask.bool()
    expected = torch.stack(
        [
            (ours - theirs)[real].square().mean() / variance
            for ours, theirs, variance in zip(student.hidden_states, teacher.hidden_states, variances, strict=True)
        ]
    ).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@FORMS_AND_GRAMS
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("shape", [FULL, narrow_shape()], ids=["full", "narrow"])
def test_values_and_gradients_equal_the_walked_twin(form: str, gram: str, fused: bool, shape: StudentShape) -> None:
    rows, config = _batch(), _config(form)
    student, teacher = signals(rows, shape.widths, seed=0), signals(rows, TEACHER, seed=1)
    performance = PerformanceConfig.model_validate({"gram_attention": gram, "fused_vocabulary": fused})
    objective = Objective(config, shape, performance)
    losses = objective(student, teacher, rows, rows.counts(), _aligners(config, shape))
    expected = _twin(student, teacher, rows, shape, form)
    total = sum((WEIGHTS[name] * value for name, value in expected.items()), torch.zeros(()))
    torch.testing.assert_close(
        losses.parts, {name: value.detach() for name, value in expected.items()}, rtol=1e-11, atol=0
    )
    torch.testing.assert_close(losses.total, total, rtol=1e-11, atol=0)
    found, twins = (torch.autograd.grad(loss, leaves(student)) for loss in (losses.total, total))
    for ours, theirs in zip(found, twins, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@CAUSAL
@FORMS
def test_a_padded_batch_gives_the_losses_of_its_unpadded_sequences_alone(form: str, causal: bool) -> None:
    rows, config, shape = _batch(), _config(form, "projection"), narrow_shape()
    assert (rows.attention_mask == 0).any()
    student, teacher = signals(rows, shape.widths, seed=0), signals(rows, TEACHER, seed=1)
    objective = Objective(config, shape, PerformanceConfig(), causal=causal)
    aligners, counts = _aligners(config, shape), rows.counts()
    together = objective(student, teacher, rows, counts, aligners).parts
    alone: dict[str, Tensor] = {}
    for row in range(len(rows)):
        one, one_student = cropped(rows, student, row)
        parts = objective(one_student, cropped(rows, teacher, row)[1], one, counts, aligners).parts
        alone = {name: alone.get(name, 0) + part for name, part in parts.items()}
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_of_any_size_add_up_to_the_update(size: int) -> None:
    rows, config = _batch(), _config()
    student, teacher = signals(rows, TEACHER, seed=0), signals(rows, TEACHER, seed=1)
    objective, counts = Objective(config, FULL, PerformanceConfig()), rows.counts()
    whole = objective(student, teacher, rows, counts, _aligners(config, FULL))
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(rows), size):
        part = [_rows(of, start, start + size) for of in (student, teacher)]
        total = total + objective(*part, rows.rows(start, start + size), counts, _aligners(config, FULL)).total
    torch.testing.assert_close(total, whole.total, rtol=1e-13, atol=0)
    for ours, theirs in zip(
        *(torch.autograd.grad(loss, leaves(student)) for loss in (total, whole.total)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def _rows(of: Signals, start: int, end: int) -> Signals:
    return Signals(
        hidden_states=tuple(state[start:end] for state in of.hidden_states),
        queries_keys=tuple((query[start:end], key[start:end]) for query, key in of.queries_keys),
        attention_scale=of.attention_scale,
        logits=of.logits[start:end],
    )


def test_a_student_equal_to_its_teacher_has_no_loss_but_mlm_whatever_the_aligner() -> None:
    rows = _batch()
    same = signals(rows, TEACHER, seed=0, dtype=torch.float32)
    for aligner in ("indexed", "projection"):
        config = _config(aligner=aligner)
        aligners = build_aligners(config.hidden, FULL, LAYERS + 1)
        parts = Objective(config, FULL, PerformanceConfig())(same, same, rows, rows.counts(), aligners).parts
        assert [parts[name].item() for name in ("kl", "hidden", "attention")] == [0, 0, 0]
        assert parts["task"].item() > 0


def test_a_term_of_weight_zero_is_not_computed() -> None:
    rows = _batch()
    losses = _losses(_config(hidden=0.0, kl=0.0), "auto", FULL, rows, rows.counts())
    assert losses.parts.keys() == {"task", "attention"}


def test_without_a_teacher_only_mlm_is_computed() -> None:
    rows = _batch()
    student = signals(rows, TEACHER, seed=0)
    losses = Objective(_config(), FULL, PerformanceConfig())(student, None, rows, rows.counts(), nn.ModuleList())
    assert losses.parts.keys() == {"task"}
    assert losses.total.item() == losses.parts["task"].item()


def test_only_the_total_carries_gradients() -> None:
    rows = _batch()
    losses = _losses(_config(), "auto", narrow_shape(), rows, rows.counts())
    assert losses.total.requires_grad
    assert not any(part.requires_grad for part in losses.parts.values())


def test_projections_get_gradients_from_the_objective() -> None:
    rows, config, shape = _batch(), _config(aligner="projection"), narrow_shape()
    aligners = _aligners(config, shape)
    student, teacher = signals(rows, shape.widths, 0), signals(rows, TEACHER, 1)
    Objective(config, shape, PerformanceConfig())(student, teacher, rows, rows.counts(), aligners).total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in aligners.parameters())


def test_bf16_signals_give_fp32_losses_as_close_as_fp32_arithmetic_but_for_what_is_subtracted_in_bf16() -> None:
    rows, config, shape = _batch(), _config(), narrow_shape()
    student, teacher = (signals(rows, w, seed, torch.bfloat16) for w, seed in ((shape.widths, 0), (TEACHER, 1)))
    objective = Objective(config, shape, PerformanceConfig()).bfloat16()  # as an engine casts the module it is part of
    parts = objective(student, teacher, rows, rows.counts(), _aligners(config, shape)).parts
    expected = _twin(_double(student), _double(teacher), rows, shape, "scores")
    assert {part.dtype for part in parts.values()} == {torch.float32}
    for name, part in parts.items():
        tolerance = 1e-3 if name in ("hidden", "attention") else 2e-6
        torch.testing.assert_close(part.double(), expected[name].detach(), rtol=tolerance, atol=0)


def _double(of: Signals) -> Signals:
    return Signals(
        hidden_states=tuple(state.double() for state in of.hidden_states),
        queries_keys=tuple((query.double(), key.double()) for query, key in of.queries_keys),
        attention_scale=of.attention_scale,
        logits=of.logits.double(),
    )


def test_a_batch_without_any_target_adds_nothing_and_stays_finite() -> None:
    rows = _batch()
    empty = Batch(**{**vars(rows), "weights": torch.zeros_like(rows.weights)})
    parts = _losses(_config(), "auto", FULL, empty, empty.counts()).parts
    assert parts["task"].item() == 0 == parts["kl"].item()


def test_a_gram_form_of_probabilities_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"performance\.gram_attention: found on.*probabilities"):
        Objective(_config("probabilities"), FULL, PerformanceConfig(gram_attention="on"))


def test_a_gram_form_of_a_causal_models_scores_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"performance\.gram_attention: found on.*causal.*auto"):
        Objective(_config(), FULL, PerformanceConfig(gram_attention="on"), causal=True)


def test_an_objective_without_terms_is_refused() -> None:
    rows = _batch()
    with pytest.raises(ConfigError, match="weight 0"):
        Objective(_config(task=0.0), FULL, PerformanceConfig())(
            signals(rows, TEACHER, 0), None, rows, rows.counts(), build_aligners(HiddenTerm(), FULL, 3)
        )
