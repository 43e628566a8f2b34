"""Scores of Hugging Face directories on small benchmarks, against each example run alone, unpadded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from homodistil.config import TaskConfig
from homodistil.errors import ModelError
from homodistil.evaluation.tasks import TaskResult, evaluate_task, save_predictions
from homodistil.tasks import TASKS
from tests.fixtures import bert_config, save_bert, save_tokenizer
from tests.unit.data.small_tasks import write_glue, write_squad

MAX_LENGTH = 24


def save_task_model(directory: Path, name: str, **changes: Any) -> Path:
    """The awkward BERT with a task's head, random weights far from zero, and its tokenizer."""
    task = TASKS[name]
    labels = dict(enumerate(task.classes or ("score",)))
    torch.manual_seed(1)
    if task.kind == "span":
        model: Any = BertForQuestionAnswering(bert_config(**changes))
    else:
        settings = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}, **changes}
        model = BertForSequenceClassification(bert_config(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def by_row(model: Path, kind: Any, texts: list[list[str]]) -> torch.Tensor:
    """(N, V) logits of each example alone."""
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), kind.from_pretrained(model).eval()
    with torch.no_grad():
        rows = [
            loaded(**tokenizer(*row, return_tensors="pt", truncation=True, max_length=MAX_LENGTH)).logits
            for row in texts
        ]
    return torch.cat(rows)


def columns(file: Path, *places: int) -> list[list[str]]:
    return [[line.split("\t")[place] for place in places] for line in file.read_text().splitlines()[1:]]


def test_a_classifiers_scores_are_those_of_each_example_alone(tmp_path: Path) -> None:
    files = write_glue(tmp_path / "rte", "rte", validation=23)
    model = save_task_model(tmp_path / "model", "rte")
    result = evaluate_task(model, TaskConfig(name="rte", path=files, max_length=MAX_LENGTH), micro_batch=4)

    logits = by_row(model, BertForSequenceClassification, columns(files / "dev.tsv", 1, 2))
    names = [row[0] for row in columns(files / "dev.tsv", 3)]
    labels = torch.tensor([TASKS["rte"].classes.index(name) for name in names])
    hits = logits.argmax(dim=1) == labels
    assert 0 < hits.sum() < 23
    assert result.metrics == {"accuracy": pytest.approx(float(hits.double().mean()))}
    assert result.loss == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-5)
    assert result.examples == 23 and result.examples_per_second > 0
    assert isinstance(result.predictions, list)
    for number, row in enumerate(result.predictions):
        assert (row["split"], row["number"], row["label"]) == ("validation", number, names[number])
        assert row["prediction"] == TASKS["rte"].classes[int(logits[number].argmax())]
        assert row["logits"] == pytest.approx(logits[number].tolist(), abs=1e-4)


def test_a_regressors_scores_are_correlations_and_squared_error(tmp_path: Path) -> None:
    files = write_glue(tmp_path / "stsb", "stsb", validation=15)
    model = save_task_model(tmp_path / "model", "stsb")
    result = evaluate_task(model, TaskConfig(name="stsb", path=files, max_length=MAX_LENGTH), micro_batch=4)
    found = by_row(model, BertForSequenceClassification, columns(files / "dev.tsv", 7, 8))[:, 0].double().numpy()
    labels = np.array([float(row[0]) for row in columns(files / "dev.tsv", 9)])
    assert list(result.metrics) == ["spearman", "pearson"]
    assert result.metrics["pearson"] == pytest.approx(np.corrcoef(found, labels)[0, 1], rel=1e-4)
    assert result.loss == pytest.approx(float(((found - labels) ** 2).mean()), rel=1e-4)


def test_mnli_is_scored_on_both_of_its_validation_sets(tmp_path: Path) -> None:
    files = write_glue(tmp_path / "mnli", "mnli", validation=12)
    model = save_task_model(tmp_path / "model", "mnli")
    result = evaluate_task(model, TaskConfig(name="mnli", path=files, max_length=MAX_LENGTH), micro_batch=5)
    expected = {}
    for metric, file in (("accuracy", "dev_matched.tsv"), ("accuracy_mismatched", "dev_mismatched.tsv")):
        found = by_row(model, BertForSequenceClassification, columns(files / file, 8, 9)).argmax(dim=1)
        labels = [TASKS["mnli"].classes.index(row[0]) for row in columns(files / file, 11)]
        expected[metric] = pytest.approx(float(np.mean(found.numpy() == np.array(labels))))
    assert result.metrics == expected
    assert list(result.metrics) == list(TASKS["mnli"].metrics)
    assert result.examples == 24
    splits = [row["split"] for row in result.predictions if isinstance(row, dict)]
    assert splits == ["validation"] * 12 + ["validation_mismatched"] * 12


