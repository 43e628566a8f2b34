"""Scoring for causal language modelling: every token but the first is foretold from those before it.

The twin of masking.py's `Masker`. Nothing is drawn, so every pass over the corpus scores the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from homodistil.batch import Batch
from homodistil.data.shards import Sequences

# B sequences, T tokens, S = T - 1 scored slots per sequence


@dataclass(frozen=True)
class CausalScorer:
    """Slot s stands at position s, and its label is the token after it; where that is padding, its weight is 0."""

    pad: int | None
    """The id that is padding and nothing else; None: sequences have none."""

    def __call__(self, sequences: Sequences, samples: NDArray[np.int64], *key: int) -> Batch:
        """Of (B, T) sequences numbered `samples` (B,). `key` is what a `Masker` draws by; here it decides nothing."""
        ids_BT = torch.from_numpy(sequences.astype(np.int64))
        real_BT = torch.ones_like(ids_BT) if self.pad is None else (ids_BT != self.pad).long()
        labels_BS = ids_BT[:, 1:].contiguous()
        return Batch(
            input_ids=ids_BT,
            attention_mask=real_BT,
            token_type_ids=torch.zeros_like(ids_BT),
            scored_positions=torch.arange(labels_BS.shape[1]).repeat(len(ids_BT), 1),
            labels=labels_BS,
            weights=real_BT[:, 1:].float(),
            samples=torch.from_numpy(samples.astype(np.int64)),
            padded=not real_BT.all(),
        )
