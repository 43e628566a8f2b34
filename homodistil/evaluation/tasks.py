"""A benchmark's validation split: any Hugging Face directory with the task's head, run by stock transformers.

Metrics are glue.py's and squad.py's; examples are data/examples.py's, tokenized with the directory's own tokenizer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from transformers import PreTrainedModel

from homodistil.batch import Batch
from homodistil.config import TaskConfig
from homodistil.data.encoded import Integers
from homodistil.data.examples import TaskData
from homodistil.data.glue import Split
from homodistil.errors import ModelError
from homodistil.evaluation.squad import Spans, answers, best_spans, squad_metrics
from homodistil.evaluation.stock import load_whole
from homodistil.files import write_text_durably
from homodistil.models.loading import HEAD_WORDS
from homodistil.progress import progress_bar
from homodistil.tasks import Task

# N examples (of SQuAD windows), B rows of a batch, T tokens, S scored slots, V classes or positions


@dataclass(frozen=True)
class TaskResult:
    """How a model did on a benchmark's validation split."""

    metrics: dict[str, float]
    """In order of `Task.metrics`: shares and correlations; SQuAD's in percent."""
    loss: float
    """Mean over scored slots: cross-entropy in nats, or squared error."""
    examples: int
    """Of SQuAD, questions."""
    examples_per_second: float
    predictions: list[dict[str, Any]] | dict[str, str]
    """GLUE: a row an example. SQuAD: question's id -> answer, as its official script reads them."""


def evaluate_task(model: Path, config: TaskConfig, micro_batch: int, dtype: str = "float32") -> TaskResult:
    """The model in a Hugging Face directory, on a task's validation split; MNLI on both of its two.

    On this process alone, on the GPU if there is one. Raises `ModelError` for a directory that holds no trained model
    of this task, `DataError` for the examples.
    """
    task = config.task
    splits: tuple[Split, ...] = ("validation", "validation_mismatched") if task.name == "mnli" else ("validation",)
    loaded = load_task_model(model, task, dtype)
    data = TaskData.open(config, model, splits)
    _check_fits(model, loaded, data)
    if loaded.config.pad_token_id is None:  # GPT-2 finds an example's last token by it
        loaded.config.pad_token_id = data.pad_token_id
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]  # a decorator hides its signature
    return _span_result(loaded, data, micro_batch) if task.kind == "span" else _glue_result(loaded, data, micro_batch)


def load_task_model(directory: Path, task: Task, dtype: str) -> PreTrainedModel:
    """The model of any architecture in a directory, with its head for `task`, in eval mode. Raises `ModelError` for
    weights that are missing, and for labels that are not the task's or in another order."""
    whose = f"that was trained on {task.name}, saved with its {HEAD_WORDS[task.kind]} head"
    model = load_whole(directory, dtype, task.kind, f"model for task {task.name}", whose)
    if task.kind != "span":
        _check_labels(directory, model, task)
    return model


def _check_labels(directory: Path, model: PreTrainedModel, task: Task) -> None:
    if model.config.num_labels != task.labels:
        raise ModelError(
            f"{directory}: num_labels is {model.config.num_labels}, but task {task.name} has {task.labels}. "
            f"Expected a checkpoint that was trained on {task.name}."
        )
    labels: Any = model.config.id2label
    names = tuple(str(labels[number]).lower() for number in range(task.labels))
    if names != task.classes and sorted(names) == sorted(task.classes):
        raise ModelError(
            f"{directory}: its labels are in the order {', '.join(names)}, those of task {task.name} are "
            f"{', '.join(task.classes)}. Reorder the rows of its last layer, and id2label in config.json."
        )


def _check_fits(directory: Path, model: PreTrainedModel, data: TaskData) -> None:
    if data.vocab_size > model.config.vocab_size:
        raise ModelError(
            f"{directory}: vocab_size is {model.config.vocab_size}, but the tokenizer beside it has {data.vocab_size} "
            "tokens. Copy the tokenizer that the model was trained with."
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max(int(encoded.lengths.max()) for encoded in data.splits.values())
    if positions is not None and positions < longest:
        raise ModelError(
            f"{directory}: {positions} positions, but there are examples of {longest} tokens. "
            f"Set task.max_length to {positions} or less."
        )


@torch.no_grad()
def passes(
    model: PreTrainedModel, data: TaskData, split: Split, micro_batch: int
) -> Iterator[tuple[Integers, Batch, Tensor]]:
    """(numbers, batch, logits_BSV in fp32 on the host) of all examples of a split, the longest first."""
    order = np.argsort(-data.splits[split].lengths, kind="stable")
    typed = getattr(model.config, "type_vocab_size", 0) > 0
    with progress_bar("evaluate", len(order), "example") as bar:
        for start in range(0, len(order), micro_batch):
            numbers = order[start : start + micro_batch]
            batch = data.batch(split, numbers)
            rows = batch.to(model.device)
            types = {"token_type_ids": rows.token_type_ids} if typed else {}
            outputs = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, **types)
            yield numbers, batch, _slots(outputs, batch, data.task)
            bar.update(len(numbers))


