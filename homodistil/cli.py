"""The commands: `homodistil NAME ...` and launchers/NAME.py parse the same flags and call one function each.

An error that the user can mend is printed as one message, without a traceback, with exit code 2.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import CliImplicitFlag, CliPositionalArg

from homodistil.arguments import parse
from homodistil.config import RunConfig, Section
from homodistil.data import commands
from homodistil.data.commands import BuildShards, TrainTokenizer, VerifyShards
from homodistil.errors import ConfigError, HomodistilError, OutOfMemory, Preempted, RankLostError, Stopped, nearest
from homodistil.evaluation.command import Evaluate, measure
from homodistil.recipe import explain

if TYPE_CHECKING:
    from homodistil.ds_config import DeepSpeedConfig

Settings = TypeVar("Settings", bound=BaseModel)
AnyLaunch = TypeVar("AnyLaunch", bound="Launch")
INTERRUPTED = 128 + signal.SIGINT
"""What shells say of a program that Ctrl-C ended."""
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"), ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
"""Where launchers say which of all processes this is, and which of this machine's."""
DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"


class Launch(Section):
    """What is run, and on which engines."""

    ds_config: Path = DS_CONFIGS / "zero2.json"
    """DeepSpeed JSON of the student: ZeRO stage, precision, clipping."""
    teacher_ds_config: Path = DS_CONFIGS / "teacher_zero3.json"
    """DeepSpeed JSON of the teacher, where it is sharded."""
    dry_run: CliImplicitFlag[bool] = False
    """Print the ladder, shapes, parameters, memory per rank and time, or the size of a cache; then stop."""
    local_rank: int | None = None
    """Given by the deepspeed launcher; the environment says the same."""


class FilterLaunch(Launch):
    """Of which model, too."""

    of: Literal["teacher", "student"]
    """Whose filters: the model's of teacher.path, or that of student.path."""


class SeededLaunch(Launch):
    """How often, too."""

    seeds: list[int] = Field(default=[0])
    """A run for each, such as 1,2,3; they are summed up as mean and deviation."""


class Pretrain(RunConfig, Launch):
    """Distil a student out of its teacher. Flags override the recipe; the defaults shown are those without one."""


class LearnFilters(RunConfig, FilterLaunch):
    """Learn task-aware filters (TED, stage I) with the recipe of the run that will compare them."""


class CacheTeacher(RunConfig, Launch):
    """Write the teacher's knowledge that a recipe asks for to cache.path, so that the run needs no teacher."""

    recipe: str = "hsk_cached"
    """Name of a recipe of this package, or path of a YAML file."""


class FineTune(RunConfig, SeededLaunch):
    """Train a model on a task of GLUE or on SQuAD, with or without a teacher. Flags override the recipe."""

    recipe: str = "finetune"
    """Name of a recipe of this package, or path of a YAML file."""


class PlanRun(RunConfig):
    """Foretell memory, time and communication of a run on a cluster. Flags override the recipe."""

    gpus: int = Field(default=8, ge=1)
    """Ranks, eight to a machine."""
    gpu: Literal["a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb"] = "a100-80gb"
    """Kind of GPU."""
    ds_config: Path = DS_CONFIGS / "zero2.json"
    """DeepSpeed JSON of the student: ZeRO stage, precision, overlap."""
    length: int | None = Field(default=None, ge=3)
    """Tokens a sequence; by default those of data.shards, or 128 where there are none yet."""
    network: float | None = Field(default=None, gt=0)
    """Gbit/s of a machine's network cards together; by default those of a DGX."""
    curve: Path | None = None
    """Draw hours, and what an update is made of, from 1 to 1,024 GPUs to this PNG or SVG file."""


class Export(Section):
    """Turn a checkpoint into other formats."""

    checkpoint: Path
    """A complete checkpoint, such as runs/NAME/checkpoints/step_00000500."""
    output: Path
    """Folder to write."""
    format: Literal["huggingface", "deepspeed"] = "huggingface"
    """`huggingface`: a directory that stock `from_pretrained` loads. `deepspeed`: fp32 weights that DeepSpeed's
    zero_to_fp32.py reads."""
    teacher: str | None = None
    """Where the run's teacher lies now, if it was moved; only its config is read."""
    student: str | None = None
    """Where that of student.path lies now, if it was moved; only its config and a benchmark's tokenizer are read."""
    shards: Path | None = None
    """Where the run's shards lie now, if they were moved; only their tokenizer is read."""


