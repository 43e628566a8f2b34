"""What a DeepSpeed JSON may say here: the settings that engine.py and zero.py support, and why not the others.

Filling the "auto"s is ds_config.py's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from homodistil.config import Section
from homodistil.errors import ConfigError
from homodistil.recipe import explain

REFUSED = {
    "fp16": "loss scaling would distort importance scores; use bf16",
    "amp": "removed from DeepSpeed; use bf16",
    "torch_autocast": "it is global to the process, so it would change the teacher too; use bf16",
    "scheduler": "the recipe's optimizer.warmup and optimizer.schedule decide the learning rate",
    "activation_checkpointing": "set performance.activation_checkpointing in the recipe",
    "compile": "set performance.compile in the recipe",
    "compression_training": "removed from DeepSpeed; pruning is the recipe's section `pruning`",
    "elasticity": "removed from DeepSpeed; the global batch stays the same on any number of ranks",
    "tensorboard": "every run writes its own TensorBoard events",
    "checkpoint": "runs write their own checkpoints, which fit any world size and ZeRO stage",
    "zero_optimization.offload_param": "weights, masters and moments stay on the device that prunes them",
    "zero_optimization.offload_optimizer": "weights, masters and moments stay on the device that prunes them",
}
"""Settings that DeepSpeed knows, or knew, and this project does without: the reason and the mend."""


class ZeroOptimization(Section):
    """The settings of `zero_optimization` under which masters and moments are found and sliced."""

    stage: Literal[1, 2, 3]
    contiguous_gradients: bool | None = None
    overlap_comm: bool | None = None
    reduce_scatter: bool | None = None
    reduce_bucket_size: int | None = Field(default=None, gt=0)
    allgather_partitions: bool | None = None
    allgather_bucket_size: int | None = Field(default=None, gt=0)
    round_robin_gradients: Literal[False] | None = None
    """With it a partition holds other parameters than DeepSpeed's own mapping says, by which they are found."""
    sub_group_size: int | None = Field(default=None, gt=0)
    memory_efficient_linear: Literal[False] = False
    """DeepSpeed's default puts a slower linear in place of torch's, in the whole process: in the other engine too."""
    stage3_prefetch_bucket_size: int | None = Field(default=None, ge=0)
    stage3_param_persistence_threshold: int | None = Field(default=None, ge=0)
    stage3_max_live_parameters: int | None = Field(default=None, ge=0)
    stage3_max_reuse_distance: int | None = Field(default=None, ge=0)


class OptimizerParams(Section):
    lr: float | None = Field(default=None, gt=0)
    betas: tuple[float, float] | None = None
    eps: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    fused: bool | None = None
    torch_adam: Literal[True]
    """torch's own AdamW: needs no compiler, and its moments are plain tensors that a prune can slice."""


class Optimizer(Section):
    type: Literal["AdamW"]
    params: OptimizerParams


class Bf16(Section):
    enabled: bool | None = None
    check_grad_overflow: Literal[True] | None = None  # without it a step is taken on gradients that are not finite


class DataTypes(Section):
    grad_accum_dtype: Literal["fp32", "bf16"] | None = None


class DeepSpeedJson(Section):
    """What a DeepSpeed JSON may say here, once its "auto"s are taken out."""

    zero_optimization: ZeroOptimization
    optimizer: Optimizer | None = None
    bf16: Bf16 = Bf16()
    data_types: DataTypes = DataTypes()
    communication_data_type: Literal["fp32", "bf16"] | None = None
    gradient_clipping: float | None = Field(default=None, ge=0)
    train_batch_size: int | None = Field(default=None, ge=1)
    train_micro_batch_size_per_gpu: int | None = Field(default=None, ge=1)
    gradient_accumulation_steps: int | None = Field(default=None, ge=1)
    steps_per_print: int | None = None
    wall_clock_breakdown: bool | None = None
    comms_logger: dict[str, Any] | None = None
    flops_profiler: dict[str, Any] | None = None


def read_json(path: Path) -> tuple[DeepSpeedJson, dict[str, Any], set[str]]:
    """The file checked; its nested values less the "auto"s; the dotted keys of those. Raises `ConfigError`."""
    values, autos = _without_autos(_parse(path))
    for key, reason in REFUSED.items():
        if get(values, key) is not None:
            raise ConfigError(f"{path}: {key} is not supported here: {reason}. Remove it.")
    try:
        return DeepSpeedJson.model_validate(values), values, autos
    except ValidationError as error:
        raise ConfigError(explain(error, DeepSpeedJson, lambda key: f"{key} in {path}")) from None


def get(values: Any, key: str) -> Any:
    """The value at a dotted key of nested dicts; None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _parse(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"DeepSpeed JSON {path} cannot be read: {error.strerror}. See ds_configs/.") from None
    except ValueError as error:
        raise ConfigError(f"DeepSpeed JSON {path} is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"DeepSpeed JSON {path}: expected an object, found {type(values).__name__}.")
    return values


def _without_autos(values: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], set[str]]:
    """Nested `values` less the "auto"s, and the dotted keys of those."""
    kept, autos = {}, set()
    for key, value in values.items():
        if isinstance(value, dict):
            kept[key], below = _without_autos(value, f"{prefix}{key}.")
            autos |= below
        elif value == "auto":
            autos.add(prefix + key)
        else:
            kept[key] = value
    return kept, autos
