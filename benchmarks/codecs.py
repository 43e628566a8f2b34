"""What each codec of a cache costs and loses: python -m benchmarks.codecs

Real text (../shared/data/lm), a real teacher (../shared/teacher/minilm-l6-mlm), a student of half its layers after some
updates beside it; skipped with the reason where these are not there. Codecs of hidden values are tried beside exact
predictions, codecs of predictions beside exact values, each with everything kept and with a selection. Rows are those
of the real layout, encoded and decoded in memory.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.arena import DS_CONFIGS, ZERO2
from benchmarks.interleaved import interleave, leave
from homodistil.batch import Batch
from homodistil.cache_plan import layouts, recorded
from homodistil.config import RunConfig
from homodistil.data.build import build_shards
from homodistil.data.shards import ShardIndex
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import TeacherEngine, started_ranks
from homodistil.knowledge.cached import Cache, CachedTeacher, Manifest
from homodistil.knowledge.recording import Recording
from homodistil.models.loading import load_model
from homodistil.objective.losses import divergence, log_probabilities, sparse_divergence
from homodistil.opening import first_model, live_teacher, open_stream
from homodistil.progress import progress_bar
from homodistil.ranks import Ranks
from homodistil.run_plan import Plan, plan_run
from homodistil.signals import Knowledge
from homodistil.student import Student, as_tuple

SHARED = Path("../shared")
TEACHER, TEXT = SHARED / "teacher/minilm-l6-mlm", SHARED / "data/lm/wikitext2_valid.txt"
LAYERS = [1, 3, 5]
"""Of the teacher's, that the student has."""
EXACT: dict[str, Any] = {"values": "fp32", "logits": "states"}
VALUES: dict[str, dict[str, Any]] = {name: {"values": name} for name in ("fp32", "fp16", "int8", "int4")}
PREDICTIONS: dict[str, dict[str, Any]] = {
    **{f"top_k {k}": {"logits": "top_k", "top_k": k} for k in (8, 32, 128)},
    **{f"draws {n}": {"logits": "draws", "draws": n} for n in (50, 200)},
    "states": {"logits": "states"},
}
KINDS = {"values": VALUES, "predictions": PREDICTIONS}
EVERYTHING, LENGTH, LANES = "everything", 128, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16, help="of a batch")
    parser.add_argument("--batches", type=int, default=4, help="that errors and gradients are averaged over")
    parser.add_argument("--updates", type=int, default=100, help="that the student has learned beside its teacher")
    parser.add_argument("--rounds", type=int, default=7, help="times encoding and decoding are measured")
    parser.add_argument("--keep", default="1l_10t_0.1h", help="the selection (knowledge.keep)")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the KL (objective.kl.temperature)")
    parser.add_argument("--small", action="store_true", help="only show that it works: no result is left")
    options = parser.parse_args()
    if missing := [str(path) for path in (TEACHER, TEXT) if not path.exists()]:
        print(f"skipped: {' and '.join(missing)} not there, and only a real teacher's real text tells codecs apart")
        return
    if options.small:
        options.sequences, options.batches, options.updates, options.rounds = 4, 1, 2, 1
    with started_ranks() as ranks, tempfile.TemporaryDirectory(prefix="codecs_") as folder:
        shards = Path(folder) / "shards"
        build_shards(str(TEXT), shards, tokenizer=TEACHER, sequence_length=[LENGTH], shards=LANES)
        rows = [row for keep in (None, options.keep) for row in measure(options, Path(folder), keep, ranks)]
    for kind in KINDS:
        Console(width=150).print(table(kind, rows, options.keep))
    print(f"a row's masked input takes {rows[0]['masked input']:.1f} bytes a token besides")
    print("nothing is left of a small run" if options.small else f"written to {leave('codecs', rows)}")