def _slots(outputs: Any, batch: Batch, task: Task) -> Tensor:
    """(B, S, V), as all tasks' logits are read; padding of a span is -inf."""
    if task.kind != "span":
        return outputs.logits.float().cpu().unsqueeze(1)
    logits_BST = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float().cpu()
    return logits_BST.masked_fill(batch.attention_mask[:, None] == 0, -torch.inf)


def _loss(logits_BSV: Tensor, labels_BS: Tensor, task: Task) -> float:
    """Sum over the batch's slots."""
    if task.kind == "regression":
        return mse_loss(logits_BSV[..., 0], labels_BS, reduction="sum").item()
    return cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="sum").item()


def _glue_result(model: PreTrainedModel, data: TaskData, micro_batch: int) -> TaskResult:
    from homodistil.evaluation.glue import glue_metrics  # scikit-learn is slow to import, and pre-training needs none

    task, rows, loss = data.task, [], 0.0
    metrics: dict[str, float] = {}
    started = time.perf_counter()
    for split, encoded in data.splits.items():
        logits_NV = np.zeros((len(encoded), task.labels), dtype=np.float32)
        for numbers, batch, logits_BSV in passes(model, data, split, micro_batch):
            logits_NV[numbers] = logits_BSV[:, 0].numpy()
            loss += _loss(logits_BSV, batch.labels, task)
        found = logits_NV[:, 0] if task.kind == "regression" else logits_NV.argmax(axis=1)
        scores = glue_metrics(task, found, encoded.labels[:, 0])
        metrics |= {"accuracy_mismatched": scores["accuracy"]} if split == "validation_mismatched" else scores
        rows += _rows(task, split, found, encoded.labels[:, 0], logits_NV)
    return TaskResult(metrics, loss / len(rows), len(rows), len(rows) / (time.perf_counter() - started), rows)


def _rows(
    task: Task, split: Split, found: NDArray[Any], labels: NDArray[Any], logits: NDArray[np.float32]
) -> list[dict[str, Any]]:
    """A row an example; classes by their names."""

    def named(value: Any) -> Any:
        return task.classes[value] if task.classes else float(value)

    return [
        {"split": split, "number": n, "prediction": named(guess), "label": named(label), "logits": logits[n].tolist()}
        for n, (guess, label) in enumerate(zip(found, labels, strict=True))
    ]


def _span_result(model: PreTrainedModel, data: TaskData, micro_batch: int) -> TaskResult:
    windows = data.windows
    assert windows is not None, "opened with its validation split"
    order, spans, loss = [], [], 0.0
    started = time.perf_counter()
    for numbers, batch, logits_BST in passes(model, data, "validation", micro_batch):
        start_BT, end_BT = logits_BST.double().numpy().swapaxes(0, 1)
        allowed_BT = windows.of_paragraph(numbers, start_BT.shape[1])
        spans.append(best_spans(start_BT, end_BT, allowed_BT, windows.null[numbers]))
        order.append(numbers)
        loss += _loss(logits_BST, batch.labels, data.task)
    seconds = time.perf_counter() - started
    found = answers(windows, Spans.together(spans, np.concatenate(order)), may_be_null=data.task.name == "squad2")
    metrics, questions = squad_metrics(found, windows.questions), len(windows.questions)
    texts = {question.id: text for question, text in zip(windows.questions, found, strict=True)}
    return TaskResult(metrics, loss / windows.encoded.labels.size, questions, questions / seconds, texts)


def save_predictions(result: TaskResult, path: Path) -> None:
    """GLUE: JSON lines of split, number, prediction, label and logits. SQuAD: the official {id: text}, one JSON."""
    if isinstance(result.predictions, dict):
        write_text_durably(path, json.dumps(result.predictions, ensure_ascii=False) + "\n")
    else:
        write_text_durably(path, "".join(json.dumps(row) + "\n" for row in result.predictions))
