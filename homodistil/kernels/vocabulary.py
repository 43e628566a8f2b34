"""Cross-entropy and KL(teacher || student) over a vocabulary, from one look at each model's logits.

The plain forms (objective/losses.py) make array after array as large as all logits in fp32, and keep several. Here
rows are taken a few at a time, so that what is made of them stays in the processor's cache, and both terms' gradients
are made on the way: they, in the logits' precision, are all that is kept. Logits come from the models' own heads, not
from hidden states and weights: a weight that ZeRO-3 has sharded can be read only inside its own module.
"""

# N scored slots, V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from homodistil.kernels.precision import at_least_fp32

CPU_BYTES, GPU_BYTES = 1 << 20, 1 << 28
"""Of one array of rows in fp32: on CPUs a share of the cache; on GPUs a guess, not measured yet."""


def cross_entropy_and_divergence(
    student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, weights_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sums over slots of weight * -log p(label), at temperature 1, and of weight * KL(teacher || student), at
    `temperature`, in nats. Only the student is differentiated. Computed and returned in fp32, or in fp64 for fp64."""
    return _CrossEntropyAndDivergence.apply(student_NV, teacher_NV, labels_N, weights_N, temperature)


class _CrossEntropyAndDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, weights_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """d CE = p - y; d KL = (p_T - q_T) / T, with p and q the student's and the teacher's probabilities."""
        losses, ce_NV, kl_NV = [], torch.empty_like(student_NV), torch.empty_like(student_NV)
        for rows in few_at_a_time(student_NV):
            s, label = at_least_fp32(student_NV[rows]), labels_N[rows, None]
            weight = weights_N[rows, None].to(s.dtype)
            log_p, log_q = (
                s.log_softmax(dim=-1),
                warm(at_least_fp32(teacher_NV[rows]), temperature).log_softmax(dim=-1),
            )
            warm_log_p = log_p if temperature == 1 else warm(s, temperature).log_softmax(dim=-1)
            warm_p, q, loss = warm_log_p.exp(), log_q.exp(), -log_p.gather(-1, label)
            kl = torch.linalg.vecdot(q, log_q.sub_(warm_log_p)).unsqueeze(-1)
            kl_NV[rows] = q.sub_(warm_p).mul_(-weight / temperature)
            p = warm_p if temperature == 1 else log_p.exp()
            ce_NV[rows] = p.scatter_add_(-1, label, torch.full_like(loss, -1.0)).mul_(weight)
            losses.append(torch.cat([loss, kl], dim=-1) * weight)
        ctx.save_for_backward(ce_NV, kl_NV)
        sums = torch.cat(losses).sum(dim=0)
        return sums[0], sums[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (ce_NV, kl_NV), (ce, kl) = ctx.saved_tensors, gradients  # factors without a dimension are not rounded to bf16
        return (ce_NV * ce).add_(kl_NV * kl), None, None, None, None


def warm(logits: Tensor, temperature: float) -> Tensor:
    """Logits at `temperature`; at 1 no copy is made."""
    return logits if temperature == 1 else logits / temperature


def few_at_a_time(logits_NV: Tensor) -> Iterator[slice]:
    """Slots, so many that an array of their logits in fp32 stays in the cache."""
    slots, vocabulary = logits_NV.shape
    limit = CPU_BYTES if logits_NV.device.type == "cpu" else GPU_BYTES
    count = max(1, limit // (4 * vocabulary))
    return (slice(start, min(start + count, slots)) for start in range(0, slots, count))
