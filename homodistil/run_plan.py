"""Plan: a run that was found sound, from its configuration to its shapes. What configuration and data alone can show
is refused here, before the training starts; checks.py says what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PretrainedConfig

from homodistil import checks
from homodistil.checks import Source
from homodistil.config import RunConfig
from homodistil.data.examples import TaskData, updates_for
from homodistil.data.shards import ShardIndex
from homodistil.ds_config import DeepSpeedConfig
from homodistil.errors import ConfigError
from homodistil.files import sha256
from homodistil.knowledge.filters import WEIGHTS
from homodistil.models import family_of
from homodistil.models.attention import attention_implementation
from homodistil.models.base import ModelFamily
from homodistil.models.loading import load_config, model_directory, model_hash, new_config
from homodistil.models.shape import StudentShape
from homodistil.pruning.ladder import Ladder
from homodistil.student import Blueprint
from homodistil.tasks import Task


@dataclass(frozen=True)
class Plan:
    """A run that was found sound: what it reads, its original model's config, its shapes, its ladder."""

    run: RunConfig
    ds_config: DeepSpeedConfig
    source: Source
    blueprint: Blueprint
    start: StudentShape
    ladder: Ladder

    @property
    def family(self) -> ModelFamily:
        return self.blueprint.family

    @property
    def tokens_per_update(self) -> int:
        """Padding left out."""
        return round(self.run.data.global_batch * self.source.mean_length)

    @property
    def task(self) -> Task:
        return self.run.task.task

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer lies that made the run's tokens."""
        if isinstance(self.source, TaskData):
            return self.source.tokenizer
        return self.run.data.shards / ShardIndex.tokenizer_name

    @property
    def dtype(self) -> torch.dtype:
        return self.ds_config.dtype

    @cached_property
    def identity(self) -> dict[str, str | int | float | None]:
        """What decides a run's numbers besides its configuration, for its checkpoints to compare. Reads the teacher."""
        run = self.run
        models = {"teacher": run.teacher.path, "student": run.student.path, "filters_teacher": run.filters.teacher}
        filters = {"teacher_filters": run.teacher.filters, "student_filters": run.student.filters}
        return {
            **{name: model_hash(path) if path else None for name, path in models.items()},
            **{name: sha256(path / WEIGHTS) if path else None for name, path in filters.items()},
            "knowledge": "cached" if run.cache.path else None,
            "architecture": self.blueprint.architecture_sha256,
            "tokenizer": self.source.tokenizer_sha256,
            "corpus": self.source.sha256,
            "precision": str(self.dtype).removeprefix("torch."),
            "gradient_clipping": self.ds_config.values.get("gradient_clipping"),
        }


def plan_run(run: RunConfig, source: Source, ds_config: DeepSpeedConfig, world_size: int) -> Plan:
    """Check that batch, data, teacher and target shape belong together. Raises the error to act on."""
    run = _with_updates(run, source)
    checks.check_batches(run, source, ds_config, world_size)
    checks.check_destination(run)
    checks.check_cache(run)
    checks.check_tokenizer(run, source)
    blueprint = replace(draw_blueprint(run, source.vocab_size), sep=source.sep_token_id)
    for config in (blueprint.config, blueprint.teacher_config):
        checks.check_length(run, config, source.sequence_length)
    checks.check_vocabulary(run, blueprint.teacher_config, source)
    start, ladder = plan_shapes(blueprint)
    checks.check_filters(blueprint)
    return Plan(run, ds_config, source, blueprint, start, ladder)


def _with_updates(run: RunConfig, source: Source) -> RunConfig:
    """`run` with as many updates as its passes over a benchmark's examples take."""
    epochs = run.task.epochs
    if not isinstance(source, TaskData) or epochs is None:
        return run
    run = run.model_copy(deep=True)
    run.run.updates = updates_for(epochs, source.count("train"), run.data.global_batch)
    return run


def draw_blueprint(run: RunConfig, vocab_size: int, config: PretrainedConfig | None = None) -> Blueprint:
    """What a run's students are built from. config: of what the student is cut out of, if it is known. Raises
    `ModelError` for models that cannot serve, or not each other."""
    config, kind = config or original_config(run, vocab_size), run.task.task.kind
    teacher = None
    if run.student.path is not None and (other := run.teacher.path or run.filters.teacher) is not None:
        teacher = load_config(other, run.task.task)
        checks.check_same_family(run.student.path, config, other, teacher)
    attention = attention_implementation(run.performance.attention)
    return Blueprint(family_of(config, kind), config, run, attention, teacher)


def plan_shapes(blueprint: Blueprint) -> tuple[StudentShape, Ladder]:
    """The shape that the student begins with, and its ladder. Raises `ConfigError`, `ShapeError`."""
    run, family = blueprint.run, blueprint.family
    checks.check_start(run)
    checks.check_layers(blueprint)
    checks.check_alignment(blueprint)
    full = blueprint.full_shape
    ladder = Ladder.plan(run.pruning, run.run.updates, full.widths)
    if ladder.rungs and run.teacher.path is None:
        raise ConfigError(
            "pruning.target is set, but there is no teacher to prune out of. Set teacher.path or drop it."
        )
    if ladder.rungs:
        family.stock_config(blueprint.config, ladder.rungs[-1].widths)  # refuses what cannot be exported
    start = full
    if run.student.init == "random" and ladder.rungs:
        start, ladder = full.first(ladder.rungs[-1].widths), Ladder(())
    return start, ladder


def tokenizer_directory(run: RunConfig) -> Path:
    """Where a benchmark's tokenizer is found: beside the student that the run starts with, or its teacher."""
    path = run.student.path or run.teacher.path
    if path is None:
        raise ConfigError(f"task.name is {run.task.name}, but there is no model. Set student.path or teacher.path.")
    return model_directory(path)


def original_config(run: RunConfig, vocab_size: int) -> PretrainedConfig:
    """Of what the student is cut out of: student.path, the teacher, even if its recipe is still to make it, or the
    model made from nothing."""
    if run.student.path is not None:
        return load_config(run.student.path, run.task.task)
    if run.teacher.path is None:
        return new_config(run.student.config, vocab_size, run.task.task.kind)
    if run.teacher.recipe and not Path(run.teacher.path).exists():
        first = RunConfig.load(run.teacher.recipe)
        if (made := first.run.path / "student") != Path(run.teacher.path):
            raise ConfigError(
                f"teacher.path {run.teacher.path} does not exist, and teacher.recipe {run.teacher.recipe} would leave "
                f"its model in {made}. Correct the path, or set teacher.recipe to none for a model of the hub."
            )
        return new_config(first.student.config, vocab_size, run.task.task.kind)
    return load_config(run.teacher.path, run.task.task)
