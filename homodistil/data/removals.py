"""Removals: what of a corpus was dropped and why, as counts for people and line by line for whoever doubts it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from homodistil.data.choice import Choice, Why
from homodistil.data.reading import Reading

REPORT, LINES = "report.json", "removed.jsonl"
BEGINNING = 16
"""Ids of a removed document that show which it is."""


class SourceReport(BaseModel):
    """Documents of one source."""

    read: int = 0
    empty: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    quote_evaluation_texts: int = 0
    kept: int = 0
    kept_tokens: int = 0


COUNTED = {
    Why.KEPT: "kept",
    Why.EXACT: "exact_duplicates",
    Why.NEAR: "near_duplicates",
    Why.QUOTES: "quote_evaluation_texts",
}


@dataclass(frozen=True)
class Removals:
    """Of a corpus."""

    sources: dict[str, SourceReport]
    removed: list[dict[str, Any]]
    """Of each document: source, its number there, why, what it repeats or quotes, how it begins."""

    @classmethod
    def of(
        cls, reading: Reading, choice: Choice, tokenizer: PreTrainedTokenizerFast, evaluation_texts: list[str]
    ) -> Removals:
        sources: dict[str, SourceReport] = {}
        for request, begin, size, empty in zip(
            reading.requests, reading.begins, reading.documents, reading.empty, strict=True
        ):
            report = sources.setdefault(request.part.name, SourceReport())
            here = slice(begin, begin + size)
            report.read += size + empty
            report.empty += empty
            for why, name in COUNTED.items():
                setattr(report, name, getattr(report, name) + int((choice.why[here] == why).sum()))
            lengths = reading.found.lengths[here][choice.kept[here]]
            report.kept_tokens += int(lengths.sum()) - len(lengths)
        return cls(sources, list(_lines(reading, choice, tokenizer, evaluation_texts)))

    def save(self, folder: Path) -> None:
        report = {name: source.model_dump() for name, source in self.sources.items()}
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in self.removed)
        (folder / LINES).write_text("".join(lines), encoding="utf-8")


def _lines(
    reading: Reading, choice: Choice, tokenizer: PreTrainedTokenizerFast, evaluation_texts: list[str]
) -> Iterator[dict[str, Any]]:
    removed = ~choice.kept
    numbers = np.flatnonzero(removed)
    lengths = iter(reading.found.lengths[numbers].tolist())
    texts = (part[end - length : end] for part, length, end in _documents(reading, removed, lengths))
    for number, ids in zip(numbers.tolist(), texts, strict=True):
        why, of = Why(choice.why[number]), int(choice.of[number])
        yield {
            **_place(reading, number),
            "why": why.name.lower(),
            "of": evaluation_texts[of] if why is Why.QUOTES else _place(reading, of),
            "begins": tokenizer.decode(ids[:BEGINNING].tolist(), skip_special_tokens=True),
        }


def _documents(reading: Reading, removed: Any, lengths: Iterator[int]) -> Iterator[tuple[Any, int, int]]:
    """(ids of a part's removed documents, length of one, where it ends) one after another."""
    for part in reading.ids(removed):
        end = 0
        while end < len(part):
            length = next(lengths)
            end += length
            yield part, length, end


def _place(reading: Reading, number: int) -> dict[str, Any]:
    """Which document that is: its source, and the how manieth of its file or dataset, from 0, empty ones counted."""
    part = int(np.searchsorted(reading.begins, number, side="right")) - 1
    asked = reading.requests[part].part
    place = {"source": asked.name, "document": reading.earlier[part] + int(reading.found.numbers[number])}
    return {**place, "file": asked.file.name} if asked.file else place
