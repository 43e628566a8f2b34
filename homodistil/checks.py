"""Checks: what a run must fulfil before it starts, each refusal in words that name file, key, value and mend."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from transformers import PretrainedConfig

from homodistil.config import RunConfig
from homodistil.data.shards import ShardIndex
from homodistil.data.stream import check_divisions
from homodistil.data.tokenizer import tokenizer_hash
from homodistil.ds_config import DeepSpeedConfig
from homodistil.errors import ConfigError, DataError, ModelError
from homodistil.export import refuse_to_replace_anything_else
from homodistil.knowledge.filters import HOW_TO_LEARN, FilterSet
from homodistil.models.loading import model_directory, model_hash
from homodistil.student import Blueprint


class Source(Protocol):
    """What a run reads: shards of text, or a benchmark's examples."""

    @property
    def sequence_length(self) -> int:
        """Tokens a sequence at most."""
        ...

    @property
    def mean_length(self) -> float: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def tokenizer_sha256(self) -> str: ...

    @property
    def sep_token_id(self) -> int | None:
        """Of the token between and after segments, if there is one."""
        ...

    @property
    def sha256(self) -> str:
        """Of all that is read."""
        ...


def check_batches(run: RunConfig, source: Source, ds_config: DeepSpeedConfig, world_size: int) -> None:
    """The ranks can share the batches, and the engine can run as it is asked to."""
    if isinstance(source, ShardIndex):
        check_divisions(run.data, source, world_size)
        if source.task != run.task.name:
            raise ConfigError(
                f"task.name is {run.task.name}, but data.shards {run.data.shards} was built for {source.task}. Build "
                f"shards with --task {run.task.name}, or set task.name to {source.task}."
            )
    ds_config.resolved(run, world_size)
    _check_compile(run, ds_config, world_size)


def check_destination(run: RunConfig) -> None:
    """The run leaves its student where no model lies that it reads."""
    destination = run.run.path / "student"
    for key, path in (("teacher.path", run.teacher.path), ("student.path", run.student.path)):
        if path and destination.resolve() == Path(path).resolve():
            raise ConfigError(f"{key} {path} is where this run would leave its student. Give --run.name.")
    if run.filters.of is None:
        refuse_to_replace_anything_else(destination)


def check_tokenizer(run: RunConfig, source: Source) -> None:
    """The shards' own copy goes out with the student, at the very end."""
    if not isinstance(source, ShardIndex):
        return
    folder = run.data.shards / source.tokenizer_name
    if tokenizer_hash(folder) != source.tokenizer_sha256:
        raise DataError(f"{folder}: not the tokenizer that made these shards. Restore it, or build the shards again.")


def check_same_family(student: str, config: PretrainedConfig, teacher: str, teacher_config: PretrainedConfig) -> None:
    """A student that starts as another model than its teacher is of the same architecture and vocabulary."""
    for field in ("model_type", "vocab_size"):
        own, other = getattr(config, field), getattr(teacher_config, field)
        if own != other:
            raise ModelError(
                f"student.path {student}: {field} is {own}, but the teacher's, {teacher}, is {other}. Give a student "
                f"with the teacher's {field}."
            )


def check_start(run: RunConfig) -> None:
    """One thing that the student starts as."""
    if run.student.config and (run.teacher.path or run.student.path):
        key = "teacher.path" if run.teacher.path else "student.path"
        raise ConfigError(f"student.config describes a model made from nothing, but {key} is set. Drop one of them.")
    if run.student.path and run.student.init == "random":
        raise ConfigError(f"student.init is random, but student.path is {run.student.path}. Drop one of them.")
    if not run.task.task.is_language_modeling and run.student.init == "random":
        raise ConfigError(f"student.init is random, but task {run.task.name} starts from a model. Set student.path.")


