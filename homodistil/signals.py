"""Signals: what a model says of a batch. A teacher's signals are its knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from homodistil.sparse_targets import SparseTargets

# B sequences, T tokens, D hidden width, A heads, d head width, S scored slots, V vocabulary
# n kept tokens, u kept units, k words that are told apart


class Kept(NamedTuple):
    """Which part of a hidden state is handed over. Tuples, because ZeRO-3's hooks can walk them."""

    counted: Tensor
    """(B, n): 1 for a token that is compared, 0 for a slot that only fills up its row."""
    positions: Tensor | None = None
    """(B, n) int64: the kept tokens in order; all T of them by default."""
    units: Tensor | None = None
    """(u,), or (B, n, u) where they are each token's own, int64: the kept units in order; all of them by default."""


@dataclass(frozen=True)
class Signals:
    """One forward pass, as far as the objective looks at it."""

    hidden_states: tuple[Tensor, ...]
    """Embedding output, then each layer's: (B, T, D) each."""
    queries_keys: tuple[tuple[Tensor, Tensor], ...]
    """Each layer's queries and keys: (B, A, T, d) each. Scores are Q K^T * attention_scale."""
    attention_scale: float
    """1 / sqrt(head width of the original model)."""
    logits: Tensor
    """(B, S, V), at the scored slots only; (B, S, 0) where a teacher gives `targets` instead."""
    kept: tuple[Kept, ...] = ()
    """Where `hidden_states` are selected parts, (B, n, u) each: which. Empty: they are whole."""
    targets: SparseTargets | None = None
    """(B, S) of them: what a cached teacher expects, compressed."""
    final_states: Tensor | None = None
    """(B, S, D): what the head made the logits of, where that is recorded."""

    def at(self, layers: Sequence[int], embeddings: bool = True) -> Signals:
        """Of these layers, counted from 0, and of the embeddings."""
        states = (0,) * embeddings + tuple(layer + 1 for layer in layers)
        hidden_states = tuple(self.hidden_states[state] for state in states)
        return replace(self, hidden_states=hidden_states, queries_keys=tuple(self.queries_keys[k] for k in layers))


@dataclass(frozen=True)
class Compared:
    """Whose hidden states and attention are compared with whose: k-th layer with k-th layer, counted from 0."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    embeddings: bool = True
    """The embeddings with the embeddings, too."""

    @property
    def states(self) -> int:
        """Hidden states that are compared."""
        return len(self.student) + self.embeddings

    def topmost(self, states: int | None) -> Compared:
        """The last so many of the pairs, or all."""
        if states is None or states >= self.states:
            return self
        return Compared(self.student[-states:], self.teacher[-states:], embeddings=False)

    @property
    def teacher_states(self) -> tuple[int, ...]:
        """The teacher's that are compared, 0 the embeddings' output."""
        return (0,) * self.embeddings + tuple(layer + 1 for layer in self.teacher)


Knowledge = Signals
