"""Signals: what a model says of a batch. A teacher's signals are its knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

# B sequences, T tokens, D hidden width, A heads, d head width, S scored slots, V vocabulary


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
    """(B, S, V), at the scored slots only."""

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


Knowledge = Signals