def measure(options: argparse.Namespace, folder: Path, keep: str | None, ranks: Ranks) -> list[dict[str, Any]]:
    """Every codec under one selection: sizes, errors and gradients, then speeds."""
    scene = Scene.of(options, folder, keep, ranks)
    codecs = {(kind, name): scene.codec(change) for kind, named in KINDS.items() for name, change in named.items()}
    kept, rows = keep or EVERYTHING, []
    with progress_bar(f"codecs, {kept}", len(codecs), "codec") as bar:
        for (kind, name), codec in codecs.items():
            found = {"kind": kind, "codec": name, "kept": kept, "temperature": options.temperature}
            rows.append({**found, **codec.size(kind), **scene.losses_of(codec)})
            bar.update()
    arms: dict[str, Callable[[], Any]] = {}
    for (kind, name), codec in codecs.items():
        arms[f"{kind} {name} encode"] = partial(codec.encode, scene.knowledge[0], scene.batches[0])
        arms[f"{kind} {name} decode"] = partial(
            codec.decode, codec.attached(scene.knowledge[0], scene.batches[0]), kind
        )
    timings, tokens = interleave(arms, options.rounds, f"speeds, {kept}"), options.sequences * LENGTH
    for row in rows:
        for way in ("encode", "decode"):
            row[f"{way}, tokens/s"] = tokens / timings.median(f"{row['kind']} {row['codec']} {way}")
    return rows


@dataclass(frozen=True)
class Codec:
    """One layout of rows, and who reads them."""

    layout: Recording
    reader: CachedTeacher

    def size(self, kind: str) -> dict[str, float]:
        """Bytes a token of what the codec is for, positions and units of values included."""
        parts = self.layout.parts
        own = ("predictions",) if kind == "predictions" else ("values", "positions", "units")
        return {
            "bytes a token": sum(parts[part] for part in own) / LENGTH,
            "masked input": parts["masked input"] / LENGTH,
        }

    def encode(self, knowledge: Knowledge, batch: Batch) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in self.layout.encode(knowledge, batch).items()}

    def attached(self, knowledge: Knowledge, batch: Batch) -> Batch:
        """A batch as the stream would bring it."""
        return replace(batch, recorded=self.encode(knowledge, batch))

    def decode(self, batch: Batch, kind: str = "predictions") -> Knowledge:
        """All of it; of values without what a head makes of the last states."""
        if kind == "predictions":
            return self.reader.knowledge(batch)
        assert batch.recorded is not None
        return self.layout.decode(batch.recorded, batch)


@dataclass(frozen=True)
class Scene:
    """A student that has begun to learn, batches, and what the live teacher says of them."""

    plan: Callable[[dict[str, Any]], Plan]
    """Of a run with such a cache."""
    student: Student
    batches: list[Batch]
    knowledge: list[Knowledge]
    gradients: list[Tensor]
    head: torch.nn.Module

    @classmethod
    def of(cls, options: argparse.Namespace, folder: Path, keep: str | None, ranks: Ranks) -> Scene:
        plan_of = partial(planned, options, folder, keep)
        plan = plan_of(EXACT)
        model = load_model(str(TEACHER), plan.dtype, plan.blueprint.attention, plan.task)
        settings = DeepSpeedConfig.load_teacher(DS_CONFIGS / "teacher_zero3.json", plan.ds_config)
        teacher = live_teacher(recorded(plan), model, settings, ranks, recorded=True)
        stream = open_stream(plan, ranks)
        total = options.updates + options.batches
        seen = (batch.to(ranks.device) for _, batch in stream.updates(0, total))
        student = Student(first_model(plan), plan.blueprint, plan.start).to(ranks.device).train()
        learn(student, teacher, list(islice(seen, options.updates)), options)
        batches = list(seen)
        knowledge = [teacher.knowledge(batch) for batch in batches]
        gradients = [gradient(student, *both) for both in zip(batches, knowledge, strict=True)]
        return cls(plan_of, student, batches, knowledge, gradients, plan.family.head(model))

    def codec(self, change: dict[str, Any]) -> Codec:
        plan = self.plan({**EXACT, **change})
        rows = layouts(plan)
        manifest = Manifest(
            identity={}, teacher_parameters=0, maskings=1, bytes_per_record=rows.training.bytes_per_record
        )
        cache = Cache(Path("in memory"), manifest)
        return Codec(rows.training, CachedTeacher(cache, plan.family, rows.training, rows.validation, self.head))

    def losses_of(self, codec: Codec) -> dict[str, float]:
        """Means over the batches of what is lost: of values, of the KL, of the student's gradient."""
        found = [self._loss(codec, *one) for one in zip(self.batches, self.knowledge, self.gradients, strict=True)]
        return {name: sum(one[name] for one in found) / len(found) for name in found[0]}

    def _loss(self, codec: Codec, batch: Batch, live: Knowledge, wanted: Tensor) -> dict[str, float]:
        cached = codec.decode(codec.attached(live, batch))
        exact, stored = (torch.cat([s.flatten() for s in k.hidden_states]).double() for k in (live, cached))
        kl, kl_stored = (self._divergences(batch, knowledge) for knowledge in (live, cached))
        cosine = F.cosine_similarity(gradient(self.student, batch, cached).double(), wanted.double(), dim=0)
        return {
            "values' squared error": ((stored - exact).square().sum() / exact.square().sum()).item(),
            "KL": kl.mean().item(),
            "KL's error": (kl_stored - kl).abs().mean().item(),
            "KL's bias": (kl_stored - kl).mean().item(),
            "gradient's cosine": cosine.item(),
        }

    def _divergences(self, batch: Batch, teacher: Knowledge) -> Tensor:
        """(B, S): each slot's KL(teacher || student), in nats, as far as `teacher` lets one know: the derivative of
        their weighted sum by the weights."""
        temperature = self.student.objective.config.kl.temperature
        with torch.no_grad():
            student_log_p = log_probabilities(
                self.student.family.signals(self.student.model, batch).logits, temperature
            )
        weights = torch.ones_like(batch.weights, requires_grad=True)
        if teacher.targets is not None:
            total = sparse_divergence(student_log_p, teacher.targets, weights)
        else:
            total = divergence(student_log_p, log_probabilities(teacher.logits, temperature), weights)
        return torch.autograd.grad(total, weights)[0]