def check_layers(blueprint: Blueprint) -> None:
    """Layers that there are; of the student's in order, each once; as many to compare with as are compared."""
    run, family = blueprint.run, blueprint.family
    there, teachers = family.layers(blueprint.config), family.layers(blueprint.teacher_config)
    if run.student.layers is not None and run.teacher.path is None and run.student.path is None:
        raise ConfigError(
            f"student.layers is {run.student.layers}, but there is no teacher whose layers they are. Set teacher.path."
        )
    if run.knowledge.layers is not None and run.teacher.path is None and run.filters.of is None:
        raise ConfigError(
            f"knowledge.layers is {run.knowledge.layers}, but there is no teacher whose layers they are. "
            "Set teacher.path."
        )
    _check_there("student.layers", run.student.layers, there)
    _check_there("filters.layers", run.filters.layers, there)
    _check_there("knowledge.layers", run.knowledge.layers, teachers)
    if blueprint.source != tuple(sorted(set(blueprint.source))):
        raise ConfigError(f"student.layers: found {run.student.layers}, expected each layer once, in order.")
    count = len(blueprint.source)
    if count % run.knowledge.interval:
        fitting = [n for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            f"knowledge.interval: {run.knowledge.interval} does not fit the student's {count} layers, of which the "
            f"last is always compared. Give one of {fitting}."
        )
    compared = blueprint.compared
    if len(compared.teacher) != len(compared.student):
        raise ConfigError(
            f"knowledge.layers: found {len(compared.teacher)} layers, but {len(compared.student)} of the student's are "
            "compared. Give one of the teacher's for each of them."
        )
    if min(compared.teacher, default=0) < 0 and (run.objective.attention.weight > 0 or run.filters_are_compared):
        raise ConfigError(
            f"knowledge.top: {run.knowledge.top} compares the student's lowest layers with the teacher's embeddings, "
            "which have no attention and no filters. Raise it, name knowledge.layers, or set a larger "
            "knowledge.interval."
        )
    if run.teacher.path and len(compared.student) > teachers:
        raise ConfigError(
            f"{len(compared.student)} of the student's layers are to be compared, but the teacher has {teachers}. Set "
            "knowledge.interval, so that fewer are, or knowledge.layers."
        )


def check_alignment(blueprint: Blueprint) -> None:
    """Maps and heads that a student which did not start as its teacher can have."""
    run = blueprint.run
    own, other = (blueprint.family.widths(config) for config in (blueprint.config, blueprint.teacher_config))
    term, attention = run.objective.hidden, run.objective.attention
    if blueprint.teacher is None or run.teacher.path is None:
        return
    if term.weight > 0 and term.aligner == "indexed":
        raise ConfigError(
            f"objective.hidden.aligner: indexed, but the student starts as student.path {run.student.path}, whose "
            "dimensions are none of the teacher's. Set it to projection or filter."
        )
    is_identity = term.aligner == "projection" and term.projection_init == "identity"
    if term.weight > 0 and is_identity and own.hidden != other.hidden:
        raise ConfigError(
            f"objective.hidden.projection_init: identity, but the student is {own.hidden} wide and the teacher "
            f"{other.hidden}. Set it to random."
        )
    if attention.weight > 0 and (own.heads, own.head_width) != (other.heads, other.head_width):
        raise ConfigError(
            f"objective.attention.weight is {attention.weight}, but the student {run.student.path} has {own.heads} "
            f"heads of {own.head_width} and the teacher {other.heads} of {other.head_width}. Set it to 0."
        )


def check_filters(blueprint: Blueprint) -> None:
    """Filters on both sides, learned on these very models, wherever layers are compared."""
    run = blueprint.run
    if run.filters.of is not None:
        if run.student.path is None:
            raise ConfigError("filters.of is set, but student.path, the model that filters are learned on, is not.")
        if not run.filters.layers:
            raise ConfigError(f"filters.of is set, but filters.layers, where filters stand, is not. {HOW_TO_LEARN}.")
        return
    term = run.objective.hidden
    if term.aligner != "filter" or term.weight == 0 or run.teacher.path is None:
        return
    if run.teacher.filters is None:
        raise ConfigError(
            "objective.hidden.aligner: filter, but teacher.filters is not set: the teacher has none. "
            f"{HOW_TO_LEARN} --of teacher, and set it to the folder that they are left in."
        )
    if run.student.filters is None and run.student.path is not None:
        raise ConfigError(
            f"objective.hidden.aligner: filter, but student.filters is not set, and the student starts as "
            f"{run.student.path}. {HOW_TO_LEARN} --of student, and set it to the folder that they are left in."
        )
    if run.student.path is not None and run.student.layers is not None:
        raise ConfigError(
            f"objective.hidden.aligner: filter, but student.layers cuts {run.student.layers} out of student.path "
            f"{run.student.path}, whose filters belong to all its layers. Train the cut model first, and give that."
        )
    compared, task = blueprint.compared, run.task.name
    own, other = blueprint.family.widths(blueprint.config).hidden, blueprint.teacher_width
    if Path(run.teacher.path).exists() or not run.teacher.recipe:
        teacher = model_hash(run.teacher.path)
        FilterSet.load(run.teacher.filters).check(
            "teacher.filters", teacher, compared.teacher, width_in=other, width_out=other, task=task
        )
        if run.student.filters is not None:
            student = model_hash(run.student.path) if run.student.path else teacher
            FilterSet.load(run.student.filters).check(
                "student.filters", student, compared.student, width_in=own, width_out=other, task=task
            )


