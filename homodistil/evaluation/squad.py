"""SQuAD's answers, read off the logits of windows, and their scores, as the official script of 2.0 has them.

That script scores 1.1 as well. Windows are data/squad.py's.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from homodistil.data.squad import Question, Windows

# B windows of a batch, N all windows, T tokens, n = CANDIDATES, Q questions

CANDIDATES = 20
"""Most likely first tokens, and last ones, of which spans are made (BERT's n_best_size)."""
LONGEST_ANSWER = 30
"""Tokens of an answer at most."""
NULL_THRESHOLD = 0.0
"""SQuAD 2.0: a question has no answer if the null score is higher than the best span's by more than this."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Spans:
    """The best span of each window; shapes (N,)."""

    first: Integers
    last: Integers
    """Tokens of the window."""
    score: Floats
    """Sum of the two logits; -inf where no candidates make a span."""
    null: Floats
    """Sum of the two logits of no answer."""

    @classmethod
    def together(cls, parts: Sequence[Spans], numbers: Integers) -> Spans:
        """Spans of batches whose windows had these `numbers`, in the order of their numbers."""
        order = np.argsort(numbers)
        return cls(*(np.concatenate([vars(part)[name] for part in parts])[order] for name in vars(parts[0])))


def best_spans(start_BT: Floats, end_BT: Floats, allowed_BT: NDArray[np.bool_], null_B: Integers) -> Spans:
    """Each window's span of the highest score: start and end among the `CANDIDATES` highest logits, both on allowed
    tokens, in order, at most `LONGEST_ANSWER` tokens. Logits of padding are -inf. Ties go to the earlier start, then
    to the earlier end, in order of logits, and of tokens where those are equal. null_B: the token of no answer.
    """
    first_Bn1, last_B1n = _candidates(start_BT)[:, :, None], _candidates(end_BT)[:, None, :]
    row_B11 = np.arange(len(start_BT))[:, None, None]
    length_Bnn = last_B1n - first_Bn1 + 1
    valid_Bnn = allowed_BT[row_B11, first_Bn1] & allowed_BT[row_B11, last_B1n]
    valid_Bnn &= (length_Bnn >= 1) & (length_Bnn <= LONGEST_ANSWER)
    scores_Bnn = np.where(valid_Bnn, start_BT[row_B11, first_Bn1] + end_BT[row_B11, last_B1n], -np.inf)
    rows = np.arange(len(start_BT))
    start, end = np.unravel_index(scores_Bnn.reshape(len(rows), -1).argmax(axis=1), scores_Bnn.shape[1:])
    return Spans(
        first=first_Bn1[rows, start, 0],
        last=last_B1n[rows, 0, end],
        score=scores_Bnn[rows, start, end],
        null=start_BT[rows, null_B] + end_BT[rows, null_B],
    )


def _candidates(logits_BT: Floats) -> Integers:
    return np.argsort(-logits_BT, axis=1, kind="stable")[:, :CANDIDATES]


def answers(windows: Windows, spans: Spans, may_be_null: bool) -> list[str]:
    """(Q,): each question's answer, cut from its paragraph; '' for none.

    The best span of its windows, the earliest of equals; with `may_be_null` (SQuAD 2.0) none where the lowest null
    score of its windows exceeds that by more than `NULL_THRESHOLD`.
    """
    order = np.lexsort((-spans.score, windows.question))  # stable: the earlier window of equals stays first
    _, firsts = np.unique(windows.question[order], return_index=True)
    best_Q = order[firsts]
    null_Q = np.minimum.reduceat(spans.null, np.searchsorted(windows.question, np.arange(len(windows.questions))))
    none_Q = np.isneginf(spans.score[best_Q])
    if may_be_null:
        none_Q |= null_Q - spans.score[best_Q] > NULL_THRESHOLD
    offsets_Q = windows.encoded.bounds[best_Q]
    begins_Q = windows.characters[offsets_Q + spans.first[best_Q], 0]
    ends_Q = windows.characters[offsets_Q + spans.last[best_Q], 1]
    return [
        "" if none else question.context[begin:end].strip()
        for question, none, begin, end in zip(windows.questions, none_Q, begins_Q, ends_Q, strict=True)
    ]


def squad_metrics(predictions: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """f1 and exact_match in percent, of one prediction a question: the best over its gold answers, then the mean.

    A question without answers wants an empty prediction; gold answers of punctuation alone do not count.
    Source: Rajpurkar et al. 2016, section 6.1, and 2018.
    """
    f1 = exact = 0.0
    for prediction, question in zip(predictions, questions, strict=True):
        found = normalised(prediction)
        golds = [gold for gold in (normalised(answer.text) for answer in question.answers) if gold] or [""]
        f1 += max(_f1(found, gold) for gold in golds)
        exact += max(float(found == gold) for gold in golds)
    return {"f1": 100 * f1 / len(questions), "exact_match": 100 * exact / len(questions)}


PUNCTUATION: dict[int, Any] = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, white space single."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


def _f1(found: str, gold: str) -> float:
    """Of the bags of words; where one is empty, whether both are."""
    ours, theirs = found.split(), gold.split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))
