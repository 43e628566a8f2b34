"""GLUE: the nine tasks' examples, from its own files or from its Hugging Face dataset (Wang et al. 2019).

Owns where texts and labels stand in each layout. Tokens are encoded.py's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from homodistil.errors import DataError
from homodistil.tasks import Task

logger = logging.getLogger(__name__)

Split = Literal["train", "validation", "validation_mismatched"]
"""`validation_mismatched`: MNLI's other validation set, of genres that no training example has."""
HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Example:
    """One or two texts and what is true of them."""

    number: int
    """Counted from 0 in its split."""
    text: str
    pair: str | None
    label: float
    """A class's number, or a regression's score."""


@dataclass(frozen=True)
class Columns:
    """Names of what is read: GLUE's files first, then others that are around, then the Hugging Face dataset's."""

    text: tuple[str, ...]
    pair: tuple[str, ...] = ()
    label: tuple[str, ...] = ("label",)


PAIR = Columns(("sentence1",), ("sentence2",))
COLUMNS = {
    "cola": Columns(("sentence",)),
    "sst2": Columns(("sentence",)),
    "mrpc": Columns(("#1 String", "sentence1"), ("#2 String", "sentence2"), ("Quality", "label")),
    "stsb": Columns(("sentence1",), ("sentence2",), ("score", "label")),
    "qqp": Columns(("question1",), ("question2",), ("is_duplicate", "label")),
    "mnli": Columns(("sentence1", "premise"), ("sentence2", "hypothesis"), ("gold_label", "label")),
    "qnli": Columns(("question",), ("sentence",)),
    "rte": PAIR,
    "wnli": PAIR,
}
COLA_HEADER = ["source", "label", "mark", "sentence"]
"""CoLA's files have no header."""
HIGHEST_SCORE = 5.0
"""STS-B's scores are from 0 to 5."""
TORN = ("qqp",)
"""Tasks whose official files hold questions with a line break in them. Their halves are left out, as the Hugging Face
dataset does; in any other file, a line with too few fields is an error."""


def read_glue(task: Task, path: Path | None, split: Split) -> list[Example]:
    """A split's examples, in order.

    path: folder with GLUE's own train.tsv and dev.tsv (MNLI: dev_matched.tsv, dev_mismatched.tsv); None reads the
    Hugging Face dataset. Raises `DataError` for files, columns, lines and labels that are missing or not as expected.
    """
    examples = _of_hub(task, split) if path is None else list(_of_file(task, path / file_name(task, split)))
    if not examples:
        raise DataError(f"{path or HUB}: {task.name}'s {split} split holds no examples, expected at least one.")
    return examples


def file_name(task: Task, split: Split) -> str:
    """What GLUE calls a split's file."""
    if split == "train":
        return "train.tsv"
    if task.name == "mnli":
        return "dev_mismatched.tsv" if split == "validation_mismatched" else "dev_matched.tsv"
    return "dev.tsv"


def check_files(task: Task, path: Path) -> None:
    """All that a run reads is there, at its end too. Raises `DataError`."""
    for name in _file_names(task):
        _check_there(task, path / name)


def _file_names(task: Task) -> list[str]:
    splits: tuple[Split, ...] = ("train", "validation", "validation_mismatched")
    return list(dict.fromkeys(file_name(task, split) for split in splits))


def _check_there(task: Task, file: Path) -> None:
    if not file.is_file():
        found = ", ".join(sorted(p.name for p in file.parent.glob("*.tsv"))) if file.parent.is_dir() else "no folder"
        raise DataError(
            f"{file}: no such file. task.path must be a folder with {task.name}'s {', '.join(_file_names(task))}; "
            f"found there: {found or 'no .tsv files'}."
        )


def _of_file(task: Task, file: Path) -> Iterator[Example]:
    _check_there(task, file)
    lines = _lines(file)
    header = COLA_HEADER if task.name == "cola" else next(lines, (0, []))[1]
    text, pair, label = _places(task, header, str(file))
    number = torn = 0
    for line, fields in lines:
        if len(fields) < len(header):
            torn += 1
            _check_torn(task, f"{file}, line {line}", fields, header)
            continue
        truth = _label(task, fields[label], f"{file}, line {line}")
        yield Example(number, fields[text], None if pair is None else fields[pair], truth)
        number += 1
    if torn:
        logger.warning("%s: %d lines with too few fields left out", file, torn)


def _lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields. A quote is a character like any other, and only \\n ends a line."""
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line := line.rstrip("\r\n"):
                    yield number, line.split("\t")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}). Expected tab-separated UTF-8 text.") from error


def _places(task: Task, header: Sequence[str], where: str) -> tuple[int, int | None, int]:
    """Where text, pair and label stand among the columns."""
    columns = COLUMNS[task.name]
    wanted = [names for names in (columns.text, columns.pair, columns.label) if names]
    places = [next((header.index(name) for name in names if name in header), None) for names in wanted]
    if missing := [" or ".join(map(repr, wanted[i])) for i, place in enumerate(places) if place is None]:
        raise DataError(
            f"{where}: no column {', '.join(missing)} for task {task.name}; found: {', '.join(header) or 'nothing'}. "
            "Check task.name and task.path."
        )
    text, *pair, label = (place for place in places if place is not None)
    return text, pair[0] if pair else None, label


def _check_torn(task: Task, where: str, fields: Sequence[str], header: Sequence[str]) -> None:
    if task.name not in TORN:
        raise DataError(
            f"{where}: {len(fields)} field(s), expected {len(header)} ({', '.join(header)}), with a tab between two. "
            "Copy the file again."
        )


def _label(task: Task, value: str, where: str) -> float:
    if task.kind == "classification":
        if value not in task.classes:
            raise DataError(f"{where}: label is '{value}', expected one of: {', '.join(task.classes)}.")
        return task.classes.index(value)
    try:
        score = float(value)
    except ValueError:
        score = math.nan
    if not 0 <= score <= HIGHEST_SCORE:
        raise DataError(f"{where}: score is '{value}', expected a number from 0 to {HIGHEST_SCORE:g}.")
    return score


def _of_hub(task: Task, split: Split) -> list[Example]:
    rows = load_hub(HUB, task.name, "validation_matched" if (task.name, split) == ("mnli", "validation") else split)
    text, pair, label = _places(task, rows.column_names, f"{HUB} {task.name}")
    names = rows.column_names
    return [
        Example(number, row[names[text]], None if pair is None else row[names[pair]], row[names[label]])
        for number, row in enumerate(rows)
    ]


def load_hub(name: str, config: str | None, split: str) -> Any:
    """A split of a Hugging Face dataset. Raises `DataError`, such as where there is no network."""
    from datasets import load_dataset  # slow to import, and rarely needed

    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # network, names and formats fail in many ways, all the user's to mend
        raise DataError(
            f"Hugging Face dataset {name}, {split}: cannot be had ({type(error).__name__}: {error}). Check the "
            "network, or set task.path to a folder with the benchmark's own files."
        ) from error
