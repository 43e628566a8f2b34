"""Corpus: the ids of the documents of a split, one after another on disk, and the sequences that they are cut into.

Ids are read through a memory map, so a corpus need not fit in memory.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from homodistil.data.shards import Sequences
from homodistil.data.tokenizer import piece_texts

# N sequences, T tokens of a sequence, V vocabulary

STOP = re.compile(r"""[.!?]+["'\u201d\u2019)\]]*""")
CLOSING = re.compile(r"""["'\u201d\u2019)\].!?]+""")
MOST_CLOSING = 2
"""Pieces behind a full stop that still belong to its sentence."""
IDS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Corpus:
    """Where a split's ids lie."""

    path: Path
    size: int
    """Ids."""
    dtype: str

    @classmethod
    def join(cls, path: Path, documents: Iterable[Sequences], dtype: np.dtype[np.unsignedinteger]) -> Corpus:
        """Write documents' ids one after another."""
        size = 0
        with path.open("wb") as file:
            for ids in documents:
                file.write(ids.astype(dtype).tobytes())
                size += len(ids)
        return cls(path, size, dtype.str)

    @property
    def ids(self) -> Sequences:
        """(size,)"""
        return np.memmap(self.path, self.dtype, mode="r") if self.size else np.empty(0, self.dtype)


@dataclass(frozen=True)
class PackedSequences:
    """A corpus cut into sequences of T ids. With a `frame` of two, [CLS] and [SEP], the first and the last are these.

    Without `starts`, each sequence goes on where the one before ended, and a last partial one is dropped.
    """

    corpus: Corpus
    length: int
    """T."""
    frame: tuple[int, int] | None = None
    starts: Path | None = None
    """(N,) on disk: where in the corpus each sequence starts."""

    @property
    def body(self) -> int:
        """Ids of a sequence that are the corpus's."""
        return self.length - 2 if self.frame else self.length

    def __len__(self) -> int:
        return len(self._starts) if self.starts else self.corpus.size // self.body

    def rows(self, numbers: NDArray[np.int64]) -> Sequences:
        """(N, T) sequences by their numbers (N,)."""
        starts = self._starts[numbers] if self.starts else numbers * self.body
        bodies = self.corpus.ids[starts[:, None] + np.arange(self.body)]
        if self.frame is None:
            return bodies
        sequences = np.empty((len(numbers), self.length), dtype=bodies.dtype)
        sequences[:, 0], sequences[:, -1] = self.frame
        sequences[:, 1:-1] = bodies
        return sequences

    @property
    def _starts(self) -> NDArray[np.int64]:
        assert self.starts is not None
        return np.load(self.starts, mmap_mode="r")


def sentence_starts(borders: NDArray[np.int64], size: int, body: int) -> NDArray[np.int64]:
    """(N,): where sequences of `body` of `size` ids start if each starts with a sentence. borders: ids behind which
    sentences start, ascending.

    The next one starts with the sentence that did not fit whole, so that nothing is lost; with the next id where a
    sentence is longer than a sequence.
    """
    starts, start = array("q"), 0
    while start + body <= size:
        starts.append(start)
        before = int(np.searchsorted(borders, start + body, side="right"))
        border = int(borders[before - 1]) if before else 0
        start = border if border > start else start + body
    return np.array(starts, dtype=np.int64)


def sentence_borders(ids: Sequences, tokenizer: PreTrainedTokenizerFast, end: int) -> NDArray[np.int64]:
    """Where in `ids` a sentence may start: behind a full stop, its closing quotes and brackets, or a document's `end`.

    An abbreviation's full stop counts as well: what starts behind it starts with a word all the same.
    """
    texts = [text.strip() for text in piece_texts(tokenizer)]
    stops = np.array([bool(STOP.fullmatch(text)) for text in texts])
    closes = np.array([bool(CLOSING.fullmatch(text)) for text in texts])
    found = []
    for start in range(0, len(ids), IDS_AT_ONCE):
        here = ids[start : start + IDS_AT_ONCE]
        ends, closing = stops[here], closes[here]
        for _ in range(MOST_CLOSING):
            ends[1:] |= ends[:-1] & closing[1:]
        ends[:-1] &= ~closing[1:]
        found.append(np.flatnonzero(ends | (here == end)) + start + 1)
    return np.concatenate([*found, np.empty(0, np.int64)])
