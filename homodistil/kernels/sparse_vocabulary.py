"""Cross-entropy and KL(target || student) over a vocabulary, of targets that name only a few of its ids.

The plain forms (objective/losses.py) make array after array as large as all logits. As in vocabulary.py, rows are taken
a few at a time. Gradients are made in the backward pass, from the logits again: that is one softmax more, and cheaper
than an array of their size that waits in memory.
"""

# N scored slots, V vocabulary, k ids that are kept of each slot's target

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from homodistil.kernels.precision import at_least_fp32
from homodistil.kernels.vocabulary import few_at_a_time, warm
from homodistil.sparse_targets import SparseTargets, negative_entropy


def cross_entropy_and_sparse_divergence(
    student_NV: Tensor, targets: SparseTargets, labels_N: Tensor, weights_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sums over slots of weight * -log p(label), at temperature 1, and of weight * KL(target || student), at
    `temperature`, in nats. Only the student is differentiated. Computed and returned in fp32, or in fp64 for fp64."""
    return _CrossEntropyAndSparseDivergence.apply(student_NV, *targets, labels_N, weights_N, temperature)


class _CrossEntropyAndSparseDivergence(torch.autograd.Function):
    """The student in two parts: p at the target's ids, its head, and the mass P of all others, the rest.

    P is added up from logits of its own, never 1 - sum of p: where the head has nearly everything, nothing would be
    left of that. With target masses m and t, d KL/dz is (p - m) / T in the head and r (P - t) / T in the rest, where r
    is the softmax of the rest alone. Nothing there can overflow, however small P is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_NV: Tensor,
        ids_Nk: Tensor,
        log_mass_Nk: Tensor,
        log_tail_N: Tensor,
        entropy_N: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        used_Nk = log_mass_Nk > -torch.inf
        ids_Nk = ids_Nk.where(used_Nk, ids_Nk[:, :1])  # an unused slot repeats the first
        log_mass_Nk = log_mass_Nk.where(used_Nk, log_mass_Nk[:, :1])
        log_p_Nk, log_rest_N, log_label_N = _log_probabilities(student_NV, ids_Nk, used_Nk, labels_N, temperature)
        log_mass_Nk, log_tail_N, weights_N = (x.to(log_p_Nk.dtype) for x in (log_mass_Nk, log_tail_N, weights_N))
        mass_Nk, tail_N = log_mass_Nk.exp(), log_tail_N.exp()
        in_head_N = (mass_Nk * (log_mass_Nk - log_p_Nk)).where(used_Nk, 0).sum(dim=-1)
        in_rest_N = (tail_N * (log_tail_N - log_rest_N)).where(tail_N > 0, 0)
        excess_N = entropy_N - negative_entropy(log_mass_Nk.where(used_Nk, -torch.inf), log_tail_N)
        ctx.temperature = temperature
        ctx.save_for_backward(
            student_NV, ids_Nk, log_p_Nk.exp(), log_rest_N.exp(), mass_Nk, tail_N, labels_N, weights_N
        )
        return -(weights_N * log_label_N).sum(), (weights_N * (in_head_N + in_rest_N + excess_N)).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        student_NV, ids_Nk, p_Nk, rest_N, mass_Nk, tail_N, labels_N, weights_N = ctx.saved_tensors
        ce_N1, kl_N1 = (weights_N[:, None] * gradient for gradient in gradients)
        kl_N1 = kl_N1 / ctx.temperature
        both_N1 = kl_N1 + ce_N1 if ctx.temperature == 1 else kl_N1  # then the terms share p
        head_Nk = both_N1 * p_Nk - kl_N1 * mass_Nk
        factor_N1 = both_N1 * rest_N[:, None] - kl_N1 * tail_N[:, None]
        student_gradient_NV = torch.empty_like(student_NV)
        for rows in few_at_a_time(student_NV):
            s, ids = at_least_fp32(student_NV[rows]), ids_Nk[rows]
            gradient = _without(ids, warm(s, ctx.temperature)).softmax(dim=-1).mul_(factor_N1[rows])
            gradient.scatter_(-1, ids, head_Nk[rows])
            if ctx.temperature != 1:
                gradient.addcmul_(s.softmax(dim=-1), ce_N1[rows])
            student_gradient_NV[rows] = gradient.scatter_add_(-1, labels_N[rows, None], -ce_N1[rows])
        return student_gradient_NV, *[None] * 7


def _log_probabilities(
    student_NV: Tensor, ids_Nk: Tensor, used_Nk: Tensor, labels_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's log p of the ids, (N, k), and of all others together, (N,), at `temperature`; and of the labels,
    (N,), at 1."""
    s_Nk, label_N1 = (at_least_fp32(student_NV.gather(-1, x)) for x in (ids_Nk, labels_N[:, None]))
    rests, colds = [], []
    for rows in few_at_a_time(student_NV):
        s = at_least_fp32(student_NV[rows])
        rests.append(_sum_of_exp(_without(ids_Nk[rows], warm(s, temperature))))
        if temperature != 1:
            colds.append(_sum_of_exp(s))
    rest_N1, log_rest_N1 = torch.cat(rests, dim=1)
    head_Nk = warm(s_Nk, temperature)
    top_N1 = head_Nk.amax(dim=-1, keepdim=True).maximum(rest_N1)  # all is relative to it: large logits lose no digits
    head_Nk, log_rest_N1 = head_Nk - top_N1, rest_N1 - top_N1 + log_rest_N1
    log_head_N1 = head_Nk.masked_fill(~used_Nk, -torch.inf).logsumexp(dim=-1, keepdim=True)
    log_sum_N1 = torch.logaddexp(log_head_N1, log_rest_N1)
    cold_N1, log_cold_N1 = torch.cat(colds, dim=1) if colds else (top_N1, log_sum_N1)
    log_rest_N1, log_label_N1 = log_rest_N1 - log_sum_N1, label_N1 - cold_N1 - log_cold_N1
    return head_Nk - log_sum_N1, log_rest_N1.squeeze(-1), log_label_N1.squeeze(-1)


def _without(ids: Tensor, logits: Tensor) -> Tensor:
    """A copy in which the ids have no mass; finite, for a row may have no others."""
    return logits.scatter(-1, ids, torch.finfo(logits.dtype).min)


def _sum_of_exp(logits: Tensor) -> Tensor:
    """(2, rows, 1): the largest logit, and the log of the sum of exp(logit - largest), which softmax's largest is one
    over. torch's logsumexp takes several times as long on CPUs, and longer still where logits are far apart."""
    return torch.stack([logits.amax(dim=-1, keepdim=True), -logits.softmax(dim=-1).amax(dim=-1, keepdim=True).log()])