@pytest.mark.parametrize("name", ["squad", "squad2"])
def test_a_span_models_answers_are_the_best_spans_of_windows_run_alone(name: str, tmp_path: Path) -> None:
    files = write_squad(tmp_path / "squad", impossible=name == "squad2")
    model = save_task_model(tmp_path / "model", name)
    config = TaskConfig(name=name, path=files, max_length=MAX_LENGTH, stride=6)  # type: ignore[arg-type]
    result = evaluate_task(model, config, micro_batch=5)

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = BertForQuestionAnswering.from_pretrained(model).eval()
    articles = json.loads((files / "dev-v0.json").read_text())["data"]
    expected = {}
    for paragraph in [p for article in articles for p in article["paragraphs"]]:
        for qa in paragraph["qas"]:
            best, null = (-np.inf, ""), np.inf
            context = paragraph["context"].split()
            room = MAX_LENGTH - 3 - len(qa["question"].split())
            for first in range(0, len(context) - 6, room - 6):
                part = context[first : first + room]
                with torch.no_grad():
                    out = loaded(**tokenizer(qa["question"], " ".join(part), return_tensors="pt"))
                start, end = out.start_logits[0].tolist(), out.end_logits[0].tolist()
                null = min(null, start[0] + end[0])
                offset = 2 + len(qa["question"].split())
                allowed = [sorted(range(len(logits)), key=lambda i: -logits[i])[:20] for logits in (start, end)]
                for i in range(len(part)):
                    for j in range(i, len(part)):
                        score = start[offset + i] + end[offset + j]
                        if offset + i in allowed[0] and offset + j in allowed[1] and score > best[0]:
                            best = score, " ".join(part[i : j + 1])
            expected[qa["id"]] = "" if name == "squad2" and null > best[0] else best[1]
    assert result.predictions == expected
    assert len(set(expected.values())) > 4
    assert list(result.metrics) == ["f1", "exact_match"]
    assert result.examples == len(expected) == 8
    assert 0 < result.loss < 20


@pytest.mark.parametrize("name", ["sst2", "squad2"])
def test_scores_do_not_depend_on_the_micro_batch(name: str, tmp_path: Path) -> None:
    files = tmp_path / "files"
    write_squad(files, impossible=True) if name == "squad2" else write_glue(files, name)
    model = save_task_model(tmp_path / "model", name)
    config = TaskConfig(name=name, path=files, max_length=MAX_LENGTH, stride=6)  # type: ignore[arg-type]
    one, many = (evaluate_task(model, config, size) for size in (1, 100))
    assert one.metrics == many.metrics
    assert one.loss == pytest.approx(many.loss, rel=1e-5)


def test_a_causal_classifier_is_read_at_its_last_token(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: n for n, letter in enumerate([*letters, "<|endoftext|>"])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = ["input_ids", "attention_mask"]
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", model_input_names=names)
    made.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=24, n_layer=2, n_head=2, num_labels=2)
    config.eos_token_id = config.bos_token_id = 256
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    files = write_glue(tmp_path / "sst2", "sst2", validation=13)
    result = evaluate_task(tmp_path / "model", TaskConfig(name="sst2", path=files, max_length=MAX_LENGTH), 4)
    logits = by_row(tmp_path / "model", GPT2ForSequenceClassification, columns(files / "dev.tsv", 0))
    assert isinstance(result.predictions, list)
    for number, row in enumerate(result.predictions):
        assert row["logits"] == pytest.approx(logits[number].tolist(), abs=1e-5)


def test_predictions_are_saved_as_json_lines_or_as_squads_own_json(tmp_path: Path) -> None:
    rows = [{"split": "validation", "number": 0, "prediction": "1", "label": "0", "logits": [0.25, 0.5]}]
    save_predictions(TaskResult({}, 0.0, 1, 1.0, rows), tmp_path / "glue.jsonl")
    assert [json.loads(line) for line in (tmp_path / "glue.jsonl").read_text().splitlines()] == rows
    save_predictions(TaskResult({}, 0.0, 2, 1.0, {"a": "Café", "b": ""}), tmp_path / "squad.json")
    assert json.loads((tmp_path / "squad.json").read_text(encoding="utf-8")) == {"a": "Café", "b": ""}


@pytest.fixture(scope="module")
def cola(tmp_path_factory: pytest.TempPathFactory) -> TaskConfig:
    return TaskConfig(name="cola", path=write_glue(tmp_path_factory.mktemp("cola"), "cola"), max_length=MAX_LENGTH)


def test_a_directory_without_its_head_is_refused_by_name(tmp_path: Path, cola: TaskConfig) -> None:
    with pytest.raises(ModelError, match=r"classifier\.weight missing.*trained on cola, saved with its classifier's"):
        evaluate_task(save_bert(tmp_path / "model"), cola, 4)


def test_another_number_of_labels_is_refused(tmp_path: Path, cola: TaskConfig) -> None:
    with pytest.raises(ModelError, match="num_labels is 3, but task cola has 2"):
        evaluate_task(save_task_model(tmp_path / "model", "mnli"), cola, 4)


def test_labels_in_another_order_are_refused_with_both_orders(tmp_path: Path) -> None:
    files = write_glue(tmp_path / "mnli", "mnli")
    other = {0: "CONTRADICTION", 1: "ENTAILMENT", 2: "NEUTRAL"}
    model = save_task_model(tmp_path / "model", "mnli", id2label=other, label2id={v: k for k, v in other.items()})
    with pytest.raises(ModelError, match=r"order contradiction, entailment, neutral, .*entailment, neutral, contra"):
        evaluate_task(model, TaskConfig(name="mnli", path=files, max_length=MAX_LENGTH), 4)


def test_a_tokenizer_with_more_words_than_the_model_is_refused(tmp_path: Path, cola: TaskConfig) -> None:
    with pytest.raises(ModelError, match=r"vocab_size is 500.*has 997 tokens"):
        evaluate_task(save_task_model(tmp_path / "model", "cola", vocab_size=500), cola, 4)


def test_examples_longer_than_the_models_positions_are_refused(tmp_path: Path, cola: TaskConfig) -> None:
    model = save_task_model(tmp_path / "model", "cola", max_position_embeddings=8)
    with pytest.raises(ModelError, match=r"8 positions, but there are examples of \d+ tokens.*max_length to 8"):
        evaluate_task(model, cola, 4)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, cola: TaskConfig) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ModelError, match="no model for task cola"):
        evaluate_task(tmp_path, cola, 4)
