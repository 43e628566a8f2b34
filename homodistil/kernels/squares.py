"""Sums of squared differences: multiplied in the models' precision, added up in fp32.

The plain form turns both sides to fp32 first and keeps the result: three times the memory traffic. Nothing is lost by
subtracting in bf16: rounding is relative to the difference, as in gram_attention.py.
"""

# B sequences, T tokens, D compared dimensions

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def squared_error(student_BTD: Tensor, teacher_BTD: Tensor, valid_BT: Tensor) -> Tensor:
    """Sum over the elements of valid tokens of (student - teacher)^2, in fp32, or in fp64 for fp64. Only the student is
    differentiated."""
    return _SquaredError.apply(student_BTD, teacher_BTD, valid_BT)


def sum_of_squares(x: Tensor) -> Tensor:
    """Over the last dimension, (..., D) -> (...), added up in fp32, or in fp64 for fp64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype).square_()


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_BTD: Tensor, teacher_BTD: Tensor, valid_BT: Tensor) -> Tensor:
        difference = student_BTD - teacher_BTD
        difference.mul_(valid_BT.unsqueeze(-1).to(difference.dtype))
        ctx.save_for_backward(difference)
        ctx.dtype = student_BTD.dtype
        return sum_of_squares(difference).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        return (difference * (2 * gradient)).to(ctx.dtype), None, None  # a factor without a dimension is not rounded
