"""What `homodistil evaluate` accepts, refuses and prints; the measures themselves are the neighbours'.

Which flags belong to which task is decided before anything is loaded. Libraries are imported when a task runs, so that
`--help` is quick.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic_settings import CliImplicitFlag

from homodistil.config import Section, TaskConfig
from homodistil.errors import ConfigError
from homodistil.files import write_text_durably

if TYPE_CHECKING:
    from homodistil.evaluation.scoring import Scores

SQUAD = ("squad", "squad2")
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
PASSAGES = "a .jsonl file with a passage under `text` in each row"


class EvaluationData(Section):
    """What the model is measured on."""

    shards: Path | None = None
    """Folder of shards, of which the held-out one is used (mlm, pseudo_perplexity)."""
    path: str | None = None
    """Text (perplexity, pseudo_perplexity): a file or whatever else build_shards.py reads. A .jsonl file with a passage
    under `text` in each row (lambada). A folder with a benchmark's own files, by default its Hugging Face dataset."""
    max_length: int | None = Field(default=None, ge=8)
    """Tokens of a benchmark's example, as task.max_length of its training; by default 128, of SQuAD 384."""
    stride: int = Field(default=128, ge=1)
    """Tokens that two windows of one SQuAD paragraph share, as task.stride of its training."""


class Windows(Section):
    """How a text is shown to a causal model (perplexity)."""

    window: int | None = Field(default=None, ge=1)
    """Tokens seen at a time; by default the model's positions, up to 2,048."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens from one window to the next, each scored given window - stride tokens or more. Small is exact, and slow;
    by default half a window."""
    detokenize: CliImplicitFlag[bool] = False
    """Undo the tokenisation of WikiText's word-level files (` @-@ `, ` , `), as is usual for models of ordinary text.
    Words are counted in the file all the same. By default the file is measured as it is."""


class Evaluate(Section):
    """Measure a Hugging Face directory: its language modelling, or a benchmark it was fine-tuned for."""

    task: Literal[
        "mlm", "pseudo_perplexity", "perplexity", "lambada",
        "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "squad", "squad2",
    ] = "mlm"  # fmt: skip
    """Of masked language models: `mlm`, loss and accuracy at 15 % masked positions; `pseudo_perplexity`, each token
    masked in turn. Of causal ones: `perplexity` of a text, a token, word and byte; `lambada`, last words. Else a
    benchmark of GLUE or SQuAD, by its own metrics on its development set."""
    model: Path
    """Hugging Face directory, such as a run's student/."""
    data: EvaluationData = Field(default_factory=EvaluationData)
    perplexity: Windows = Field(default_factory=Windows)
    sequences: int | None = Field(default=None, ge=1)
    """Held-out sequences, lines or rows used, the first ones; by default 1,024 (mlm), 128 (pseudo_perplexity), all
    (lambada)."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Sequences of a forward pass; by default 32, or 4 of perplexity's long windows."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass."""
    output: Path | None = None
    """Write the figures, and the flags behind them, to this JSON file as well."""
    predictions: Path | None = None
    """Write a benchmark's predictions to this file."""


def measure(options: Evaluate) -> None:
    """Measure, print, and write what was asked for. Raises `ConfigError`, `DataError` and `ModelError`."""
    check(options)

    from homodistil.quiet import hush

    hush()
    scores = MEASURES[options.task].run(options)
    print(table(scores))
    if options.output:
        flags = _flags(options)
        used = {name: flags[name] for name in ("task", "model", "dtype", *MEASURES[options.task].flags)}
        write_text_durably(options.output, json.dumps({**used, **scores}, indent=1) + "\n")


def table(scores: Scores) -> str:
    """A line for each figure, names and figures in columns; words below, in lines of their own."""
    lines, width = [], max(map(len, scores)) + 1
    for name, score in scores.items():
        if isinstance(score, str):
            lines += textwrap.wrap(f"{name}: {score}", 100, subsequent_indent="  ")
        else:
            lines.append(f"{name:{width}} {f'{score:,}' if isinstance(score, int) else f'{score:,.4f}':>14}")
    return "\n".join(lines)


def _mlm(options: Evaluate) -> Scores:
    from homodistil.evaluation.language_modeling import evaluate_mlm

    assert options.data.shards is not None
    return {
        **evaluate_mlm(
            options.model, options.data.shards, options.sequences or 1024, options.micro_batch or 32, options.dtype
        )
    }


