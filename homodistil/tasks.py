"""Tasks: what a model is asked for, and what follows from it: its kind of head, its labels, how it is scored.

Every task reads the same way: a model gives logits (B, S, V) for S scored slots of a sequence, and each slot has a
label. Where the slots are, and what V counts, is the kind's. How examples are read is data/'s.
"""

# B sequences, T tokens, S scored slots

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["masked", "causal", "classification", "regression", "span"]
"""masked: S masked positions, V words. causal: the next word after each of T - 1 positions, V words.
classification: one slot, V classes. regression: one slot, V = 1, labels are floats.
span: two slots, the answer's first and last token, V = T positions."""

LanguageTask = Literal["mlm", "clm"]
"""What text can be cut into shards for: masked or causal language modelling."""

TaskName = Literal[
    "mlm", "clm", "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "squad", "squad2"
]


@dataclass(frozen=True)
class Task:
    """One task; language modelling on shards, or a benchmark's examples."""

    name: TaskName
    kind: Kind
    classes: tuple[str, ...] = ()
    """Label names in order of their numbers, as GLUE's files write them."""
    metrics: tuple[str, ...] = ()
    """What it is scored by, its headline first."""

    @property
    def is_language_modeling(self) -> bool:
        """Trained on shards of text, without labels."""
        return self.kind in ("masked", "causal")

    @property
    def labels(self) -> int:
        """Outputs of a classifier's or regressor's head."""
        return len(self.classes) or 1

    @property
    def prefix(self) -> str:
        """Of the names of its loss and accuracy in a summary."""
        return self.name if self.is_language_modeling else "task"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("mlm", "masked"),
        Task("clm", "causal"),
        Task("cola", "classification", ("0", "1"), ("matthews_correlation",)),
        Task("sst2", "classification", ("0", "1"), ("accuracy",)),
        Task("mrpc", "classification", ("0", "1"), ("accuracy", "f1")),
        Task("stsb", "regression", (), ("spearman", "pearson")),
        Task("qqp", "classification", ("0", "1"), ("accuracy", "f1")),
        Task("mnli", "classification", ("entailment", "neutral", "contradiction"), ("accuracy", "accuracy_mismatched")),
        Task("qnli", "classification", ("entailment", "not_entailment"), ("accuracy",)),
        Task("rte", "classification", ("entailment", "not_entailment"), ("accuracy",)),
        Task("wnli", "classification", ("0", "1"), ("accuracy",)),
        Task("squad", "span", (), ("f1", "exact_match")),
        Task("squad2", "span", (), ("f1", "exact_match")),
    )
}
