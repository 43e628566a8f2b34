"""Each term's sum against its formula written out in fp64, and at the edges of fp32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from homodistil.objective.losses import (
    centred,
    cross_entropy,
    divergence,
    hidden_difference,
    log_probabilities,
    probability_difference,
)

SLOTS = (2, 3)
WEIGHTS = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])


def _logits(seed: int, vocabulary: int = 11) -> Tensor:
    return torch.randn(*SLOTS, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _kl(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    return divergence(log_probabilities(student, temperature), log_probabilities(teacher, temperature), weights)


def _softmax(row: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(z / temperature) for z in row]
    return [e / sum(exponentials) for e in exponentials]


def test_cross_entropy_sums_minus_log_p_of_the_labels_over_slots_that_have_one() -> None:
    logits, labels = _logits(0), torch.randint(11, SLOTS)
    expected = sum(
        -math.log(_softmax(logits[b, s].tolist(), 1.0)[labels[b, s]]) for b in (0, 1) for s in range(3) if WEIGHTS[b, s]
    )
    assert cross_entropy(logits, labels, WEIGHTS).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_kl_of_the_teacher_from_the_student_over_slots_that_have_a_target(temperature: float) -> None:
    student, teacher = _logits(0), _logits(1)
    expected = 0.0
    for b in (0, 1):
        for s in range(3):
            p_t, p_s = (_softmax(z[b, s].tolist(), temperature) for z in (teacher, student))
            expected += WEIGHTS[b, s].item() * sum(t * math.log(t / q) for t, q in zip(p_t, p_s, strict=True))
    assert _kl(student, teacher, WEIGHTS, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_of_the_divergence_is_the_difference_of_the_softened_probabilities() -> None:
    student, teacher = _logits(0).requires_grad_(), _logits(1)
    (gradient,) = torch.autograd.grad(_kl(student, teacher, WEIGHTS, temperature=2.0), student)
    expected = WEIGHTS[..., None] * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 2
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-12, atol=1e-14)


def test_equal_logits_diverge_by_exactly_zero() -> None:
    logits = _logits(0).float()
    assert _kl(logits, logits.clone(), WEIGHTS).item() == 0


def test_extreme_logits_stay_finite_in_fp32_with_their_gradients() -> None:
    certain = torch.full((*SLOTS, 11), -1e4)
    certain[..., 0] = 1e4
    opposite = certain.flip(-1).requires_grad_()
    loss = _kl(opposite, certain, WEIGHTS) + cross_entropy(opposite, torch.zeros(SLOTS).long(), WEIGHTS)
    loss.backward()
    assert loss.item() == pytest.approx(2 * 4 * 2e4)
    assert torch.isfinite(opposite.grad).all()


def test_low_precision_inputs_are_added_up_in_fp32() -> None:
    student, teacher = _logits(0).bfloat16(), _logits(1).bfloat16()
    found = _kl(student, teacher, WEIGHTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), _kl(student.double(), teacher.double(), WEIGHTS), rtol=1e-6, atol=0)
    states = torch.randn(2, 5, 8).bfloat16(), torch.randn(2, 5, 8).bfloat16()
    exact = hidden_difference(states[0].double(), states[1].double(), torch.ones(2, 5))
    found = hidden_difference(*states, torch.ones(2, 5))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=0)  # differences are bf16's


def test_hidden_difference_sums_over_tokens_the_mean_over_dimensions() -> None:
    student, teacher = torch.zeros(1, 3, 4), torch.tensor([1.0, 2.0, 50.0])[None, :, None].expand(1, 3, 4)
    assert hidden_difference(student, teacher, torch.tensor([[1, 1, 0]])).item() == 1 + 4


def test_centred_keys_give_each_query_scores_of_mean_zero_over_valid_keys() -> None:
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 5, 3, generator=random, dtype=torch.float64) for _ in range(2))
    valid = torch.tensor([[1, 1, 1, 0, 0]])
    scores = (query @ key.mT)[..., :3]
    centred_query, centred_key = centred((query, key), valid)
    expected = scores - scores.mean(dim=-1, keepdim=True)
    torch.testing.assert_close((centred_query @ centred_key.mT)[..., :3], expected, rtol=1e-12, atol=1e-12)


def test_a_constant_added_to_all_keys_changes_neither_centred_scores_nor_probabilities() -> None:
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 5, 3, generator=random, dtype=torch.float64) for _ in range(2))
    valid = torch.tensor([[1, 1, 1, 1, 0]])
    shifted = (query, key + torch.tensor([3.0, -1.0, 2.0]))
    torch.testing.assert_close(centred(shifted, valid)[1][:, :, :4], centred((query, key), valid)[1][:, :, :4])
    assert probability_difference((query, key), shifted, valid, scale=0.5).item() < 1e-25


def test_probabilities_of_fp32_extremes_stay_finite_with_their_gradients() -> None:
    query, key = torch.full((1, 1, 4, 2), 1e3, requires_grad=True), torch.full((1, 1, 4, 2), 1e3)
    key[..., 0, :] = -1e3
    loss = probability_difference((query, key), (-query.detach(), key), torch.tensor([[1, 1, 1, 0]]), scale=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(3 * (1 + 2 * 0.25))
    assert torch.isfinite(query.grad).all()
