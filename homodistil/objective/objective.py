"""The objective: weighted terms, each a sum over this micro-batch divided by the whole update's count.

So that adding `total` over micro-batches and ranks gives the update's loss, whatever they are: never a mean of means
(docs/methods.md, "The objective"). The terms' formulas are losses.py's; where the teacher's signals come from is
knowledge/'s.
"""

# B sequences, T tokens, L layers

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from homodistil.batch import Batch, Counts
from homodistil.config import ObjectiveConfig, PerformanceConfig
from homodistil.errors import ConfigError
from homodistil.kernels import gram_attention
from homodistil.kernels.gram_attention import QueriesKeys, ScoreDifference
from homodistil.kernels.sparse_vocabulary import cross_entropy_and_sparse_divergence
from homodistil.kernels.vocabulary import cross_entropy_and_divergence
from homodistil.models.outputs import at_tokens
from homodistil.models.shape import StudentShape
from homodistil.objective import losses
from homodistil.objective.pairing import HeadPairing
from homodistil.signals import Kept, Signals
from homodistil.sparse_targets import SparseTargets
from homodistil.tasks import Kind


@dataclass(frozen=True)
class Losses:
    """What a micro-batch adds to the update's loss."""

    total: Tensor
    """Scalar to differentiate: the weighted sum of the terms."""
    parts: dict[str, Tensor]
    """Each computed term, unweighted and detached: "task", "kl", "hidden", "attention"."""


