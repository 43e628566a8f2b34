"""Opening a run: what must exist first (shards, a teacher), what must fit together, and the first engines.

Everything that can be refused is refused here, before the training starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from homodistil.batch import Batch
from homodistil.checkpoint import Checkpoints
from homodistil.config import RunConfig
from homodistil.data.build import build_shards
from homodistil.data.shards import ShardIndex
from homodistil.data.stream import Stream, check_divisions
from homodistil.data.tokenizer import tokenizer_hash
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import StudentEngine, TeacherEngine
from homodistil.errors import ConfigError, DataError
from homodistil.export import refuse_to_replace_anything_else
from homodistil.hardware import matrix_product_flops
from homodistil.health import Health
from homodistil.metrics import Metrics
from homodistil.models import family_of
from homodistil.models.attention import attention_implementation
from homodistil.models.base import ModelFamily
from homodistil.models.loading import bert_config, load_config, load_model, model_directory, model_hash, new_model
from homodistil.models.shape import StudentShape
from homodistil.objective.measures import Measures
from homodistil.pruning.coordinator import PruningCoordinator
from homodistil.pruning.ladder import Ladder
from homodistil.ranks import Ranks
from homodistil.resume import RunState, resume
from homodistil.student import Blueprint
from homodistil.summary import FILE as SUMMARY


def provide_shards(run: RunConfig, ranks: Ranks) -> ShardIndex:
    """The index of `data.shards`, building them from `data.source` first if they do not exist. Collective."""
    data = run.data
    source = data.source
    if source and not ranks.broadcast((data.shards / "index.json").is_file()):
        ranks.once(lambda: build_shards(source, data.shards, shards=data.lanes, progress=True))
    return ShardIndex.load(data.shards, check_files=data.on_bad_shard == "stop")  # else whoever reads a bad one says so


def provide_teacher(run: RunConfig, ranks: Ranks, train: Callable[[RunConfig], object]) -> None:
    """Train `teacher.recipe` first if `teacher.path` does not exist and a recipe is given. Collective."""
    config = run.teacher
    if config.path is None or config.recipe is None or ranks.broadcast(Path(config.path).exists()):
        return
    recipe = RunConfig.load(config.recipe, {"data": run.data.model_dump(include={"shards", "source", "lanes"})})
    made = recipe.run.path / "student"
    if made != Path(config.path):
        raise ConfigError(f"teacher.path {config.path}: recipe {config.recipe} would leave its model in {made}.")
    train(recipe)


@dataclass(frozen=True)
class Plan:
    """A run that was found sound: its original model's config, its shapes, its ladder."""

    run: RunConfig
    ds_config: DeepSpeedConfig
    index: ShardIndex
    blueprint: Blueprint
    start: StudentShape
    ladder: Ladder

    @property
    def family(self) -> ModelFamily:
        return self.blueprint.family

    @property
    def tokens_per_update(self) -> int:
        return self.run.data.global_batch * self.index.sequence_length

    @property
    def dtype(self) -> torch.dtype:
        return self.ds_config.dtype

    @cached_property
    def identity(self) -> dict[str, str | int | float | None]:
        """What decides a run's numbers besides its configuration, for its checkpoints to compare. Reads the teacher."""
        teacher = self.run.teacher.path
        return {
            "teacher": model_hash(teacher) if teacher else None,
            "architecture": self.blueprint.architecture_sha256,
            "tokenizer": self.index.tokenizer_sha256,
            "corpus": self.index.sha256,
            "precision": str(self.dtype).removeprefix("torch."),
            "gradient_clipping": self.ds_config.values.get("gradient_clipping"),
        }


def plan_run(run: RunConfig, index: ShardIndex, ds_config: DeepSpeedConfig, world_size: int) -> Plan:
    """Check that batch, data, teacher and target shape belong together. Raises the error to act on."""
    check_divisions(run.data, index, world_size)
    ds_config.resolved(run, world_size)
    _check_compile(run, ds_config, world_size)
    _check_destination(run)
    _check_tokenizer(run, index)
    config = original_config(run, index.vocab_size)
    check_length(run, config, index.sequence_length)
    _check_vocabulary(run, config, index)
    blueprint = Blueprint(family_of(config), config, run, attention_implementation(run.performance.attention))
    start, ladder = plan_shapes(blueprint)
    return Plan(run, ds_config, index, blueprint, start, ladder)


