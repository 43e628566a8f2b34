"""Last words against one forward pass a token, one passage at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertLMHeadModel, GPT2LMHeadModel

from homodistil.errors import DataError, ModelError
from homodistil.evaluation.lambada import evaluate_lambada
from tests.fixtures import bert_config, save_bert, save_tokenizer
from tests.unit.evaluation.tiny_gpt2 import POSITIONS, TEXT, log_probability, save_gpt2

LAMBADA = Path(__file__).parents[4] / "shared" / "data" / "lm" / "lambada_test.jsonl"
PASSAGES = [
    "The sea is cold , and the lobster",
    "Only cooking makes it red, said the old man who lives in the sea and has a hard shell to grow",  # too long
    "A\n\nlarge animal",
    "It must shed it in order to grow.  ",
    "The lobster unforeseeably",  # a word of many tokens
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("model") / "gpt2")


def rows(path: Path, passages: Sequence[str]) -> str:
    path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages), encoding="utf-8")
    return str(path)


def one_by_one(model: Path, passages: Sequence[str]) -> tuple[list[float], list[bool], int]:
    """Of each passage: its last word's log-probability, whether every token of it was the likeliest; and how many
    tokens the longest of the words has."""
    stock = GPT2LMHeadModel.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    sums, right, longest = [], [], 0
    for passage in passages:
        words = passage.strip().split(" ")
        context, word = (tokenizer(part)["input_ids"] for part in (" ".join(words[:-1]), " " + words[-1]))
        # Of the longest input, the word but its last token, only the last POSITIONS tokens are seen.
        start = max(0, len(context) + len(word) - 1 - POSITIONS)
        scored = [
            log_probability(stock, [*context, *word[:number]][start:], token) for number, token in enumerate(word)
        ]
        sums.append(math.fsum(value for value, _ in scored))
        right.append(all(likeliest for _, likeliest in scored))
        longest = max(longest, len(word))
    return sums, right, longest


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_figures_are_those_of_each_passage_alone(model: Path, tmp_path: Path, micro_batch: int) -> None:
    scores = evaluate_lambada(model, rows(tmp_path / "rows.jsonl", PASSAGES), micro_batch=micro_batch)
    sums, right, longest = one_by_one(model, PASSAGES)
    assert longest > 3
    assert scores["examples"] == len(PASSAGES)
    assert scores["cut"] == 1
    assert scores["lambada_accuracy"] == pytest.approx(sum(right) / len(right))
    assert scores["last_word_log_probability"] == pytest.approx(sum(sums) / len(sums), rel=1e-5)
    assert scores["last_word_perplexity"] == pytest.approx(math.exp(-sum(sums) / len(sums)), rel=1e-4)


def passage_with(model: Path, wanted: list[bool]) -> str:
    """A passage whose last word has a token for each of `wanted`: whether the model finds it the likeliest."""
    stock = GPT2LMHeadModel.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = TEXT.split()
    begins = [piece for piece in tokenizer.get_vocab().values() if tokenizer.decode([piece])[:1] == " "]
    for number, first in product(range(1, len(words)), begins):
        context = " ".join(words[:number][-6:])
        ids = [*tokenizer(context)["input_ids"], first]
        while len(ids) - len(tokenizer(context)["input_ids"]) < len(wanted):
            with torch.no_grad():
                ids.append(int(stock(torch.tensor([ids])).logits[0, -1].argmax()))
        passage = tokenizer.decode(ids)
        if passage.strip().rpartition(" ")[0] == context and tokenizer(passage)["input_ids"] == ids:
            flags = [log_probability(stock, ids[:end], ids[end])[1] for end in range(len(ids) - len(wanted), len(ids))]
            if flags == wanted:
                return passage
    raise AssertionError("no such passage; give the tiny model another seed")


@pytest.mark.parametrize(("likeliest", "accuracy"), [([True], 1.0), ([False], 0.0), ([False, True], 0.0)])
def test_a_word_is_right_only_if_all_its_tokens_are(
    model: Path, tmp_path: Path, likeliest: list[bool], accuracy: float
) -> None:
    path = rows(tmp_path / "rows.jsonl", [passage_with(model, likeliest)])
    assert evaluate_lambada(model, path)["lambada_accuracy"] == accuracy


def test_only_the_first_rows_are_read(model: Path, tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", PASSAGES)
    scores = evaluate_lambada(model, path, rows=2)
    sums, _, _ = one_by_one(model, PASSAGES[:2])
    assert scores["examples"] == 2
    assert scores["last_word_log_probability"] == pytest.approx(sum(sums) / 2, rel=1e-5)


def test_bfloat16_is_near_float32(model: Path, tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", PASSAGES)
    exact, rounded = (
        float(evaluate_lambada(model, path, dtype=dtype)["last_word_log_probability"])
        for dtype in ("float32", "bfloat16")
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.skipif(not LAMBADA.is_file(), reason="../shared/data/lm/lambada_test.jsonl is not there")
def test_every_passage_of_lambada_has_a_last_word(tmp_path: Path) -> None:
    model = save_gpt2(tmp_path / "gpt2", n_positions=512)
    scores = evaluate_lambada(model, str(LAMBADA), rows=12)
    passages = [json.loads(line)["text"] for line in LAMBADA.read_text(encoding="utf-8").splitlines()]
    assert len(passages) == 5153
    assert all(" " in passage.strip() for passage in passages)
    assert (scores["examples"], scores["cut"]) == (12, 0)


def test_a_row_without_text_is_refused_by_its_number(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "The sea is cold"}\n{"passage": "The sea is cold"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: found \['passage'\].*under 'text'"):
        evaluate_lambada(model, str(path))


def test_a_passage_of_one_word_is_refused_by_its_number(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2: found 'Lobster', expected a passage"):
        evaluate_lambada(model, rows(tmp_path / "rows.jsonl", ["The sea", "Lobster"]))


def test_an_empty_file_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: no rows in it"):
        evaluate_lambada(model, rows(tmp_path / "rows.jsonl", []))


def test_a_word_longer_than_the_model_sees_is_refused(tmp_path: Path) -> None:
    model = save_gpt2(tmp_path / "gpt2", n_positions=4)
    with pytest.raises(DataError, match=r"last word has \d+ tokens, but the model has 4 positions"):
        evaluate_lambada(model, rows(tmp_path / "rows.jsonl", ["The lobster unforeseeably"]))


def test_weights_that_are_not_in_the_directory_are_refused_by_name(tmp_path: Path) -> None:
    model = save_gpt2(tmp_path / "gpt2")
    weights = load_file(model / "model.safetensors")
    lost = next(name for name in weights if name.endswith("h.1.mlp.c_fc.weight"))
    save_file(
        {name: weight for name, weight in weights.items() if name != lost},
        model / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=r"h\.1\.mlp\.c_fc\.weight missing"):
        evaluate_lambada(model, rows(tmp_path / "rows.jsonl", PASSAGES))


def test_an_encoder_is_refused_and_a_decoder_made_of_one_is_not(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", ["w7 w8 w9"])
    with pytest.raises(ModelError, match="expected a causal language model, found masked language model"):
        evaluate_lambada(save_bert(tmp_path / "encoder"), path)
    decoder = tmp_path / "decoder"
    BertLMHeadModel(bert_config(is_decoder=True)).save_pretrained(decoder)
    save_tokenizer(decoder)
    assert evaluate_lambada(decoder, path)["examples"] == 1
