"""SQuAD's answers against a loop over every candidate span, and its scores against values worked out by hand."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from homodistil.data.encoded import Encoded
from homodistil.data.squad import OUTSIDE, Answer, Question, Windows, read_squad
from homodistil.evaluation.squad import Spans, answers, best_spans, normalised, squad_metrics
from homodistil.tasks import TASKS

REAL = Path(__file__).parents[4] / "shared" / "data" / "squad"


def asked(*golds: str, context: str = "") -> Question:
    return Question(id="q", question="?", answers=[Answer(text=g, answer_start=0) for g in golds], context=context)


def made_up(draw: np.random.Generator, questions: int, words: int = 90) -> tuple[Windows, list[NDArray[np.float64]]]:
    """Windows of 4 asked tokens and up to 44 of a paragraph with overlaps, and (T, 2) logits of each."""
    texts = [" ".join(f"q{q}word{i}" for i in range(draw.integers(3, words))) for q in range(questions)]
    owners, characters, bounds, logits = [], [], [0], []
    for owner, text in enumerate(texts):
        starts = np.cumsum([0] + [len(word) + 1 for word in text.split()])
        spans = np.stack([starts[:-1], starts[1:] - 1], axis=1)
        for first in range(0, len(spans), 30):
            part = spans[first : first + 44]
            owners.append(owner)
            characters.append(np.concatenate([np.full((4, 2), OUTSIDE), part, np.full((1, 2), OUTSIDE)]))
            bounds.append(bounds[-1] + len(characters[-1]))
            logits.append(draw.integers(-6, 7, (len(characters[-1]), 2)) * 0.5)  # many ties
            logits[-1][0] += 4 * (owner % 2)
    empty = np.zeros(bounds[-1])
    labels = np.zeros((len(owners), 2), dtype=np.int64)
    encoded = Encoded(empty.astype(np.int32), empty.astype(np.uint8), np.array(bounds), labels)
    questions_ = [asked(context=text) for text in texts]
    places = np.concatenate(characters).astype(np.int32)
    return Windows(encoded, questions_, np.array(owners), places, np.zeros(len(owners), dtype=np.int64)), logits


def by_loops(windows: Windows, logits: list[NDArray[np.float64]], may_be_null: bool) -> list[str]:
    """What the official BERT script does, a span at a time."""
    found = []
    for owner, question in enumerate(windows.questions):
        best, text, null = -math.inf, "", math.inf
        for number in np.flatnonzero(windows.question == owner):
            bound, (starts, ends) = windows.encoded.bounds[number], logits[number].T.tolist()
            null = min(null, starts[0] + ends[0])
            tokens = range(len(starts))
            for first in sorted(tokens, key=lambda token: -starts[token])[:20]:
                for last in sorted(tokens, key=lambda token: -ends[token])[:20]:
                    inside = all(windows.characters[bound + token, 0] != OUTSIDE for token in (first, last))
                    if inside and first <= last < first + 30 and starts[first] + ends[last] > best:
                        best = starts[first] + ends[last]
                        begin, end = windows.characters[bound + first, 0], windows.characters[bound + last, 1]
                        text = question.context[begin:end]
        found.append("" if may_be_null and null - best > 0 else text)
    return found


def in_batches(windows: Windows, logits: list[NDArray[np.float64]], size: int) -> Spans:
    """Spans of padded batches of windows, the longest first, put back in order."""
    order = np.argsort([-len(one) for one in logits], kind="stable")
    parts = []
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        width = max(len(logits[number]) for number in numbers)
        padded = np.full((len(numbers), width, 2), -np.inf)
        for row, number in enumerate(numbers):
            padded[row, : len(logits[number])] = logits[number]
        allowed = windows.of_paragraph(numbers, width)
        parts.append(best_spans(padded[..., 0], padded[..., 1], allowed, windows.null[numbers]))
    return Spans.together(parts, order)


@pytest.mark.parametrize("may_be_null", [False, True])
def test_answers_are_those_of_a_loop_over_all_candidates(may_be_null: bool) -> None:
    windows, logits = made_up(np.random.default_rng(3), questions=60)
    assert len(logits) > 100
    expected = by_loops(windows, logits, may_be_null)
    assert answers(windows, in_batches(windows, logits, 7), may_be_null) == expected
    assert ("" in expected) == may_be_null
    assert len(set(expected)) > 30


def test_a_question_whose_candidates_make_no_span_gets_no_answer() -> None:
    windows, logits = made_up(np.random.default_rng(0), questions=1, words=4)
    flat = np.zeros_like(logits[0])
    flat[4:-1, 0] = np.arange(len(flat) - 5)  # the last token starts, the first one ends, and few candidates are left
    allowed = np.zeros((1, len(flat)), dtype=np.bool_)
    spans = best_spans(flat[None, :, 0], flat[None, :, 1], allowed, windows.null)
    assert np.isneginf(spans.score).all()
    assert answers(windows, spans, may_be_null=False) == [""]


def test_no_answer_wins_only_with_a_higher_score() -> None:
    windows, logits = made_up(np.random.default_rng(1), questions=1, words=10)
    flat = np.full_like(logits[0], -9.0)
    flat[5] = [1.0, 2.0]
    text = windows.questions[0].context.split()[1]
    for null, expected in ((2.99, text), (3.0, text), (3.01, "")):
        flat[0] = [null, 0.0]
        assert answers(windows, in_batches(windows, [flat], 1), may_be_null=True) == [expected]
        assert answers(windows, in_batches(windows, [flat], 1), may_be_null=False) == [text]


def test_answers_keep_the_paragraphs_own_characters() -> None:
    context = "In  1876,\tthe CAFÉ Müller opened"
    words = ["In", "1876,", "the", "CAFÉ", "Müller", "opened"]
    places = [[context.index(word), context.index(word) + len(word)] for word in words]
    one = np.zeros(6)
    encoded = Encoded(one.astype(np.int32), one.astype(np.uint8), np.array([0, 6]), np.zeros((1, 2), dtype=np.int64))
    windows = Windows(encoded, [asked(context=context)], np.array([0]), np.array(places, dtype=np.int32), np.array([0]))
    spans = Spans(first=np.array([1]), last=np.array([4]), score=np.array([1.0]), null=np.array([0.0]))
    assert answers(windows, spans, may_be_null=False) == ["1876,\tthe CAFÉ Müller"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat's  (an) hat!", "cats hat"),
        ("theatre at a sea-side", "theatre at seaside"),
        ("  A\tthe an ", ""),
        ("24\u201310", "24\u201310"),  # a dash that ASCII lacks is no punctuation to the official script
    ],
)
def test_normalisation_is_the_official_one(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_f1_and_exact_match_take_the_best_gold_answer() -> None:
    scores = squad_metrics(["the red brick house"], [asked("a house", "red house of brick", "barn")])
    # red brick house / red house of brick: 3 words common, of 3 and of 4
    assert scores == {"f1": pytest.approx(100 * 2 * 3 / (3 + 4)), "exact_match": 0.0}
    assert list(scores) == list(TASKS["squad"].metrics)
    assert squad_metrics(["The Barn!"], [asked("a house", "barn")]) == {"f1": 100.0, "exact_match": 100.0}


def test_repeated_words_count_as_often_as_both_have_them() -> None:
    scores = squad_metrics(["ha ha ha"], [asked("ha ha ho ho")])
    assert scores["f1"] == pytest.approx(100 * 2 * 2 / (3 + 4))


def test_a_question_without_answers_wants_an_empty_prediction() -> None:
    assert squad_metrics(["", "x", ""], [asked(), asked(), asked("x")]) == {
        "f1": pytest.approx(100 / 3),
        "exact_match": pytest.approx(100 / 3),
    }


def test_scores_are_means_over_questions() -> None:
    questions = [asked("x y"), asked("x y"), asked("x y"), asked("x y")]
    scores = squad_metrics(["x y", "x", "z", "z"], questions)
    assert scores == {"f1": pytest.approx(100 * (1 + 2 / 3) / 4), "exact_match": 25.0}


@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared with real SQuAD files")
def test_gold_answers_score_100_on_the_real_dev_set_in_seconds() -> None:
    questions = read_squad(TASKS["squad"], REAL, "validation")
    assert len(questions) == 10570
    started = time.perf_counter()
    for choice in (0, -1):  # three questions have '.' among their answers, which leaves nothing to compare
        golds = [[a.text for a in question.answers if a.text != "."][choice] for question in questions]
        assert squad_metrics(golds, questions) == {"f1": pytest.approx(100), "exact_match": 100}
    assert time.perf_counter() - started < 20
    others = [question.answers[0].text for question in questions[1:] + questions[:1]]
    assert squad_metrics(others, questions)["exact_match"] < 5