class Report(Section):
    """Show what runs did, on one page with figures: of one run, or of several side by side, finished or not."""

    runs: CliPositionalArg[list[Path]]
    """Folders of runs, such as runs/quickstart."""
    output: Path | None = None
    """Folder for the page, figures and numbers; by default `report` in the first run's folder, or of several, here."""


# The libraries behind a command are imported when it runs: `--help` and a misspelt flag need not wait for torch.


def pretrain(arguments: Sequence[str]) -> None:
    """Load recipe and DeepSpeed JSONs, check them against each other, and train."""
    launch, run, student, teacher = _launched(Pretrain, Launch, "homodistil pretrain", arguments)

    from homodistil import train

    train.pretrain(run, student, teacher, launch.dry_run)


def plan(arguments: Sequence[str]) -> None:
    """Foretell a run's memory, hours and communication on so many GPUs."""
    given = parse(PlanRun, "homodistil plan", arguments)
    own = set(PlanRun.model_fields) - set(RunConfig.model_fields)
    options = _checked(PlanRun, {name: given.pop(name) for name in own & given.keys()})
    run = RunConfig.load(given.pop("recipe", "quickstart"), given)

    import torch

    from homodistil.ds_config import DeepSpeedConfig
    from homodistil.forecast import show_plan
    from homodistil.machines import gpu_machine
    from homodistil.quiet import hush

    hush()
    ds_config = DeepSpeedConfig.load(options.ds_config, torch.bfloat16)
    machine = gpu_machine(options.gpu, options.network)
    show_plan(ds_config.adopted_by(run), ds_config, machine, options.gpus, options.length, options.curve)


def measure_weights(arguments: Sequence[str]) -> None:
    """Measure the weights at which a recipe's loss terms pull equally hard."""
    launch, run, student, teacher = _launched(Pretrain, Launch, "homodistil measure-weights", arguments)

    if launch.dry_run:
        raise ConfigError("--dry_run: measuring weights has no forecast, only the run that has them. Leave it out.")

    from homodistil import weights

    weights.measure_weights(run, student, teacher)


def learn_filters(arguments: Sequence[str]) -> None:
    """Learn task-aware filters of a teacher or a student (TED, stage I)."""
    launch, run, student, teacher = _launched(LearnFilters, FilterLaunch, "homodistil learn-filters", arguments)

    if launch.dry_run:
        raise ConfigError("--dry_run: learning filters has no forecast, only the run that compares them. Leave it out.")

    from homodistil import stage_one

    stage_one.learn_filters(run, launch.of, student, teacher)


def cache_teacher(arguments: Sequence[str]) -> None:
    """Ask a teacher once about everything, and write down what it says."""
    launch, run, student, teacher = _launched(CacheTeacher, Launch, "homodistil cache-teacher", arguments)

    from homodistil import caching

    caching.cache_teacher(run, student, teacher, launch.dry_run)


def finetune(arguments: Sequence[str]) -> None:
    """Train a model on GLUE or SQuAD, with or without a teacher."""
    launch, run, student, teacher = _launched(FineTune, SeededLaunch, "homodistil finetune", arguments)

    from homodistil import finetune as seeds

    seeds.finetune(run, launch.seeds, student, teacher, launch.dry_run)


def _launched(
    command: type[RunConfig], settings: type[AnyLaunch], program: str, arguments: Sequence[str]
) -> tuple[AnyLaunch, RunConfig, DeepSpeedConfig, DeepSpeedConfig]:
    """Flags, recipe and both DeepSpeed JSONs, checked against each other. settings: the command's own flags, besides
    those of a recipe."""
    given = parse(command, program, arguments)
    launch = _checked(settings, {name: given.pop(name) for name in settings.model_fields if name in given})
    run = RunConfig.load(given.pop("recipe", command.model_fields["recipe"].default), given)

    from homodistil.ds_config import DeepSpeedConfig
    from homodistil.quiet import hush

    hush()
    student = DeepSpeedConfig.load(launch.ds_config)
    teacher = DeepSpeedConfig.load_teacher(launch.teacher_ds_config, student)
    return launch, student.adopted_by(run), student, teacher


