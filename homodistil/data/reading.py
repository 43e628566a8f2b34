"""Reading a corpus: all parts that are wanted, by all workers, and what they hold together.

Leaves a part's files to encoding.py, and which documents stay to choice.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from homodistil.data.encoding import Found, Request, encode_part, together
from homodistil.data.shards import Sequences
from homodistil.data.workers import Workers

# N documents

IDS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Reading:
    """Documents in the order of the sources, whoever read them."""

    requests: list[Request]
    """One a part."""
    documents: list[int]
    """Of each part."""
    empty: list[int]
    """Documents without text, which are not among these."""
    found: Found
    """Of all N documents."""
    dtype: np.dtype[np.unsignedinteger]

    @cached_property
    def begins(self) -> NDArray[np.int64]:
        """Number of each part's first document."""
        return np.cumsum(self.documents, dtype=np.int64) - np.array(self.documents, dtype=np.int64)

    @cached_property
    def earlier(self) -> list[int]:
        """Documents, empty ones too, of the same file or dataset in the parts before each."""
        found, before = [], 0
        for request, documents, empty in zip(self.requests, self.documents, self.empty, strict=True):
            before = before if request.part.start else 0
            found.append(before)
            before += documents + empty
        return found

    def ids(self, chosen: NDArray[np.bool_]) -> Iterator[Sequences]:
        """Of the chosen, (N,), of the documents: of as many at a time as have about IDS_AT_ONCE."""
        for request, begin, size in zip(self.requests, self.begins, self.documents, strict=True):
            here, lengths = chosen[begin : begin + size], self.found.lengths[begin : begin + size]
            if here.any():
                ids = np.memmap(request.ids, self.dtype, mode="r", shape=(int(lengths.sum()),))
                ends = np.cumsum(lengths)
                cuts = np.flatnonzero(np.diff(ends // IDS_AT_ONCE)) + 1
                for some in np.split(np.arange(size), cuts):
                    yield ids[ends[some[0]] - lengths[some[0]] : ends[some[-1]]][np.repeat(here[some], lengths[some])]


def read_all(requests: list[Request], workers: Workers, dtype: np.dtype[np.unsignedinteger], progress: bool) -> Reading:
    """Every part, or as many as it takes: the document with which ids reach a request's `max_tokens` is the last.

    Raises `DataError`.
    """
    limit = requests[0].max_tokens
    done, total = 0, 0
    with tqdm(desc="reading", unit="tok", unit_scale=True, disable=not progress) as bar:
        for done, size in enumerate(_sizes(requests, workers, bar), start=1):
            total += size
            bar.set_postfix_str(f"part {done} of {len(requests)}")
            if limit is not None and total >= limit:
                break
    parts = [Found.load(request) for request in requests[:done]]
    found = together(parts)
    if limit is not None:
        found = found.first(int((np.cumsum(found.lengths) - found.lengths < limit).sum()))
    ends = np.minimum(np.cumsum([len(part.lengths) for part in parts]), len(found.lengths))
    documents = np.diff(ends, prepend=0).tolist()
    return Reading(requests[:done], documents, [int(part.empty) for part in parts], found, dtype)


def _sizes(requests: list[Request], workers: Workers, bar: tqdm) -> Iterator[int]:
    """Ids of each part, as it is done."""
    if workers.alone:  # somebody watches: say more than once a part that it goes on
        yield from (encode_part(request, bar.update) for request in requests)
        return
    for size in workers.results(encode_part, requests):
        bar.update(size)
        yield size
