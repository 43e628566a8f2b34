"""Counter hashes: every random choice about data is a pure function of what it is for, never of what came before.

So a stream resumes anywhere at once, and its choices do not depend on ranks, batch composition or library versions.
The mixer is SplitMix64's finaliser (Steele, Lea and Flood 2014), on NumPy arrays and on tensors.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Hashes = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST = np.uint64(0xBF58476D1CE4E5B9)
SECOND = np.uint64(0x94D049BB133111EB)
_SIGNED = {number: int(number.astype(np.int64)) for number in (GOLDEN, FIRST, SECOND)}


class Purpose(IntEnum):
    """First key of every hash, so that two choices never share one."""

    SHARD_ORDER = 1
    SEQUENCE_ORDER = 2
    TRAINING_MASKS = 3
    VALIDATION_MASKS = 4
    HELD_OUT_DOCUMENTS = 5
    CORPUS_ORDER = 6
    TOKENIZER_TEXT = 7
    EXAMPLE_ORDER = 8
    TRAINING_EXAMPLES = 9
    VALIDATION_EXAMPLES = 10
    KEPT_TOKENS = 11
    KEPT_UNITS = 12
    DRAWN_TARGETS = 13
    BATCH_ORDER = 14


def mix(values: Hashes) -> Hashes:
    """SplitMix64's finaliser: a bijection of 64 bits in which every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * FIRST
    values = (values ^ (values >> np.uint64(27))) * SECOND
    return values ^ (values >> np.uint64(31))


def counter_hash(*keys: Any) -> Hashes:
    """64-bit hash of integer keys, in order; array keys broadcast. Negative keys count modulo 2^64.

    Definition: start at 0; for each key, state = mix((state xor key) + GOLDEN).
    """
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = mix((state ^ np.asarray(key).astype(np.uint64)) + GOLDEN)
    return state


def tensor_hash(*keys: int | Tensor) -> Tensor:
    """The same on int64 tensors, wherever they are: ordered as `counter_hash`'s unsigned numbers are."""
    state = next(key for key in keys if isinstance(key, Tensor)).new_zeros(1)
    for key in keys:
        state = _mix((state ^ key) + _SIGNED[GOLDEN])
    return state ^ torch.iinfo(torch.int64).min


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shifted(state, 30)) * _SIGNED[FIRST]
    state = (state ^ _shifted(state, 27)) * _SIGNED[SECOND]
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Right, filled with zeros."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def permutation(size: int, *keys: int) -> NDArray[np.int64]:
    """The numbers below `size` in an order that depends on the keys alone."""
    return np.argsort(counter_hash(*keys, np.arange(size)), kind="stable")
