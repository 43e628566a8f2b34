"""Scores of a Hugging Face directory and of the unigram guess, against sums taken one position at a time in numpy."""

from __future__ import annotations

import json
import math
import tarfile
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from homodistil.config import DataConfig
from homodistil.data.stream import Stream
from homodistil.errors import ModelError
from homodistil.evaluation.language_modeling import evaluate_mlm, token_frequencies, unigram
from homodistil.ranks import Ranks
from tests.fixtures import FIRST_WORD, VOCABULARY, SilentRanks, batch, save_bert, save_shards
from tests.pool import RankPool

ALONE = SilentRanks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    save_shards(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("model") / "bert")


def test_scores_are_those_of_each_unpadded_sequence_alone(shards: Path, model: Path) -> None:
    scores = evaluate_mlm(model, shards, sequences=7, micro_batch=3)

    stock = AutoModelForMaskedLM.from_pretrained(model, dtype=torch.float32).eval()
    stream = Stream(DataConfig(shards=shards, lanes=4, global_batch=8), seed=5, ranks=ALONE)
    (rows,) = stream.validation(7, 100)
    losses, hits = [], []
    for row in range(7):
        length = int(rows.attention_mask[row].sum())
        with torch.no_grad():
            logits = stock(rows.input_ids[row : row + 1, :length]).logits[0].double().numpy()
        for position, label, weight in zip(
            rows.scored_positions[row].tolist(), rows.labels[row].tolist(), rows.weights[row].tolist(), strict=True
        ):
            if weight:
                z = logits[position]
                losses.append(math.log(np.exp(z - z.max()).sum()) + z.max() - z[label])
                hits.append(int(z.argmax()) == label)
    assert len(losses) > 15
    assert scores["mlm_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert scores["mlm_accuracy"] == pytest.approx(np.mean(hits))
    assert scores["tokens_per_second"] > 0


def test_scores_do_not_depend_on_the_micro_batch(shards: Path, model: Path) -> None:
    one, all_at_once = (evaluate_mlm(model, shards, sequences=7, micro_batch=size) for size in (1, 7))
    assert one["mlm_loss"] == pytest.approx(all_at_once["mlm_loss"], rel=1e-6)


def test_token_frequencies_are_counted_from_the_training_tars_alone(shards: Path) -> None:
    counts: Counter[int] = Counter()
    for path in shards.glob("train-*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                counts.update(np.load(BytesIO(file.read())).ravel().tolist())
    words = {token: count for token, count in counts.items() if token >= FIRST_WORD}
    expected = np.array([words.get(token, 0) + 1 for token in range(VOCABULARY)]) / (sum(words.values()) + VOCABULARY)
    np.testing.assert_allclose(token_frequencies(shards), expected, rtol=1e-12)


def test_the_unigram_guess_is_scored_at_weighted_slots_only(shards: Path) -> None:
    batches = [batch(seed=1), batch(seed=2)]
    frequency = token_frequencies(shards).numpy()
    slots = [
        (label, weight)
        for one in batches
        for label, weight in zip(one.labels.flatten().tolist(), one.weights.flatten().tolist(), strict=True)
    ]
    scored = [label for label, weight in slots if weight]
    assert 0 < len(scored) < len(slots)
    guess = unigram(shards, batches, ALONE)
    assert guess["mlm_loss"] == pytest.approx(np.mean([-math.log(frequency[label]) for label in scored]))
    assert guess["mlm_accuracy"] == pytest.approx(np.mean([label == frequency.argmax() for label in scored]))


def guess_by_rank(shards: Path) -> dict[str, float]:
    return unigram(shards, [batch(seed=1 + Ranks.current().rank)], Ranks.current())


def test_the_guess_is_that_of_all_ranks_text(shards: Path, pool: Callable[[int], RankPool]) -> None:
    alone = unigram(shards, [batch(seed=1), batch(seed=2)], ALONE)
    assert pool(2).run(guess_by_rank, shards) == [pytest.approx(alone)] * 2


def test_a_guess_from_the_text_beats_an_untrained_model(shards: Path, model: Path) -> None:
    stream = Stream(DataConfig(shards=shards, lanes=4, global_batch=8), seed=0, ranks=ALONE)
    held_out = stream.validation(12, 4)
    assert unigram(shards, held_out, ALONE)["mlm_loss"] < evaluate_mlm(model, shards, 12, 4)["mlm_loss"] - 0.3


def test_a_directory_without_its_head_is_refused_by_name(shards: Path, model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if not name.startswith("cls.")},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=r"cls\.predictions\.transform\.dense\.weight.*missing"):
        evaluate_mlm(tmp_path, shards, 7, 7)


def test_another_vocabulary_is_refused_with_both_sizes(shards: Path, tmp_path: Path) -> None:
    small = save_bert(tmp_path / "small", vocab_size=500)
    with pytest.raises(ModelError, match=r"vocab_size is 500.*997.*--tokenizer"):
        evaluate_mlm(small, shards, 7, 7)


def test_a_folder_that_is_no_model_is_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ModelError, match="no masked language model"):
        evaluate_mlm(tmp_path, shards, 7, 7)