def check_cache(run: RunConfig) -> None:
    """What a cache can hold of a teacher that there is."""
    if run.cache.path is None or run.filters.of is not None:
        return
    if run.teacher.path is None:
        raise ConfigError(f"cache.path is {run.cache.path}, but there is no teacher. Set teacher.path, or drop it.")
    if run.objective.attention.weight > 0:
        raise ConfigError(
            f"objective.attention.weight is {run.objective.attention.weight}, but a cache never holds attention, which "
            "takes hundreds of times what all else does. Set it to 0, or drop cache.path."
        )
    if run.knowledge.padding:
        raise ConfigError("knowledge.padding is true, but a cache holds nothing of padding. Drop it, or cache.path.")


def check_length(run: RunConfig, config: PretrainedConfig, length: int) -> None:
    """Whether the model has a position for every token, and every masked sequence a token that is scored."""
    limit, probability, task = config.max_position_embeddings, run.data.mask_probability, run.task.task
    if length > limit:
        found = f"data.shards {run.data.shards}: sequences of {length} tokens"
        mend = f"Build shards with --sequence_length {limit} or less."
        if not task.is_language_modeling:
            found, mend = f"task.max_length is {length}", f"Set it to {limit} or less."
        raise ConfigError(f"{found}, but the model has {limit} positions. {mend}")
    if task.kind == "masked" and round(probability * length) < 1:
        raise ConfigError(
            f"data.mask_probability: {probability} of {length} tokens is not one. Give {1 / length:.3f} or more."
        )


def check_vocabulary(run: RunConfig, config: PretrainedConfig, source: Source) -> None:
    """Models and data speak of the same tokens: as many and, where a model brings its tokenizer, the same pieces."""
    made_here = bool(run.teacher.recipe) and not Path(run.teacher.path or "").exists()
    paths = {"teacher": None if made_here else run.teacher.path, "student": run.student.path}
    for who, path in ((who, path) for who, path in paths.items() if path is not None):
        found = _vocabulary_fault(run, config, source, model_directory(path))
        if found and run.task.task.is_language_modeling:
            raise ConfigError(
                f"data.shards {run.data.shards}: tokenized with {found} the {who}'s. Build shards with the {who}'s own "
                f"tokenizer: data_prep/build_shards.py --tokenizer {path}."
            )
        if found:
            raise ConfigError(f"{who}.path {path}: task {run.task.name} is tokenized with {found} the {who}'s.")


def _vocabulary_fault(run: RunConfig, config: PretrainedConfig, source: Source, directory: Path) -> str | None:
    own, known = source.vocab_size, config.vocab_size
    if own != known if run.task.task.is_language_modeling else own > known:  # some models' tables have spare rows
        return f"a vocabulary of {own}, not the {known} of"
    has_tokenizer = any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json"))
    if has_tokenizer and tokenizer_hash(directory) != source.tokenizer_sha256:
        return f"other pieces, {own} of them, than"
    return None


def is_sharded(run: RunConfig, world_size: int) -> bool:
    """Whether the teacher is cut over the ranks; by default where there is more than one."""
    sharding = run.teacher.sharding
    return run.teacher.path is not None and (sharding == "zero3" or (sharding == "auto" and world_size > 1))


def _check_there(key: str, layers: list[int] | None, there: int) -> None:
    if layers is not None and (not layers or max(layers) >= there):
        raise ConfigError(f"{key}: found {layers}, but the model's layers are 0 to {there - 1}. Give some of them.")


def _check_compile(run: RunConfig, ds_config: DeepSpeedConfig, world_size: int) -> None:
    if not run.performance.compile:
        return
    if ds_config.zero_stage == 3:
        raise ConfigError(
            f"performance.compile is true, but {ds_config.path} shards the student at ZeRO stage 3, whose gathering "
            "hooks no graph can hold. Use ZeRO 1 or 2, or set performance.compile to false."
        )
    if run.has_live_teacher and is_sharded(run, world_size):
        raise ConfigError(
            f"performance.compile is true, but teacher.sharding is {run.teacher.sharding}: a teacher sharded by ZeRO-3 "
            "cannot be compiled. Set teacher.sharding to replicated, or performance.compile to false."
        )
