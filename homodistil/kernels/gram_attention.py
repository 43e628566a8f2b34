"""Squared error between two models' attention scores, with and without T x T maps: exact forms of one number.

Both work on factors U, V with U V^T = Q_s K_s^T - Q_t K_t^T = D on valid pairs and zero elsewhere. `direct` makes D;
`gram` uses ||U V^T||^2 = <U^T U, V^T V>, whose matrices are as wide as a head and whose cost is linear in T. Which
heads and columns face each other, scaling, centring and normalising are the objective's. A causal mask does not
factorise over queries and keys: `causal` makes D too, but block by block, and only up to the diagonal.
"""

# B sequences, A compared heads, T tokens, d student's head width, e teacher's head width, w = d + e

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from homodistil.kernels.precision import at_least_fp32, without_autocast
from homodistil.kernels.squares import sum_of_squares

QueriesKeys = tuple[Tensor, Tensor]
"""Queries and keys of one layer: (B, A, T, head width) each."""
ScoreDifference = Callable[[QueriesKeys, QueriesKeys, Tensor], Tensor]
QUERIES = 128
"""Of a causal map, so many rows are made at once."""


def direct(student: QueriesKeys, teacher: QueriesKeys, valid_BT: Tensor) -> Tensor:
    """Sum over valid query-key pairs and heads of (q_s . k_s - q_t . k_t)^2, from the map of differences.

    Args: see `difference_factors`. Returns a scalar in fp32, or in fp64 for fp64 inputs. Only the student is
    differentiated.
    """
    with without_autocast(valid_BT):
        return _Direct.apply(*student, *teacher, valid_BT)


def gram(student: QueriesKeys, teacher: QueriesKeys, valid_BT: Tensor) -> Tensor:
    """The value and gradients of `direct`, from two w x w matrices per head."""
    with without_autocast(valid_BT):
        return _Gram.apply(*student, *teacher, valid_BT)


def causal(student: QueriesKeys, teacher: QueriesKeys, valid_BT: Tensor) -> Tensor:
    """`direct`, of the pairs alone whose key does not come after the query.

    Keeps no map: at most QUERIES rows of it exist at a time, and for the backward pass the gradients themselves, which
    the value's own pass makes of each block, (B, A, T, d) twice.
    """
    with without_autocast(valid_BT):
        return _Causal.apply(*student, *teacher, valid_BT)


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_s: Tensor, key_s: Tensor, query_t: Tensor, key_t: Tensor, valid_BT: Tensor) -> Tensor:
        left, right = difference_factors((query_s, key_s), (query_t, key_t), valid_BT)
        difference = left @ right.mT
        ctx.save_for_backward(query_s, key_s, difference)
        return sum_of_squares(difference).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """d D^2 = 2 D dD, and dD is dQ_s K_s^T + Q_s dK_s^T."""
        query_s, key_s, difference = ctx.saved_tensors
        twice = 2 * gradient
        by_query, by_key = difference @ key_s.to(difference.dtype), difference.mT @ query_s.to(difference.dtype)
        return (by_query * twice).to(query_s.dtype), (by_key * twice).to(key_s.dtype), None, None, None


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_s: Tensor, key_s: Tensor, query_t: Tensor, key_t: Tensor, valid_BT: Tensor) -> Tensor:
        left, right = difference_factors((query_s, key_s), (query_t, key_t), valid_BT)
        ctx.save_for_backward(query_s, key_s, left, right)
        return (at_least_fp32(left.mT @ left) * at_least_fp32(right.mT @ right)).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """`_Direct`'s with D = U V^T never multiplied out: D K_s = U (V^T K_s)."""
        query_s, key_s, left, right = ctx.saved_tensors
        twice = 2 * gradient
        by_query = left @ (right.mT @ key_s.to(right.dtype) * twice).to(left.dtype)
        by_key = right @ (left.mT @ query_s.to(left.dtype) * twice).to(right.dtype)
        return by_query.to(query_s.dtype), by_key.to(key_s.dtype), None, None, None


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_s: Tensor, key_s: Tensor, query_t: Tensor, key_t: Tensor, valid_BT: Tensor) -> Tensor:
        left, right = difference_factors((query_s, key_s), (query_t, key_t), valid_BT)
        by_query, by_key = (torch.zeros_like(at_least_fp32(x)) for x in (query_s, key_s))
        sums = []
        for start in range(0, left.shape[-2], QUERIES):
            end = min(start + QUERIES, left.shape[-2])
            difference = left[..., start:end, :] @ right[..., :end, :].mT
            difference[..., start:].tril_()
            sums.append(sum_of_squares(difference).sum())
            by_query[..., start:end, :] = difference @ key_s[..., :end, :].to(difference.dtype)
            by_key[..., :end, :] += difference.mT @ query_s[..., start:end, :].to(difference.dtype)
        ctx.save_for_backward(by_query.to(query_s.dtype), by_key.to(key_s.dtype))
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """`_Direct`'s, made already but for the factor."""
        by_query, by_key = ctx.saved_tensors
        twice = 2 * gradient
        return (by_query * twice).to(by_query.dtype), (by_key * twice).to(by_key.dtype), None, None, None


def prefers_gram(tokens: int, student_width: int, teacher_width: int) -> bool:
    """Whether `gram` needs fewer multiplications: 2 T w^2 against T^2 w; at equal head widths d, from T = 4d on."""
    return tokens > 2 * (student_width + teacher_width)


@torch.no_grad()
def difference_factors(student: QueriesKeys, teacher: QueriesKeys, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
    """U and V, (B, A, T, w) each, with U V^T the difference of the models' unscaled scores.

    Args: `student` queries and keys (B, A, T, d); `teacher`'s (B, A, T, e), e >= d, its first d columns being those
    that the student kept; `valid_BT` 1 for tokens, 0 for padding. The factors have the widest of the four dtypes.

    Written with differences, U = [Q_s - Q_t, Q_t, Q_lost] and V = [K_s, K_s - K_t, -K_lost], so that every product
    is small where the models' queries and keys are close. The plain [Q_s, -Q_t], [K_s, K_t] cancels there: 4-18 % off
    at a gap of 1e-3.
    For the same reason bf16 factors are enough for bf16 queries and keys: rounding is relative to the differences.
    """
    (query_s, key_s), (query_t, key_t) = student, teacher
    dtype = reduce(torch.promote_types, (x.dtype for x in (*student, *teacher)))
    valid_BT11 = valid_BT[:, None, :, None].to(dtype)
    width = query_s.shape[-1]
    kept_query, lost_query = query_t[..., :width], query_t[..., width:]
    kept_key, lost_key = key_t[..., :width], key_t[..., width:]
    left = torch.cat([query_s - kept_query, kept_query, lost_query], dim=-1).to(dtype)
    right = torch.cat([key_s, key_s - kept_key, -lost_key], dim=-1).to(dtype)
    return left.mul_(valid_BT11), right.mul_(valid_BT11)
