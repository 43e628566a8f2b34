"""RunConfig and its sections: what a recipe (YAML) and the command line may say, typed and documented.

Precedence: command line, then recipe, then the defaults here. ZeRO, precision, clipping, buckets and the
optimizer's type belong to the DeepSpeed JSON instead (ds_config.py); reading recipes and wording errors is
recipe.py's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from homodistil.errors import ConfigError
from homodistil.recipe import Origin, explain, merge, read_recipe, recipe_path
from homodistil.tasks import TASKS, Task, TaskName

Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are checked when assigned."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _none_takes_a_value_back(cls, value: Any, info: ValidationInfo) -> Any:
        """`none`, as a command line can say it, for what may be left out."""
        is_optional = info.field_name and type(None) in get_args(cls.model_fields[info.field_name].annotation)
        return None if is_optional and isinstance(value, str) and value.lower() == "none" else value


class RunSection(Section):
    """Which run this is, how long, and where it leaves its files."""

    name: str = "run"
    """Folder below `directory`; give each run its own."""
    directory: Path = Path("runs")
    """Where runs are kept."""
    updates: int = Field(default=1000, ge=1)
    """Optimizer updates in total."""
    seed: int = 0
    """Decides data order, masks and every initial weight."""
    log_every: int = Field(default=10, ge=1)
    """Updates between two points in TensorBoard."""

    @property
    def path(self) -> Path:
        return self.directory / self.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


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
    """A Hugging Face directory, or `none` for plain masked-language-model training."""
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
    """Folder of its task-aware filters, for `objective.hidden.aligner: filter`; by default the teacher's."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of a Hugging Face BertConfig, for a model made from nothing (`teacher: none`); on the command
    line as `--student.config hidden_size=128`."""

    @field_validator("config", mode="before")
    @classmethod
    def _values_of_the_command_line_have_types(cls, config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        return {key: yaml.safe_load(value) if isinstance(value, str) else value for key, value in config.items()}


class Share(NamedTuple):
    """How much of the hidden states is compared; None: all."""

    states: int | None = None
    tokens: int | None = None
    """Of each sequence and state."""
    units: float | None = None
    """Fraction of a state's."""


class KnowledgeConfig(Section):
    """What of the teacher's hidden states and attention the student is compared with."""

    keep: str | None = None
    """How much: `1l_10t_0.1h` is one layer, ten tokens of each sequence, a tenth of the units. What is not named is
    kept whole, as everything is by default."""
    interval: int = Field(default=1, ge=1)
    """Every so many of the student's layers one is compared, up to the last; divides their number."""
    top: float = Field(default=1.0, gt=0, le=1)
    """Share of the teacher's depth that the student's last layer is compared at; the others are spaced evenly below.
    5/6 (0.8333) did best in the marginal-utility paper."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """For each of those layers, the teacher's that it is compared with, counted from 0, instead of spacing them."""
    embeddings: bool = True
    """Compare the embeddings' output as well; filters have none there. The first that `keep` drops."""
    tokens: Literal["left", "random", "attention", "attention_no_sep"] = "attention_no_sep"
    """Which tokens `keep` keeps: the first; drawn anew for every sequence, state and masking; those that [CLS] attends
    to most, in the layer before the one compared; or of those without [SEP]. A causal model's last token takes [CLS]'s
    part."""
    units: Literal["random", "uniform", "magnitude"] = "magnitude"
    """Which units: drawn once for the run; evenly spaced; or each token's largest."""
    left_out: Literal["ignored", "zero"] = "ignored"
    """What becomes of units that are not kept: nothing, or the student's are pulled to zero."""
    padding: bool = False
    """Compare padding as well, as TED's authors' code does; not with `keep`'s tokens."""

    @field_validator("keep")
    @classmethod
    def _share_can_be_read(cls, keep: str | None) -> str | None:
        _read_share(keep)
        return keep

    @model_validator(mode="after")
    def _padding_is_never_chosen(self) -> KnowledgeConfig:
        if self.padding and self.share.tokens is not None:
            raise ValueError(f"padding is true, but keep ({self.keep}) chooses tokens, and padding is none")
        return self

    @property
    def share(self) -> Share:
        return _read_share(self.keep)


