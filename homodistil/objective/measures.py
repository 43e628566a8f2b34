"""What validation reports: loss and accuracy at the masked positions, and how far the student is from its teacher.

One vector of sums per batch, so that batches and ranks add up before anything is divided. Which text is measured and
who adds are the caller's.
"""

# B sequences, S scored slots, V vocabulary

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from homodistil.batch import Batch
from homodistil.objective.losses import cross_entropy, divergence, log_probabilities
from homodistil.signals import Signals


def measure(student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
    """Sums over a batch's scored slots, (6,) float64: slots, student's loss and hits, teacher's loss and hits, KL.

    Losses and KL(teacher || student), at temperature 1, in nats. Without a teacher only the first three.
    """
    sums = [batch.weights.sum(), *_loss_and_hits(student.logits, batch)]
    if teacher is not None:
        student_log_p, teacher_log_p = (log_probabilities(signals.logits) for signals in (student, teacher))
        sums += [*_loss_and_hits(teacher.logits, batch), divergence(student_log_p, teacher_log_p, batch.weights)]
    return torch.stack([value.double() for value in sums])


def _loss_and_hits(logits_BSV: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    hits = (logits_BSV.argmax(dim=-1) == batch.labels) * batch.weights
    return cross_entropy(logits_BSV, batch.labels, batch.weights), hits.sum()


@dataclass(frozen=True)
class Measures:
    """Means per scored slot; what needs a teacher is None without one."""

    slots: float
    student_mlm_loss: float
    student_mlm_accuracy: float
    teacher_mlm_loss: float | None
    teacher_mlm_accuracy: float | None
    kl: float | None

    @classmethod
    def of(cls, sums: Tensor) -> Measures:
        """Of `measure`'s vectors added over all batches and ranks. Waits for the device."""
        slots, *totals = sums.tolist()
        loss, accuracy, *teachers = (total / max(slots, 1.0) for total in totals)
        return cls(slots, loss, accuracy, *(teachers or (None, None, None)))
