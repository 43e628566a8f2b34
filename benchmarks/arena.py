"""What benchmarks of the step share: a BERT of BERT-base's widths, batches, and this project's engines over them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM

from homodistil.batch import Batch
from homodistil.config import RunConfig
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import StudentEngine, TeacherEngine
from homodistil.machines import Machine
from homodistil.models import family_of
from homodistil.models.attention import attention_implementation
from homodistil.models.groups import kept_positions
from homodistil.models.loading import new_model
from homodistil.models.shape import StudentShape, Widths
from homodistil.planning import Planner
from homodistil.pruning.ladder import Ladder
from homodistil.pruning.surgery import narrow
from homodistil.ranks import Ranks
from homodistil.student import Blueprint

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
ZERO2 = DS_CONFIGS / "zero2.json"
WEIGHTS = {"task": 1.0, "kl": 1.0, "hidden": 1.0, "attention": 1.0}
BASE = Widths(hidden=768, ffn=3072, heads=12, head_width=64)
RATE = 1e-5


def bert(layers: int, seed: int, device: torch.device) -> BertForMaskedLM:
    """Of BERT-base's widths, without dropout, fp32."""
    torch.manual_seed(seed)
    config = BertConfig(num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = new_model(config, attention_implementation("auto"))
    assert isinstance(model, BertForMaskedLM)
    torch.nn.Module.to(model, device)  # past the wrapper, whose types hide it
    return model


def share_of(width: float) -> Widths:
    """Heads stay and get narrower with the hidden width, so that stock transformers can hold the student."""
    return Widths(int(BASE.hidden * width), int(BASE.ffn * width), BASE.heads, int(BASE.head_width * width))


def cut(model: BertForMaskedLM, shape: StudentShape) -> BertForMaskedLM:
    """A copy of `model`, narrowed to `shape`, with the original's attention scale."""
    model, family = copy.deepcopy(model), family_of(model.config)
    full = StudentShape.full(family.layers(model.config), family.widths(model.config))
    narrow(model, kept_positions(family.groups(full), shape.kept))
    family.configure(model, shape)
    return model


def run_config(sequences: int, **sections: Any) -> RunConfig:
    """All four terms; one micro-batch an update."""
    objective: dict[str, Any] = {name: {"weight": weight} for name, weight in WEIGHTS.items()}
    objective["kl"]["temperature"] = 1.0  # the references have none
    data = {"global_batch": sequences, "micro_batch": sequences}
    return RunConfig.model_validate(
        {"teacher": {"path": "in memory"}, "objective": objective, "data": data, **sections}
    )


def engines(
    run: RunConfig,
    teacher: BertForMaskedLM,
    student: BertForMaskedLM,
    shape: StudentShape | None,
    ranks: Ranks,
    ds_config: Path = ZERO2,
) -> tuple[StudentEngine, TeacherEngine]:
    """bf16: a student over a copy of `student`, of `shape` or whole, beside a replicated teacher. Collective."""
    config = teacher.config
    plan = Blueprint(family_of(config), config, run, attention_implementation(run.performance.attention))
    settings = DeepSpeedConfig.load(ds_config).resolved(run, ranks.world_size)
    settings["bf16"] = {"enabled": True}
    shape = shape or plan.full_shape
    engine = StudentEngine.build(plan, settings, ranks, model=copy.deepcopy(student).train(), shape=shape)
    compiled = run.performance.compile
    return engine, TeacherEngine(copy.deepcopy(teacher).bfloat16(), plan.family, ranks, None, compiled)


def planner(
    run: RunConfig, layers: int, length: int, ladder: Ladder, device: torch.device, ds_config: Path = ZERO2
) -> Planner:
    """What would foretell these arms' times, on this machine as it is now."""
    config = BertConfig(num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plan = Blueprint(family_of(config), config, run, attention_implementation(run.performance.attention))
    machine = Machine.here(device, torch.bfloat16)
    return Planner(plan, ladder, BASE, length, machine, DeepSpeedConfig.load(ds_config), torch.bfloat16)


def random_batch(sequences: int, length: int, seed: int = 0) -> Batch:
    """Full sequences of random words, 15 % of them masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 30000, (sequences, length), generator=generator)
    slots = round(0.15 * length)
    positions = torch.stack([torch.randperm(length, generator=generator)[:slots].sort()[0] for _ in range(sequences)])
    labels = ids.gather(1, positions)
    ids.scatter_(1, positions, 103)
    weights, samples = torch.ones(sequences, slots), torch.arange(sequences)
    return Batch(ids, torch.ones_like(ids), torch.zeros_like(ids), positions, labels, weights, samples, padded=False)
