"""What validation reports: loss and accuracy at the scored slots, and how far the student is from its teacher.

One vector of sums per batch, so that batches and ranks add up before anything is divided. Which text is measured and
who adds are the caller's.
"""

# B sequences, S scored slots, V vocabulary or classes

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from homodistil.batch import Batch
from homodistil.objective.losses import task_divergence, task_loss
from homodistil.signals import Signals
from homodistil.tasks import Kind


def measure(student: Signals, teacher: Signals | None, batch: Batch, kind: Kind = "masked") -> Tensor:
    """Sums over a batch's scored slots, (6,) float64: slots, student's loss and hits, teacher's loss and hits, KL.

    Losses and KL(teacher || student), at temperature 1, in nats; of a regression squared differences, and NaN for
    hits, which it has none of.
    Without a teacher only the first three.
    """
    sums = [batch.weights.sum(), *loss_and_hits(student.logits, batch, kind)]
    if teacher is not None:
        distance = task_divergence(kind, student.logits, teacher.logits, batch.weights)
        sums += [*loss_and_hits(teacher.logits, batch, kind), distance]
    return torch.stack([value.double() for value in sums])


def loss_and_hits(logits_BSV: Tensor, batch: Batch, kind: Kind) -> tuple[Tensor, Tensor]:
    """Sums over the scored slots of the task's loss, and of right first guesses."""
    hits = ((logits_BSV.argmax(dim=-1) == batch.labels) * batch.weights).sum()
    loss = task_loss(kind, logits_BSV, batch.labels, batch.weights)
    return loss, torch.full_like(hits, torch.nan) if kind == "regression" else hits


@dataclass(frozen=True)
class Measures:
    """Means per scored slot; what needs a teacher is None without one, an accuracy of a regression too."""

    slots: float
    student_loss: float
    student_accuracy: float | None
    teacher_loss: float | None
    teacher_accuracy: float | None
    kl: float | None

    @classmethod
    def of(cls, sums: Tensor) -> Measures:
        """Of `measure`'s vectors added over all batches and ranks. Waits for the device."""
        slots, *totals = sums.tolist()
        loss, hits, *teachers = (total / max(slots, 1.0) for total in totals)
        teacher_loss, teacher_hits, kl = teachers or (None, None, None)
        return cls(slots, loss, _number(hits), teacher_loss, _number(teacher_hits), kl)


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
