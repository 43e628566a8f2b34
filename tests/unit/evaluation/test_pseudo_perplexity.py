"""Pseudo-perplexity against a plain loop: one sequence, one masked token at a time (Salazar et al. 2020)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM

from homodistil.data.shards import ShardIndex, read_shard
from homodistil.errors import DataError, ModelError
from homodistil.evaluation.pseudo_perplexity import evaluate_pseudo_perplexity
from tests.fixtures import CLS, MASK, PAD, SEP, save_bert, save_shards
from tests.unit.evaluation.tiny_gpt2 import save_gpt2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("model") / "bert")


def twin(model: Path, sequences: list[list[int]]) -> tuple[float, int]:
    """Mean log-probability of a token, and how many were asked for."""
    plain, values = BertForMaskedLM.from_pretrained(model).eval(), []
    for ids in sequences:
        for place in (n for n, token in enumerate(ids) if token not in (CLS, SEP)):
            hidden = [*ids[:place], MASK, *ids[place + 1 :]]
            with torch.no_grad():
                logits = plain(torch.tensor([hidden])).logits[0, place]
            values.append(float(logits.log_softmax(0)[ids[place]]))
    return float(np.mean(values)), len(values)


def test_held_out_sequences_are_scored_as_one_by_one(model: Path, tmp_path: Path) -> None:
    save_shards(tmp_path / "shards", sequences=4, tokens=10)
    index = ShardIndex.load(tmp_path / "shards")
    rows = read_shard(tmp_path / "shards", index, index.splits["validation"][0]).tolist()
    mean, count = twin(model, [[token for token in row if token != PAD] for row in rows])
    found = evaluate_pseudo_perplexity(model, tmp_path / "shards", None, 128, 7)
    assert found["pseudo_log_likelihood"] == pytest.approx(mean, rel=1e-5)
    assert found["pseudo_perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert (found["tokens"], found["sequences"]) == (count, 4)


def test_lines_of_a_text_are_sequences(model: Path, tmp_path: Path) -> None:
    lines = ["w17 w40 w9", "", "w300 w6 w7 w8"]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)
    mean, count = twin(model, [tokenizer(line)["input_ids"] for line in lines if line])
    found = evaluate_pseudo_perplexity(model, None, str(tmp_path / "text.txt"), 128, 32)
    assert found["pseudo_log_likelihood"] == pytest.approx(mean, rel=1e-5)
    assert (found["tokens"], found["sequences"]) == (count, 2)
    fewer = evaluate_pseudo_perplexity(model, None, str(tmp_path / "text.txt"), 1, 32)
    assert fewer["sequences"] == 1


def test_a_causal_model_and_shards_for_one_are_refused(model: Path, tmp_path: Path) -> None:
    save_shards(tmp_path / "shards", sequences=4, tokens=10)
    with pytest.raises(ModelError, match="masked language model"):
        evaluate_pseudo_perplexity(save_gpt2(tmp_path / "gpt2"), tmp_path / "shards", None, 4, 4)
    index = ShardIndex.load(tmp_path / "shards")
    index.task, index.special_tokens.eos = "clm", SEP
    index.save(tmp_path / "shards")
    with pytest.raises(DataError, match="built for clm"):
        evaluate_pseudo_perplexity(model, tmp_path / "shards", None, 4, 4)
