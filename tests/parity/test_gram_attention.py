"""The forms of the attention-score error against score maps written out, sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from homodistil.kernels import gram_attention
from homodistil.kernels.gram_attention import QueriesKeys, causal, direct, gram, prefers_gram

SEQUENCES, HEADS, TOKENS, WIDTH = 3, 2, 19, 8
FORMS = pytest.mark.parametrize("form", [direct, gram, causal], ids=["direct", "gram", "causal"])


def _states(width: int, seed: int, dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> QueriesKeys:
    random = torch.Generator().manual_seed(seed)
    shape = (SEQUENCES, HEADS, tokens, width)
    query, key = (torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for _ in range(2))
    return query.requires_grad_(), key.requires_grad_()


def _valid(tokens: int = TOKENS) -> Tensor:
    return (torch.arange(tokens) < torch.tensor([[tokens], [5], [tokens - 6]])).long()


@pytest.fixture(autouse=True)
def _several_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_attention, "QUERIES", 7)


def _twin(student: QueriesKeys, teacher: QueriesKeys, valid: Tensor, form: Callable[..., Tensor]) -> Tensor:
    """Both score maps of each unpadded sequence, subtracted; without those after the query for the causal form."""
    total = torch.zeros((), dtype=student[0].dtype)
    for row, length in enumerate(valid.sum(dim=1).tolist()):
        for head in range(HEADS):
            maps = [query[row, head, :length] @ key[row, head, :length].T for query, key in (student, teacher)]
            seen = torch.ones_like(maps[0]).tril() if form is causal else torch.ones_like(maps[0])
            total = total + ((maps[0] - maps[1]) * seen).pow(2).sum()
    return total


@FORMS
@pytest.mark.parametrize("width", [WIDTH, 5])
def test_values_and_gradients_equal_the_written_out_maps_in_fp64(form: Callable[..., Tensor], width: int) -> None:
    student, teacher = _states(width, seed=0), _states(WIDTH, seed=1)
    expected = _twin(student, teacher, _valid(), form)
    found = form(student, teacher, _valid())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for ours, twins in zip(torch.autograd.grad(found, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(ours, twins, rtol=1e-12, atol=1e-10)


@FORMS
def test_fp32_keeps_six_digits_where_student_and_teacher_differ_by_a_thousandth(form: Callable[..., Tensor]) -> None:
    teacher = _states(32, seed=1, dtype=torch.float32, tokens=128)
    noise = _states(32, seed=0, dtype=torch.float32, tokens=128)
    student = (teacher[0] + 1e-3 * noise[0], teacher[1] + 1e-3 * noise[1])
    exact = _exact(student, teacher, _valid(128), form)
    torch.testing.assert_close(form(student, teacher, _valid(128)).double(), exact, rtol=1e-6, atol=0)


@FORMS
def test_equal_models_have_exactly_no_error_and_no_gradient(form: Callable[..., Tensor]) -> None:
    student, teacher = (_states(WIDTH, seed=0, dtype=torch.float32) for _ in range(2))
    loss = form(student, teacher, _valid())
    assert loss.item() == 0
    assert all(gradient.count_nonzero() == 0 for gradient in torch.autograd.grad(loss, student))


@FORMS
def test_what_stands_at_padding_does_not_matter(form: Callable[..., Tensor]) -> None:
    student, teacher = _states(WIDTH, seed=0), _states(WIDTH, seed=1)
    padding = (_valid() == 0)[:, None, :, None]
    louder = tuple(x.detach() + 1e3 * padding for x in student)
    torch.testing.assert_close(form(louder, teacher, _valid()), form(student, teacher, _valid()), rtol=0, atol=0)


@FORMS
def test_autocast_does_not_lower_the_precision_of_fp32_inputs(form: Callable[..., Tensor]) -> None:
    student, teacher = (_states(WIDTH, seed=seed, dtype=torch.float32) for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = form(student, teacher, _valid())
    torch.testing.assert_close(found.double(), _exact(student, teacher, _valid(), form), rtol=1e-6, atol=0)


@FORMS
@pytest.mark.parametrize("gap", [1.0, 0.05, 0.01])
def test_bf16_inputs_lose_nothing_to_cancellation(form: Callable[..., Tensor], gap: float) -> None:
    """Products are bf16's, each as precise as the difference that it is made of; the sum is fp32's."""
    teacher, noise = (_states(32, seed=seed, dtype=torch.float32, tokens=128) for seed in (1, 0))
    student = tuple((x + gap * n).detach().bfloat16().requires_grad_() for x, n in zip(teacher, noise, strict=True))
    teacher = tuple(x.detach().bfloat16() for x in teacher)
    found, exact = form(student, teacher, _valid(128)), _exact(student, teacher, _valid(128), form)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact.detach(), rtol=2e-3, atol=0)
    for ours, twins in zip(torch.autograd.grad(found, student), torch.autograd.grad(exact, student), strict=True):
        assert (ours.double() - twins.double()).norm() < 0.01 * twins.double().norm()


def _exact(student: QueriesKeys, teacher: QueriesKeys, valid: Tensor, form: Callable[..., Tensor]) -> Tensor:
    in_fp64 = [(query.double(), key.double()) for query, key in (student, teacher)]
    return _twin(in_fp64[0], in_fp64[1], valid, form)


def test_the_causal_form_is_the_same_in_blocks_of_any_size_and_keeps_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = _states(WIDTH, seed=0), _states(WIDTH, seed=1)
    whole = causal(student, teacher, _valid())
    kept: list[int] = []
    for queries in (1, 5, TOKENS, 100):
        monkeypatch.setattr(gram_attention, "QUERIES", queries)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            value = causal(student, teacher, _valid())
        torch.testing.assert_close(value, whole, rtol=1e-13, atol=0)
    assert kept == 4 * 2 * [student[0].numel()]


def test_the_gram_form_is_preferred_from_four_head_widths_of_tokens_on() -> None:
    assert not prefers_gram(tokens=4 * 64, student_width=64, teacher_width=64)
    assert prefers_gram(tokens=4 * 64 + 1, student_width=64, teacher_width=64)
    assert prefers_gram(tokens=4 * 64, student_width=48, teacher_width=64)