def evaluate(arguments: Sequence[str]) -> None:
    """Measure a Hugging Face directory: language modelling, LAMBADA, GLUE or SQuAD."""
    measure(_checked(Evaluate, parse(Evaluate, "homodistil evaluate", arguments)))


def export(arguments: Sequence[str]) -> None:
    """Turn a checkpoint into a Hugging Face directory, or into what DeepSpeed's zero_to_fp32.py reads."""
    options = _checked(Export, parse(Export, "homodistil export", arguments))

    from homodistil import convert
    from homodistil.quiet import hush

    hush()
    if options.format == "deepspeed":
        print(convert.to_deepspeed(options.checkpoint, options.output))
    else:
        print(
            convert.to_huggingface(options.checkpoint, options.output, options.teacher, options.shards, options.student)
        )


def build_shards(arguments: Sequence[str]) -> None:
    """Turn text into shards of packed sequences."""
    commands.build_shards(_checked(BuildShards, parse(BuildShards, "homodistil build-shards", arguments)))


def train_tokenizer(arguments: Sequence[str]) -> None:
    """Train a tokenizer on text: WordPiece or byte-level BPE."""
    commands.train_tokenizer(_checked(TrainTokenizer, parse(TrainTokenizer, "homodistil train-tokenizer", arguments)))


def verify_shards(arguments: Sequence[str]) -> None:
    """Compare shards with their index."""
    commands.verify_shards(_checked(VerifyShards, parse(VerifyShards, "homodistil verify-shards", arguments)))


def report(arguments: Sequence[str]) -> None:
    """Show what runs did, on one page."""
    options = _checked(Report, parse(Report, "homodistil report", arguments))

    from homodistil.report import compare

    own = options.runs[0] / "report" if len(options.runs) == 1 else Path("report")
    print(compare(options.runs, options.output or own))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "pretrain": pretrain,
    "learn-filters": learn_filters,
    "cache-teacher": cache_teacher,
    "finetune": finetune,
    "plan": plan,
    "measure-weights": measure_weights,
    "evaluate": evaluate,
    "export": export,
    "report": report,
    "build-shards": build_shards,
    "train-tokenizer": train_tokenizer,
    "verify-shards": verify_shards,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `NAME flags...`; exits with 2 after an error that the user can mend, with 75 if it was preempted, with
    130 after Ctrl-C where there was nothing to save."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.umask(os.umask(0o022) | 0o002)  # no file of ours is world-writable, whatever the machine's default
    try:
        _command(words[0] if words else "--help")(words[1:])
    except HomodistilError as error:
        _report(error)
        if isinstance(error, RankLostError):  # an orderly exit would wait for the rank that is lost
            sys.stdout.flush()
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if not _is_for_want_of_memory(error):
            raise
        _report(OutOfMemory(str(error)))
        sys.exit(OutOfMemory.exit_code)
    except KeyboardInterrupt:  # before a run trains, or between its results: what is on disk is whole
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def _command(name: str) -> Callable[[Sequence[str]], None]:
    if name in COMMANDS:
        return COMMANDS[name]
    if name in {"-h", "--help"}:
        return _overview
    raise ConfigError(f"{name}: no such command.{nearest(name, COMMANDS)} One of: {', '.join(COMMANDS)}.")


def _overview(_: Sequence[str]) -> None:
    for name, command in COMMANDS.items():
        print(f"homodistil {name:16} {command.__doc__}")


def _is_for_want_of_memory(error: RuntimeError) -> bool:
    """CUDA's own class, which is known without loading torch; CPUs have words alone."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _checked(settings: type[Settings], values: dict[str, Any]) -> Settings:
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, settings, lambda key: f"--{key} on the command line")) from None


def _report(error: HomodistilError) -> None:
    """By rank 0, if all ranks ended together; what flags, recipe and JSON say wrong once a machine; else by each."""
    rank, local_rank = (int(next((os.environ[name] for name in names if name in os.environ), 0)) for names in RANKS)
    if rank == 0 or not isinstance(error, Stopped | ConfigError) or (isinstance(error, ConfigError) and not local_rank):
        kind = "preempted" if isinstance(error, Preempted) else "error"
        print(f"{kind}{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
