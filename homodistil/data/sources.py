"""Text sources: whatever the user names, as parts that can be read side by side, each a stream of cleaned documents.

A source is a file (.txt, .jsonl, either with .gz, or .parquet), a folder of those, `hf:NAME[:config[:split]]`, a corpus
by its name (NAMED), or `embedded` (embedded.py). Files stream line by line; nothing holds a corpus in memory. What the
parts are depends on the sources alone, never on who reads them.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from homodistil.data.embedded import embedded_documents
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
TITLE = re.compile(r"= (?!= ).+ =$")
LONGEST_DOCUMENT = 1_000_000
"""Characters; a text file that is longer goes on as another document, so that memory stays bounded."""
PART_BYTES = 64 << 20
"""A .jsonl or .parquet file that is larger is read in parts of about this size."""


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

    @property
    def version(self) -> tuple[int, int] | None:
        """Size and time of a file's last change: whether it is still what was read."""
        found = self.file.stat() if self.file else None
        return (found.st_size, found.st_mtime_ns) if found else None


Paragraphs = Iterable[str]
Reader = Callable[[Path], Iterator[Paragraphs]]
Readers = dict[str, Reader]
"""Ending of a file's name -> the paragraphs of its documents."""


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
        found = _read(part.file, WHOLE) if whole and part.file else _paragraphs(part)
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
    files = sorted(p for p in path.rglob("*") if _reader(p, READERS) and p.is_file()) if path.is_dir() else [path]
    if not files or not _reader(files[0], READERS):
        raise DataError(f"source {path}: no text in it. Known kinds: {', '.join(READERS)}.")
    above = path.resolve().parent
    for file in files:
        name = (file if file == path else file.parent).resolve().relative_to(above).as_posix()
        yield from (Part(source, name, file, *bounds) for bounds in _bounds(file))


def _bounds(file: Path) -> Iterator[tuple[int, int | None]]:
    """Where the parts of a file begin and end."""
    size = file.stat().st_size
    if size > PART_BYTES and file.suffix == ".jsonl":
        yield from ((start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES))
    elif size > PART_BYTES and file.suffix == ".parquet":
        yield from _row_groups(file)
    else:
        yield 0, None


def _row_groups(file: Path) -> Iterator[tuple[int, int]]:
    groups = _table(file).metadata
    start = bytes_so_far = 0
    for group in range(groups.num_row_groups):
        bytes_so_far += groups.row_group(group).total_byte_size
        if bytes_so_far >= PART_BYTES or group == groups.num_row_groups - 1:
            yield start, group + 1
            start, bytes_so_far = group + 1, 0


def _shards(source: str, name: str, rows_of_a_document: int = 1) -> Iterator[Part]:
    count = _dataset(source).num_shards
    for shard in range(count):
        yield Part(source, name, None, shard, count, rows_of_a_document)


def _paragraphs(part: Part) -> Iterator[Paragraphs]:
    if part.source == EMBEDDED:
        return embedded_documents()
    if part.file is None:
        return _rows(part)
    if part.stop is None:
        return _read(part.file, READERS)
    read_range = _json_lines if part.file.suffix == ".jsonl" else _parquet
    return _read(part.file, {part.file.suffix: lambda file: read_range(file, part.start, part.stop)})


def _read(file: Path, readers: Readers) -> Iterator[Paragraphs]:
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


def _json_lines(file: Path, start: int = 0, stop: int | None = None) -> Iterator[Paragraphs]:
    """Of the lines that begin at bytes from `start` to `stop`; the whole file's, compressed or not, without."""
    if stop is None:
        numbered = ((f"line {number}", line) for number, line in enumerate(_lines(file), start=1))
    else:
        numbered = ((f"byte {place}", line) for place, line in _lines_within(file, start, stop))
    for where, line in numbered:
        if line.strip():
            yield _text_of(_parsed(line), f"{file}, {where}").split("\n")


def _lines_within(file: Path, start: int, stop: int) -> Iterator[tuple[int, str]]:
    with file.open("rb") as raw:
        if start:  # the line that the byte before belongs to is another part's
            raw.seek(start - 1)
            raw.readline()
        while (place := raw.tell()) < stop and (line := raw.readline()):
            yield place, line.decode("utf-8")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line


def _parquet(file: Path, start: int = 0, stop: int | None = None) -> Iterator[Paragraphs]:
    table = _table(file)
    if "text" not in table.schema_arrow.names:
        raise DataError(f"source {file}: columns are {table.schema_arrow.names}, expected one called 'text'.")
    groups = list(range(table.num_row_groups))[start:stop]
    for batch in table.iter_batches(batch_size=1024, columns=["text"], row_groups=groups):
        yield from ((text or "").split("\n") for text in batch.column(0).to_pylist())


def _table(file: Path) -> Any:
    from pyarrow import parquet  # slow to import, and rarely needed

    return parquet.ParquetFile(file)


READERS: Readers = {
    ".txt": _read_text,
    ".txt.gz": _read_text,
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".parquet": _parquet,
}
WHOLE: Readers = {".txt": _read_whole, ".txt.gz": _read_whole}


def _reader(file: Path, readers: Readers) -> Reader | None:
    return next((reader for ending, reader in readers.items() if file.name.endswith(ending)), None)


def _rows(part: Part) -> Iterator[Paragraphs]:
    """Documents of one shard of a dataset, streamed."""
    rows = _dataset(part.source).shard(num_shards=part.stop, index=part.start)
    texts = (_text_of(row, f"{part.source}, shard {part.start}, row {number}") for number, row in enumerate(rows))
    while joined := list(islice(texts, part.rows_of_a_document)):
        yield "\n".join(joined).split("\n")


def _dataset(source: str) -> Any:
    """`hf:NAME[:config[:split]]`, to be streamed; split `train` by default."""
    from datasets import load_dataset  # slow to import, and rarely needed

    name, config, split, *_ = [*source.removeprefix(HUGGING_FACE).split(":"), "", ""]
    try:
        return load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # network, names and formats fail in many ways, all the user's to mend
        raise DataError(f"source {source}: cannot be opened ({error}). Expected hf:NAME[:config[:split]].") from error


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
