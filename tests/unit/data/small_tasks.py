"""Benchmarks' files in miniature, in each task's official layout, of words that tests/fixtures.py's tokenizer knows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from homodistil.tasks import TASKS
from tests.fixtures import FIRST_WORD, VOCABULARY

HEADERS = {
    "cola": "",
    "sst2": "sentence\tlabel",
    "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label"
    ),
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
    "wnli": "index\tsentence1\tsentence2\tlabel",
}
ROWS = {
    "cola": "gj04\t{label}\t*\t{a}",
    "sst2": "{a}\t{label}",
    "mrpc": "{label}\t11\t22\t{a}\t{b}",
    "stsb": "7\tnews\tfile\t2012\t3\tx\ty\t{a}\t{b}\t{label}",
    "qqp": "7\t1\t2\t{a}\t{b}\t{label}",
    "mnli": "7\tp\tq\tfiction\t( x )\t( y )\t(R x)\t(R y)\t{a}\t{b}\twrong\t{label}",
    "qnli": "7\t{a}\t{b}\t{label}",
    "rte": "7\t{a}\t{b}\t{label}",
    "wnli": "7\t{a}\t{b}\t{label}",
}
GLUE = sorted(HEADERS)


def words(draw: random.Random, low: int = 1, high: int = 14) -> str:
    return " ".join(f"w{draw.randrange(FIRST_WORD, VOCABULARY)}" for _ in range(draw.randint(low, high)))


def write_glue(folder: Path, name: str, train: int = 26, validation: int = 11) -> Path:
    """Files of one GLUE task: random words, every label there."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(name)
    labels = TASKS[name].classes or ("0.0", "2.5", "5.0", "1.25")

    def write(file: str, count: int) -> None:
        rows = [
            ROWS[name].format(a=words(draw), b=words(draw), label=labels[number % len(labels)])
            for number in range(count)
        ]
        header = [HEADERS[name]] if HEADERS[name] else []
        (folder / file).write_text("\n".join(header + rows) + "\n", encoding="utf-8")

    write("train.tsv", train)
    for file in ("dev_matched.tsv", "dev_mismatched.tsv") if name == "mnli" else ("dev.tsv",):
        write(file, validation)
    return folder


def question(number: int, context: str, first: int | None, count: int = 2) -> dict[str, Any]:
    """Asked of a paragraph of words; the answer is `count` of them from the `first` one on, or there is none."""
    answers = []
    if first is not None:
        starts = [i for i, c in enumerate(context) if i == 0 or context[i - 1] == " "]
        text = " ".join(context.split(" ")[first : first + count])
        answers = [{"text": text, "answer_start": starts[first]}]
    return {"id": f"q{number}", "question": f"w{10 + number} w20 w21", "answers": answers, "is_impossible": not answers}


def write_squad(folder: Path, impossible: bool, paragraphs: int = 4, length: int = 40) -> Path:
    """train.json and dev.json: two questions a paragraph of `length` words, of which one has no answer if `impossible`
    ones there are to be."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(5)
    for file in ("train-v0.json", "dev-v0.json"):
        entries = []
        for number in range(paragraphs):
            context = words(draw, length, length)
            second = None if impossible else draw.randrange(length - 2)
            qas = [question(2 * number, context, draw.randrange(length - 2)), question(2 * number + 1, context, second)]
            entries.append({"context": context, "qas": qas})
        articles = [{"title": "one", "paragraphs": entries[:1]}, {"title": "two", "paragraphs": entries[1:]}]
        (folder / file).write_text(json.dumps({"version": "0", "data": articles}), encoding="utf-8")
    return folder
