"""What the distributed tests share: an engine over the awkward BERT, in fp32, with clipping and accumulation."""

from __future__ import annotations

import copy
from typing import Any

from homodistil.batch import Batch
from homodistil.config import RunConfig
from homodistil.engine import StudentEngine, TeacherEngine
from homodistil.models import family_of
from homodistil.models.attention import attention_implementation
from homodistil.models.bert import BertFamily
from homodistil.ranks import Ranks
from homodistil.student import Blueprint
from tests import fixtures, twin

GLOBAL_BATCH = 8
ACCUMULATION = 2
TARGET = {"hidden": 42, "ffn": 69, "heads": 6, "head_width": 7}
"""Odd on purpose: no world size divides them."""


def run_config(**pruning: Any) -> RunConfig:
    values = {
        "teacher": {"path": "in memory"},
        "objective": {name: {"weight": weight} for name, weight in twin.WEIGHTS.items()},
        "pruning": {
            "target": TARGET,
            "smoothing_window": twin.WINDOW,
            "smoothing_beta": twin.BETA,
            "ffn_multiple": 1,
            **pruning,
        },
    }
    return RunConfig.model_validate(values)


def settings(stage: int, world_size: int, fused: bool = False) -> dict[str, Any]:
    """Buckets far smaller than the model, so that gradients are reduced in many pieces."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 5000, "overlap_comm": False}
    zero3 = {"stage3_param_persistence_threshold": 200, "memory_efficient_linear": False}
    zero |= zero3 if stage == 3 else {"allgather_bucket_size": 5000, "reduce_scatter": False}
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // ACCUMULATION // world_size,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": twin.CLIP,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "torch_adam": True,
                "fused": fused,
                "lr": twin.LR,
                "betas": twin.BETAS,
                "eps": twin.EPS,
                "weight_decay": twin.DECAY,
            },
        },
    }


def blueprint(run: RunConfig) -> Blueprint:
    config = fixtures.bert_config()
    return Blueprint(family_of(config), config, run, attention_implementation("sdpa"))


def live_bert(seed: int = 0) -> Any:
    """The awkward BERT with the attention function that hands out queries and keys."""
    model = copy.deepcopy(fixtures.bert(seed))
    model.set_attn_implementation(attention_implementation("sdpa"))
    return model


def student_engine(stage: int, run: RunConfig | None = None, seed: int = 0) -> StudentEngine:
    """A student that is the teacher. Collective."""
    ranks, plan = Ranks.current(), blueprint(run or run_config())
    model = live_bert(seed).train()
    return StudentEngine.build(plan, settings(stage, ranks.world_size), ranks, model=model, shape=plan.full_shape)


def teacher_engine(sharded: bool, seed: int = 0) -> TeacherEngine:
    ranks = Ranks.current()
    zero3 = {"stage": 3, "memory_efficient_linear": False}
    settings = {"zero_optimization": zero3, "train_micro_batch_size_per_gpu": 1}
    return TeacherEngine(live_bert(seed), BertFamily(), ranks, settings if sharded else None)


def global_batch(update: int) -> Batch:
    return fixtures.batch(sequences=GLOBAL_BATCH, seed=update)


def local_batch(update: int) -> Batch:
    """This rank's rows of the update's global batch."""
    ranks = Ranks.current()
    share = GLOBAL_BATCH // ranks.world_size
    return global_batch(update).rows(ranks.rank * share, (ranks.rank + 1) * share)
