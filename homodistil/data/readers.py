"""Readers: files of text, whole or in parts, as the paragraphs of one document after another.

Files stream line by line; nothing holds one in memory. Leaves what a user names to sources.py.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from homodistil.errors import DataError

TITLE = re.compile(r"= (?!= ).+ =$")
END_OF_TEXT = "<|endoftext|>"
"""A line of text files that were written for GPT-2."""
LONGEST_DOCUMENT = 1_000_000
"""Characters; a text file that is longer goes on as another document, so that memory stays bounded."""
STRINGS = ("string", "large_string", "string_view", "null")
"""A table's types of text."""
PART_BYTES = 64 << 20
"""A .jsonl or .parquet file that is larger is read in parts of about this size."""

Paragraphs = Iterable[str]
Reader = Callable[..., Iterator[Paragraphs]]
Readers = dict[str, Reader]
"""Ending of a file's name -> the paragraphs of its documents."""


def read_file(file: Path, readers: Readers, start: int = 0, stop: int | None = None) -> Iterator[Paragraphs]:
    """A file's documents, or those of one of the parts that `bounds` gives. Raises `DataError`."""
    reader = reader_of(file, readers)
    assert reader is not None
    try:
        yield from reader(file) if stop is None else reader(file, start, stop)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"source {file}: cannot be read ({error}). Expected UTF-8 text, gzip or parquet.") from error


def bounds(file: Path) -> Iterator[tuple[int, int | None]]:
    """Where the parts of a file begin and end: bytes of .jsonl, row groups of .parquet; other files have one part."""
    size = file.stat().st_size
    if size > PART_BYTES and file.suffix == ".jsonl":
        yield from ((start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES))
    elif size > PART_BYTES and file.suffix == ".parquet":
        yield from _row_groups(file)
    else:
        yield 0, None


def _row_groups(file: Path) -> Iterator[tuple[int, int]]:
    try:
        groups = _table(file).metadata
    except (OSError, ValueError) as error:
        raise DataError(f"source {file}: cannot be read ({error}). Expected parquet.") from error
    start = bytes_so_far = 0
    for group in range(groups.num_row_groups):
        bytes_so_far += groups.row_group(group).total_byte_size
        if bytes_so_far >= PART_BYTES or group == groups.num_row_groups - 1:
            yield start, group + 1
            start, bytes_so_far = group + 1, 0


def _lines(file: Path, longest: int = -1) -> Iterator[str]:
    """Of a file, compressed or not; those of more than `longest` characters in pieces."""
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig")
        yield from iter(lambda: text.readline(longest), "")


def _read_text(file: Path) -> Iterator[Iterable[str]]:
    """A `= Title =` line starts an article, and END_OF_TEXT ends one; a file without any is one document."""
    article: list[str] = []
    size = 0
    for line in _lines(file, LONGEST_DOCUMENT):
        line = line.strip()
        if TITLE.match(line) or line == END_OF_TEXT or size > LONGEST_DOCUMENT:
            if any(article):
                yield article
            article, size = [], 0
        if line != END_OF_TEXT:
            article.append(line.strip("= ") if TITLE.match(line) else line)
            size += len(line)
    if any(article):
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
            yield text_of(_parsed(line), f"{file}, {where}").split("\n")


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
    if (kind := str(table.schema_arrow.field("text").type)) not in STRINGS:
        raise DataError(f"source {file}: column 'text' is of {kind}, expected one of {', '.join(STRINGS)}.")
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


def reader_of(file: Path, readers: Readers) -> Reader | None:
    return next((reader for ending, reader in readers.items() if file.name.endswith(ending)), None)


def text_of(row: Any, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"source {where}: found {found}, expected an object with a string under 'text'.")
    return row["text"]
