"""Choice: which of the documents that were read stay, and why the others go.

The first of several that say the same stays, in the order of the sources; so the choice does not depend on who read
what. Owns that rule. Leaves how documents are compared to fingerprints.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from homodistil.data.encoding import Found
from homodistil.data.fingerprints import PERMUTATIONS
from homodistil.data.hashing import counter_hash
from homodistil.data.options import Deduplicate

# N documents, P permutations, R rows of a band

SIMILAR = 0.8
"""Estimated Jaccard similarity of two documents' shingles from which they say the same (Lee et al. 2022)."""
BANDS = 16
"""Of 8 columns: two documents that are 0.8 similar share one with a probability of 95 %, 0.9 similar with 99.99 %."""


PAIRS_AT_ONCE = 1 << 16


class Why(IntEnum):
    """What becomes of a document."""

    KEPT = 0
    EXACT = 1
    NEAR = 2
    QUOTES = 3


@dataclass(frozen=True)
class Choice:
    """Of N documents."""

    why: NDArray[np.int8]
    """(N,)"""
    of: NDArray[np.int64]
    """(N,): the document that it repeats, or the evaluation text that it quotes; -1 where it stays."""

    @property
    def kept(self) -> NDArray[np.bool_]:
        """(N,)"""
        return self.why == Why.KEPT


def choose(found: Found, deduplicate: Deduplicate) -> Choice:
    """First go those that quote, then exact duplicates, then near ones."""
    why = np.where(found.quotes >= 0, Why.QUOTES, Why.KEPT).astype(np.int8)
    choice = Choice(why, np.where(found.quotes >= 0, found.quotes, -1).astype(np.int64))
    if deduplicate != "none":
        _drop(choice, Why.EXACT, _first_equal(found.exact, choice.kept))
    if deduplicate == "near":
        _drop(choice, Why.NEAR, _first_similar(found.signatures, choice.kept))
    return choice


def _drop(choice: Choice, why: Why, first: NDArray[np.int64]) -> None:
    """Documents whose `first`, (N,), is another document."""
    repeats = choice.kept & (first != np.arange(len(first)))
    choice.why[repeats] = why
    choice.of[repeats] = first[repeats]


def _first_equal(exact: NDArray[np.uint64], kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(N,): the first document with the same hash, among those that are kept."""
    first = np.arange(len(exact))
    (here,) = np.nonzero(kept)
    _, begins, group = np.unique(exact[here], axis=0, return_index=True, return_inverse=True)
    first[here] = here[begins[group.reshape(-1)]]
    return first


def _first_similar(signatures: NDArray[np.uint32], kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(N,): the first of a document's group: what similar pairs tie together, among those that are kept."""
    first = np.arange(len(signatures))
    (here,) = np.nonzero(kept & signatures.any(axis=1))
    pairs = _similar_pairs(signatures[here])
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(here), len(here)))
    _, group = connected_components(graph, directed=False)
    _, begins = np.unique(group, return_index=True)
    first[here] = here[begins[group]]
    return first


def _similar_pairs(signatures: NDArray[np.uint32]) -> NDArray[np.int64]:
    """(pairs, 2) of rows that agree in a band and whose estimated similarity reaches SIMILAR; within a band, a row is
    compared with the first that shares it and with the one before."""
    rows = PERMUTATIONS // BANDS
    found = [np.empty((0, 2), dtype=np.int64)]
    for band in range(BANDS):
        keys = counter_hash(*signatures[:, band * rows : (band + 1) * rows].T.astype(np.uint64))
        order = np.argsort(keys, kind="stable")
        new = np.concatenate([[True], keys[order][1:] != keys[order][:-1]]) if len(order) else np.empty(0, np.bool_)
        begins = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
        (later,) = np.nonzero(~new)
        for other in (begins[later], later - 1):
            pairs = np.stack([order[other], order[later]], axis=1)
            for start in range(0, len(pairs), PAIRS_AT_ONCE):
                some = pairs[start : start + PAIRS_AT_ONCE]
                alike = (signatures[some[:, 0]] == signatures[some[:, 1]]).mean(axis=1)
                found.append(some[alike >= SIMILAR])
    return np.concatenate(found)
