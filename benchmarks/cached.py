"""Updates a second beside a live teacher, from a cache of it, and without any: python -m benchmarks.cached

Real engines over the real stream, fp32 on CPUs and bf16 on GPUs (hide them, CUDA_VISIBLE_DEVICES=, to measure CPUs).
The teacher has BERT-base's shape and random weights, the text is random words: neither changes the arithmetic. `live`
and `cached` share one objective, task, KL and hidden states, and one selection of what is compared; `none` is plain
training of the same student. Before anything is timed, a cache that compresses nothing gives the live teacher's losses.
Caches are written by the real writer, which is timed. Each arm has a process of its own, and they take turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig

from benchmarks.arena import DS_CONFIGS, RATE, ZERO2
from benchmarks.interleaved import interleave, leave
from benchmarks.loader import VOCABULARY, build
from benchmarks.turns import Step, Turns
from homodistil.cache_folder import Work
from homodistil.caching import record
from homodistil.config import RunConfig
from homodistil.costs import micro_batch_cost
from homodistil.data.shards import ShardIndex
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import started_ranks
from homodistil.models.loading import new_model
from homodistil.opening import open_stream, open_student, open_teacher_and_stream
from homodistil.resume import RunState
from homodistil.run_plan import Plan, plan_run

LIVE, CACHED, NONE = "live", "cached", "none"
EXACT = "exact"
CACHES: dict[str, dict[str, Any]] = {CACHED: {}, EXACT: {"values": "fp32", "logits": "states"}}
"""Arm -> what its cache has that is no default."""
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Relative, of losses that should be the same."""
LANES, UPDATES_AN_EPOCH, LENGTH = 4, 8, 128


class Shape(NamedTuple):
    """Of a BERT with twelve heads."""

    layers: int
    hidden: int
    ffn: int

    def __str__(self) -> str:
        return f"{self.layers} x {self.hidden}"


TEACHER, STUDENTS = Shape(12, 768, 3072), (Shape(4, 312, 1200), Shape(6, 768, 768))
SMALL_TEACHER, SMALL_STUDENTS = Shape(3, 96, 192), (Shape(2, 48, 96),)
WANTED = {Shape(4, 312, 1200): 3.4}
"""Student -> how many times as many updates a cache is to give it."""
WANTED_OF_CEILING, WANTED_OF_NONE = 0.85, 0.90


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256 if gpu else 32, help="of a micro-batch; four times some")
    parser.add_argument("--micro-batches", type=int, default=4 if gpu else 1, help="of an update")
    parser.add_argument("--updates", type=int, default=8 if gpu else 2, help="of an arm's turn")
    parser.add_argument("--rounds", type=int, default=5, help="times each arm is measured")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if gpu else "fp32")
    parser.add_argument("--keep", default="1l_10t_0.1h", help="what of the teacher is compared (knowledge.keep)")
    parser.add_argument("--compile", action="store_true", help="all arms with performance.compile")
    parser.add_argument("--small", action="store_true", help="only show that it works: tiny models, no result is left")
    options = parser.parse_args()
    students = SMALL_STUDENTS if options.small else STUDENTS
    with tempfile.TemporaryDirectory(prefix="cached_") as name:
        folder = Path(name)
        prepare(options, folder, students)
        written = {cache: _once(Turns(writing, options, folder, cache, students[0])) for cache in CACHES}
        rows = [measure(options, folder, student, written[CACHED]) for student in students]
    show(rows)
    print("nothing is left of a small run" if options.small else f"written to {leave('cached', rows)}")


def prepare(options: argparse.Namespace, folder: Path, students: tuple[Shape, ...]) -> None:
    """Shards, a teacher and students; micro-batches fill shards exactly."""
    sequences = options.sequences * options.micro_batches * UPDATES_AN_EPOCH // LANES
    build(argparse.Namespace(length=LENGTH, sequences=sequences, shards=LANES), folder / "shards")
    for seed, shape in enumerate((SMALL_TEACHER if options.small else TEACHER, *students)):
        torch.manual_seed(seed)
        name = str(shape) if seed else "teacher"
        new_model(config(shape)).save_pretrained(folder / name)


def config(shape: Shape) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=12,
        intermediate_size=shape.ffn,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def measure(options: argparse.Namespace, folder: Path, student: Shape, written: dict[str, Any]) -> dict[str, Any]:
    """Equality, then time, of one student's arms."""
    with ExitStack() as exits:
        arms = {
            arm: exits.enter_context(Turns(training, options, folder, arm, student)) for arm in (LIVE, CACHED, NONE)
        }
        assert_equal(arms[LIVE](), _once(Turns(training, options, folder, EXACT, student)), precision(options))
        timings = interleave(arms, options.rounds, str(student))
    sequences = options.sequences * options.micro_batches * options.updates
    a_sequence = {arm: timings.median(arm) / sequences for arm in arms}
    faster, ceiling = timings.ratio(LIVE, CACHED), arithmetic_ceiling(options, folder, student)
    return {
        "student": str(student),
        "precision": options.precision,
        "sequences": options.sequences,
        "micro-batches": options.micro_batches,
        "keep": options.keep,
        "updates/s": {arm: options.updates / timings.median(arm) for arm in arms},
        "cached / live": faster,
        "wanted": WANTED.get(student, WANTED_OF_CEILING * ceiling),
        "ceiling": ceiling,
        "of the ceiling": faster / ceiling,
        "cached / none": timings.ratio(NONE, CACHED),
        "writing": written,
        "epochs to pay": written["seconds"] / written["sequences"] / (a_sequence[LIVE] - a_sequence[CACHED]),
        "seconds": timings.seconds,
    }


