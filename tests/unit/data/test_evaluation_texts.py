"""Evaluation texts: every passage of 13 words of a benchmark's files is found, however the file wraps it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from homodistil.data.evaluation_texts import evaluation_texts
from homodistil.errors import DataError

PASSAGE = "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("quoted.csv", f'label,text\n1,"{PASSAGE}"\n'),
        ("dev.tsv", f'label\ttext\n1\t{PASSAGE}\n1\t"an open quote\n'),
        ("dev.tsv", f"1\t{'long ' * 50_000}\n1\t{PASSAGE}\n"),
        ("dev.json", json.dumps({"data": [{"context": PASSAGE}]})),
        ("dev.jsonl", json.dumps({"text": PASSAGE}) + "\n\n" + json.dumps("a\u2028b", ensure_ascii=False) + "\n"),
        ("wrapped.txt", "before\n\n" + PASSAGE.replace(" ", "\n") + "\n\nafter"),
    ],
)
def test_a_passage_is_whole(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    ((found, passages),) = evaluation_texts([tmp_path / name])
    assert found == name and PASSAGE in [" ".join(passage.split()) for passage in passages]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("long.csv", b'"' + b"x" * 200_000),
        ("flipped.txt.gz", gzip.compress(bytes(range(256)) * 99)[:40] + bytes(99)),
        ("latin.txt", b"caf\xe9"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        list(evaluation_texts([tmp_path / name]))
