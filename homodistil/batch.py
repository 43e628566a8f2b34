"""Batch: what one forward pass reads, and the counts that normalise its losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

# B sequences, T tokens, S scored slots per sequence

VALIDATION = -1
"""Masking of held-out text: the same for every run."""


@dataclass(frozen=True)
class Batch:
    """Sequences with a fixed number of scored slots each, so that shapes never change."""

    input_ids: Tensor
    """(B, T) int64, as the model sees them."""
    attention_mask: Tensor
    """(B, T) int64: 1 real, 0 padding."""
    token_type_ids: Tensor
    """(B, T) int64: 1 for the second of two segments."""
    scored_positions: Tensor
    """(B, S) int64: where logits are computed, if they are a token's."""
    labels: Tensor
    """(B, S) int64: the true tokens there; what a label is depends on the task. Of a regression float32."""
    weights: Tensor
    """(B, S) float32: 1 for a scored slot, 0 for one that had no target."""
    samples: Tensor
    """(B,) int64: each sequence's number in the corpus."""
    padded: bool = True
    """False if every sequence fills its row, so that attention needs no mask. Known on the host: nobody has to wait for
    a device to say so."""
    masking: int = 0
    """Which masking of these sequences this is: an epoch's number, or `VALIDATION`. With a sequence's number, the key
    of what a cached teacher said of it."""
    recorded: dict[str, Tensor] | None = None
    """What a cached teacher said, as it lies on disk: tensors of B rows each, see knowledge/cached.py."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def rows(self, start: int, end: int) -> Batch:
        """Of a batch on the host."""
        rows = self._each(lambda tensor: tensor[start:end])
        return replace(rows, padded=self.padded and not bool(rows.attention_mask.all()))

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """Consecutive slices of at most `size` sequences."""
        for start in range(0, len(self), size):
            yield self.rows(start, start + size)

    def to(self, device: torch.device) -> Batch:
        """On `device`; the copy is asynchronous where the memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        recorded = {k: change(v) for k, v in self.recorded.items()} if self.recorded is not None else None
        return replace(self, **changed, recorded=recorded)

    def counts(self, compared_B: Tensor | None = None) -> Counts:
        """This batch's share of the update's counts, as a float64 vector ready for an all-reduce. compared_B: each
        sequence's tokens whose hidden states are compared, by default all but padding."""
        lengths = self.attention_mask.sum(dim=1).double()
        pairs, compared = lengths * lengths, lengths if compared_B is None else compared_B.double()
        return Counts(
            torch.stack([self.weights.double().sum(), compared.sum(), pairs.sum(), ((pairs + lengths) / 2).sum()])
        )


Attach = Callable[[Batch], Batch]


def unchanged(batch: Batch) -> Batch:
    """An `Attach` that attaches nothing."""
    return batch


class Piece(NamedTuple):
    """Consecutive examples under one masking, as a teacher is asked about them for a cache."""

    masking: int
    number: int
    """Of the pieces of that masking."""
    start: int
    """Number of the first example."""
    stop: int


@dataclass(frozen=True)
class Counts:
    """How many elements each term of the objective has in an update."""

    vector: Tensor
    """(4,) float64: scored slots, compared tokens, valid query-key pairs, those of a causal model."""

    @property
    def scored(self) -> Tensor:
        return self.vector[0]

    @property
    def tokens(self) -> Tensor:
        return self.vector[1]

    @property
    def pairs(self) -> Tensor:
        return self.vector[2]

    @property
    def causal_pairs(self) -> Tensor:
        return self.vector[3]
