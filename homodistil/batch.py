"""Batch: what one forward pass reads, and the counts that normalise its losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# B sequences, T tokens, S scored slots per sequence


@dataclass(frozen=True)
class Batch:
    """Masked sequences with a fixed number of scored slots each, so that shapes never change."""

    input_ids: Tensor
    """(B, T) int64, masked."""
    attention_mask: Tensor
    """(B, T) int64: 1 real, 0 padding."""
    scored_positions: Tensor
    """(B, S) int64: where the vocabulary logits are computed."""
    labels: Tensor
    """(B, S) int64: the true tokens there."""
    weights: Tensor
    """(B, S) float32: 1 for a scored slot, 0 for one that had no target."""
    samples: Tensor
    """(B,) int64: each sequence's number in the corpus."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def rows(self, start: int, end: int) -> Batch:
        return Batch(*(getattr(self, f.name)[start:end] for f in fields(self)))

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """Consecutive slices of at most `size` sequences."""
        for start in range(0, len(self), size):
            yield self.rows(start, start + size)

    def to(self, device: torch.device) -> Batch:
        """On `device`; the copy is asynchronous where the memory is pinned."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def pin_memory(self) -> Batch:
        return Batch(*(getattr(self, f.name).pin_memory() for f in fields(self)))

    def counts(self) -> Counts:
        """This batch's share of the update's counts, as a float64 vector ready for an all-reduce."""
        lengths = self.attention_mask.sum(dim=1).double()
        return Counts(torch.stack([self.weights.double().sum(), lengths.sum(), (lengths * lengths).sum()]))


@dataclass(frozen=True)
class Counts:
    """How many elements each term of the objective has in an update."""

    vector: Tensor
    """(3,) float64: scored positions, non-padding tokens, valid query-key pairs."""

    @property
    def scored(self) -> Tensor:
        return self.vector[0]

    @property
    def tokens(self) -> Tensor:
        return self.vector[1]

    @property
    def pairs(self) -> Tensor:
        return self.vector[2]
