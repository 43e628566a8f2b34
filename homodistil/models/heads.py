"""What heads of all architectures share: states at scored slots, logits of an answer's first and last token."""

# B sequences, T tokens, D hidden width, S scored slots

from __future__ import annotations

from torch import Tensor

from homodistil.batch import Batch

NOWHERE = -1e4
"""Logit of padding: its probability is exactly 0 in any precision, and its logarithm still finite."""


def at_slots(states_BTD: Tensor, batch: Batch) -> Tensor:
    """(B, S, D): the states of the tokens at the scored positions."""
    return at_tokens(states_BTD, batch.scored_positions)


def at_tokens(states_BTD: Tensor, positions_Bn: Tensor) -> Tensor:
    """(B, n, D): the states of the tokens at `positions`, (B, n) int64."""
    return states_BTD.gather(1, positions_Bn.unsqueeze(-1).expand(-1, -1, states_BTD.shape[-1]))


def spans(logits_BT2: Tensor, batch: Batch) -> Tensor:
    """(B, 2, T): of each token to be an answer's first, and its last; padding never is."""
    return logits_BT2.transpose(1, 2).masked_fill(batch.attention_mask[:, None] == 0, NOWHERE)