class Objective(nn.Module):
    """L = task + a1 kl + a2 hidden + a3 attention (HomoDistil, TED). No parameters; index tensors move with `to`."""

    def __init__(
        self,
        config: ObjectiveConfig,
        shape: StudentShape,
        performance: PerformanceConfig,
        layers: Sequence[int] | None = None,
        kind: Kind = "masked",
        causal: bool = False,
        hidden_variances: Sequence[float] | None = None,
    ) -> None:
        """layers: those of the student's that are compared, all by default. causal: whether a token sees those before
        it alone. hidden_variances: for each compared hidden state, what its squared difference is divided by, of
        pre-norm families the teacher's variance (knowledge/variances.py); 1 by default. Raises `ConfigError` for a
        Gram form that does not exist."""
        super().__init__()
        self.causal = causal
        self.hidden_variances = hidden_variances
        self.config, self.gram, self.fused = config, performance.gram_attention, performance.fused_vocabulary
        self.layers, self.kind = tuple(range(shape.layers) if layers is None else layers), kind
        self.weights = {name: getattr(config, name).weight for name in type(config).model_fields}
        if self.gram == "on" and self.weights["attention"] > 0:
            _refuse_gram(config.attention.form, causal)
        attended = self.layers if self.weights["attention"] > 0 else ()
        self.pairings = nn.ModuleList(HeadPairing(shape, layer) for layer in attended)

    def forward(
        self,
        student: Signals,
        teacher: Signals | None,
        batch: Batch,
        counts: Counts,
        aligners: Iterable[nn.Module],
        counted: Collection[str] | None = None,
    ) -> Losses:
        """This micro-batch's share of the update's loss.

        Args: `student` and `teacher` hold the compared layers alone; `counts` are the whole update's, over all ranks;
        `aligners` one for each hidden state; `counted` the terms that count now. Without a teacher only "task" is
        computed; a term of weight 0 never is. Nothing here waits for the device. Raises `ConfigError` when no term is
        left.
        """
        terms = {"task": lambda: self._task(student, batch, counts)}
        if teacher is not None:
            terms |= {
                "kl": lambda: self._kl(student, teacher, batch, counts),
                "hidden": lambda: self._hidden(student, teacher, batch, counts, aligners),
                "attention": lambda: self._attention(student, teacher, batch, counts),
            }
        wanted = {name: term for name, term in terms.items() if self.weights[name] > 0}
        if counted is not None:
            wanted = {name: term for name, term in wanted.items() if name in counted}
        if not wanted:
            raise ConfigError(
                f"objective: {', '.join(terms)}: each has weight 0, or does not count now. Give one a positive weight."
            )
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
        if teacher.targets is not None:
            student_log_p = losses.log_probabilities(student.logits, temperature)
            distance = losses.sparse_divergence(student_log_p, teacher.targets, batch.weights)
        else:
            distance = losses.task_divergence(self.kind, student.logits, teacher.logits, batch.weights, temperature)
        return over(temperature**2 * distance, counts.scored)

    def _task_and_kl(self, student: Signals, teacher: Signals, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        temperature = self.config.kl.temperature
        logits, labels, weights = student.logits.flatten(0, 1), batch.labels.flatten(), batch.weights.flatten()
        if teacher.targets is not None:
            targets = SparseTargets(*(part.flatten(0, 1) for part in teacher.targets))
            task, divergence = cross_entropy_and_sparse_divergence(logits, targets, labels, weights, temperature)
        else:
            theirs = teacher.logits.flatten(0, 1)
            task, divergence = cross_entropy_and_divergence(logits, theirs, labels, weights, temperature)
        return {"task": over(task, counts.scored), "kl": over(temperature**2 * divergence, counts.scored)}

    def _hidden(
        self, student: Signals, teacher: Signals, batch: Batch, counts: Counts, aligners: Iterable[nn.Module]
    ) -> Tensor:
        """Mean over the states that are compared, of the parts that the teacher hands over."""
        states = student.hidden_states
        kept = teacher.kept or (Kept(batch.attention_mask),) * len(states)
        variances = self.hidden_variances or (1.0,) * len(states)
        compared = zip(aligners, states, teacher.hidden_states, kept, variances, strict=True)
        differences = [_state_difference(*one) for one in compared]
        return over(torch.stack(differences).mean(), counts.tokens)

    def _attention(self, student: Signals, teacher: Signals, batch: Batch, counts: Counts) -> Tensor:
        """Mean over layers and over the heads the student still has, each against the teacher's it came from."""
        layers = zip(self.pairings, student.queries_keys, teacher.queries_keys, strict=True)
        differences = [
            self._layer_attention(s, pair(t), batch.attention_mask, student.attention_scale) for pair, s, t in layers
        ]
        heads = student.queries_keys[0][0].shape[1]
        return over(torch.stack(differences).mean() / heads, counts.causal_pairs if self.causal else counts.pairs)

    def _layer_attention(self, student: QueriesKeys, teacher: QueriesKeys, valid_BT: Tensor, scale: float) -> Tensor:
        form = self.config.attention.form
        if form == "probabilities":
            return losses.probability_difference(student, teacher, valid_BT, scale, self.causal)
        if form == "scores_centred":
            centred = losses.causally_centred if self.causal else losses.centred
            student, teacher = centred(student, valid_BT), centred(teacher, valid_BT)
        return losses.score_difference(student, teacher, valid_BT, scale, self._exact_form(student, teacher))

    def _exact_form(self, student: QueriesKeys, teacher: QueriesKeys) -> ScoreDifference:
        """The cheapest that gives the exact sum."""
        if self.causal:
            return gram_attention.causal
        tokens, width = student[0].shape[-2:]
        cheaper = self.gram == "auto" and gram_attention.prefers_gram(tokens, width, teacher[0].shape[-1])
        return gram_attention.gram if self.gram == "on" or cheaper else gram_attention.direct


def _state_difference(align: nn.Module, student_BTD: Tensor, teacher: Tensor, kept: Kept, variance: float) -> Tensor:
    states = student_BTD if kept.positions is None else at_tokens(student_BTD, kept.positions)
    aligned = align(states, teacher, kept.units)
    return losses.hidden_difference(aligned[0], aligned[1], kept.counted, variance)


def _refuse_gram(form: str, causal: bool) -> None:
    if causal:
        raise ConfigError(
            "performance.gram_attention: found on, but a causal model's attention loss has no Gram form: its mask does "
            "not factorise. Set gram_attention to auto."
        )
    if form == "probabilities":
        raise ConfigError(
            "performance.gram_attention: found on, but objective.attention.form: probabilities has no Gram form. "
            "Set gram_attention to auto, or the form to scores or scores_centred."
        )


def over(total: Tensor, count: Tensor) -> Tensor:
    """A sum divided by a count in the sum's own precision; nothing to count leaves 0."""
    return total / count.clamp(min=1).to(total.dtype)
