"""Who learns what from whom: the task, the teacher, the student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from homodistil.config.section import Section
from homodistil.tasks import TASKS, Task, TaskName


class TaskConfig(Section):
    """What the model is asked for; of a benchmark (GLUE, SQuAD) its examples as well."""

    name: TaskName = "mlm"
    """`mlm` or `clm`: masked or causal language modelling, on `data.shards`. Else a benchmark's task."""
    path: Path | None = None
    """Folder with a benchmark's own files (train.tsv and dev.tsv, or train*.json and dev*.json); by default its
    Hugging Face dataset."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over a benchmark's training examples; `run.updates` follows from it, unless a flag gives that."""
    max_length: int = Field(default=128, ge=8)
    """Tokens of an example at most; what is longer is cut, or, for SQuAD, where it is 384 by default, becomes several
    windows."""
    stride: int = Field(default=128, ge=1)
    """Tokens that two windows of one SQuAD paragraph share."""
    train_examples: int | None = Field(default=None, ge=1)
    """Only so many training examples, a fixed part whatever the seed; all by default."""
    group_by_length: bool = False
    """Batches of examples of nearly equal lengths, in an order that is drawn: little of them is padding, so an epoch
    takes less time where examples differ in length. The task's data stay an exact stream."""

    @model_validator(mode="before")
    @classmethod
    def _windows_are_longer(cls, data: Any) -> Any:
        if isinstance(data, dict) and str(data.get("name")).startswith("squad"):
            return {"max_length": 384, **data}
        return data

    @model_validator(mode="after")
    def _of_a_benchmark(self) -> TaskConfig:
        given = [key for key in ("epochs", "train_examples", "group_by_length") if getattr(self, key)]
        if given and self.task.is_language_modeling:
            raise ValueError(f"{', '.join(given)}: only for a benchmark's examples; text is counted by run.updates")
        return self

    @property
    def task(self) -> Task:
        return TASKS[self.name]


class TeacherConfig(Section):
    """The frozen model whose knowledge the student matches."""

    path: str | None = None
    """A Hugging Face directory, or `none` for plain training."""
    sharding: Literal["auto", "zero3", "replicated"] = "auto"
    """`zero3` shards it over the ranks, `replicated` (fast for small teachers) keeps a whole copy in each;
    `auto` is zero3 when there is more than one rank."""
    recipe: str | None = None
    """Recipe that trains this teacher first, when `path` does not exist yet."""
    filters: Path | None = None
    """Folder of its task-aware filters, for `objective.hidden.aligner: filter`."""

    @model_validator(mode="before")
    @classmethod
    def _none_is_no_teacher(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"path": data}
        if isinstance(data, dict) and data.get("path") == "":
            raise ValueError("path is empty; give a model, or `none` for plain training")
        return data


class StudentConfig(Section):
    """The model that is trained."""

    path: str | None = None
    """A Hugging Face directory to start from; by default the student starts as its teacher."""
    init: Literal["teacher", "random"] = "teacher"
    """`teacher`: start as the teacher (or as `path`) and shrink on the ladder. `random`: new weights, at the target
    shape from the first update (with `teacher: none`, at the shape in `config`)."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """The layers it starts with, of the teacher's (or of those of `path`), counted from 0, such as 1,3,5; all by
    default."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Of every dropout in the model; by default 0 where it is distilled on text, and else the model's own."""
    head_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Of a classifier's last map; by default as all others."""
    filters: Path | None = None
    """Folder of its task-aware filters, for `objective.hidden.aligner: filter`; by default the teacher's, or, with
    `path`, what learn_filters.py left for this run."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of a Hugging Face BertConfig (GPT2Config for task clm), for a model made from nothing (`teacher: none`);
    on the command line as `--student.config hidden_size=128`."""

    @field_validator("config", mode="before")
    @classmethod
    def _values_of_the_command_line_have_types(cls, config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        return {key: yaml.safe_load(value) if isinstance(value, str) else value for key, value in config.items()}