def _pseudo_perplexity(options: Evaluate) -> Scores:
    from homodistil.evaluation.pseudo_perplexity import evaluate_pseudo_perplexity

    return evaluate_pseudo_perplexity(
        options.model,
        options.data.shards,
        options.data.path,
        options.sequences or 128,
        options.micro_batch or 32,
        options.dtype,
    )


def _perplexity(options: Evaluate) -> Scores:
    from homodistil.evaluation.perplexity import evaluate_perplexity

    assert options.data.path is not None
    return evaluate_perplexity(
        options.model,
        options.data.path,
        **dict(options.perplexity),
        micro_batch=options.micro_batch or 4,
        dtype=options.dtype,
    )


def _lambada(options: Evaluate) -> Scores:
    from homodistil.evaluation.lambada import evaluate_lambada

    assert options.data.path is not None
    return evaluate_lambada(
        options.model, options.data.path, options.sequences, options.micro_batch or 32, options.dtype
    )


def _benchmark(options: Evaluate) -> Scores:
    from homodistil.evaluation.tasks import evaluate_task, save_predictions

    data = options.data
    given = {"max_length": data.max_length} if data.max_length is not None else {}
    config = TaskConfig.model_validate({"name": options.task, "path": data.path, "stride": data.stride, **given})
    result = evaluate_task(options.model, config, options.micro_batch or 32, options.dtype)
    if options.predictions:
        save_predictions(result, options.predictions)
    return {
        **result.metrics,
        "loss": result.loss,
        "examples": result.examples,
        "examples_per_second": result.examples_per_second,
    }


@dataclass(frozen=True)
class Measure:
    """How a task is measured, and which flags it has a use for, of those that not all tasks have."""

    run: Callable[[Evaluate], Scores]
    flags: tuple[str, ...]
    needs: str = ""
    """Of data, in words, if exactly one of --data.shards and --data.path must be given."""


MEASURES: dict[str, Measure] = {
    "mlm": Measure(_mlm, ("data.shards", "sequences"), "--data.shards, a folder of shards"),
    "pseudo_perplexity": Measure(
        _pseudo_perplexity,
        ("data.shards", "data.path", "sequences"),
        "either --data.shards, a folder of shards, or --data.path, a text",
    ),
    "perplexity": Measure(
        _perplexity,
        ("data.path", "perplexity.window", "perplexity.stride", "perplexity.detokenize"),
        "--data.path, a text",
    ),
    "lambada": Measure(_lambada, ("data.path", "sequences"), f"--data.path, {PASSAGES}"),
    **{name: Measure(_benchmark, ("data.path", "data.max_length", "predictions")) for name in GLUE},
    **{name: Measure(_benchmark, ("data.path", "data.max_length", "data.stride", "predictions")) for name in SQUAD},
}


def check(options: Evaluate) -> None:
    """Raises `ConfigError` for flags that don't go together, and for files and folders that aren't there."""
    here = MEASURES[options.task]
    for flag, value in _flags(options, given=True).items():
        having = [task for task, one in MEASURES.items() if flag in one.flags]
        if having and flag not in here.flags:
            raise ConfigError(
                f"--{flag} {value}: --task {options.task} has no use for it, only {', '.join(having)}. Leave it out, "
                "or set another --task."
            )
    if here.needs and (options.data.shards is None) == (options.data.path is None):
        found = "neither --data.shards nor" if options.data.path is None else "both --data.shards and"
        raise ConfigError(f"--task {options.task}: found {found} --data.path, expected {here.needs}. Give that alone.")
    _check_paths(options)


def _flags(options: Evaluate, given: bool = False) -> dict[str, Any]:
    """Dotted name -> value of every flag, or of those that were given."""
    flags: dict[str, Any] = {}
    for name, value in options.model_dump(mode="json", exclude_unset=given).items():
        flags |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flags


def _check_paths(options: Evaluate) -> None:
    from homodistil.data.sources import EMBEDDED, NAMED

    path, by_name = options.data.path, ("hf", EMBEDDED, *NAMED)
    if path is not None and path.partition(":")[0] not in by_name and not Path(path).exists():
        raise ConfigError(f"--data.path {path}: no such file or folder. Check the path.")
    if path is not None and options.task == "lambada" and path.endswith((".txt", ".txt.gz")):
        raise ConfigError(f"--data.path {path}: a text file, expected {PASSAGES}. Give such a file.")
    if not options.model.is_dir():
        raise ConfigError(
            f"--model {options.model}: no such folder, expected a Hugging Face directory. Check the path."
        )
    for flag in ("output", "predictions"):
        file = getattr(options, flag)
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise ConfigError(f"--{flag} {file}: expected a file, in a folder that exists. Make {file.parent} first.")
