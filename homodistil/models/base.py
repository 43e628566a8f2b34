"""ModelFamily: all that the rest of the house may ask of an architecture. HF module names live in this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from homodistil.batch import Batch
from homodistil.models.groups import PrunableGroup
from homodistil.models.shape import StudentShape, Widths
from homodistil.signals import Signals
from homodistil.tasks import Kind

# B sequences, T tokens, D hidden width, S scored slots, V vocabulary, classes or positions


class ModelFamily(Protocol):
    """One object per architecture and kind of task, without state. Parameter names are the Hugging Face model's own."""

    @property
    def kind(self) -> Kind:
        """What its models are asked for."""
        ...

    kinds: ClassVar[tuple[Kind, ...]]
    """What models of this architecture can be asked for."""
    causal: ClassVar[bool]
    """Whether a token sees those before it alone."""
    pre_norm: ClassVar[bool]
    """Whether hidden states are what no LayerNorm has standardised."""
    own_attention: ClassVar[bool]
    """Whether attention is the architecture's own code, so that no attention function can be chosen for it."""

    def for_config(self, config: PretrainedConfig) -> ModelFamily:
        """The family of models with this config, which may decide which tensors there are."""
        ...

    @property
    def head_names(self) -> tuple[str, ...]:
        """How the names of parameters begin that only this task's models have."""
        ...

    def widths(self, config: PretrainedConfig) -> Widths:
        """The shape that a config describes. Raises `ShapeError` for what cannot be distilled."""
        ...

    def layers(self, config: PretrainedConfig) -> int: ...

    def with_layers(self, config: PretrainedConfig, count: int) -> PretrainedConfig:
        """A copy of a config, with so many layers."""
        ...

    def keep_layers(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        """Drop all other layers of a model, in place."""
        ...

    def groups(self, shape: StudentShape) -> list[PrunableGroup]:
        """Every prunable group of a model of this shape; sizes are the shape's, not the teacher's."""
        ...

    def configure(self, model: PreTrainedModel, shape: StudentShape) -> None:
        """After the tensors were narrowed: set the module attributes that follow from the shape (head counts,
        widths, the attention scale of the original model), never touching a parameter."""
        ...

    def stock_config(self, config: PretrainedConfig, widths: Widths) -> PretrainedConfig:
        """A copy of the teacher's config for a plain model of these widths. Raises `ShapeError`, naming the
        nearest widths that a stock config can express."""
        ...

    def fold_attention_scale(self, shape: StudentShape) -> Mapping[str, float | Tensor]:
        """Parameter -> factor, or factors that broadcast with it, with which a stock model, which scales by its own
        head width, computes the same scores: sqrt(d_new / d_original) on each query weight and bias."""
        ...

    def signals(self, model: PreTrainedModel, batch: Batch, with_logits: bool = True) -> Signals:
        """One forward pass; vocabulary logits only at the scored positions. with_logits: else (B, S, 0) of them."""
        ...

    def head(self, model: PreTrainedModel) -> nn.Module:
        """The modules of a model that make logits of its last layer's output."""
        ...

    def logits(self, head: nn.Module, states_BTD: Tensor, batch: Batch) -> Tensor:
        """(B, S, V) of what a layer gave, or a filter made of it, through a `head`."""
        ...
