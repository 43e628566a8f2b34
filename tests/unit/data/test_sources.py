"""Sources: every kind of file gives the same cleaned documents; what cannot be read is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from homodistil.data.embedded import embedded_documents, prose
from homodistil.data.sources import Document, clean, documents, parts_of, read, verbatim
from homodistil.errors import DataError

FLIPPED = gzip.compress(bytes(range(256)) * 99)
FLIPPED = FLIPPED[:40] + bytes(20) + FLIPPED[60:]
TEXTS = ["One paragraph.\nAnother é.", "A second document."]


def plain(path: Path) -> None:
    path.write_text("\n".join(f"= {i} =\n{text}" for i, text in enumerate(TEXTS)), encoding="utf-8")


def json_lines(path: Path) -> None:
    path.write_text("\n".join(json.dumps({"text": f"{i}\n{text}"}) for i, text in enumerate(TEXTS)), encoding="utf-8")


def table(path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [f"{i}\n{text}" for i, text in enumerate(TEXTS)]}), path)


def compressed(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def write_compressed(path: Path) -> None:
        write(path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_compressed


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.txt", plain),
        ("a.txt.gz", compressed(plain)),
        ("a.jsonl", json_lines),
        ("a.jsonl.gz", compressed(json_lines)),
        ("a.parquet", table),
    ],
)
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    expected = [Document(name, f"{i}\n{text}") for i, text in enumerate(TEXTS)]
    assert list(documents([str(tmp_path / name)])) == expected


def test_a_folder_is_read_in_order_and_counted_by_the_folders_in_it(tmp_path: Path) -> None:
    for folder, name in (("wiki", "b.txt"), ("wiki", "a.txt"), ("books", "c.txt")):
        (tmp_path / "text" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / folder / name).write_text(name)
        (tmp_path / "text" / folder / "notes.md").write_text("not a source")
    found = [(document.source, document.text) for document in documents([str(tmp_path / "text")])]
    assert found == [("text/books", "c.txt"), ("text/wiki", "a.txt"), ("text/wiki", "b.txt")]


def test_verbatim_text_is_a_whole_file_or_a_whole_row_with_nothing_cleaned(tmp_path: Path) -> None:
    texts = [" = Title = \n \n two  spaces\tand a tab \n\n", "no end of line"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert list(verbatim(str(tmp_path / "0.txt"))) == texts[:1]
    assert list(verbatim(str(tmp_path / "rows.jsonl"))) == texts
    assert list(verbatim(str(tmp_path))) == texts + texts


def test_a_hugging_face_dataset_is_streamed_by_name(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    json_lines(tmp_path / "set" / "train.jsonl")
    source = f"hf:{tmp_path / 'set'}"
    assert [document.text for document in documents([source])] == [f"{i}\n{text}" for i, text in enumerate(TEXTS)]


def test_an_endless_file_becomes_several_documents(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(("word " * 20 + "\n") * 25_000)
    found = list(documents([str(tmp_path / "long.txt")]))
    assert len(found) == 3
    assert sum(len(document.text.split()) for document in found) == 25_000 * 20


def test_an_endless_line_becomes_several_documents(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 500_000)
    found = list(documents([str(tmp_path / "long.txt")]))
    assert len(found) > 1 and sum(len(document.text.split()) for document in found) == 500_000


def test_nothing_before_the_first_title_is_no_document_and_end_of_text_ends_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n= One =\ntext\n<|endoftext|>\nsecond\n<|endoftext|>\n")
    (part,) = parts_of([str(tmp_path / "a.txt")])
    assert [document.text for document in read(part)] == ["One\ntext", "second"]


def test_section_headings_do_not_start_documents(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text(" = Title = \n\n text one \n = = Section = = \n text two")
    assert len(list(documents([str(tmp_path / "wiki.txt")]))) == 1


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", "= A =\n\nwords here\n"), ("a.jsonl", '{"text": "words here"}\n')]
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / name).write_text(content, encoding="utf-8")
    marked, plain = (list(documents([str(folder / name)])) for folder in (tmp_path, tmp_path / "plain"))
    assert [one.text for one in marked] == [one.text for one in plain] and plain[0].text.endswith("words here")


def test_text_is_composed_and_its_white_space_single() -> None:
    assert clean("  cafe\u0301\u00a0 noir\t\x00\u200bagain ") == "café noir again"


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("bad.txt", b"caf\xe9 noir", ["bad.txt", "UTF-8"]),
        ("bad.txt.gz", b"not gzip", ["bad.txt.gz", "gzip"]),
        ("cut.txt.gz", gzip.compress(b"text " * 9999, mtime=0)[:-30], ["cut.txt.gz"]),
        ("flipped.txt.gz", FLIPPED, ["flipped.txt.gz", "gzip"]),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": ', ["bad.jsonl, line 2", "'text'"]),
        ("key.jsonl", b'{"txt": "x"}', ["key.jsonl, line 1", "'txt'", "'text'"]),
        ("bad.parquet", b"not parquet", ["bad.parquet"]),
        ("text.docx", b"", ["text.docx", ".jsonl.gz"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, named: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        list(documents([str(tmp_path / name)]))
    assert all(text in str(refused.value) for text in named), refused.value


def test_a_table_without_text_names_its_columns(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="body"):
        list(documents([str(tmp_path / "t.parquet")]))


def test_a_table_whose_text_is_not_text_says_what_it_is(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="'text' is of int64"):
        list(documents([str(tmp_path / "t.parquet")]))


@pytest.mark.parametrize("source", ["nowhere.txt", "hf:/no/such/dataset"])
def test_a_missing_source_is_named(source: str) -> None:
    with pytest.raises(DataError, match=source):
        list(documents([source]))


def test_docstrings_leave_their_prose_and_no_code() -> None:
    docstring = """Return the mean of a list of numbers, in the type of its elements.

    The elements may be of :class:`~decimal.Decimal` or any
    other type that `supports` addition and division.

    >>> mean([1, 2, 3, 4, 4])
    2.8

    .. versionadded:: 3.4

    x : array_like
    :param x: the numbers to take the mean of, of course in any order

        result = mean(x) + foo(y, z=3) - bar[4]
    """
    assert list(prose(docstring)) == [
        "Return the mean of a list of numbers, in the type of its elements.",
        "The elements may be of decimal.Decimal or any other type that supports addition and division.",
    ]


def test_this_installations_documentation_is_prose_that_never_repeats() -> None:
    found = []
    for document in embedded_documents():
        found += document
        if len(found) > 3000:
            break
    assert len(found) == len(set(found)) > 3000
    assert sum(" the " in paragraph for paragraph in found) > 0.4 * len(found)
    assert not any(">>>" in paragraph[:4] for paragraph in found)