def plan_shapes(blueprint: Blueprint) -> tuple[StudentShape, Ladder]:
    """The shape that the student begins with, and its ladder. Raises `ConfigError`, `ShapeError`."""
    run, family = blueprint.run, blueprint.family
    _check_layers(blueprint)
    full = blueprint.full_shape
    ladder = Ladder.plan(run.pruning, run.run.updates, full.widths)
    if ladder.rungs and run.teacher.path is None:
        raise ConfigError(
            "pruning.target is set, but there is no teacher to prune out of. Set teacher.path or drop it."
        )
    if run.teacher.path and run.student.config:
        raise ConfigError(
            "student.config describes a model made from nothing, but teacher.path is set. Drop one of them."
        )
    if ladder.rungs:
        family.stock_config(blueprint.config, ladder.rungs[-1].widths)  # refuses what cannot be exported
    start = full
    if run.student.init == "random" and ladder.rungs:
        start, ladder = full.first(ladder.rungs[-1].widths), Ladder(())
    return start, ladder


@dataclass
class Training:
    """A run under way: what the story's verbs act on. The student changes with every prune."""

    plan: Plan
    ranks: Ranks
    start: int
    """Updates that earlier processes completed."""
    update: int
    """Completed updates."""
    stream: Stream
    teacher: TeacherEngine | None
    student: StudentEngine
    pruner: PruningCoordinator
    checkpoints: Checkpoints
    health: Health
    metrics: Metrics
    held_out: list[Batch]
    validation: Measures | None = None
    """Of the latest held-out measurement."""


def open_training(plan: Plan, teacher_ds: DeepSpeedConfig, ranks: Ranks) -> Training:
    """Everything that a run needs, where its newest intact checkpoint left off, or at the beginning. Collective."""
    run = plan.run
    ranks.once(lambda: forget_ending(run))
    identity = ranks.once(lambda: plan.identity)
    state = resume(run, identity, ranks) or RunState(update=0, shape=plan.start)
    ranks.once(lambda: run.save(run.run.path / "run.yaml"))
    stream = Stream(run.data, run.run.seed, ranks, state.bad_shards)
    teacher, student = open_teacher(plan, teacher_ds, ranks), open_student(plan, state, ranks)
    checkpoints = Checkpoints(run, identity, ranks, state.update)
    checkpoints.check_room(student.trained_parameters)
    pruner = PruningCoordinator(run.pruning, plan.ladder, student.groups, ranks, run.run.seed)
    pruner.load(state.shares(ranks), state.observed)
    peak_flops = matrix_product_flops(plan.dtype, ranks.device)
    return Training(
        plan=plan,
        ranks=ranks,
        start=state.update,
        update=state.update,
        stream=stream,
        teacher=teacher,
        student=student,
        pruner=pruner,
        checkpoints=checkpoints,
        health=Health(run.health, ranks, state.progress.skipped_in_a_row),
        metrics=Metrics(run, ranks, peak_flops, state.update, state.progress),
        held_out=stream.validation(run.validation.sequences, run.data.micro_batch),
    )


def forget_ending(run: RunConfig) -> None:
    """From now on the run's folder does not say how an earlier process ended. On rank 0."""
    (run.run.path / SUMMARY).unlink(missing_ok=True)


def open_teacher(plan: Plan, teacher_ds: DeepSpeedConfig, ranks: Ranks) -> TeacherEngine | None:
    """The frozen engine beside the student's, or None for plain training. Collective."""
    run = plan.run
    if run.teacher.path is None:
        return None
    model = load_model(run.teacher.path, plan.dtype, plan.blueprint.attention)
    sharded = is_sharded(run, ranks.world_size)
    settings = teacher_ds.resolved(run, ranks.world_size) if sharded else None
    return TeacherEngine(model, plan.family, ranks, settings, compiled=run.performance.compile)


def is_sharded(run: RunConfig, world_size: int) -> bool:
    """Whether the teacher is cut over the ranks; by default where there is more than one."""
    sharding = run.teacher.sharding
    return run.teacher.path is not None and (sharding == "zero3" or (sharding == "auto" and world_size > 1))


def open_student(plan: Plan, state: RunState, ranks: Ranks) -> StudentEngine:
    """The student where the run stands: from a checkpoint, or as it is before the first update. Collective."""
    settings = plan.ds_config.resolved(plan.run, ranks.world_size)
    model = None if state.student else _first_model(plan)
    return StudentEngine.build(plan.blueprint, settings, ranks, model=model, shape=state.shape, state=state.student)


def _first_model(plan: Plan) -> PreTrainedModel:
    run, attention = plan.run, plan.blueprint.attention
    if run.teacher.path and run.student.init == "teacher":
        model = load_model(run.teacher.path, torch.float32, attention)
        plan.family.keep_layers(model, plan.blueprint.source)
        return model
    torch.manual_seed(run.run.seed)
    return new_model(plan.family.stock_config(plan.blueprint.student_config, plan.start.widths), attention)


