"""Cross-entropy and KL from one look, against autograd of their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from homodistil.kernels import vocabulary
from homodistil.kernels.vocabulary import cross_entropy_and_divergence

SLOTS, WORDS = 11, 23


def _random(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(SLOTS, WORDS, generator=random, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(WORDS, (SLOTS,), generator=random)
    weights = torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1])
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels, weights


def _twin(student: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """As they are written in papers, in fp64."""
    student, teacher = student.double(), teacher.double()
    loss = -student.softmax(-1)[range(SLOTS), labels].log()
    p, q = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    return (weights * loss).sum(), (weights * (q * (q / p).log()).sum(-1)).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("rows", [1, 4, 100], ids=lambda rows: f"{rows}_rows_at_a_time")
def test_sums_and_their_separate_gradients_are_those_of_the_definitions(
    monkeypatch: pytest.MonkeyPatch, rows: int, temperature: float
) -> None:
    monkeypatch.setattr(vocabulary, "CPU_BYTES", 4 * WORDS * rows)
    student, *rest = _random(torch.float64)
    found = cross_entropy_and_divergence(student, *rest, temperature)
    expected = _twin(student, *rest, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, twin in zip(found, expected, strict=True):  # each alone, so that neither hides in the other
        ours, theirs = (torch.autograd.grad(2.5 * value, student, retain_graph=True)[0] for value in (one, twin))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_logits_are_computed_in_fp32(dtype: torch.dtype) -> None:
    student, *rest = _random(dtype)
    found, expected = cross_entropy_and_divergence(student, *rest, 2.0), _twin(student, *rest, 2.0)
    for one, twin in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), twin, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(sum(values), student)[0] for values in (found, expected))
    assert ours.dtype == dtype
    if dtype == torch.bfloat16:  # each term's gradient is rounded, then their sum
        assert (ours - theirs).norm() < 5e-3 * theirs.norm()
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_divergence_of_equal_logits_and_its_gradient_are_zero() -> None:
    student, _, *rest = _random(torch.float32)
    _, kl = cross_entropy_and_divergence(student, student.detach(), *rest, 1.0)
    assert kl.item() == 0
    assert not torch.autograd.grad(kl, student)[0].any()
