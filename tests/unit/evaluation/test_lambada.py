"""LAMBADA against one passage and one token at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

from homodistil.errors import ConfigError, DataError, ModelError
from homodistil.evaluation.command import Evaluate, check
from homodistil.evaluation.lambada import evaluate_lambada
from tests.fixtures import save_bert
from tests.unit.evaluation.tiny_gpt2 import POSITIONS, log_probability, save_gpt2

PASSAGES = [
    "A lobster is blue and lives in the sea",
    "The sea is cold",
    "It has a hard shell , which it must shed in order to grow , and then it is blue and it is cold in the sea",
    "only cooking makes a lobster red",
]
REAL = Path(__file__).parents[4] / "shared" / "data" / "lm" / "lambada_test.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("model") / "gpt2")


def rows(path: Path, passages: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages), encoding="utf-8")
    return str(path)


def test_last_words_are_scored_as_token_by_token(model: Path, tmp_path: Path) -> None:
    plain, tokenizer = GPT2LMHeadModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    sums, rights = [], []
    for passage in PASSAGES:
        context = passage[: passage.rindex(" ")]
        ids, start = tokenizer(passage)["input_ids"], len(tokenizer(context)["input_ids"])
        first = max(0, len(ids) - 1 - POSITIONS)  # what the model sees when the last token is to be named
        each = [log_probability(plain, ids[first:end], ids[end]) for end in range(start, len(ids))]
        sums.append(sum(value for value, _ in each))
        rights.append(all(likeliest for _, likeliest in each))
    found = evaluate_lambada(model, rows(tmp_path / "rows.jsonl", PASSAGES), micro_batch=3)
    assert found["last_word_log_probability"] == pytest.approx(sum(sums) / 4, rel=1e-5)
    assert found["last_word_perplexity"] == pytest.approx(math.exp(-sum(sums) / 4), rel=1e-4)
    assert found["lambada_accuracy"] == sum(rights) / 4
    assert (found["examples"], found["cut"]) == (4, 1)


def test_only_the_first_rows_are_read_if_so_asked(model: Path, tmp_path: Path) -> None:
    some, two = rows(tmp_path / "all.jsonl", PASSAGES), rows(tmp_path / "two.jsonl", PASSAGES[:2])
    assert evaluate_lambada(model, some, rows=2) == evaluate_lambada(model, two)


@pytest.mark.parametrize("line", ['{"passage": "no text"}', '{"text": "word"}', '{"text": 3}', "not json"])
def test_a_row_that_is_no_passage_is_named(model: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "The sea is cold"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl, (line|row) 2"):
        evaluate_lambada(model, str(path))


def test_an_empty_file_and_an_encoder_are_refused(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError, match="expected at least one"):
        evaluate_lambada(model, str(empty))
    with pytest.raises(ModelError, match="causal language model"):
        evaluate_lambada(save_bert(tmp_path / "bert"), rows(tmp_path / "rows.jsonl", PASSAGES))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "lambada"}, ["--data.path", "neither"]),
        ({"task": "lambada", "data": {"path": "nowhere.jsonl"}}, ["nowhere.jsonl", "no such file"]),
        ({"task": "perplexity", "data": {"shards": "x"}}, ["--data.shards", "no use for it"]),
        ({"task": "mlm", "data": {"path": "x"}}, ["--data.path", "no use for it"]),
        ({"task": "mlm"}, ["--data.shards", "neither"]),
        ({"task": "mrpc", "sequences": 3}, ["--sequences", "mrpc"]),
    ],
)
def test_flags_that_do_not_go_together_are_refused_before_anything_is_loaded(
    model: Path, options: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(Evaluate.model_validate({"model": model, **options}))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.skipif(not REAL.exists(), reason=f"optional data: there is no {REAL.name} beside the checkout")
def test_real_passages_are_read(model: Path) -> None:
    found = evaluate_lambada(model, str(REAL), rows=6)
    assert found["examples"] == 6 and float(found["last_word_log_probability"]) < 0
