"""Text sources: whatever the user names, as a deterministic stream of cleaned documents.

A source is a file (.txt, .jsonl, either with .gz, or .parquet), a folder of those, `hf:NAME[:config[:split]]`, or
`embedded` (embedded.py). Files stream line by line; nothing holds a corpus in memory.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from homodistil.data.embedded import embedded_documents
from homodistil.errors import DataError

EMBEDDED = "embedded"
HUGGING_FACE = "hf:"
TITLE = re.compile(r"= (?!= ).+ =$")
LONGEST_DOCUMENT = 1_000_000
"""Characters; a text file that is longer goes on as another document, so that memory stays bounded."""


@dataclass(frozen=True)
class Document:
    """Cleaned text, one paragraph a line, and the name its source has in the counts."""

    source: str
    text: str


def documents(sources: Iterable[str]) -> Iterator[Document]:
    """Every source's documents, source by source, in the same order each time. Raises `DataError`."""
    for source in sources:
        for name, paragraphs in _open_source(source, READERS):
            if text := "\n".join(filter(None, map(clean, paragraphs))):
                yield Document(name, text)


def verbatim(source: str) -> Iterator[str]:
    """A source's texts uncleaned, for measures that count every character: of a text file its whole, of a row its text.

    Raises `DataError`.
    """
    for _, paragraphs in _open_source(source, READERS | WHOLE):
        yield "\n".join(paragraphs)


Raw = Iterable[tuple[str, Iterable[str]]]
"""(name of the source, paragraphs of a document) of every document."""
Readers = dict[str, Callable[[Path], Iterator[Iterable[str]]]]
"""Ending of a file's name -> the paragraphs of its documents."""


def _open_source(source: str, readers: Readers) -> Raw:
    if source == EMBEDDED:
        return ((EMBEDDED, paragraphs) for paragraphs in embedded_documents())
    if source.startswith(HUGGING_FACE):
        return ((source, text.split("\n")) for text in _hugging_face(source))
    return _files(Path(source), readers)


def _files(path: Path, readers: Readers) -> Raw:
    """Documents of a file, or of every readable file below a folder, named by the folder they lie in."""
    if not path.exists():
        raise DataError(
            f"source {path}: no such file or folder. Give a text file, a folder, `hf:NAME` or `{EMBEDDED}`."
        )
    files = sorted(p for p in path.rglob("*") if _reader(p, readers) and p.is_file()) if path.is_dir() else [path]
    if not files or not _reader(files[0], readers):
        raise DataError(f"source {path}: no text in it. Known kinds: {', '.join(READERS)}.")
    above = path.resolve().parent
    for file in files:
        name = (file if file == path else file.parent).resolve().relative_to(above).as_posix()
        for paragraphs in _read(file, readers):
            yield name, paragraphs


def _read(file: Path, readers: Readers) -> Iterator[Iterable[str]]:
    reader = _reader(file, readers)
    assert reader is not None
    try:
        yield from reader(file)
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"source {file}: cannot be read ({error}). Expected UTF-8 text, gzip or parquet.") from error


def _lines(file: Path) -> Iterator[str]:
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as raw:
        yield from io.TextIOWrapper(raw, encoding="utf-8")


def _read_text(file: Path) -> Iterator[Iterable[str]]:
    """A `= Title =` line starts an article; a file without any is one document."""
    article: list[str] = []
    size = 0
    for line in _lines(file):
        line = line.strip()
        if TITLE.match(line) or size > LONGEST_DOCUMENT:
            yield article
            article, size = [], 0
        article.append(line.strip("= ") if TITLE.match(line) else line)
        size += len(line)
    yield article


def _read_whole(file: Path) -> Iterator[Iterable[str]]:
    yield "".join(_lines(file)).split("\n")


def _read_json_lines(file: Path) -> Iterator[Iterable[str]]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            yield _text_of(_parsed(line), f"{file}, line {number}").split("\n")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line


def _read_parquet(file: Path) -> Iterator[Iterable[str]]:
    from pyarrow import parquet  # slow to import, and rarely needed

    table = parquet.ParquetFile(file)
    if "text" not in table.schema_arrow.names:
        raise DataError(f"source {file}: columns are {table.schema_arrow.names}, expected one called 'text'.")
    for batch in table.iter_batches(batch_size=1024, columns=["text"]):
        yield from ((text or "").split("\n") for text in batch.column(0).to_pylist())


READERS: Readers = {
    ".txt": _read_text,
    ".txt.gz": _read_text,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".parquet": _read_parquet,
}
WHOLE: Readers = {".txt": _read_whole, ".txt.gz": _read_whole}


def _reader(file: Path, readers: Readers) -> Callable[[Path], Iterator[Iterable[str]]] | None:
    return next((reader for ending, reader in readers.items() if file.name.endswith(ending)), None)


def _hugging_face(source: str) -> Iterator[str]:
    """Texts of `hf:NAME[:config[:split]]`, streamed; split `train` by default."""
    from datasets import load_dataset  # slow to import, and rarely needed

    name, config, split, *_ = [*source.removeprefix(HUGGING_FACE).split(":"), "", ""]
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # network, names and formats fail in many ways, all the user's to mend
        raise DataError(f"source {source}: cannot be opened ({error}). Expected hf:NAME[:config[:split]].") from error
    for number, row in enumerate(rows):
        yield _text_of(row, f"{source}, row {number}")


def _text_of(row: Any, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"source {where}: found {found}, expected an object with a string under 'text'.")
    return row["text"]


def clean(paragraph: str) -> str:
    """One paragraph in Unicode NFC, its white space single, its control and format characters gone."""
    composed = unicodedata.normalize("NFC", paragraph)
    if not composed.isprintable():
        composed = "".join(c for c in composed if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join(composed.split())
