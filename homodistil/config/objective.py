"""The objective: its terms, their weights, and when in a run each counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from homodistil.config.section import Section


class Term(Section):
    """One weighted term of the objective."""

    weight: float = Field(default=1.0, ge=0)
    """Factor of this term in the sum; 0 leaves it out."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """Share of the updates after which it counts."""
    end: float = Field(default=1.0, gt=0, le=1)
    """Share of the updates after which it no longer counts. Where terms begin or end, another stage of the run begins,
    with a warm-up and a decay of its own."""

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> Term:
        if self.start >= self.end:
            raise ValueError(f"start ({self.start}) must be before end ({self.end})")
        return self


class TaskTerm(Term):
    """The task's own loss: cross-entropy with the true tokens or classes; a regression's squared error."""


class KlTerm(Term):
    """KL(teacher || student) at a temperature, times its square; of a regression the squared difference."""

    temperature: float = Field(default=2.0, gt=0)
    """Softens both distributions."""


class HiddenTerm(Term):
    """Mean squared difference of hidden states."""

    aligner: Literal["projection", "indexed", "filter"] = "projection"
    """`projection`: a learned linear map per layer. `indexed`: the teacher's own kept dimensions. `filter`: task-aware
    filters on both sides, from launchers/learn_filters.py (TED)."""
    projection_init: Literal["identity", "random"] = "identity"
    """`identity` on the student's own dimensions makes the term 0 at the start."""


class AttentionTerm(Term):
    """Mean squared difference of attention, head by head."""

    form: Literal["scores", "scores_centred", "probabilities"] = "scores"
    """Pre-softmax scores; scores less the mean valid key's; or post-softmax probabilities."""


class ObjectiveConfig(Section):
    """L = task + a1 kl + a2 hidden + a3 attention; measure a1..a3 with `homodistil measure-weights`."""

    task: TaskTerm = TaskTerm()
    kl: KlTerm = KlTerm()
    hidden: HiddenTerm = HiddenTerm()
    attention: AttentionTerm = AttentionTerm()

    @model_validator(mode="after")
    def _something_always_counts(self) -> ObjectiveConfig:
        terms = [term for name in type(self).model_fields if (term := getattr(self, name)).weight > 0]
        covered = 0.0
        for term in sorted(terms, key=lambda term: term.start):
            covered = max(covered, term.end) if term.start <= covered else covered
        if terms and covered < 1:
            raise ValueError(f"no term counts after {covered} of the updates. Let one start there, or end later")
        return self

    def stage(self, update: int, updates: int, among: Sequence[str]) -> Stage:
        """The stage that update `update` (1-based) of `updates` belongs to, `among` these terms."""
        terms = {name: getattr(self, name) for name in among}
        windows = {n: (round(t.start * updates), round(t.end * updates)) for n, t in terms.items() if t.weight > 0}
        borders = {0, updates, *(border for window in windows.values() for border in window)}
        first, last = max(b for b in borders if b < update), min(b for b in borders if b >= update)
        return Stage(update - first, last - first, tuple(n for n, (a, b) in windows.items() if a < update <= b))


class Stage(NamedTuple):
    """A stretch of a run in which the same terms count."""

    update: int
    """Counted from the stage's first, which is 1."""
    updates: int
    terms: tuple[str, ...]
