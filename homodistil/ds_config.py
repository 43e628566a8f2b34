"""DeepSpeedConfig: a checked DeepSpeed JSON, and its "auto"s filled from the run.

The JSON owns ZeRO, precision, clipping, buckets and the optimizer's type; the recipe owns batch sizes and the
optimizer's values. What a JSON may say at all is ds_schema.py's. Nothing here imports DeepSpeed.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from homodistil.config import RunConfig
from homodistil.ds_schema import get, read_json
from homodistil.errors import ConfigError
from homodistil.hardware import has_bf16

OWNED_BY_RECIPE = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.micro_batch",
    "optimizer.params.lr": "optimizer.learning_rate",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "optimizer.params.fused": "performance.fused_adamw",
}
"""JSON key -> the recipe's key that fills its "auto"."""

ACCUMULATION, PRECISION = "gradient_accumulation_steps", "bf16.enabled"
FILLED = {*OWNED_BY_RECIPE, ACCUMULATION, PRECISION}


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A DeepSpeed JSON that was found sound. Made by `load` or `load_teacher`, before the run starts."""

    path: Path
    zero_stage: int
    dtype: torch.dtype
    """Of weights in the forward and backward pass; masters and moments are fp32."""
    values: dict[str, Any] = field(repr=False)
    """The file's own settings, without its "auto"s."""

    @classmethod
    def load(cls, path: Path, automatic: torch.dtype | None = None) -> DeepSpeedConfig:
        """A student's settings; `"bf16": {"enabled": "auto"}` is `automatic`, or bf16 where this hardware computes it.
        Raises `ConfigError`."""
        config = cls._read(path, automatic or (torch.bfloat16 if has_bf16() else torch.float32))
        if "optimizer" not in config.values:
            raise ConfigError(f'{path}: optimizer is missing. Expected {{"type": "AdamW", "params": {{...}}}}.')
        return config

    @classmethod
    def load_teacher(cls, path: Path, student: DeepSpeedConfig) -> DeepSpeedConfig:
        """A frozen teacher's settings; with `"bf16": {"enabled": "auto"}`, the student's precision. Raises
        `ConfigError`."""
        config = cls._read(path, student.dtype)
        if "optimizer" in config.values:
            raise ConfigError(f"{path}: a teacher is frozen and has no optimizer. Remove `optimizer`.")
        if config.zero_stage != 3:
            raise ConfigError(
                f"{path}: zero_optimization.stage is {config.zero_stage}, but without an optimizer DeepSpeed shards "
                "only at stage 3. Set it to 3, or set teacher.sharding to replicated."
            )
        return config

    @classmethod
    def _read(cls, path: Path, automatic: torch.dtype) -> DeepSpeedConfig:
        checked, values, autos = read_json(path)
        for key in sorted(autos - FILLED):
            raise ConfigError(f'{path}: {key} is "auto", but nothing fills it. These may be: {sorted(FILLED)}.')
        stage = checked.zero_optimization.stage
        dtype = automatic if PRECISION in autos else torch.bfloat16 if checked.bf16.enabled else torch.float32
        if stage == 1 and dtype == torch.bfloat16 and checked.data_types.grad_accum_dtype == "fp32":
            raise ConfigError(
                f"{path}: data_types.grad_accum_dtype is fp32 at ZeRO stage 1 with bf16: DeepSpeed then takes another "
                "optimizer, which cannot be pruned. Use stage 2, which accumulates in fp32, or leave data_types out."
            )
        return cls(path, stage, dtype, values)

    def adopted_by(self, run: RunConfig) -> RunConfig:
        """`run` with the values that only this file sets. Raises `ConfigError` for one that the
        recipe sets otherwise."""
        run = run.model_copy(deep=True)
        for key, recipe_key in OWNED_BY_RECIPE.items():
            value = get(self.values, key)
            if value is None:
                continue
            section, name = _section_of(run, recipe_key)
            value = tuple(value) if isinstance(value, list) else value
            if getattr(section, name) != value and (place := run.origin(recipe_key)):
                raise ConfigError(
                    f"{key} is {value!r} in {self.path}, and {place} is {getattr(section, name)!r}: one value, set "
                    f'twice. Write "auto" in the JSON, or leave {recipe_key} out.'
                )
            setattr(section, name, value)
        return run

    def resolved(self, run: RunConfig, world_size: int) -> dict[str, Any]:
        """The dict for `deepspeed.initialize`, every "auto" filled. Raises `ConfigError` for a global batch that
        `world_size` ranks cannot share."""
        values = deepcopy(self.values)
        for key, recipe_key in OWNED_BY_RECIPE.items():
            if "optimizer" in values or not key.startswith("optimizer."):
                _set(values, key, getattr(*_section_of(run, recipe_key)))
        micro_batch = micro_batch_size(run.data.global_batch, run.data.micro_batch, world_size)
        _set(values, "train_micro_batch_size_per_gpu", micro_batch)
        _set(values, ACCUMULATION, self._accumulation(run, micro_batch, world_size))
        _set(values, PRECISION, self.dtype == torch.bfloat16)
        if self.zero_stage == 3:  # DeepSpeed would replace torch's linear process-wide, in the other engine too
            _set(values, "zero_optimization.memory_efficient_linear", False)
        return values

    def _accumulation(self, run: RunConfig, micro_batch: int, world_size: int) -> int:
        data = run.data
        steps = data.global_batch // (micro_batch * world_size)
        if self.values.get(ACCUMULATION, steps) != steps:
            raise ConfigError(
                f"{self.path}: {ACCUMULATION} is {self.values[ACCUMULATION]}, but data.global_batch "
                f"{data.global_batch} is micro-batches of {micro_batch} x {world_size} rank(s) x {steps}. "
                'Write "auto" in the JSON.'
            )
        return steps


def micro_batch_size(global_batch: int, largest: int, world_size: int) -> int:
    """The largest micro-batch, up to `largest`, of which every rank does equally many in an update. Raises
    `ConfigError`, naming the nearest global batches that the ranks can share."""
    share, rest = divmod(global_batch, world_size)
    if rest:
        batches = " or ".join(str(n * world_size) for n in (share, share + 1) if n)
        raise ConfigError(
            f"data.global_batch {global_batch} is not a multiple of {world_size} rank(s). Set data.global_batch to "
            f"{batches}, or start another number of ranks."
        )
    return next(size for size in range(min(largest, share), 0, -1) if share % size == 0)


def _section_of(run: RunConfig, key: str) -> tuple[Any, str]:
    section, name = key.split(".")
    return getattr(run, section), name


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value
