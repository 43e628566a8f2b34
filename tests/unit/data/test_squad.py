"""SQuAD's files and windows, against positions found by hand, and what is refused of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from homodistil.data.squad import OUTSIDE, Question, Windows, read_squad, windows
from homodistil.data.tokenizer import open_tokenizer
from homodistil.errors import ConfigError, DataError
from homodistil.tasks import TASKS
from tests.fixtures import CLS, SEP, save_tokenizer
from tests.unit.data.small_tasks import question, write_squad

REAL = Path(__file__).parents[4] / "shared"
ONE, TWO = TASKS["squad"], TASKS["squad2"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return open_tokenizer(folder)


def asked(context: str, first: int | None, number: int = 0, count: int = 2) -> Question:
    return Question.model_validate({**question(number, context, first, count), "context": context})


def ids(some: Windows, number: int) -> list[int]:
    start, end = some.encoded.bounds[number : number + 2]
    return some.encoded.ids[start:end].tolist()


def test_both_versions_are_read_with_their_paragraphs(tmp_path: Path) -> None:
    write_squad(tmp_path / "one", impossible=False)
    write_squad(tmp_path / "two", impossible=True)
    for task, folder in ((ONE, "one"), (TWO, "two")):
        questions = read_squad(task, tmp_path / folder, "train")
        assert [q.id for q in questions] == [f"q{i}" for i in range(8)]
        for number, q in enumerate(questions):
            assert len(q.context.split()) == 40
            assert q.is_impossible == (not q.answers) == (task is TWO and number % 2 == 1)
    file = tmp_path / "one" / "dev-v0.json"
    assert read_squad(ONE, file, "validation") == read_squad(ONE, tmp_path / "one", "validation")


def test_windows_overlap_by_the_stride_and_cover_every_token(tokenizer: PreTrainedTokenizerFast) -> None:
    context = " ".join(f"w{100 + i}" for i in range(23))
    some = windows(tokenizer, [asked(context, 7)], max_length=16, stride=4)  # 3 asked, 3 special: 10 of the paragraph
    starts = [0, 6, 12, 18]
    assert len(some.encoded) == len(starts)
    for number, start in enumerate(starts):
        part = [100 + i for i in range(start, min(start + 10, 23))]
        assert ids(some, number) == [CLS, 10, 20, 21, SEP, *part, SEP]
        assert some.encoded.types[some.encoded.bounds[number] :][:6].tolist() == [0, 0, 0, 0, 0, 1]


def test_labels_are_the_answers_tokens_or_cls_where_a_window_lacks_it(tokenizer: PreTrainedTokenizerFast) -> None:
    context = " ".join(f"w{100 + i}" for i in range(23))
    for first in range(22):
        some = windows(tokenizer, [asked(context, first)], max_length=16, stride=4)
        for number, start in enumerate([0, 6, 12, 18]):
            inside = start <= first and first + 1 < min(start + 10, 23)
            expected = [5 + first - start, 6 + first - start] if inside else [0, 0]
            assert some.encoded.labels[number].tolist() == expected


def test_a_question_without_an_answer_points_at_cls(tokenizer: PreTrainedTokenizerFast) -> None:
    some = windows(tokenizer, [asked("w100 w101 w102", None)], max_length=16, stride=4)
    assert some.encoded.labels.tolist() == [[0, 0]]


def test_characters_cut_each_token_out_of_its_paragraph(tokenizer: PreTrainedTokenizerFast) -> None:
    contexts = ["w100  w101,\tw102", " ".join(f"w{200 + i}" for i in range(30))]
    some = windows(tokenizer, [asked(contexts[0], None), asked(contexts[1], 3, number=1)], max_length=16, stride=4)
    assert some.question.tolist() == [0] + [1] * (len(some.encoded) - 1)
    for number, owner in enumerate(some.question):
        start = some.encoded.bounds[number]
        for place, token in enumerate(ids(some, number)):
            begin, end = some.characters[start + place]
            assert (begin == OUTSIDE) == (place < 5 or token == SEP)
            if begin != OUTSIDE:
                assert tokenizer.convert_tokens_to_ids(contexts[owner][begin:end]) in (token, 1)  # 1: the comma
        width = 24
        expected = [5 <= place < len(ids(some, number)) - 1 for place in range(width)]
        assert some.of_paragraph(np.array([number]), width)[0].tolist() == expected


def test_long_questions_are_cut_at_64_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    long = asked("w100 w101", 0).model_copy(update={"question": " ".join(f"w{300 + i}" for i in range(90))})
    some = windows(tokenizer, [long], max_length=80, stride=4)
    assert ids(some, 0) == [CLS, *range(300, 364), SEP, 100, 101, SEP]


def test_a_stride_without_room_is_refused_with_the_length_that_has_it(tokenizer: PreTrainedTokenizerFast) -> None:
    one = asked("w100 w101", 0)
    with pytest.raises(ConfigError, match=r"stride = 10 .*max_length = 16.*leaves 10 tokens.*max_length to 17 or"):
        windows(tokenizer, [one], max_length=16, stride=10)
    windows(tokenizer, [one], max_length=17, stride=10)


def squad_file(**changes: Any) -> dict[str, Any]:
    qa = {**question(0, "w100 w101 w102", 1), **changes}
    return {"data": [{"paragraphs": [{"context": "w100 w101 w102", "qas": [qa]}]}]}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", r"dev\.json: file: Invalid JSON.*EOF"),
        ('{"version": "1.1"}', r"dev\.json: data: Field required"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "x", "question": "q"}]}]}]}',
            r"data\.0\.paragraphs\.0\.qas\.0\.answers: Field required",
        ),
        ('{"data": []}', "no questions in it"),
        (json.dumps(squad_file(answers=[])), r"question q0 has no answer.*task\.name to squad2"),
        (json.dumps(squad_file(is_impossible=True)), r"q0 is_impossible, yet has answers"),
        (
            json.dumps(squad_file(answers=[{"text": "w101", "answer_start": 4}])),
            r"question q0: the answer is 'w101', but at its answer_start 4 the context has ' w10'",
        ),
    ],
)
def test_a_bad_file_is_refused_by_key_and_question(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(content)
    with pytest.raises(DataError, match=named):
        read_squad(ONE, tmp_path, "validation")


def test_a_folder_needs_exactly_one_file_of_a_split(tmp_path: Path) -> None:
    write_squad(tmp_path, impossible=False)
    (tmp_path / "train-v9.json").touch()
    with pytest.raises(DataError, match=r"exactly one file train\*\.json; .*found: train-v0\.json, train-v9\.json"):
        read_squad(ONE, tmp_path, "train")
    (tmp_path / "dev-v0.json").rename(tmp_path / "test.json")
    with pytest.raises(DataError, match=r"exactly one file dev\*\.json; .*found: .*test\.json"):
        read_squad(ONE, tmp_path, "validation")


def test_the_hugging_face_dataset_is_read_by_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: None, split: str) -> list[dict[str, Any]]:
        assert (name, config, split) == ("rajpurkar/squad_v2", None, "validation")
        answers = {"text": ["b c"], "answer_start": [2]}
        rows = [{"id": "1", "question": "q", "context": "a b c", "answers": answers}]
        return [*rows, {**rows[0], "id": "2", "answers": {"text": [], "answer_start": []}}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    first, second = read_squad(TWO, None, "validation")
    assert (first.answers[0].text, first.answers[0].answer_start, first.context) == ("b c", 2, "a b c")
    assert not second.answers


@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared with real SQuAD files")
def test_labels_on_real_paragraphs_cut_out_the_answers() -> None:
    questions = read_squad(ONE, REAL / "data" / "squad", "validation")
    assert len(questions) == 10570
    part = questions[::40]
    some = windows(open_tokenizer(REAL / "data/vocab/bert-base-uncased-vocab.txt"), part, 384, 128)
    held = wrong = 0
    answered = set()
    for number, (first, last) in enumerate(some.encoded.labels):
        if first == last == 0:
            continue
        one, start = part[some.question[number]], some.encoded.bounds[number]
        found = one.context[some.characters[start + first, 0] : some.characters[start + last, 1]]
        held += 1
        wrong += found != one.answers[0].text
        answered.add(some.question[number])
    assert len(answered) == len(part)
    assert wrong <= 0.01 * held  # answers that end inside a word have no tokens of their own
