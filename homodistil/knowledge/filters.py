"""Filters: maps of layers' outputs that keep what a task needs of them (TED, Liang et al. 2023, section 3.1).

A side branch: what a filter makes does not feed the next layer. Owns the maps, and the folder in which those of one
model lie between stage I, which learns them, and stage II, which compares what they let through. How they are learned
is learner.py's; how the student's follow its shrinking is aligners.py's.
"""

# B sequences, T tokens, D width of a layer's output, E width of what a filter makes of it: the teacher's

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

from homodistil.errors import ModelError
from homodistil.files import write_durably, write_text_durably

DESCRIPTION, WEIGHTS = "filters.json", "filters.safetensors"
HOW_TO_LEARN = "Learn them with launchers/learn_filters.py"


class Filter(nn.Module):
    """Linear(D, E) with bias, or Linear(D, H), an activation and Linear(H, E). At all positions; nothing else."""

    def __init__(self, width_in: int, width_out: int, inner: int | None = None, activation: str = "gelu") -> None:
        super().__init__()
        self.inner = nn.Linear(width_in, inner) if inner else None
        self.activation = ACT2FN[activation] if inner else None
        self.linear = nn.Linear(inner or width_in, width_out)

    def forward(self, states_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, E)."""
        if self.inner is None or self.activation is None:
            return self.linear(states_BTD)
        return self.linear(self.activation(self.inner(states_BTD)))

    @property
    def entrance(self) -> str:
        """Name of the parameter whose columns are D."""
        return "linear.weight" if self.inner is None else "inner.weight"

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """A square, single map hands its input on. Raises `ModelError` for any other."""
        if self.inner is not None or self.linear.in_features != self.linear.out_features:
            raise ModelError(
                f"filters.init: identity, but a filter maps {self.linear.in_features} dimensions to "
                f"{self.linear.out_features}{' through an inner layer' if self.inner else ''}. Set it to random."
            )
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


class FilterDescription(BaseModel):
    """filters.json: what the filters of a folder fit."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """Where the model was whose filters they are."""
    model_sha256: str
    task: str
    layers: list[int]
    """Of that model, counted from 0."""
    width_in: int
    width_out: int
    inner: int | None = None
    activation: Literal["gelu", "relu", "tanh"] = "gelu"


class FilterSet:
    """One model's filters: layer -> `Filter`, fp32."""

    def __init__(self, description: FilterDescription, directory: Path, weights: Mapping[str, Tensor]) -> None:
        self.description, self.directory, self._weights = description, directory, weights

    @classmethod
    def load(cls, directory: Path) -> FilterSet:
        """From the folder that stage I left. Raises `ModelError`."""
        path = directory / DESCRIPTION
        return _load(directory, path.stat().st_mtime_ns if path.exists() else 0)

    def filter(self, layer: int) -> Filter:
        """A copy of the filter at `layer`, with its own memory."""
        d = self.description
        made = Filter(d.width_in, d.width_out, d.inner, d.activation)
        prefix = f"{layer}."
        own = {name.removeprefix(prefix): w for name, w in self._weights.items() if name.startswith(prefix)}
        made.load_state_dict(own)
        return made

    def check(self, key: str, sha256: str, layers: Iterable[int], width_in: int, width_out: int, task: str) -> None:
        """Raise `ModelError` unless these are filters of the model with that hash, for these layers, widths and task.

        key: the configuration's, such as teacher.filters.
        """
        d, where = self.description, f"{key} {self.directory}"
        if d.model_sha256 != sha256:
            raise ModelError(f"{where}: learned on other weights, those of {d.model}. {HOW_TO_LEARN} on this model.")
        if d.task != task:
            raise ModelError(f"{where}: learned for the task {d.task}, but this run's is {task}. {HOW_TO_LEARN}.")
        if missing := sorted(set(layers) - set(d.layers)):
            raise ModelError(
                f"{where}: has filters on layers {d.layers}, but layers {missing} are compared. {HOW_TO_LEARN} and the "
                "same knowledge.interval and knowledge.layers."
            )
        if (d.width_in, d.width_out) != (width_in, width_out):
            raise ModelError(
                f"{where}: maps {d.width_in} dimensions to {d.width_out}, but here it is {width_in} to {width_out}. "
                f"{HOW_TO_LEARN} for this teacher and student."
            )


def save_filters(directory: Path, weights: Mapping[str, Tensor], description: FilterDescription) -> Path:
    """Write a folder that `FilterSet.load` reads, the description last. weights: `LAYER.parameter` -> fp32."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / DESCRIPTION).unlink(missing_ok=True)
    whole = {name: weight.contiguous() for name, weight in weights.items()}
    write_durably(directory / WEIGHTS, lambda partial: save_file(whole, partial))
    write_text_durably(directory / DESCRIPTION, description.model_dump_json(indent=1) + "\n")
    return directory


@cache
def _load(directory: Path, _written: int) -> FilterSet:
    path = directory / DESCRIPTION
    if not path.is_file():
        raise ModelError(
            f"{directory}: there is no {DESCRIPTION}, so no filters. {HOW_TO_LEARN}, or set "
            "teacher.filters, student.filters to those that another run has learned."
        )
    try:
        description = FilterDescription.model_validate_json(path.read_bytes())
        weights = load_file(directory / WEIGHTS)
        found = FilterSet(description, directory, weights)
        for layer in description.layers:
            found.filter(layer)
    except (ValidationError, OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise ModelError(f"{directory}: the filters cannot be read ({error}). {HOW_TO_LEARN} again.") from None
    return found
