"""Squared errors against their definition in fp64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from homodistil.kernels.squares import squared_error, sum_of_squares


def pair(gap: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    teacher, noise = (torch.randn(3, 5, 200, generator=random) for _ in range(2))
    return (teacher + gap * noise).to(dtype).requires_grad_(), teacher.to(dtype)


VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])


def exact(student: Tensor, teacher: Tensor) -> Tensor:
    return (((student.double() - teacher.double()) ** 2).sum(dim=-1) * VALID).sum()


@pytest.mark.parametrize(
    ("dtype", "value", "gradient"),
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-6, 1e-6), (torch.bfloat16, 2e-3, 5e-3)],
)
@pytest.mark.parametrize("gap", [1.0, 0.05])
def test_values_and_gradients_are_those_of_the_definition(
    dtype: torch.dtype, value: float, gradient: float, gap: float
) -> None:
    student, teacher = pair(gap, dtype)
    found, wanted = squared_error(student, teacher, VALID), exact(student, teacher)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), wanted, rtol=value, atol=0)
    (ours,) = torch.autograd.grad(found / 3, student)
    (theirs,) = torch.autograd.grad(wanted / 3, student)
    assert ours.dtype == dtype
    assert (ours.double() - theirs.double()).norm() <= gradient * theirs.double().norm()


def test_what_is_equal_has_no_error_and_no_gradient() -> None:
    student, _ = pair(1.0, torch.bfloat16)
    found = squared_error(student, student.detach(), VALID)
    (gradient,) = torch.autograd.grad(found, student)
    assert found.item() == 0 and not gradient.any()


def test_many_small_squares_are_added_up_in_fp32() -> None:
    small = torch.full((1, 4_096), 0.01, dtype=torch.bfloat16)
    expected = 4_096 * small[0, 0].double() ** 2
    torch.testing.assert_close(sum_of_squares(small).double(), expected.reshape(1), rtol=1e-5, atol=0)
