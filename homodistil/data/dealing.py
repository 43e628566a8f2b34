"""Dealing: a corpus cut into sequences, and these dealt in random order to shards of equal size."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from homodistil.data.corpus import PackedSequences
from homodistil.data.hashing import Purpose, permutation
from homodistil.data.shards import SEQUENCES_PER_MEMBER, ShardEntry, Split, write_shard
from homodistil.data.workers import Workers


class Hand(NamedTuple):
    """One shard, and who gets it."""

    path: Path
    number: int
    size: int
    """Sequences of every shard."""
    sequences: PackedSequences
    order: Path
    """All sequences' numbers, on disk, as they are dealt."""


def deal(
    folder: Path, split: Split, sequences: PackedSequences, shards: int, seed: int, workers: Workers, progress: bool
) -> list[ShardEntry]:
    """Write a split's shards. What does not fill them equally is left over."""
    order = sequences.corpus.path.with_suffix(".order.npy")
    np.save(order, permutation(len(sequences), Purpose.CORPUS_ORDER, seed))
    size = len(sequences) // shards
    hands = (Hand(folder / f"{split}-{shard:05d}.tar", shard, size, sequences, order) for shard in range(shards))
    written = workers.results(_write, hands)
    return list(tqdm(written, desc=f"writing {split}", total=shards, unit="shard", disable=not progress))


def _write(hand: Hand) -> ShardEntry:
    mine = np.load(hand.order, mmap_mode="r")[hand.number * hand.size : (hand.number + 1) * hand.size]
    members = (mine[start : start + SEQUENCES_PER_MEMBER] for start in range(0, hand.size, SEQUENCES_PER_MEMBER))
    return write_shard(hand.path, map(hand.sequences.rows, members))
