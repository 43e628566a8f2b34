"""Encoding a part of a corpus: its documents' ids on disk, and beside them what decides which documents stay.

A part that was encoded is not read again, as long as its file, the tokenizer and what is asked of it are the same. Owns
these two files of a part. Leaves what a part is to sources.py, what several are together to reading.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from homodistil.data.encoder import Encoder
from homodistil.data.fingerprints import Quotable, signatures, words_of
from homodistil.data.sources import Document, Part, read
from homodistil.files import sha256, write_durably

# N documents of a part, P permutations

VERSION = 2
"""Of how documents become ids: what another version had read is read again."""
CHARACTERS_AT_ONCE, DOCUMENTS_AT_ONCE = 500_000, 10_000
_encoder = cache(Encoder)
"""Made once a process."""


@dataclass(frozen=True)
class Request:
    """What is asked of whoever reads a part."""

    part: Part
    folder: Path
    """For the files."""
    tokenizer: Path
    """Named by its content, as `quotable` is: a process opens each name once."""
    end: int
    """The id that ends a document."""
    max_tokens: int | None = None
    """Enough of this part: documents after that with which ids reach it are not read."""
    near: bool = True
    """Whether near duplicates will be looked for."""
    quotable: Path | None = None

    @cached_property
    def file(self) -> Path:
        """Beside which the part's files lie, named by everything that decides what is in them."""
        decisive = [VERSION, asdict(self.part), self.end, self.max_tokens, self.near]
        decisive += [path.name for path in (self.tokenizer, self.quotable) if path]
        return self.folder / hashlib.sha256(json.dumps(decisive, default=str).encode()).hexdigest()[:24]

    @property
    def ids(self) -> Path:
        return self.file.with_suffix(".ids")

    @property
    def found(self) -> Path:
        return self.file.with_suffix(".npz")


def request_of(
    folder: Path, opened: PreTrainedTokenizerFast, end: int, quotable: Quotable, near: bool, max_tokens: int | None
) -> Request:
    """What is asked for every part. What all workers need lies in `folder`, named by what is in it."""
    opened.save_pretrained(folder / "tokenizer.partial")
    tokenizer = _named(folder / "tokenizer.partial", "tokenizer-{}")
    texts = None
    if quotable.texts:
        quotable.save(folder / "quotable.partial")
        texts = _named(folder / "quotable.partial", "quotable-{}")
    return Request(Part("", ""), folder, tokenizer, end, max_tokens, near, texts)


def _named(path: Path, pattern: str) -> Path:
    """A file or folder under the hash of its content."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    named = path.with_name(pattern.format(sha256(*files)[:24]))
    if named.is_dir():
        shutil.rmtree(named)
    return path.replace(named)


@dataclass(frozen=True)
class Found:
    """A part's documents, the empty ones left out."""

    lengths: NDArray[np.int64]
    """(N,): ids of each, the one that ends it included."""
    numbers: NDArray[np.int64]
    """(N,): which of the part's documents each is, empty ones counted."""
    exact: NDArray[np.uint64]
    """(N, 2): XXH3-128 of the text."""
    signatures: NDArray[np.uint32]
    """(N, P): MinHash; (N, 0) where nobody will ask."""
    quotes: NDArray[np.int32]
    """(N,): the evaluation text that it quotes, -1 for none."""
    empty: NDArray[np.int64]
    """(): documents without text."""

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, request: Request) -> Found:
        with np.load(request.found) as found:
            return cls(**found)

    def first(self, count: int) -> Found:
        """Of the first so many documents."""
        return replace(self, **{name: getattr(self, name)[:count] for name in BY_DOCUMENT})


BY_DOCUMENT = ("lengths", "numbers", "exact", "signatures", "quotes")


def together(parts: list[Found]) -> Found:
    """Of parts one after another, at least one."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in BY_DOCUMENT}
    return Found(**arrays, empty=np.array(sum(int(part.empty) for part in parts)))


def encode_part(request: Request, tick: Callable[[int], object] = lambda ids: None) -> int:
    """Write a part's files, unless they are there; returns its ids, which `tick` hears of on the way. Raises
    `DataError`."""
    if request.found.exists():
        return int(Found.load(request).lengths.sum())
    found: list[Found] = []
    write_durably(request.ids, partial(_write_ids, request, found, tick))
    all_of_it = together(found) if found else _looked_at(request, Batch([], [], 0), np.empty(0, np.int64))
    write_durably(request.found, all_of_it.save)
    return int(all_of_it.lengths.sum())


def dtype_of(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Of ids on disk."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _write_ids(request: Request, found: list[Found], tick: Callable[[int], object], path: Path) -> None:
    total = 0
    encoder = _encoder(request.tokenizer)
    dtype = dtype_of(encoder.size)
    with path.open("wb") as file:
        for batch in _batches(read(request.part)):
            ids = encoder.ids(batch.texts, request.end, dtype)
            lengths = np.array([len(document) for document in ids], dtype=np.int64)
            if request.max_tokens is not None:
                before = total + np.cumsum(lengths) - lengths
                lengths = lengths[before < request.max_tokens]
            joined = np.concatenate([*ids[: len(lengths)], np.empty(0, dtype)])
            found.append(_looked_at(request, batch, lengths))
            file.write(joined.tobytes())
            total += len(joined)
            tick(len(joined))
            if request.max_tokens is not None and total >= request.max_tokens:
                break


def _looked_at(request: Request, batch: Batch, lengths: NDArray[np.int64]) -> Found:
    """The first documents of a batch, as many as have lengths."""
    texts, numbers = batch.texts[: len(lengths)], np.array(batch.numbers[: len(lengths)], dtype=np.int64)
    exact = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
    marks, quotes = np.empty((len(texts), 0), np.uint32), np.full(len(texts), -1, np.int32)
    if request.near or request.quotable:
        words, counts = words_of(texts)
        marks = signatures(words, counts) if request.near else marks
        quotes = Quotable.load(request.quotable).quoted(words, counts) if request.quotable else quotes
    hashes = np.frombuffer(exact, np.uint64).reshape(-1, 2)
    return Found(lengths, numbers, hashes, marks, quotes, np.array(batch.empty))


class Batch(NamedTuple):
    """Documents that are encoded at once."""

    texts: list[str]
    numbers: list[int]
    """Of each, in its part."""
    empty: int
    """How many without text were among them."""


def _batches(documents: Iterator[Document]) -> Iterator[Batch]:
    """Of about CHARACTERS_AT_ONCE, and DOCUMENTS_AT_ONCE at most."""
    batch, characters = Batch([], [], 0), 0
    for number, document in enumerate(documents):
        if not document.text:
            batch = batch._replace(empty=batch.empty + 1)
            continue
        batch.texts.append(document.text)
        batch.numbers.append(number)
        characters += len(document.text)
        if characters > CHARACTERS_AT_ONCE or len(batch.texts) == DOCUMENTS_AT_ONCE:
            yield batch
            batch, characters = Batch([], [], 0), 0
    if batch.texts or batch.empty:
        yield batch
