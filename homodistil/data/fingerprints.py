"""Fingerprints: what tells that two documents say the same, or that one quotes a text that models are judged by.

Texts are compared word by word, whatever the tokenizer; case and punctuation don't count. Near duplicates are found by
MinHash (Broder 1997; rensa's) over shingles of five words, quotations as 13-grams of words (Brown et al. 2020, appendix
C). Leaves which documents go to choice.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from homodistil.data.hashing import GOLDEN, Hashes, mix
from homodistil.data.workers import Workers

# N documents, W words, G n-grams, P permutations

SHINGLE_WORDS = 5
PERMUTATIONS = 128
QUOTED_WORDS = 13
SEED = 1
PASSAGES_AT_ONCE = 10_000
BLOCK_CHARACTERS = 50_000
FILTER_BITS = 24
"""A table of 2^24 flags tells most n-grams at once that they are in no evaluation text."""
IDEOGRAPHS = (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)
"""Chinese and Japanese put no spaces between words."""

Counts = NDArray[np.int64]
POWERS = np.concatenate([[np.uint64(1)], np.cumprod(np.full(QUOTED_WORDS, GOLDEN))])
"""Of the polynomial's base, modulo 2^64."""


def words_of(texts: Sequence[str]) -> tuple[Hashes, Counts]:
    """(W,) hashes of the words of texts one after another, and how many each of the (N,) has.

    A word is a run of letters and digits, or a single ideograph. It sums what each of its characters makes with the one
    that follows: order counts, and no place in a word need be known.
    """
    found = [_words(block, start) for start, block in _blocks("\n".join([*texts, ""]))]
    words, places = (np.concatenate(parts) for parts in zip(*found, (_NONE, _NOWHERE), strict=True))
    ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)
    return words, np.diff(np.searchsorted(places, ends), prepend=0)


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """(where it starts, lines of a text that fit a processor's cache together)."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + BLOCK_CHARACTERS) + 1 or len(text)
        yield start, text[start:end]
        start = end


def _words(block: str, start: int) -> tuple[Hashes, Counts]:
    """(W,) hashes and places of the words of lines."""
    codes = np.frombuffer(block.encode("utf-32-le", "surrogatepass"), np.uint32)
    alphabet = _alphabet()
    kinds, characters = alphabet.kinds[codes], alphabet.hashes[codes]
    starts = (kinds == Kind.IDEOGRAPH) | (np.diff(kinds, prepend=Kind.NONE) != 0)
    begins = np.flatnonzero(starts & (kinds != Kind.NONE))
    if not len(begins):
        return _NONE, _NOWHERE
    following = characters[1:] >> np.uint64(1)
    np.copyto(following, 0, where=starts[1:])  # the last of a word has none
    return np.add.reduceat(characters[:-1] ^ following, begins), begins + start


_NONE, _NOWHERE = np.empty(0, np.uint64), np.empty(0, np.int64)


class Kind(IntEnum):
    """What a character is to a word."""

    NONE = 0
    LETTER = 1
    """Or a digit."""
    IDEOGRAPH = 2


class Alphabet(NamedTuple):
    """Of every character."""

    kinds: NDArray[np.int8]
    hashes: Hashes
    """Of the small letter; zero of what is in no word."""


@cache
def _alphabet() -> Alphabet:
    kinds = np.array([chr(code).isalnum() for code in range(sys.maxunicode + 1)], dtype=np.int8)
    for first, last in IDEOGRAPHS:
        kinds[first : last + 1] *= Kind.IDEOGRAPH
    lower = np.array([ord(chr(code).lower()[0]) for code in range(len(kinds))], dtype=np.uint64)
    hashes = mix(lower + GOLDEN)
    return Alphabet(kinds, np.where(kinds == Kind.NONE, np.uint64(0), hashes))


def ngrams(words: Hashes, counts: Counts, n: int) -> tuple[Hashes, Counts]:
    """(G,) hashes of the `n` words that begin at every word of a document but its last n - 1, and how many each has."""
    ends = np.cumsum(counts)
    begins = np.ones(len(words), dtype=np.bool_)
    for back in range(1, n):
        begins[(ends - back)[counts >= back]] = False
    if len(words) < n:
        return words[:0], np.zeros_like(counts)
    rolled = _rolled(words, n)
    return mix(rolled[begins[: len(rolled)]]), np.maximum(counts - (n - 1), 0)


def _rolled(words: Hashes, n: int) -> Hashes:
    """(W - n + 1,): the polynomial of the n words from each on, put together of those of 1, 2, 4, ... words."""
    rolled, done, block, length = words[:0], 0, words, 1
    while done < n:
        if n & length:
            rolled, done = (_after(rolled, block, done, length) if done else block), done + length
        block, length = _after(block, block, length, length), 2 * length
    return rolled


def _after(first: Hashes, then: Hashes, size: int, length: int) -> Hashes:
    """Polynomials of `size` words, each followed by that of the next `length`."""
    following = then[size:]
    count = min(len(first), len(following))
    return first[:count] * POWERS[length] + following[:count]


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
    def of(cls, texts: Iterable[tuple[str, Sequence[str]]], workers: Workers) -> Quotable:
        """Of each name's passages."""
        names: list[str] = []
        grams, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        batches = [(name, batch) for name, passages in texts for batch in _batches(passages)]
        for (name, _), found in zip(batches, workers.results(_quotable_grams, batches), strict=True):
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


def _batches(passages: Sequence[str]) -> Iterator[list[str]]:
    """Each of a text's passages once, those left out that are too short for the words that are looked for."""
    long = [passage for passage in dict.fromkeys(passages) if len(passage) >= 2 * QUOTED_WORDS - 1]
    for start in range(0, len(long), PASSAGES_AT_ONCE):
        yield long[start : start + PASSAGES_AT_ONCE]


def _quotable_grams(batch: tuple[str, list[str]]) -> Hashes:
    return ngrams(*words_of(batch[1]), QUOTED_WORDS)[0]
