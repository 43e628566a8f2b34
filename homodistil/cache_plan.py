"""What a run asks of a cache: whose knowledge, of what, in which layout. The same for its writer and its readers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import nn
from transformers import PreTrainedModel

from homodistil.batch import Piece
from homodistil.config import CacheConfig, RunConfig
from homodistil.data.examples import TaskData, TaskStream
from homodistil.data.stream import Stream
from homodistil.errors import CacheError
from homodistil.files import checksum, write_durably
from homodistil.knowledge.cached import HEAD, Cache
from homodistil.knowledge.recording import Recording
from homodistil.models.loading import new_model
from homodistil.run_plan import Plan

SMALLEST_HELD_OUT = 128
"""Held-out sequences that a cache has at least: what variances are measured on."""


class Layouts(NamedTuple):
    """Of the two kinds of rows."""

    training: Recording
    validation: Recording
    """A language model's last hidden states, whatever training rows hold: what is measured on them is exact."""


def layouts(plan: Plan) -> Layouts:
    """How rows lie in the run's cache."""
    run, blueprint, source = plan.run, plan.blueprint, plan.source
    if isinstance(source, TaskData):
        slots = source.splits["validation"].labels.shape[1]
        vocabulary = source.sequence_length if plan.task.kind == "span" else plan.task.labels
    else:
        tokens = source.sequence_length
        slots = tokens - 1 if plan.family.causal else round(run.data.mask_probability * tokens)
        vocabulary = source.vocab_size
    is_hidden = run.objective.hidden.weight > 0

    def layout(config: CacheConfig) -> Recording:
        return Recording.of(
            config,
            blueprint.selection,
            states=blueprint.compared.states if is_hidden else 0,
            tokens=source.sequence_length,
            slots=slots,
            vocabulary=vocabulary,
            dtype=plan.dtype,
            temperature=run.objective.kl.temperature,
            is_language=plan.task.is_language_modeling,
        )

    return Layouts(layout(run.cache), layout(run.cache.model_copy(update={"logits": "states"})))


def identity(plan: Plan) -> dict[str, Any]:
    """What a run and its cache must have in common, by the keys of the configuration where there are."""
    run, compared = plan.run, plan.blueprint.compared
    found: dict[str, Any] = {
        "task.name": run.task.name,
        "hash of the data": plan.source.sha256,
        "hash of the tokenizer": plan.source.tokenizer_sha256,
        "hash of teacher.path": plan.identity["teacher"],
        "precision": str(plan.dtype).removeprefix("torch."),
    }
    if run.objective.hidden.weight > 0:
        if run.objective.hidden.aligner == "filter":
            found["hash of teacher.filters"] = plan.identity["teacher_filters"]
        found |= {"teacher's states": list(compared.teacher_states), "cache.values": run.cache.values}
        share = run.knowledge.share
        found |= {"knowledge.keep tokens": share.tokens, "knowledge.keep units": share.units}
        found |= {"knowledge.tokens": run.knowledge.tokens} if share.tokens else {}
        found |= {"knowledge.units": run.knowledge.units} if share.units else {}
    if plan.task.kind == "masked":
        found |= {f"data.{key}": getattr(run.data, key) for key in ("mask_probability", "whole_word")}
    if plan.task.is_language_modeling:
        found["cache.logits"] = run.cache.logits
        if run.cache.logits != "states":
            found[f"cache.{run.cache.logits}"] = getattr(run.cache, run.cache.logits)
            found["objective.kl.temperature"] = run.objective.kl.temperature
    else:
        found["task.max_length"] = run.task.max_length
    drawn = (plan.task.kind == "masked", run.cache.logits == "draws" and plan.task.is_language_modeling)
    if any(drawn) or "random" in (found.get("knowledge.tokens"), found.get("knowledge.units")):
        found["data.mask_seed"] = run.mask_seed
    return found


def pieces_read(run: RunConfig, stream: Stream | TaskStream) -> list[Piece]:
    """What a run will ask its cache about."""
    count = maskings(run, stream)
    if isinstance(stream, Stream):
        count = min(count, epochs(run, stream))
    return stream.pieces(count, held_out(run))


def maskings(run: RunConfig, stream: Stream | TaskStream) -> int:
    """That a cache holds: as many as the stream has, or else one for each epoch; a benchmark's examples have one."""
    return 1 if isinstance(stream, TaskStream) else stream.maskings or epochs(run, stream)


def epochs(run: RunConfig, stream: Stream) -> int:
    """That the run begins."""
    return math.ceil(run.run.updates / stream.updates_per_epoch)


def held_out(run: RunConfig) -> int:
    """Held-out sequences that the run reads, if there are so many."""
    return max(run.validation.sequences, SMALLEST_HELD_OUT)


def save_head(plan: Plan, model: PreTrainedModel, folder: Path) -> str:
    """The head of a teacher, beside its last hidden states. Returns its checksum."""
    weights = {name: weight.detach().cpu().clone() for name, weight in plan.family.head(model).state_dict().items()}
    content = save(weights)  # and not `save_file`: where a disk is full, it raises no OSError
    write_durably(folder / HEAD, lambda partial: partial.write_bytes(content))
    return checksum(folder / HEAD)


def load_head(plan: Plan, cache: Cache, device: torch.device) -> nn.Module:
    """The head that `save_head` left. Raises `CacheError`."""
    path = cache.folder / HEAD
    found = checksum(path) if path.is_file() else "none: it is missing"
    if found != cache.manifest.head:
        raise CacheError(
            f"{path}: its checksum is {found}, expected {cache.manifest.head}. Run cache_teacher.py again: it writes "
            "what is missing."
        )
    blueprint = plan.blueprint
    slim = blueprint.family.with_layers(blueprint.teacher_config, 1)  # a head does not depend on depth
    head = plan.family.head(new_model(slim, blueprint.attention, plan.task.kind))
    head.load_state_dict(load_file(path))
    return head.to(plan.dtype).to(device).eval().requires_grad_(False)


def recorded(plan: Plan) -> Plan:
    """The plan of a teacher that is recorded: what its student makes of units that are left out is not its affair."""
    run = plan.run.model_copy(deep=True)
    run.knowledge.left_out = "ignored"
    return replace(plan, run=run, blueprint=replace(plan.blueprint, run=run))
