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
    """(B, S, V), at the scored positions only."""

    def at_layers(self, layers: Sequence[int]) -> Signals:
        """The embeddings and these layers, counted from 0."""
        hidden = self.hidden_states[0], *(self.hidden_states[layer + 1] for layer in layers)
        return replace(self, hidden_states=hidden, queries_keys=tuple(self.queries_keys[layer] for layer in layers))


Knowledge = Signals
