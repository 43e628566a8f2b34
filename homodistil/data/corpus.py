"""Corpus: every document's ids on disk, and the fixed-length sequences that a choice of documents packs into.

Ids stream to a file and are read back through a memory map, so a corpus need not fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from homodistil.data.shards import Sequences, SourceCount
from homodistil.data.sources import Document

# N sequences, T tokens of a sequence

CHARACTERS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Corpus:
    """All documents' ids one after another, each document followed by a token that ends it."""

    ids: Sequences
    """(tokens,), a memory map."""
    lengths: NDArray[np.int64]
    """(documents,): ids of each, the one that ends it included."""
    sources: dict[str, SourceCount]

    @classmethod
    def encode(
        cls,
        texts: Iterable[Document],
        tokenizer: PreTrainedTokenizerFast,
        scratch: Path,
        end: int,
        *,
        max_tokens: int | None = None,
        progress: bool = False,
    ) -> Corpus:
        """Write documents' ids, each document's followed by `end`, to the file `scratch`, until the document with which
        they reach `max_tokens`."""
        dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
        sources: dict[str, SourceCount] = {}
        lengths: list[int] = []
        total = 0
        with (
            scratch.open("wb") as file,
            tqdm(desc="encoding", unit="tok", unit_scale=True, disable=not progress) as bar,
        ):
            for document, ids in _encoded(texts, tokenizer):
                file.write(np.array([*ids, end], dtype=dtype).tobytes())
                lengths.append(len(ids) + 1)
                count = sources.setdefault(document.source, SourceCount())
                count.documents, count.tokens = count.documents + 1, count.tokens + len(ids)
                total += lengths[-1]
                bar.update(lengths[-1])
                if max_tokens is not None and total >= max_tokens:
                    break
        ids_on_disk = np.memmap(scratch, dtype, mode="r") if total else np.empty(0, dtype)
        return cls(ids_on_disk, np.array(lengths, dtype=np.int64), sources)


def _encoded(texts: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Document, list[int]]]:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    for batch in _batches(texts):
        encodings = backend.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        yield from ((document, encoding.ids) for document, encoding in zip(batch, encodings, strict=True))


def _batches(texts: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in texts:
        batch.append(document)
        characters += len(document.text)
        if characters > CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class PackedSequences:
    """Some documents of a corpus, joined and cut into T ids each; a last partial cut is dropped. With a `frame` of two
    ids, [CLS] and [SEP], the first and the last of the T are these."""

    def __init__(self, corpus: Corpus, chosen: NDArray[np.bool_], length: int, frame: tuple[int, int] | None = None):
        ends = np.cumsum(corpus.lengths)
        self._ids = corpus.ids
        self._frame, self._length = frame, length
        self._starts = (ends - corpus.lengths)[chosen]
        self._joined_starts = np.cumsum(corpus.lengths[chosen]) - corpus.lengths[chosen]
        self._body = length - 2 if frame else length
        self._size = int(corpus.lengths[chosen].sum()) // self._body

    def __len__(self) -> int:
        return self._size

    def rows(self, numbers: NDArray[np.int64]) -> Sequences:
        """(N, T) sequences by their numbers (N,)."""
        positions = numbers[:, None] * self._body + np.arange(self._body)
        document = np.searchsorted(self._joined_starts, positions, side="right") - 1
        bodies = self._ids[self._starts[document] + positions - self._joined_starts[document]]
        if self._frame is None:
            return bodies
        sequences = np.empty((len(numbers), self._length), dtype=self._ids.dtype)
        sequences[:, 0], sequences[:, -1] = self._frame
        sequences[:, 1:-1] = bodies
        return sequences
