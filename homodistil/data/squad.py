"""SQuAD 1.1 and 2.0: questions with their paragraphs and answers, and the windows of tokens that a model reads.

A window is `[CLS] question [SEP] part of the paragraph [SEP]`, as far as the tokenizer has such tokens; a paragraph
that is too long becomes several, which overlap (Devlin et al. 2019, section 4.2). Turning logits into answers, and
scoring them, is evaluation/squad.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from homodistil.data.encoded import Encoded, encode, gather, has_types
from homodistil.data.glue import Split, load_hub
from homodistil.errors import ConfigError, DataError, first_fault
from homodistil.tasks import Task

# N windows, T tokens of a window

LONGEST_QUESTION = 64
"""Tokens of a question at most, as in BERT's own run_squad; what is longer is cut."""
OUTSIDE = -1
"""Character position of tokens that are not the paragraph's."""
HUB = {"squad": "rajpurkar/squad", "squad2": "rajpurkar/squad_v2"}
FILES: dict[str, str] = {"train": "train*.json", "validation": "dev*.json"}


class Answer(BaseModel):
    text: str
    answer_start: int
    """Character of the paragraph at which it begins."""


class Question(BaseModel):
    id: str
    question: str
    answers: list[Answer]
    """Several people's; none where the paragraph has no answer (SQuAD 2.0)."""
    is_impossible: bool = False
    context: str = ""
    """Its paragraph."""


class Paragraph(BaseModel):
    context: str
    qas: list[Question]


class Article(BaseModel):
    paragraphs: list[Paragraph]


class SquadFile(BaseModel):
    data: list[Article]


def read_squad(task: Task, path: Path | None, split: Split) -> list[Question]:
    """A split's questions, in order.

    path: folder with one train*.json and one dev*.json, or such a file; None reads the Hugging Face dataset. Raises
    `DataError` for files and keys that are missing, for answers that are not where they are said to be, and, of
    SQuAD 1.1, for questions without one.
    """
    if path is None:
        where, questions = HUB[task.name], _of_hub(task, split)
    else:
        file = path if path.is_file() else _only_file(path, FILES[split])
        where, questions = str(file), _of_file(file)
    if not questions:
        raise DataError(f"{where}: no questions in it, expected at least one.")
    for question in questions:
        _check(task, question, where)
    return questions


def _only_file(folder: Path, pattern: str) -> Path:
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        found = ", ".join(file.name for file in files or sorted(folder.glob("*.json"))) or "none"
        raise DataError(
            f"task.path = {folder}: expected exactly one file {pattern}; JSON files found: {found}. "
            "Give a folder with one of each split; to evaluate, or the file itself."
        )
    return files[0]


def _of_file(file: Path) -> list[Question]:
    try:
        articles = SquadFile.model_validate_json(file.read_bytes()).data
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error}).") from error
    except ValidationError as error:
        raise DataError(f"{file}: {first_fault(error)}. Expected SQuAD's own JSON; copy the file again.") from None
    paragraphs = (paragraph for article in articles for paragraph in article.paragraphs)
    return [q.model_copy(update={"context": paragraph.context}) for paragraph in paragraphs for q in paragraph.qas]


def _of_hub(task: Task, split: Split) -> list[Question]:
    questions = []
    for row in load_hub(HUB[task.name], None, split):
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        answers = [Answer(text=text, answer_start=start) for text, start in pairs]
        questions.append(Question(id=row["id"], question=row["question"], answers=answers, context=row["context"]))
    return questions


def _check(task: Task, question: Question, where: str) -> None:
    if task.name == "squad" and not question.answers:
        raise DataError(f"{where}: question {question.id} has no answer. For SQuAD 2.0, set task.name to squad2.")
    if question.is_impossible and question.answers:
        raise DataError(f"{where}: question {question.id} is_impossible, yet has answers; expected one or the other.")
    for answer in question.answers:
        found = question.context[answer.answer_start :][: len(answer.text)]
        if found != answer.text or not answer.text.strip():
            raise DataError(
                f"{where}: question {question.id}: the answer is '{answer.text}', but at its answer_start "
                f"{answer.answer_start} the context has '{found}'. Copy the file again."
            )


