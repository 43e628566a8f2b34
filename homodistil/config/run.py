"""RunConfig: all sections, and how a recipe and a command line become one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import PrivateAttr, ValidationError, model_validator

from homodistil.config.knowledge import CacheConfig, FiltersConfig, KnowledgeConfig
from homodistil.config.models import StudentConfig, TaskConfig, TeacherConfig
from homodistil.config.objective import ObjectiveConfig, Stage
from homodistil.config.pruning import PruningConfig, TargetShape
from homodistil.config.section import Section
from homodistil.config.training import (
    CheckpointConfig,
    DataConfig,
    HealthConfig,
    OptimizerConfig,
    PerformanceConfig,
    RunSection,
    ValidationConfig,
)
from homodistil.errors import ConfigError
from homodistil.recipe import Origin, explain, merge, read_recipe, recipe_path


class RunConfig(Section):
    """Everything about a run that the DeepSpeed JSON does not own."""

    recipe: str = "quickstart"
    """Name of a recipe of this package, or path of a YAML file."""
    run: RunSection = RunSection()
    task: TaskConfig = TaskConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    knowledge: KnowledgeConfig = KnowledgeConfig()
    filters: FiltersConfig = FiltersConfig()
    cache: CacheConfig = CacheConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    pruning: PruningConfig = PruningConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    performance: PerformanceConfig = PerformanceConfig()

    _origin: Origin | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _warm_up_ends_before_pruning(self) -> RunConfig:
        prunes = self.teacher.path and self.student.init == "teacher" and self.pruning.target != TargetShape()
        if prunes and self.optimizer.warmup > self.pruning.start:
            raise ValueError(
                f"optimizer.warmup ({self.optimizer.warmup}) ends after pruning.start ({self.pruning.start}): "
                "scores taken while the rate still rises would decide the first prune. Lower warmup or raise start."
            )
        return self

    @model_validator(mode="after")
    def _the_task_counts_without_a_teacher(self) -> RunConfig:
        task = self.objective.task
        if self.teacher.path is None and task.weight > 0 and (task.start, task.end) != (0, 1):
            raise ValueError(
                f"objective.task counts from {task.start} to {task.end} of the updates, but without teacher.path "
                "nothing else can. Let it start at 0 and end at 1, or set teacher.path"
            )
        return self

    @classmethod
    def load(cls, recipe: str, overrides: dict[str, Any] | None = None) -> RunConfig:
        """The recipe's values with `overrides` (nested dict: the command line's) on top. Raises `ConfigError`."""
        origin = Origin(recipe_path(recipe), overrides or {})
        values = merge(read_recipe(origin.path), origin.overrides)
        _prefer_updates_to_epochs(values, origin.overrides)
        values["recipe"] = origin.path.stem
        if isinstance(section := values.get("run") or {}, dict):  # else its validation says what is wrong
            values["run"] = {"name": origin.path.stem, **section}
        try:
            run = cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, origin)) from None
        run._origin = origin
        return run

    def stage(self, update: int) -> Stage:
        """The stage that update `update` (1-based) belongs to: of all terms, or of the task alone without a teacher."""
        terms = tuple(ObjectiveConfig.model_fields) if self.teacher.path else ("task",)
        return self.objective.stage(update, self.run.updates, terms)

    @property
    def has_live_teacher(self) -> bool:
        """Whether the teacher's model runs beside the student."""
        return self.teacher.path is not None and self.cache.path is None

    @property
    def mask_seed(self) -> int:
        return self.run.seed if self.data.mask_seed is None else self.data.mask_seed

    def with_filter_folders(self) -> RunConfig:
        """Where filters are compared: the folders that launchers/learn_filters.py leaves for this run, unless others
        are named. A student that starts as its teacher has its teacher's."""
        if not self.filters_are_compared:
            return self
        run = self.model_copy(deep=True)
        run.teacher.filters = run.teacher.filters or run.filter_folder("teacher")
        if run.student.path is not None:
            run.student.filters = run.student.filters or run.filter_folder("student")
        return run

    @property
    def filters_are_compared(self) -> bool:
        hidden = self.objective.hidden
        return hidden.aligner == "filter" and hidden.weight > 0 and self.teacher.path is not None

    def filter_run(self, of: str) -> str:
        """Name of the run that learns the filters for this one."""
        return f"{self.run.name}-{of}_filters"

    def filter_folder(self, of: str) -> Path:
        """Where they end up."""
        return self.run.directory / self.filter_run(of) / "filters"

    def origin(self, key: str) -> str | None:
        """Where `section.field` was set, in words; None when it is still this file's default."""
        section, field = key.split(".")
        if field not in getattr(self, section).model_fields_set:
            return None
        return self._origin(key) if self._origin else f"{key} in the program"

    def save(self, path: Path) -> None:
        """Write the resolved configuration as YAML; `load` of that file repeats the run."""
        values = self.model_dump(mode="json", exclude={"recipe"})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _prefer_updates_to_epochs(values: dict[str, Any], flags: dict[str, Any]) -> None:
    """`--run.updates` stands above the passes that a recipe asks for. Raises `ConfigError` for flags of both."""
    if (flags.get("run") or {}).get("updates") is None:
        return
    if str((flags.get("task") or {}).get("epochs", "none")).lower() != "none":
        raise ConfigError("--run.updates and --task.epochs both say how long to train. Give one of them.")
    if isinstance(values.get("task"), dict) and values["task"].get("epochs") is not None:
        values["task"] = {**values["task"], "epochs": None}
