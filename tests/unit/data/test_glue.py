"""GLUE's nine layouts, the Hugging Face rows, and what is refused of them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from homodistil.data.glue import Split, read_glue
from homodistil.errors import DataError
from homodistil.tasks import TASKS
from tests.unit.data.small_tasks import GLUE, HEADERS, ROWS, write_glue

REAL = Path(__file__).parents[4] / "shared" / "data" / "glue"
ONE_SENTENCE = ("cola", "sst2")


@pytest.mark.parametrize("name", GLUE)
def test_every_official_layout_gives_texts_and_labels(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    label = task.classes[-1] if task.classes else "4.2"
    row = ROWS[name].format(a='He said "no', b="Then, she said 'yes'", label=label)
    for file in ("train.tsv", "dev_mismatched.tsv" if name == "mnli" else "dev.tsv"):
        text = "\n".join([HEADERS[name], row, row] if HEADERS[name] else [row, row])
        (tmp_path / file).write_text(text, encoding="utf-8")
    splits: tuple[Split, ...] = ("train", "validation_mismatched" if name == "mnli" else "validation")
    for split in splits:
        first, second = read_glue(task, tmp_path, split)
        assert (first.number, second.number) == (0, 1)
        assert first.text == second.text == 'He said "no'
        assert first.pair == (None if name in ONE_SENTENCE else "Then, she said 'yes'")
        assert first.label == (task.classes.index(label) if task.classes else 4.2)


def test_mnli_reads_another_file_for_each_validation_set(tmp_path: Path) -> None:
    write_glue(tmp_path, "mnli")
    matched = (tmp_path / "dev_matched.tsv").read_text().splitlines()[1].split("\t")[8]
    mismatched = (tmp_path / "dev_mismatched.tsv").read_text().splitlines()[1].split("\t")[8]
    assert read_glue(TASKS["mnli"], tmp_path, "validation")[0].text == matched
    assert read_glue(TASKS["mnli"], tmp_path, "validation_mismatched")[0].text == mismatched != matched


def test_the_other_mrpc_a_byte_order_mark_windows_line_ends_and_odd_separators_are_read(tmp_path: Path) -> None:
    lines = ["label\tid1\tid2\tsentence1\tsentence2", "1\t1\t2\tone \u2028 line\tanother \x85 line", ""]
    (tmp_path / "dev.tsv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    (example,) = read_glue(TASKS["mrpc"], tmp_path, "validation")
    assert (example.text, example.pair, example.label) == ("one \u2028 line", "another \x85 line", 1)


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("sst2", "sentence\tlabel\nfine\t1\nbad\t2\n", r"dev\.tsv, line 3: label is '2', expected one of: 0, 1"),
        ("rte", HEADERS["rte"] + "\n0\ta\tb\tmaybe\n", r"line 2: label is 'maybe'.*entailment, not_entailment"),
        ("stsb", HEADERS["stsb"] + "\n" + ROWS["stsb"].format(a="a", b="b", label="5.1"), r"line 2.*'5\.1'.*0 to 5"),
        ("stsb", HEADERS["stsb"] + "\n" + ROWS["stsb"].format(a="a", b="b", label="x"), r"line 2: score is 'x'"),
        ("sst2", "text\tlabel\nfine\t1\n", r"no column 'sentence' for task sst2; found: text, label"),
        ("mrpc", "label\tfirst\n", r"no column '#1 String' or 'sentence1', '#2 String' or 'sentence2' for task mrpc"),
        ("wnli", HEADERS["wnli"] + "\n0\tone\ttwo\t1\n1\ttorn\n", r"line 3: 2 field\(s\), expected 4 \(index, sent"),
        ("cola", "gj04\t1\t\n", r"line 1: 3 field\(s\), expected 4"),
        ("sst2", "", r"no column 'sentence', 'label'.*found: nothing"),
        ("sst2", "sentence\tlabel\n", r"validation split holds no examples"),
    ],
)
def test_a_bad_file_is_refused_by_place_and_value(name: str, text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=named):
        read_glue(TASKS[name], tmp_path, "validation")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(DataError, match=r"dev\.tsv: cannot be read.*UTF-8"):
        read_glue(TASKS["sst2"], tmp_path, "validation")


def test_a_missing_file_is_refused_with_the_names_that_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").touch()
    with pytest.raises(DataError, match=r"dev_matched\.tsv: no such file.*train\.tsv, dev_matched.*there: dev\.tsv"):
        read_glue(TASKS["mnli"], tmp_path, "validation")


def test_qqps_torn_questions_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torn = f"{HEADERS['qqp']}\n1\t1\t2\ta b\tc\t1\n2\t3\t4\thalf of\nit\td\t0\n3\t5\t6\te\tf\t0\n"
    (tmp_path / "train.tsv").write_text(torn, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        examples = read_glue(TASKS["qqp"], tmp_path, "train")
    assert [(e.number, e.text) for e in examples] == [(0, "a b"), (1, "e")]
    assert "2 lines with too few fields" in caplog.text


class Rows(list):  # type: ignore[type-arg]
    """As far as a Hugging Face dataset is looked at."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])


def test_the_hugging_face_dataset_is_read_by_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str, split: str) -> Rows:
        asked.append((name, config, split))
        return Rows([{"premise": "p", "hypothesis": "h", "label": 2, "idx": 0}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (example,) = read_glue(TASKS["mnli"], None, "validation")
    assert (example.text, example.pair, example.label) == ("p", "h", 2)
    read_glue(TASKS["mnli"], None, "validation_mismatched")
    read_glue(TASKS["mnli"], None, "train")
    assert [split for *_, split in asked] == ["validation_matched", "validation_mismatched", "train"]
    assert {(name, config) for name, config, _ in asked} == {("nyu-mll/glue", "mnli")}


def test_without_a_network_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str, split: str) -> Rows:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"nyu-mll/glue, train: cannot be had.*no route.*set task\.path"):
        read_glue(TASKS["cola"], None, "train")


@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared with real GLUE files")
@pytest.mark.parametrize(
    ("name", "folder", "train", "validation"),
    [
        ("mrpc", "MRPC", 3668, 408),
        ("cola", "CoLA", 8551, 1043),
        ("rte", "RTE", 2490, 277),
        ("sst2", "SST-2", 67349, 872),
    ],
)
def test_real_files_have_the_published_numbers_of_examples(name: str, folder: str, train: int, validation: int) -> None:
    assert len(read_glue(TASKS[name], REAL / folder, "train")) == train
    assert len(read_glue(TASKS[name], REAL / folder, "validation")) == validation
