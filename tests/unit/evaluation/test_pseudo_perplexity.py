"""Pseudo-perplexity against a plain loop: each token of each sequence masked in a forward pass of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM, BertTokenizer, RobertaConfig, RobertaForMaskedLM

from homodistil.data.shards import ShardIndex, read_shard
from homodistil.errors import DataError, ModelError
from homodistil.evaluation.pseudo_perplexity import evaluate_pseudo_perplexity
from homodistil.evaluation.scoring import logits_at
from tests.fixtures import CLS, MASK, PAD, SEP, UNK, bert, save_bert, save_shards
from tests.unit.evaluation.tiny_gpt2 import save_gpt2

LINES = ["w9 w10 w11", "", "w20 w8 unheard w8 w30 w31 w32", "w40"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    save_shards(folder, sequences=4, tokens=12)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "lines.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return str(tmp_path / "lines.txt")


def one_by_one(model: Path, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability of every token but [PAD], [CLS] and [SEP], given all others of its sequence."""
    stock = BertForMaskedLM.from_pretrained(model).eval()
    found = []
    for ids in sequences:
        for place, token in enumerate(ids):
            if token in (CLS, SEP, PAD):
                continue
            hidden = torch.tensor([ids])
            hidden[0, place] = MASK
            with torch.no_grad():
                logits = stock(hidden).logits[0, place].double()
            found.append(float(logits.softmax(0).log()[token]))
    return found


@pytest.mark.parametrize("micro_batch", [1, 5, 64])
def test_of_lines_it_is_that_of_each_token_masked_alone(model: Path, text: str, micro_batch: int) -> None:
    scores = evaluate_pseudo_perplexity(model, source=text, micro_batch=micro_batch)
    encoded = [[CLS, *(int(word[1:]) if word[1:].isdigit() else UNK for word in line.split()), SEP] for line in LINES]
    # The fixture's words are named by their ids.
    expected = one_by_one(model, [ids for ids in encoded if len(ids) > 2])
    assert scores["tokens"] == len(expected) == 3 + 7 + 1
    assert scores["sequences"] == 3
    assert scores["pseudo_log_likelihood"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert scores["pseudo_perplexity"] == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-5)


def test_of_shards_it_is_that_of_the_first_held_out_sequences_without_their_padding(model: Path, shards: Path) -> None:
    index = ShardIndex.load(shards)
    (entry,) = index.splits["validation"]
    rows = [[token for token in row if token != PAD] for row in read_shard(shards, index, entry).tolist()]
    for count in (2, 4):
        scores = evaluate_pseudo_perplexity(model, shards=shards, sequences=count)
        expected = one_by_one(model, rows[:count])
        assert (scores["sequences"], scores["tokens"]) == (count, len(expected))
        assert scores["pseudo_log_likelihood"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert len(rows[3]) < len(rows[0])


def test_a_line_longer_than_the_model_sees_loses_its_end_and_this_is_said(tmp_path: Path) -> None:
    small = save_bert(tmp_path / "bert", max_position_embeddings=6)
    words = [f"w{number}" for number in range(10, 18)]
    (tmp_path / "long.txt").write_text(" ".join(words), encoding="utf-8")
    scores = evaluate_pseudo_perplexity(small, source=str(tmp_path / "long.txt"))
    expected = one_by_one(small, [[CLS, 10, 11, 12, 13, SEP]])
    assert (scores["tokens"], scores["tokens_cut"]) == (4, 4)
    assert scores["pseudo_log_likelihood"] == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_the_head_sees_only_the_positions_that_are_asked_about() -> None:
    model, ids = bert(), torch.randint(5, 997, (3, 10), generator=torch.Generator().manual_seed(0))
    mask, places = torch.ones_like(ids), torch.tensor([[1, 1], [9, 0], [4, 7]])
    seen: list[torch.Size] = []
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with torch.no_grad():
        chosen = logits_at(model, ids, mask, places)
        whole = model(input_ids=ids, attention_mask=mask).logits
    assert seen[0] == chosen.shape == (3, 2, 997)
    for row, place in ((0, 1), (1, 0), (2, 1)):
        torch.testing.assert_close(chosen[row, place], whole[row, places[row, place]])


def test_a_head_that_is_no_module_of_its_own_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = bert(), torch.randint(5, 997, (2, 6), generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[1], [5]])
    with torch.no_grad():
        expected = logits_at(model, ids, torch.ones_like(ids), places)
        monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
        torch.testing.assert_close(logits_at(model, ids, torch.ones_like(ids), places), expected)


def test_robertas_two_positions_that_no_token_has_are_known_from_its_tokenizer(tmp_path: Path) -> None:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"w{number}" for number in range(5, 40))]
    tokenizer = BertTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        unk_token="<unk>", sep_token="</s>", pad_token="<pad>", cls_token="<s>", mask_token="<mask>",
        model_max_length=8,
    )  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    config = RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=10, pad_token_id=1,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    (tmp_path / "long.txt").write_text(" ".join(["w9"] * 12), encoding="utf-8")
    scores = evaluate_pseudo_perplexity(tmp_path, source=str(tmp_path / "long.txt"))
    assert (scores["tokens"], scores["tokens_cut"]) == (6, 6)


def test_a_causal_model_is_refused_with_the_tasks_it_serves(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"found causal language model \(gpt2\)\. Use --task perplexity or lambada"):
        evaluate_pseudo_perplexity(save_gpt2(tmp_path / "gpt2"), source=text)


def test_shards_of_another_vocabulary_or_longer_sequences_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"vocab_size is 500.*997"):
        evaluate_pseudo_perplexity(save_bert(tmp_path / "small", vocab_size=500), shards=shards)
    with pytest.raises(ModelError, match=r"8 positions.*sequences of 12 tokens"):
        evaluate_pseudo_perplexity(save_bert(tmp_path / "short", max_position_embeddings=8), shards=shards)


def test_a_text_without_words_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(DataError, match=r"blank\.txt: no words in it"):
        evaluate_pseudo_perplexity(model, source=str(tmp_path / "blank.txt"))
