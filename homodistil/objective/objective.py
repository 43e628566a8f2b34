"""The objective: weighted terms, each a sum over this micro-batch divided by the whole update's count.

So that adding `total` over micro-batches and ranks gives the update's loss, whatever they are (SPEC: never a mean of
means). The terms' formulas are losses.py's; where the teacher's signals come from is knowledge/'s.
"""

# B sequences, T tokens, L layers

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from homodistil.batch import Batch, Counts
from homodistil.config import ObjectiveConfig, PerformanceConfig
from homodistil.errors import ConfigError
from homodistil.kernels.gram_attention import QueriesKeys, direct, gram, prefers_gram
from homodistil.kernels.vocabulary import cross_entropy_and_divergence
from homodistil.models.shape import StudentShape
from homodistil.objective import losses
from homodistil.objective.pairing import HeadPairing
from homodistil.signals import Signals
from homodistil.tasks import Kind


@dataclass(frozen=True)
class Losses:
    """What a micro-batch adds to the update's loss."""

    total: Tensor
    """Scalar to differentiate: the weighted sum of the terms."""
    parts: dict[str, Tensor]
    """Each computed term, unweighted and detached: "task", "kl", "hidden", "attention"."""


class Objective(nn.Module):
    """L = task + a1 kl + a2 hidden + a3 attention (HomoDistil, TED). No parameters; its index tensors move with `to`."""

    def __init__(
        self,
        config: ObjectiveConfig,
        shape: StudentShape,
        performance: PerformanceConfig,
        layers: Sequence[int] | None = None,
        kind: Kind = "masked",
    ) -> None:
        """layers: those of the student's that are compared, all by default. Raises `ConfigError` for a Gram form that
        does not exist."""
        super().__init__()
        self.config, self.gram, self.fused = config, performance.gram_attention, performance.fused_vocabulary
        self.layers, self.kind = tuple(range(shape.layers) if layers is None else layers), kind
        self.weights = {name: getattr(config, name).weight for name in type(config).model_fields}
        if self.gram == "on" and self.weights["attention"] > 0 and config.attention.form == "probabilities":
            raise ConfigError(
                "performance.gram_attention: found on, but objective.attention.form: probabilities has no Gram form. "
                "Set gram_attention to auto, or the form to scores or scores_centred."
            )
        attended = self.layers if self.weights["attention"] > 0 else ()
        self.pairings = nn.ModuleList(HeadPairing(shape, layer) for layer in attended)

    def forward(
        self,
        student: Signals,
        teacher: Signals | None,
        batch: Batch,
        counts: Counts,
        aligners: Iterable[nn.Module],
    ) -> Losses:
        """This micro-batch's share of the update's loss.

        Args: `student` and `teacher` hold the compared layers alone; `counts` are the whole update's, over all ranks;
        `aligners` one for each hidden state. Without a teacher only "task" is computed; a term of weight 0 never is.
        Nothing here waits for the device. Raises `ConfigError` when no term is left.
        """
        terms = {"task": lambda: self._task(student, batch, counts)}
        if teacher is not None:
            terms |= {
                "kl": lambda: self._kl(student, teacher, batch, counts),
                "hidden": lambda: self._hidden(student, teacher, batch, counts, aligners),
                "attention": lambda: self._attention(student, teacher, batch, counts),
            }
        wanted = {name: term for name, term in terms.items() if self.weights[name] > 0}
        if not wanted:
            raise ConfigError(f"objective: every term of {', '.join(terms)} has weight 0. Give one a positive weight.")
        values = {}
        if self.fused and self.kind != "regression" and teacher is not None and {"task", "kl"} <= wanted.keys():
            values = self._task_and_kl(student, teacher, batch, counts)
        values |= {name: term() for name, term in wanted.items() if name not in values}
        total = torch.stack([self.weights[name] * value for name, value in values.items()]).sum()
        return Losses(total, {name: value.detach() for name, value in values.items()})

    def _task(self, student: Signals, batch: Batch, counts: Counts) -> Tensor:
        return over(losses.task_loss(self.kind, student.logits, batch.labels, batch.weights), counts.scored)

    def _kl(self, student: Signals, teacher: Signals, batch: Batch, counts: Counts) -> Tensor:
        temperature = 1.0 if self.kind == "regression" else self.config.kl.temperature
        distance = losses.task_divergence(self.kind, student.logits, teacher.logits, batch.weights, temperature)
        return over(temperature**2 * distance, counts.scored)

    def _task_and_kl(self, student: Signals, teacher: Signals, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        temperature = self.config.kl.temperature
        task, divergence = cross_entropy_and_divergence(
            student.logits.flatten(0, 1),
            teacher.logits.flatten(0, 1),
            batch.labels.flatten(),
            batch.weights.flatten(),
            temperature,
        )
        return {"task": over(task, counts.scored), "kl": over(temperature**2 * divergence, counts.scored)}

    def _hidden(
        self, student: Signals, teacher: Signals, batch: Batch, counts: Counts, aligners: Iterable[nn.Module]
    ) -> Tensor:
        """Mean over the states that are compared."""
        states = zip(aligners, student.hidden_states, teacher.hidden_states, strict=True)
        aligned = [align(s, t) for align, s, t in states]
        differences = [losses.hidden_difference(s, t, batch.attention_mask) for s, t in aligned]
        return over(torch.stack(differences).mean(), counts.tokens)

    def _attention(self, student: Signals, teacher: Signals, batch: Batch, counts: Counts) -> Tensor:
        """Mean over layers and over the heads the student still has, each against the teacher's it came from."""
        layers = zip(self.pairings, student.queries_keys, teacher.queries_keys, strict=True)
        differences = [
            self._layer_attention(s, pair(t), batch.attention_mask, student.attention_scale) for pair, s, t in layers
        ]
        heads = student.queries_keys[0][0].shape[1]
        return over(torch.stack(differences).mean() / heads, counts.pairs)

    def _layer_attention(self, student: QueriesKeys, teacher: QueriesKeys, valid_BT: Tensor, scale: float) -> Tensor:
        form = self.config.attention.form
        if form == "probabilities":
            return losses.probability_difference(student, teacher, valid_BT, scale)
        if form == "scores_centred":
            student, teacher = losses.centred(student, valid_BT), losses.centred(teacher, valid_BT)
        uses_gram = self.gram == "on" or (self.gram == "auto" and _gram_is_cheaper(student, teacher))
        return losses.score_difference(student, teacher, valid_BT, scale, gram if uses_gram else direct)


def _gram_is_cheaper(student: QueriesKeys, teacher: QueriesKeys) -> bool:
    tokens, width = student[0].shape[-2:]
    return prefers_gram(tokens, width, teacher[0].shape[-1])


def over(total: Tensor, count: Tensor) -> Tensor:
    """A sum divided by a count in the sum's own precision; nothing to count leaves 0."""
    return total / count.clamp(min=1).to(total.dtype)