def _once(turns: Turns) -> Any:
    with turns as step:
        return step()


@contextmanager
def training(options: argparse.Namespace, folder: Path, arm: str, student: Shape) -> Iterator[Step]:
    """So many updates of one arm, as a run would make them; gives the losses of each."""
    with started_ranks() as ranks:
        plan = planned(options, folder, arm, student)
        teacher, stream = open_teacher_and_stream(plan, teacher_settings(plan), ranks)
        engine = open_student(plan, RunState(update=0, shape=plan.start), ranks)
        coming = stream.updates(0, sys.maxsize)

        def step() -> list[dict[str, float]]:
            found = []
            for update, batch in islice(coming, options.updates):
                ranks.seed(0, update)
                found.append(engine.accumulate(batch, teacher))
                engine.update(RATE)
            return [{name: loss.item() for name, loss in losses.items()} for losses in found]  # waits for all of it

        yield step


@contextmanager
def writing(options: argparse.Namespace, folder: Path, cache: str, student: Shape) -> Iterator[Step]:
    """The whole cache of an arm, loading the teacher included; any student's, for all compare the same of it."""
    with started_ranks() as ranks:
        plan = planned(options, folder, cache, student)
        stream = open_stream(plan, ranks)
        work = Work.of(plan, stream)

        def step() -> dict[str, float]:
            started = time.perf_counter()
            record(plan, teacher_settings(plan), ranks)
            seconds = time.perf_counter() - started
            sequences = sum(piece.stop - piece.start for piece in work.pieces)
            return {"seconds": seconds, "sequences": sequences, "bytes a sequence": work.manifest.bytes_per_record}

        yield step


def planned(options: argparse.Namespace, folder: Path, arm: str, student: Shape) -> Plan:
    """For one rank."""
    run, index = configuration(options, folder, arm, student), ShardIndex.load(folder / "shards")
    return plan_run(run, index, DeepSpeedConfig.load(ZERO2, precision(options)), 1)


def configuration(options: argparse.Namespace, folder: Path, arm: str, student: Shape) -> RunConfig:
    size = options.sequences
    batches = {"global_batch": size * options.micro_batches, "micro_batch": size, "lanes": LANES, "maskings": 1}
    return RunConfig.model_validate(
        {
            "run": {"name": arm, "directory": folder / "runs"},
            "teacher": {"path": None if arm == NONE else str(folder / "teacher")},
            "student": {"path": str(folder / str(student))},
            "knowledge": {"keep": options.keep},
            "cache": {"path": folder / f"{arm} cache", **CACHES[arm]} if arm in CACHES else {},
            "data": {"shards": folder / "shards", **batches},
            "objective": {"hidden": {"projection_init": "random"}, "attention": {"weight": 0}},
            "performance": {"compile": options.compile, "teacher_ahead": torch.cuda.is_available()},
        }
    )


def precision(options: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if options.precision == "bf16" else torch.float32


def teacher_settings(plan: Plan) -> DeepSpeedConfig:
    """Asked for, and not needed by a teacher that one rank holds whole."""
    return DeepSpeedConfig.load_teacher(DS_CONFIGS / "teacher_zero3.json", plan.ds_config)


def assert_equal(live: list[dict[str, float]], cached: list[dict[str, float]], dtype: torch.dtype) -> None:
    assert len(live) == len(cached)
    for expected, found in zip(live, cached, strict=True):
        assert {"task", "kl", "hidden"} == expected.keys() == found.keys()
        for name, loss in expected.items():
            close = isclose(found[name], loss, rel_tol=TOLERANCE[dtype])
            assert close, f"{name} is {found[name]} from an exact cache, {loss} beside the live teacher"


def arithmetic_ceiling(options: argparse.Namespace, folder: Path, student: Shape) -> float:
    """Arithmetic of an update beside a live teacher over that from a cache, counted: how many times as fast the latter
    could be, were arithmetic all that takes time."""
    plans = (planned(options, folder, arm, student) for arm in (LIVE, CACHED))
    live, cached = (
        micro_batch_cost(plan.blueprint, plan.start.widths, options.sequences, LENGTH, plan.dtype) for plan in plans
    )
    return live.flops / cached.flops


def show(rows: list[dict[str, Any]]) -> None:
    arms = (LIVE, CACHED, NONE)
    table = Table(
        "student",
        *(f"{arm}, updates/s" for arm in arms),
        "cached / live",
        "of ceiling",
        "cached / none",
        "pays after, epochs",
    )
    for row in rows:
        speeds = [f"{row['updates/s'][arm]:.3f}" for arm in arms]
        faster = f"{row['cached / live']:.2f} (wanted {row['wanted']:.2f})"
        of_ceiling = f"{row['of the ceiling']:.0%} of {row['ceiling']:.2f}"
        of_none = f"{row['cached / none']:.2f} (wanted {WANTED_OF_NONE:.2f})"
        table.add_row(row["student"], *speeds, faster, of_ceiling, of_none, f"{row['epochs to pay']:.2f}")
    written = rows[0]["writing"]
    Console(width=150).print(table)
    print(
        f"the cache took {written['seconds']:.1f} s to write, {written['sequences']} sequences of "
        f"{written['bytes a sequence']} bytes, loading the teacher included"
    )


if __name__ == "__main__":
    main()