def _read_share(keep: str | None) -> Share:
    found = re.fullmatch(r"(?:(\d+)l)?_?(?:(\d+)t)?_?(?:(\d*\.?\d+)h)?", keep or "")
    if found is None or keep == "":
        raise ValueError(f"found {keep}, expected layers, tokens and units, or some of them, such as 1l_10t_0.1h")
    states, tokens, units = found.groups()
    share = Share(
        states=None if states is None else int(states),
        tokens=None if tokens is None else int(tokens),
        units=None if units is None else float(units),
    )
    if share.states == 0 or share.tokens == 0 or not (share.units is None or 0 < share.units <= 1):
        raise ValueError(f"found {keep}, expected at least one layer, one token, and units above 0, at most 1")
    return share


class CacheConfig(Section):
    """A teacher's knowledge on disk, written once by launchers/cache_teacher.py and read instead of the teacher."""

    path: Path | None = None
    """Folder of the cache; without one, the teacher runs beside the student."""
    values: Literal["fp32", "fp16", "int8", "int4"] = "fp16"
    """How hidden states are stored; what each costs is in docs/performance.md."""
    logits: Literal["draws", "top_k", "states"] = "draws"
    """What is kept of a language model's predictions: words drawn from them, right on average; the most probable words
    and the mass of all others, which loses much of a softened distribution; or the last hidden states, exact, with the
    teacher's head beside them. A task's few logits are kept as they are."""
    top_k: int = Field(default=32, ge=1)
    """Words that `top_k` tells apart."""
    draws: int = Field(default=50, ge=1)
    """Words that `draws` draws for a slot."""


class FiltersConfig(Section):
    """Task-aware filters (TED, stage I): linear maps of layers' outputs, learned before distilling."""

    of: Literal["teacher", "student"] | None = None
    """Whose filters this run learns, instead of distilling; launchers/learn_filters.py sets it."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Of that model, counted from 0; by default those that `knowledge` compares."""
    teacher: str | None = None
    """Whose width the filters of a student lead to, and whose head scores them; launchers/learn_filters.py sets it."""
    hidden: int | None = Field(default=None, ge=1)
    """Width of a layer inside the filter; by default the filter is one linear map."""
    activation: Literal["gelu", "relu", "tanh"] = "gelu"
    """After that inner layer."""
    init: Literal["random", "identity"] = "random"
    """`identity` lets filters of square, single maps start with the layer's output as it is."""
    head: Literal["shared", "new"] = "shared"
    """In language modelling, what scores a filter's output: the teacher's frozen `shared` head, or a `new` one per
    filter. A benchmark's task always takes new ones."""
    updates: int | None = Field(default=None, ge=1)
    """Optimizer updates; by default `run.updates`."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak; by default `optimizer.learning_rate`."""


class DataConfig(Section):
    """The stream: shards made by data_prep/build_shards.py, batched and masked."""

    shards: Path = Path("data/quickstart")
    """Folder with index.json and the shards."""
    source: str | None = None
    """Build missing shards from this source first: `embedded` (the documentation of this Python
    installation), or a text file or folder."""
    global_batch: int = Field(default=64, ge=1)
    """Sequences an update, over all ranks."""
    micro_batch: int = Field(default=32, ge=1)
    """Sequences a forward pass, on one rank, at most; the rest is accumulated."""
    lanes: int = Field(default=64, ge=1)
    """Fixed lanes the shards are dealt to: divides the global batch, and is divided by the world size."""
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of a sequence's positions that are scored."""
    whole_word: bool = False
    """Mask whole words instead of single pieces."""
    maskings: int | None = Field(default=None, ge=1)
    """Masks that a sequence has: in each epoch the next, then the first again; by default, every epoch's are new, or,
    for causal models, there is one that hides nothing. A cache holds the teacher's knowledge of each."""
    mask_seed: int | None = None
    """Decides the masks, and a draw of tokens and units; by default `run.seed`. Students of several seeds can share a
    cache."""
    on_bad_shard: Literal["stop", "replace"] = "stop"
    """A shard that is missing or not as its index says: `stop`, or `replace` it by the one read before it."""
    prefetch: int = Field(default=4, ge=1)
    """Updates that the background worker prepares ahead of the step."""