@dataclass(frozen=True)
class Windows:
    """N windows of some questions, in order; labels are the first answer's (first token, last token), or twice the
    [CLS] token where the window does not hold the whole of it."""

    encoded: Encoded
    questions: list[Question]
    question: NDArray[np.int64]
    """(N,): whose window it is."""
    characters: NDArray[np.int32]
    """(tokens, 2): where each of `encoded.ids` begins and ends in its paragraph; `OUTSIDE` for all other tokens."""
    null: NDArray[np.int64]
    """(N,): the token that stands for no answer."""

    def of_paragraph(self, numbers: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
        """(B, width): which tokens of these windows, padded, an answer can be made of."""
        real_BT = np.arange(width) < self.encoded.lengths[numbers][:, None]
        places_BT = self.encoded.bounds[numbers][:, None] + np.arange(width)
        real_BT[real_BT] = self.characters[places_BT[real_BT], 0] != OUTSIDE
        return real_BT


def windows(tokenizer: Any, questions: list[Question], max_length: int, stride: int) -> Windows:
    """Of at most `max_length` tokens, neighbours sharing `stride` of them. Raises `ConfigError` where that leaves a
    question's windows no room to move."""
    asked = _cut(tokenizer, [question.question.strip() for question in questions])
    room = max_length - max(length for _, length in asked) - tokenizer.num_special_tokens_to_add(pair=True)
    if stride >= room:
        raise ConfigError(
            f"task.stride = {stride} is too long for task.max_length = {max_length}: the longest question leaves "
            f"{max(room, 0)} tokens for the paragraph, of which two windows are to share {stride}. Raise "
            f"task.max_length to {max_length + stride - room + 1} or more, or lower task.stride."
        )
    settings = {"truncation": "only_second", "max_length": max_length, "stride": stride}
    texts = [text for text, _ in asked], [question.context for question in questions]
    owners, characters, nulls = [], [], []

    def labelled() -> Iterator[tuple[Any, tuple[int, int]]]:
        for owner, encoding in encode(tokenizer, *texts, return_overflowing_tokens=True, **settings):
            owners.append(owner)
            characters.append(_characters(encoding))
            nulls.append(_null(encoding.ids, tokenizer.cls_token_id))
            yield encoding, _span(questions[owner], characters[-1], nulls[-1])

    encoded = gather(labelled(), np.int64, has_types(tokenizer))
    return Windows(encoded, questions, np.array(owners), np.concatenate(characters), np.array(nulls))


def _cut(tokenizer: Any, texts: Sequence[str]) -> list[tuple[str, int]]:
    """Each text's first `LONGEST_QUESTION` tokens, as text, and how many they are."""
    cut = []
    for number, encoding in encode(tokenizer, texts, add_special_tokens=False):
        length, text = len(encoding.ids), texts[number]
        if length > LONGEST_QUESTION:
            length, text = LONGEST_QUESTION, text[: encoding.offsets[LONGEST_QUESTION - 1][1]]
        cut.append((text, length))
    return cut


def _characters(encoding: Any) -> NDArray[np.int32]:
    """(T, 2): `OUTSIDE` but for the paragraph's tokens."""
    of_paragraph_T = np.array([segment == 1 for segment in encoding.sequence_ids])
    return np.where(of_paragraph_T[:, None], np.array(encoding.offsets, dtype=np.int32), np.int32(OUTSIDE))


def _null(ids: Sequence[int], cls_token_id: int | None) -> int:
    """The token that stands for no answer: [CLS], or the first one where a tokenizer has none."""
    return ids.index(cls_token_id) if cls_token_id in ids else 0


def _span(question: Question, characters: NDArray[np.int32], null: int) -> tuple[int, int]:
    """First and last token of the first answer if the window holds it whole, else the null token twice."""
    inside = np.flatnonzero(characters[:, 0] != OUTSIDE)
    if not question.answers or not len(inside):
        return null, null
    answer = question.answers[0]
    start = answer.answer_start + len(answer.text) - len(answer.text.lstrip())
    end = answer.answer_start + len(answer.text.rstrip())
    begins, ends = characters[inside].T
    if start < begins[0] or end > ends[-1]:
        return null, null
    return int(inside[np.argmax(ends > start)]), int(inside[np.flatnonzero(begins < end)[-1]])
