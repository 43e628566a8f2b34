"""Teacher: whoever hands over knowledge for a batch. FrozenModel is the live one's module."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from homodistil.batch import Batch
from homodistil.models.base import ModelFamily
from homodistil.signals import Knowledge


class Teacher(Protocol):
    """Live or cached, behind one question."""

    config: PretrainedConfig
    parameters: int

    def knowledge(self, batch: Batch) -> Knowledge:
        """What the student should match on this batch. Live and sharded: collective."""
        ...

    def close(self) -> None: ...


class FrozenModel(nn.Module):
    """A model in eval mode whose forward gives its signals as plain tuples, which ZeRO-3's hooks can walk."""

    def __init__(self, model: PreTrainedModel, family: ModelFamily) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.family = family

    @torch.no_grad()
    def forward(self, *batch: Any) -> tuple[object, ...]:
        signals = self.family.signals(self.model, Batch(*batch))
        return signals.hidden_states, signals.queries_keys, signals.attention_scale, signals.logits