class OptimizerConfig(Section):
    """Values of the optimizer; its type is the DeepSpeed JSON's."""

    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    warmup: float = Field(default=0.02, ge=0, le=1)
    """Share of the updates over which the rate rises linearly; ends at or before `pruning.start`."""
    schedule: Literal["linear", "constant"] = "linear"
    """After warm-up: fall linearly to zero, or stay."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's moment decays."""
    eps: float = Field(default=1e-6, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay, on matrices only (no biases, no LayerNorm)."""


class Term(Section):
    """One weighted term of the objective."""

    weight: float = Field(default=1.0, ge=0)
    """Factor of this term in the sum; 0 leaves it out."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """Share of the updates after which it counts."""
    end: float = Field(default=1.0, gt=0, le=1)
    """Share of the updates after which it no longer counts. Where terms begin or end, another stage of the run begins,
    with a warm-up and a decay of its own."""

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> Term:
        if self.start >= self.end:
            raise ValueError(f"start ({self.start}) must be before end ({self.end})")
        return self


class TaskTerm(Term):
    """The task's own loss: cross-entropy with the true tokens or classes; a regression's squared error."""


class KlTerm(Term):
    """KL(teacher || student) at a temperature, times its square; of a regression the squared difference."""

    temperature: float = Field(default=2.0, gt=0)
    """Softens both distributions."""


class HiddenTerm(Term):
    """Mean squared difference of hidden states."""

    aligner: Literal["projection", "indexed", "filter"] = "projection"
    """`projection`: a learned linear map per layer. `indexed`: the teacher's own kept dimensions. `filter`: task-aware
    filters on both sides, from launchers/learn_filters.py (TED)."""
    projection_init: Literal["identity", "random"] = "identity"
    """`identity` on the student's own dimensions makes the term 0 at the start."""


class AttentionTerm(Term):
    """Mean squared difference of attention, head by head."""

    form: Literal["scores", "scores_centred", "probabilities"] = "scores"
    """Pre-softmax scores; scores less the mean valid key's; or post-softmax probabilities."""


class ObjectiveConfig(Section):
    """L = task + a1 kl + a2 hidden + a3 attention; measure a1..a3 with `homodistil measure-weights`."""

    task: TaskTerm = TaskTerm()
    kl: KlTerm = KlTerm()
    hidden: HiddenTerm = HiddenTerm()
    attention: AttentionTerm = AttentionTerm()

    @model_validator(mode="after")
    def _something_always_counts(self) -> ObjectiveConfig:
        terms = [term for name in type(self).model_fields if (term := getattr(self, name)).weight > 0]
        covered = 0.0
        for term in sorted(terms, key=lambda term: term.start):
            covered = max(covered, term.end) if term.start <= covered else covered
        if terms and covered < 1:
            raise ValueError(f"no term counts after {covered} of the updates. Let one start there, or end later")
        return self

    def stage(self, update: int, updates: int, among: Sequence[str]) -> Stage:
        """The stage that update `update` (1-based) of `updates` belongs to, `among` these terms."""
        terms = {name: getattr(self, name) for name in among}
        windows = {n: (round(t.start * updates), round(t.end * updates)) for n, t in terms.items() if t.weight > 0}
        borders = {0, updates, *(border for window in windows.values() for border in window)}
        first, last = max(b for b in borders if b < update), min(b for b in borders if b >= update)
        return Stage(update - first, last - first, tuple(n for n, (a, b) in windows.items() if a < update <= b))


class Stage(NamedTuple):
    """A stretch of a run in which the same terms count."""

    update: int
    """Counted from the stage's first, which is 1."""
    updates: int
    terms: tuple[str, ...]


class TargetShape(Section):
    """Widths of the finished student; what is left out stays as the teacher's."""

    hidden: int | None = Field(default=None, ge=1)
    """Residual width; a stock model needs heads x head_width."""
    ffn: int | None = Field(default=None, ge=1)
    """Intermediate width of the feed-forward layers."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads per layer."""
    head_width: int | None = Field(default=None, ge=1)
    """Dimensions of a head; by default hidden / heads."""


class PruningConfig(Section):
    """The ladder from the teacher's shape to the target, and how neurons are scored."""

    target: TargetShape = TargetShape()
    events: int = Field(default=16, ge=1)
    """Rungs of the ladder: physical prunes, equally spaced in remaining fraction."""
    schedule: Literal["cubic", "linear", "one_shot"] = "cubic"
    """How the remaining fraction falls between start and end; `one_shot` prunes everything at start."""
    start: float = Field(default=0.02, ge=0, lt=1)
    """Share of the updates before the descent begins (t_i)."""
    end: float = Field(default=0.7, gt=0, le=1)
    """Share of the updates at which the target is reached (t_f)."""
    metric: Literal["sensitivity", "magnitude", "platon", "random"] = "sensitivity"
    """|w g|; |w|; PLATON's smoothed mean times uncertainty of |w g|; or a seeded draw, as a control."""
    smoothing_window: int = Field(default=10, ge=1)
    """Updates averaged into one window before the moving average."""
    smoothing_beta: float = Field(default=0.85, ge=0, lt=1)
    """Decay of the moving average over windows."""
    across: Literal["per_matrix", "none", "per_parameter"] = "per_matrix"
    """How the tensors of a group are weighed: each matrix's scores to sum 1, raw sums, or per parameter."""
    ffn_multiple: int = Field(default=8, ge=1)
    """Intermediate widths on the way are multiples of this; the target is always met exactly."""
    head_width_multiple: int = Field(default=1, ge=1)
    """Head widths on the way are multiples of this."""
    hidden_multiple: int = Field(default=8, ge=1)
    """Hidden widths on the way, where the head count changes too; otherwise hidden = heads x head width."""

    @model_validator(mode="after")
    def _ordered(self) -> PruningConfig:
        if self.end < self.start:
            raise ValueError(f"end ({self.end}) must not be before start ({self.start})")
        return self


class ValidationConfig(Section):
    """Held-out shard, always the same text and masks."""

    every: int = Field(default=200, ge=1)
    """Updates between validations; there is always one at the end."""
    sequences: int = Field(default=256, ge=1)
    """Held-out sequences used (all there are, if fewer)."""


class CheckpointConfig(Section):
    """Sharded checkpoints: what a run goes on from after an interruption."""

    resume: str = "auto"
    """`auto`: go on from the newest whole checkpoint of this run, if there is one. `never`: start over; what was
    there is set aside. Or the path of a checkpoint."""
    every: int = Field(default=500, ge=1)
    """Updates between two checkpoints; there is always one at the end."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept; with two, a damaged one costs one interval more."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this many updates are never deleted."""
    allow_changes: list[Annotated[str, Field(pattern=r"^(optimizer|objective)\.")]] = Field(default_factory=list)
    """Keys of `optimizer` and `objective` that may differ from the checkpoint's, such as a lower learning rate."""
    background: bool = True
    """Write beside the training: a step waits only for the copy in memory."""


class HealthConfig(Section):
    """What is watched while the run goes on."""

    max_skipped: int = Field(default=10, ge=0)
    """Updates in a row that may be left out because a gradient was not finite; one more stops the run."""
    compare_every: int = Field(default=500, ge=1)
    """Updates between two comparisons of all ranks' weights."""
    hang_timeout_seconds: int = Field(default=1800, ge=1)
    """Seconds without progress after which a rank ends the run and names the rank it waits for."""


class PerformanceConfig(Section):
    """Fast forms, each beside a plain twin that is tested against it."""

    fused_adamw: bool = True
    """torch's fused AdamW instead of the loop."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """Attention kernel; `auto` is torch's SDPA, or, for short sequences on CPUs, attention written out."""
    activation_checkpointing: bool = False
    """Recompute the student's layers in backward: less memory, about a third more arithmetic."""
    teacher_ahead: bool = False
    """Start the teacher on the next micro-batch beside the student's backward pass (GPUs); holds both in memory."""
    compile: bool = False
    """torch.compile the student's and teacher's encoder (ZeRO 1 or 2, replicated teacher)."""
    fused_vocabulary: bool = True
    """Cross-entropy and KL from one look at the logits, a few rows at a time."""
    gram_attention: Literal["auto", "on", "off"] = "auto"
    """Attention loss from Gram matrices, without any T x T map; `auto` where it needs fewer FLOPs."""


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

    @classmethod
    def load(cls, recipe: str, overrides: dict[str, Any] | None = None) -> RunConfig:
        """The recipe's values with `overrides` (nested dict: the command line's) on top. Raises `ConfigError`."""
        origin = Origin(recipe_path(recipe), overrides or {})
        values = merge(read_recipe(origin.path), origin.overrides)
        _prefer_updates_to_epochs(values, origin.overrides)
        values["recipe"] = origin.path.stem
        values["run"] = {"name": origin.path.stem, **(values.get("run") or {})}
        try:
            run = cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, origin)) from None
        run._origin = origin
        return run

    @model_validator(mode="after")
    def _the_task_counts_without_a_teacher(self) -> RunConfig:
        task = self.objective.task
        if self.teacher.path is None and task.weight > 0 and (task.start, task.end) != (0, 1):
            raise ValueError(
                f"objective.task counts from {task.start} to {task.end} of the updates, but without teacher.path "
                "nothing else can. Let it start at 0 and end at 1, or set teacher.path"
            )
        return self

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
    if (values.get("task") or {}).get("epochs") is not None:
        values["task"] = {**values["task"], "epochs": None}