def planned(options: argparse.Namespace, folder: Path, keep: str | None, cache: dict[str, Any]) -> Plan:
    batches = {"global_batch": options.sequences, "micro_batch": options.sequences, "lanes": LANES}
    run = RunConfig.model_validate(
        {
            "run": {"name": "codecs", "directory": folder / "runs"},
            "teacher": {"path": str(TEACHER)},
            "student": {"layers": LAYERS},
            "knowledge": {"keep": keep},
            "cache": {"path": folder / "never written", **cache},
            "data": {"shards": folder / "shards", **batches},
            "objective": {"kl": {"temperature": options.temperature}, "attention": {"weight": 0}},
        }
    )
    return plan_run(run, ShardIndex.load(folder / "shards"), DeepSpeedConfig.load(ZERO2, torch.float32), 1)


def learn(student: Student, teacher: TeacherEngine, batches: list[Batch], options: argparse.Namespace) -> None:
    """Plain AdamW, beside the live teacher."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4)
    with progress_bar("learning", len(batches), "update") as bar:
        for batch in batches:
            losses(student, batch, teacher.knowledge(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.update()


def gradient(student: Student, batch: Batch, knowledge: Knowledge) -> Tensor:
    """Of the whole objective, by all that is trained, in one vector."""
    trained = list(student.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses(student, batch, knowledge), trained)])


def losses(student: Student, batch: Batch, knowledge: Knowledge) -> Tensor:
    counts = batch.counts(student.selection.count(batch)).vector
    total: Tensor = student(as_tuple(batch), as_tuple(knowledge), counts)[0]
    return total


def table(kind: str, rows: list[dict[str, Any]], keep: str) -> Table:
    """Of one kind of codec; speeds with everything kept of values, and of predictions with as little of them."""
    found, names = Table(title=f"codecs of {kind}"), list(KINDS[kind])
    by_name = {(row["codec"], row["kept"]): row for row in rows if row["kind"] == kind}
    found.add_column("codec")
    for heading, kept, _ in columns(kind, keep):
        found.add_column(f"{heading}; {kept}", justify="right")
    for name in names:
        found.add_row(name, *(f"{by_name[name, kept][key]:{form}}" for key, kept, form in columns(kind, keep)))
    return found


def columns(kind: str, keep: str) -> list[tuple[str, str, str]]:
    """Of a row: key, what is kept, format."""
    timed = EVERYTHING if kind == "values" else keep
    errors = [("values' squared error", EVERYTHING, ".1e")] if kind == "values" else []
    if kind == "predictions":
        errors = [(key, EVERYTHING, ".2e") for key in ("KL", "KL's error", "KL's bias")]
    return [
        *errors,
        ("bytes a token", EVERYTHING, ",.1f"),
        ("bytes a token", keep, ",.1f"),
        ("gradient's cosine", EVERYTHING, ".7f"),
        ("gradient's cosine", keep, ".7f"),
        ("encode, tokens/s", timed, ",.0f"),
        ("decode, tokens/s", timed, ",.0f"),
    ]


if __name__ == "__main__":
    main()
