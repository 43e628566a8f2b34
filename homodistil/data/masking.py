"""Masking for masked-language modelling: which positions are scored, and what the model sees there.

Every choice is a counter hash of (seed, epoch, sample, position), so a sequence's mask never depends on the batch,
the rank or the update it comes in. Leaves which sequences come when to stream.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from homodistil.batch import Batch
from homodistil.data.hashing import Hashes, Purpose, counter_hash, mix
from homodistil.data.shards import Sequences, SpecialTokens

# B sequences, T tokens, S scored slots per sequence, N scored positions of the batch

NEVER = np.uint64(2**64 - 1)
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Masker:
    """BERT's masking (Devlin et al. 2019, section 3.1) with S = round(probability T) fixed slots a sequence.

    A sequence of n real tokens gets round(probability n) targets, never special tokens; slots without a target have
    weight 0. Of the targets, 80 % become [MASK], 10 % a random ordinary token, 10 % stay as they are.
    """

    probability: float
    vocab_size: int
    special_tokens: SpecialTokens
    continues_word: Mask | None = None
    """(vocab_size,): pieces masked together with the one before them; None masks pieces one by one."""

    def __call__(self, sequences: Sequences, samples: NDArray[np.int64], *key: int) -> Batch:
        """Mask (B, T) sequences numbered `samples` (B,). `key`: (purpose, seed, epoch) of these masks."""
        ids_BT = sequences.astype(np.int64)
        hashes_BT = counter_hash(*key, samples[:, None], np.arange(ids_BT.shape[1]))
        chosen_BT = self._choose(ids_BT, hashes_BT)
        row_N, column_N = np.nonzero(chosen_BT)
        positions_BS, weights_BS = self._slots(chosen_BT, row_N, column_N)
        labels_BS = np.take_along_axis(ids_BT, positions_BS, axis=1)
        real_BT = (ids_BT != self.special_tokens.pad).astype(np.int64)
        ids_BT[row_N, column_N] = self._replace(ids_BT[row_N, column_N], hashes_BT[row_N, column_N])
        return Batch(
            input_ids=torch.from_numpy(ids_BT),
            attention_mask=torch.from_numpy(real_BT),
            token_type_ids=torch.zeros(ids_BT.shape, dtype=torch.int64),
            scored_positions=torch.from_numpy(positions_BS),
            labels=torch.from_numpy(labels_BS),
            weights=torch.from_numpy(weights_BS),
            samples=torch.from_numpy(samples.astype(np.int64)),
            padded=not real_BT.all(),
        )

    def _choose(self, ids_BT: NDArray[np.int64], hashes_BT: Hashes) -> Mask:
        """Per sequence, the words with the smallest hashes that fit its quota whole.

        With q positions to choose, exactly those below the (q + 1)-th smallest hash qualify; the pieces of a word
        share one hash, so a word that would straddle the quota equals that bound and is left out as a whole.
        """
        eligible_BT = ~np.isin(ids_BT, self.special_tokens.ids)
        if self.continues_word is not None:
            hashes_BT = self._hash_by_word(ids_BT, hashes_BT, eligible_BT)
        hashes_BT = np.where(eligible_BT, hashes_BT, NEVER)
        lengths_B = (ids_BT != self.special_tokens.pad).sum(axis=1)
        quotas_B = np.minimum(np.rint(self.probability * lengths_B).astype(np.int64), ids_BT.shape[1] - 1)
        ordered_BT = np.partition(hashes_BT, np.unique(quotas_B), axis=1)
        return hashes_BT < np.take_along_axis(ordered_BT, quotas_B[:, None], axis=1)

    def _hash_by_word(self, ids_BT: NDArray[np.int64], hashes_BT: Hashes, eligible_BT: Mask) -> Hashes:
        """Every piece's hash replaced by that of its word's first piece; a special token ends a word."""
        assert self.continues_word is not None
        joined_BT = self.continues_word[ids_BT]
        joined_BT[:, 1:] &= eligible_BT[:, :-1]
        joined_BT[:, 0] = False
        first_BT = np.maximum.accumulate(np.where(joined_BT, 0, np.arange(ids_BT.shape[1])), axis=1)
        return np.take_along_axis(hashes_BT, first_BT, axis=1)

    def _slots(
        self, chosen_BT: Mask, row_N: NDArray[np.int64], column_N: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Scored positions ascending, then weight-0 slots that point at position 0."""
        shape = len(chosen_BT), round(self.probability * chosen_BT.shape[1])
        slot_N = np.cumsum(chosen_BT, axis=1)[row_N, column_N] - 1
        positions_BS, weights_BS = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        positions_BS[row_N, slot_N], weights_BS[row_N, slot_N] = column_N, 1
        return positions_BS, weights_BS

    def _replace(self, tokens_N: NDArray[np.int64], hashes_N: Hashes) -> NDArray[np.int64]:
        """80 % [MASK], 10 % random, 10 % kept, by hashes of the hashes that chose them."""
        assert self.special_tokens.mask is not None
        share_N = mix(hashes_N ^ np.uint64(1)) >> np.uint64(32)  # uniform below 2^32
        drawn_N = mix(hashes_N ^ np.uint64(2)) % np.uint64(len(self._ordinary))
        unmasked_N = np.where(share_N < 0.9 * 2**32, self._ordinary[drawn_N], tokens_N)
        return np.where(share_N < 0.8 * 2**32, self.special_tokens.mask, unmasked_N)

    @cached_property
    def _ordinary(self) -> NDArray[np.int64]:
        """Ids of all but the special tokens."""
        return np.setdiff1d(np.arange(self.vocab_size), self.special_tokens.ids)


def training_masks(seed: int, epoch: int) -> tuple[int, int, int]:
    """Key of the masks of one epoch: each pass over the corpus masks anew."""
    return Purpose.TRAINING_MASKS, seed, epoch


VALIDATION_MASKS = (Purpose.VALIDATION_MASKS, 0, 0)
"""Key of the masks of held-out text: the same for every run, whatever its seed."""
