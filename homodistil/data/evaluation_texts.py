"""Evaluation texts: the passages of whatever file a benchmark comes in, to look for them in a corpus.

A table's cells, a JSON file's strings, a text's lines are passages. Shorter ones than the n-grams that are looked for
cannot be found.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from homodistil.errors import DataError

TABLES, LINES, OBJECTS = (".tsv", ".csv"), (".txt", ".jsonl"), (".json",)


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
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")
        if kind in TABLES:
            rows = csv.reader(text.splitlines(), delimiter="\t" if kind == ".tsv" else ",", quoting=csv.QUOTE_NONE)
            return [cell for row in rows for cell in row]
        if kind == ".jsonl":
            return [string for line in text.splitlines() if line for string in _strings(json.loads(line))]
        return list(_strings(json.loads(text))) if kind in OBJECTS else text.splitlines()
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"--decontaminate {file}: cannot be read ({error}). Expected {kind} in UTF-8.") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