def original_config(run: RunConfig, vocab_size: int) -> PretrainedConfig:
    """Of the teacher, even if its recipe is still to make it, or of the model made from nothing."""
    if run.teacher.path is None:
        return bert_config(run.student.config, vocab_size)
    if run.teacher.recipe and not Path(run.teacher.path).exists():
        return bert_config(RunConfig.load(run.teacher.recipe).student.config, vocab_size)
    return load_config(run.teacher.path)


def _check_destination(run: RunConfig) -> None:
    destination = run.run.path / "student"
    if run.teacher.path and destination.resolve() == Path(run.teacher.path).resolve():
        raise ConfigError(
            f"teacher.path {run.teacher.path} is where this run would leave its student. Give --run.name."
        )
    refuse_to_replace_anything_else(destination)


def _check_tokenizer(run: RunConfig, index: ShardIndex) -> None:
    """The shards' own copy goes out with the student, at the very end."""
    folder = run.data.shards / index.tokenizer_name
    if tokenizer_hash(folder) != index.tokenizer_sha256:
        raise DataError(f"{folder}: not the tokenizer that made these shards. Restore it, or build the shards again.")


def _check_compile(run: RunConfig, ds_config: DeepSpeedConfig, world_size: int) -> None:
    if not run.performance.compile:
        return
    if ds_config.zero_stage == 3:
        raise ConfigError(
            f"performance.compile is true, but {ds_config.path} shards the student at ZeRO stage 3, whose gathering "
            "hooks no graph can hold. Use ZeRO 1 or 2, or set performance.compile to false."
        )
    if is_sharded(run, world_size):
        raise ConfigError(
            f"performance.compile is true, but teacher.sharding is {run.teacher.sharding}: a teacher sharded by ZeRO-3 "
            "cannot be compiled. Set teacher.sharding to replicated, or performance.compile to false."
        )


def _check_layers(blueprint: Blueprint) -> None:
    """Layers that there are; of the student's in order, each once; as many to compare with as it has."""
    run, there = blueprint.run, blueprint.family.layers(blueprint.config)
    chosen = {"student.layers": run.student.layers, "knowledge.layers": run.knowledge.layers}
    for key, layers in chosen.items():
        if layers is None:
            continue
        if run.teacher.path is None:
            raise ConfigError(f"{key} is {layers}, but there is no teacher whose layers they are. Set teacher.path.")
        if not layers or max(layers) >= there:
            raise ConfigError(
                f"{key}: found {layers}, but the teacher's layers are 0 to {there - 1}. Give some of them."
            )
    if blueprint.source != tuple(sorted(set(blueprint.source))):
        raise ConfigError(f"student.layers: found {run.student.layers}, expected each layer once, in order.")
    if len(blueprint.matched) != len(blueprint.source):
        raise ConfigError(
            f"knowledge.layers: found {len(blueprint.matched)} layers, but the student has {len(blueprint.source)}. "
            "Give one of the teacher's for each of the student's."
        )


def check_length(run: RunConfig, config: PretrainedConfig, length: int) -> None:
    """Whether the model has a position for every token, and every sequence a token that is scored."""
    limit, probability = config.max_position_embeddings, run.data.mask_probability
    if length > limit:
        raise ConfigError(
            f"data.shards {run.data.shards}: sequences of {length} tokens, but the model has "
            f"{limit} positions. Build shards with --sequence_length {limit} or less."
        )
    if round(probability * length) < 1:
        raise ConfigError(
            f"data.mask_probability: {probability} of {length} tokens is not one. Give {1 / length:.3f} or more."
        )


def _check_vocabulary(run: RunConfig, config: PretrainedConfig, index: ShardIndex) -> None:
    """The same size and, where the teacher brings its tokenizer, the same pieces."""
    teacher = run.teacher.path
    found = f"a vocabulary of {index.vocab_size}, but the teacher has {config.vocab_size}"
    if teacher is None or (run.teacher.recipe and not Path(teacher).exists()):
        return  # made on these shards
    if config.vocab_size == index.vocab_size:
        directory = model_directory(teacher)
        has_tokenizer = any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
        if not has_tokenizer or tokenizer_hash(directory) == index.tokenizer_sha256:
            return
        found = f"other pieces than those of the teacher's vocabulary, both {index.vocab_size}"
    raise ConfigError(
        f"data.shards {run.data.shards}: tokenized with {found}. Build shards with the teacher's own tokenizer: "
        f"data_prep/build_shards.py --tokenizer {teacher}."
    )
