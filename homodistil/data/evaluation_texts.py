"""Evaluation texts: the passages of whatever file a benchmark comes in, to look for them in a corpus.

A table's cells, a JSON file's strings, a text's paragraphs are passages. Ones shorter than the n-grams that are looked
for cannot be found.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from homodistil.errors import DataError

TABLES, LINES, OBJECTS = (".tsv", ".csv"), (".txt", ".jsonl"), (".json",)
PARAGRAPHS = re.compile(r"\n\s*\n")


def evaluation_texts(paths: Iterable[Path]) -> Iterator[tuple[str, list[str]]]:
    """Name and passages of every file, and of every known file below a folder. Raises `DataError`."""
    for path in paths:
        files = sorted(p for p in path.rglob("*") if _kind(p)) if path.is_dir() else [path]
        if not files or not all(file.is_file() and _kind(file) for file in files):
            raise DataError(
                f"--decontaminate {path}: no evaluation text. Give a file, or a folder of them; known kinds: "
                f"{', '.join(TABLES + LINES + OBJECTS)}, each also with .gz."
            )
        above = path.resolve().parent
        yield from ((file.resolve().relative_to(above).as_posix(), _passages(file)) for file in files)


def _kind(file: Path) -> str | None:
    kind = Path(file.name.removesuffix(".gz")).suffix
    return kind if kind in TABLES + LINES + OBJECTS else None


def _passages(file: Path) -> list[str]:
    kind = _kind(file)
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8-sig")
        if kind in TABLES:
            rows = csv.reader(io.StringIO(text, newline="")) if kind == ".csv" else map(_cells, text.split("\n"))
            return [cell for row in rows for cell in row]
        if kind == ".jsonl":
            return [string for line in text.split("\n") if line.strip() for string in _strings(json.loads(line))]
        return list(_strings(json.loads(text))) if kind in OBJECTS else PARAGRAPHS.split(text)
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
        raise DataError(f"--decontaminate {file}: cannot be read ({error}). Expected {kind} in UTF-8.") from error


def _cells(line: str) -> list[str]:
    return line.split("\t")  # GLUE's tables quote nothing


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
