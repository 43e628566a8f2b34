"""Fingerprints: what tells that two documents say the same, or that one quotes a text that models are judged by.

Documents are compared word by word, whatever the tokenizer: case, punctuation, and how a word is cut don't count. Near
duplicates are found by MinHash (Broder 1997; rensa's) over shingles of five words, quotations as 13-grams of words
(Brown et al. 2020, appendix C). Leaves which documents go to choice.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from rensa import RMinHash
from transformers import PreTrainedTokenizerFast

from homodistil.data.hashing import GOLDEN, Hashes, mix
from homodistil.data.tokenizer import continues_word, open_tokenizer, piece_texts
from homodistil.data.workers import Workers

# N documents, W words, G n-grams, V vocabulary, P permutations

SHINGLE_WORDS = 5
PERMUTATIONS = 128
QUOTED_WORDS = 13
SEED = 1
PASSAGES_AT_ONCE = 10_000
FILTER_BITS = 24
"""A table of 2^24 flags tells most n-grams at once that they are in no evaluation text."""

Counts = NDArray[np.int64]


class Words:
    """How a vocabulary's pieces make up words."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        size = len(tokenizer)
        special = set(tokenizer.all_special_ids)
        texts = ["" if piece in special else _letters(text) for piece, text in enumerate(piece_texts(tokenizer))]
        self._hashes = np.array([_hash(text) if text else 0 for text in texts], dtype=np.uint64)
        self._continues = continues_word(tokenizer, size)

    def of(self, ids: NDArray[np.integer], lengths: Counts) -> tuple[Hashes, Counts]:
        """(W,) hashes of the words of documents that lie one after another in `ids`, and how many each of the (N,) has.

        A piece without letters or digits is none, and what follows it begins a word.
        """
        hashes = self._hashes[ids]
        spoken = hashes != 0
        starts = ~self._continues[ids]
        starts[1:] |= ~spoken[:-1]
        ends = np.cumsum(lengths)
        starts[(ends - lengths)[lengths > 0]] = True
        (begins,) = np.nonzero(spoken & starts)
        words = np.add.reduceat(hashes, begins) if len(begins) else hashes[:0]
        return words, np.diff(np.searchsorted(begins, ends), prepend=0)


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _letters(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


def ngrams(words: Hashes, counts: Counts, n: int) -> tuple[Hashes, Counts]:
    """(G,) hashes of the `n` words that begin at every word of a document but its last n - 1, and how many each has."""
    ends = np.cumsum(counts)
    begins = np.ones(len(words), dtype=np.bool_)
    for back in range(1, n):
        begins[(ends - back)[counts >= back]] = False
    if len(words) < n:
        return words[:0], np.zeros_like(counts)
    rolled = words[: len(words) - n + 1].copy()
    for offset in range(1, n):
        rolled *= GOLDEN
        rolled += words[offset : len(words) - n + 1 + offset]
    return mix(rolled[begins[: len(rolled)]]), np.maximum(counts - (n - 1), 0)


def signatures(words: Hashes, counts: Counts) -> NDArray[np.uint32]:
    """(N, P) MinHash signatures; the share of equal columns of two rows estimates their documents' Jaccard similarity.
    Zero where a document has fewer words than a shingle."""
    shingles, numbers = ngrams(words, counts, SHINGLE_WORDS)
    offsets = np.concatenate([[0], np.cumsum(numbers)]).astype(np.uint64)
    rows = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, PERMUTATIONS, SEED).to_rows()
    found = np.array(rows, dtype=np.uint32).reshape(-1, PERMUTATIONS)
    found[numbers == 0] = 0
    return found


@dataclass(frozen=True)
class Quotable:
    """The n-grams of the texts that models are judged by."""

    texts: list[str]
    """Names."""
    grams: Hashes
    """(G,) ascending, each once."""
    owners: NDArray[np.int32]
    """(G,) of the first text that has it."""

    @classmethod
    def of(cls, texts: Iterable[tuple[str, Sequence[str]]], tokenizer: Path, workers: Workers) -> Quotable:
        """Of each name's passages."""
        names: list[str] = []
        grams, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        batches = [(name, batch, tokenizer) for name, passages in texts for batch in _batches(passages)]
        for (name, *_), found in zip(batches, workers.results(_quotable_grams, batches), strict=True):
            names += [] if name in names else [name]
            grams.append(found)
            owners.append(np.full(len(found), names.index(name), dtype=np.int32))
        unique, first = np.unique(np.concatenate(grams), return_index=True)
        return cls(names, unique, np.concatenate(owners)[first])

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, texts=np.array(self.texts), grams=self.grams, owners=self.owners)

    @classmethod
    @cache
    def load(cls, path: Path) -> Quotable:
        with np.load(path) as found:
            return cls(found["texts"].tolist(), found["grams"], found["owners"])

    def quoted(self, words: Hashes, counts: Counts) -> NDArray[np.int32]:
        """(N,) number of the text that a document quotes first, -1 for none."""
        grams, numbers = ngrams(words, counts, QUOTED_WORDS)
        quoted = np.full(len(counts), -1, dtype=np.int32)
        (suspects,) = np.nonzero(self._flags[(grams >> np.uint64(64 - FILTER_BITS)).astype(np.int64)])
        places = np.minimum(np.searchsorted(self.grams, grams[suspects]), max(len(self.grams) - 1, 0))
        hits = suspects[self.grams[places] == grams[suspects]] if len(suspects) else suspects
        documents, first = np.unique(np.searchsorted(np.cumsum(numbers), hits, side="right"), return_index=True)
        quoted[documents] = self.owners[np.searchsorted(self.grams, grams[hits[first]])]
        return quoted

    @cached_property
    def _flags(self) -> NDArray[np.bool_]:
        flags = np.zeros(1 << FILTER_BITS, dtype=np.bool_)
        flags[(self.grams >> np.uint64(64 - FILTER_BITS)).astype(np.int64)] = True
        return flags


@cache
def words_of(tokenizer: Path) -> Words:
    """Made once a process."""
    return Words(open_tokenizer(tokenizer))


def _batches(passages: Sequence[str]) -> Iterator[list[str]]:
    """Each of a text's passages once, those left out that are too short for the words that are looked for."""
    long = [passage for passage in dict.fromkeys(passages) if len(passage) >= 2 * QUOTED_WORDS - 1]
    for start in range(0, len(long), PASSAGES_AT_ONCE):
        yield long[start : start + PASSAGES_AT_ONCE]


def _quotable_grams(batch: tuple[str, list[str], Path]) -> Hashes:
    _, passages, tokenizer = batch
    backend = open_tokenizer(tokenizer).backend_tokenizer
    encoded = [encoding.ids for encoding in backend.encode_batch_fast(passages, add_special_tokens=False)]
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    ids = np.fromiter(chain.from_iterable(encoded), dtype=np.int64, count=int(lengths.sum()))
    return ngrams(*words_of(tokenizer).of(ids, lengths), QUOTED_WORDS)[0]
