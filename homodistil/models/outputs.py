"""What all architectures share: signals of a forward pass, states at scored slots, an answer's first and last token."""

# B sequences, T tokens, D hidden width, S scored slots

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from homodistil.batch import Batch
from homodistil.signals import Signals

NOWHERE = -1e4
"""Logit of padding: its probability is exactly 0 in any precision, and its logarithm still finite."""


def signals_of(
    outputs: Any, attention_scale: float, batch: Batch, logits: Callable[[Tensor, Batch], Tensor] | None
) -> Signals:
    """What a Hugging Face body gave, with queries and keys for attentions. logits: what a head makes of the last
    layer's output; None: (B, S, 0)."""
    last = outputs.last_hidden_state
    return Signals(
        hidden_states=tuple(outputs.hidden_states),
        queries_keys=tuple(outputs.attentions),
        attention_scale=attention_scale,
        logits=last.new_empty(*batch.labels.shape[:2], 0) if logits is None else logits(last, batch),
    )


def at_slots(states_BTD: Tensor, batch: Batch) -> Tensor:
    """(B, S, D): the states of the tokens at the scored positions."""
    return at_tokens(states_BTD, batch.scored_positions)


def at_tokens(states_BTD: Tensor, positions_Bn: Tensor) -> Tensor:
    """(B, n, D): the states of the tokens at `positions`, (B, n) int64."""
    return states_BTD.gather(1, positions_Bn.unsqueeze(-1).expand(-1, -1, states_BTD.shape[-1]))


def spans(logits_BT2: Tensor, batch: Batch) -> Tensor:
    """(B, 2, T): of each token to be an answer's first, and its last; padding never is."""
    return logits_BT2.transpose(1, 2).masked_fill(batch.attention_mask[:, None] == 0, NOWHERE)
