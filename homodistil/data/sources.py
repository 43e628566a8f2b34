"""Text sources: whatever the user names, as parts that can be read side by side, each a stream of cleaned documents.

A source is a file (.txt, .jsonl, either with .gz, or .parquet), a folder of those, `hf:NAME[:config[:split]]`, a corpus
by its name (NAMED), or `embedded` (embedded.py). What the parts are depends on the sources alone, never on who reads
them. Leaves the formats of files to readers.py.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from homodistil.data.embedded import embedded_documents
from homodistil.data.readers import READERS, WHOLE, Paragraphs, bounds, read_file, reader_of, text_of
from homodistil.errors import DataError

EMBEDDED = "embedded"
HUGGING_FACE = "hf:"
NAMED = {
    "wikipedia": ("hf:wikimedia/wikipedia:{}", "20231101.en"),
    "bookcorpus": ("hf:{}", "rojagtap/bookcorpus"),
    "openwebtext": ("hf:{}", "Skylion007/openwebtext"),
}
"""Corpora of the papers, on the Hugging Face hub: name -> source, and what is put into it where `NAME:...` names
nothing else: a dump of Wikipedia, a mirror of the others."""
ROWS_OF_A_DOCUMENT = {"bookcorpus": 512}
"""Where a row is a sentence, so many one after another are a document."""


@dataclass(frozen=True)
class Document:
    """Cleaned text, one paragraph a line, and the name its source has in the counts."""

    source: str
    text: str


@dataclass(frozen=True)
class Part:
    """What one process reads at a time."""

    source: str
    """As the user named it, names of corpora spelt out."""
    name: str
    """Of the source in the counts."""
    file: Path | None = None
    """Of a source on disk."""
    start: int = 0
    stop: int | None = None
    """Of a .jsonl file the lines that begin at these bytes, of a .parquet file these row groups, of a dataset this
    shard and how many there are; None: all."""
    rows_of_a_document: int = 1
    version: tuple[int, int] | None = None
    """Size of a file and time of its last change, when it was listed: whether it is still what was read."""


def parts_of(sources: Iterable[str]) -> list[Part]:
    """Every source's parts, source by source, file by file. Raises `DataError`."""
    return [part for source in sources for part in _parts(source)]


def read(part: Part) -> Iterator[Document]:
    """A part's documents in order, those with nothing in them as well. Raises `DataError`."""
    for paragraphs in _paragraphs(part):
        yield Document(part.name, "\n".join(filter(None, map(clean, paragraphs))))


def documents(sources: Iterable[str]) -> Iterator[Document]:
    """Every source's documents, source by source, in the same order each time. Raises `DataError`."""
    for part in parts_of(sources):
        yield from (document for document in read(part) if document.text)


def verbatim(source: str) -> Iterator[str]:
    """A source's texts uncleaned, for measures that count every character: of a text file its whole, of a row its text.

    Raises `DataError`.
    """
    for part in _parts(source):
        whole = part.file is not None and part.file.name.endswith(tuple(WHOLE))
        found = read_file(part.file, WHOLE) if whole and part.file else _paragraphs(part)
        yield from ("\n".join(paragraphs) for paragraphs in found)


def _parts(source: str) -> Iterator[Part]:
    name, _, version = source.partition(":")
    if source == EMBEDDED:
        yield Part(source, EMBEDDED)
    elif source.startswith(HUGGING_FACE):
        yield from _shards(source, source)
    elif name in NAMED and not Path(source).exists():
        address, usual = NAMED[name]
        yield from _shards(address.format(version or usual), name, ROWS_OF_A_DOCUMENT.get(name, 1))
    else:
        yield from _files(source)


def _files(source: str) -> Iterator[Part]:
    """Of a file, or of every readable file below a folder, named by the folder they lie in."""
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"source {path}: no such file or folder. Give a text file, a folder, `hf:NAME`, `{EMBEDDED}`, or one of "
            f"{', '.join(NAMED)}."
        )
    files = sorted(p for p in path.rglob("*") if reader_of(p, READERS) and p.is_file()) if path.is_dir() else [path]
    if not files or not reader_of(files[0], READERS):
        raise DataError(f"source {path}: no text in it. Known kinds: {', '.join(READERS)}.")
    above = path.resolve().parent
    for file in files:
        name = (file if file == path else file.parent).resolve().relative_to(above).as_posix()
        version = file.stat().st_size, file.stat().st_mtime_ns
        yield from (Part(source, name, file, start, stop, version=version) for start, stop in bounds(file))


def _shards(source: str, name: str, rows_of_a_document: int = 1) -> Iterator[Part]:
    count = _dataset(source).num_shards
    for shard in range(count):
        yield Part(source, name, None, shard, count, rows_of_a_document)


def _paragraphs(part: Part) -> Iterator[Paragraphs]:
    if part.source == EMBEDDED:
        return embedded_documents()
    return _rows(part) if part.file is None else read_file(part.file, READERS, part.start, part.stop)


def _rows(part: Part) -> Iterator[Paragraphs]:
    """Documents of one shard of a dataset, streamed."""
    where = f"{part.source}, shard {part.start}"
    rows = _dataset(part.source).shard(num_shards=part.stop, index=part.start)
    texts = (text_of(row, f"{where}, row {number}") for number, row in enumerate(rows))
    try:
        while joined := list(islice(texts, part.rows_of_a_document)):
            yield "\n".join(joined).split("\n")
    except OSError as error:  # of the network
        raise DataError(f"source {where}: cannot be read ({error}). Run the same command again: it goes on.") from error


def _dataset(source: str) -> Any:
    """`hf:NAME[:config[:split]]`, to be streamed; split `train` by default."""
    from datasets import load_dataset  # slow to import, and rarely needed

    name, config, split, *_ = [*source.removeprefix(HUGGING_FACE).split(":"), "", ""]
    try:
        return load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # network, names and formats fail in many ways, all the user's to mend
        raise DataError(f"source {source}: cannot be opened ({error}). Expected hf:NAME[:config[:split]].") from error


def clean(paragraph: str) -> str:
    """One paragraph in Unicode NFC, its white space single, its control and format characters gone."""
    composed = unicodedata.normalize("NFC", paragraph)
    if composed.isprintable():  # then a space is the only white space in it
        return " ".join(composed.split()) if "  " in composed else composed.strip()
    composed = "".join(c for c in composed if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join(composed.split())
