"""BertFamily: what BERT and its heads are made of. The only file that knows BERT's module names.

`BertForMaskedLM` carries no pooler and ties its decoder to the word embeddings; a config that says otherwise is
refused by `widths`. Rows of the word, position and token-type embeddings, and the decoder's bias, are per word,
position and type, and those of a task's head per class: no group owns them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.bert.modeling_bert import BertSelfAttention

from homodistil.batch import Batch
from homodistil.errors import ShapeError
from homodistil.models.groups import Member, PrunableGroup, columns, norm, rows
from homodistil.models.outputs import at_slots, signals_of, spans
from homodistil.models.shape import HIDDEN, StudentShape, Widths, ffn, heads, nearest_stock, qk, stock_config_at, vo
from homodistil.signals import Signals
from homodistil.tasks import Kind

# B sequences, T tokens, D hidden width, S scored slots, V vocabulary

WORDS = "bert.embeddings.word_embeddings"
TRANSFORM = "cls.predictions.transform"
POOLER = "bert.pooler.dense"
HEADS: dict[Kind, tuple[str, ...]] = {
    "masked": ("cls",),
    "classification": ("bert.pooler", "classifier"),
    "regression": ("bert.pooler", "classifier"),
    "span": ("qa_outputs",),
}


@dataclass(frozen=True)
class BertFamily:
    """BERT with absolute positions; as a masked language model with a tied head."""

    kind: Kind = "masked"
    kinds: ClassVar[tuple[Kind, ...]] = tuple(HEADS)
    causal: ClassVar[bool] = False
    pre_norm: ClassVar[bool] = False
    own_attention: ClassVar[bool] = False

    def for_config(self, _config: PretrainedConfig) -> BertFamily:
        return self

    @property
    def head_names(self) -> tuple[str, ...]:
        return HEADS[self.kind]

    def widths(self, config: PretrainedConfig) -> Widths:
        """The shape that a config describes. Raises `ShapeError` for decoders, untied heads and uneven heads."""
        for field, wanted in (("is_decoder", False), ("add_cross_attention", False), ("tie_word_embeddings", True)):
            if getattr(config, field) != wanted:
                raise ShapeError(
                    f"{config._name_or_path or 'BertConfig'}: {field} is {getattr(config, field)}, expected {wanted}. "
                    "Only bidirectional BERT encoders with a tied head can be distilled; use such a teacher."
                )
        if config.hidden_size % config.num_attention_heads:
            near = nearest_stock(config.hidden_size, config.num_attention_heads, config.hidden_size)
            raise ShapeError(
                f"{config._name_or_path or 'BertConfig'}: hidden_size {config.hidden_size} is not a multiple of "
                f"num_attention_heads {config.num_attention_heads}. Nearest that is: {near}."
            )
        return Widths(
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            heads=config.num_attention_heads,
            head_width=config.hidden_size // config.num_attention_heads,
        )

    def layers(self, config: PretrainedConfig) -> int:
        """Number of transformer layers."""
        return int(config.num_hidden_layers)

    def with_layers(self, config: PretrainedConfig, count: int) -> PretrainedConfig:
        config = copy.deepcopy(config)
        config.num_hidden_layers = count
        return config

    def keep_layers(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        encoder: Any = model.base_model.encoder
        encoder.layer = nn.ModuleList(encoder.layer[layer] for layer in layers)
        modules: tuple[Any, ...] = (model, model.base_model, encoder)
        for module in modules:
            module.config.num_hidden_layers = len(layers)

    def groups(self, shape: StudentShape) -> list[PrunableGroup]:
        """Those of docs/methods.md, "What is pruned", for this shape; a head's comes before those of its dimensions."""
        members = _hidden_members(shape.layers) + _head_members(self.kind)
        groups = [PrunableGroup(HIDDEN, shape.widths.hidden, members)]
        for layer in range(shape.layers):
            groups += [_ffn_group(layer, shape), _heads_group(layer, shape), *_head_width_groups(layer, shape)]
        return groups

    def configure(self, model: PreTrainedModel, shape: StudentShape) -> None:
        """Head counts, the original attention scale, and the width fields of the model's own config."""
        widths = shape.widths
        _write_widths(model.config, widths)
        for attention in _attentions(model):
            attention.num_attention_heads = widths.heads
            attention.attention_head_size = widths.head_width
            attention.all_head_size = widths.heads * widths.head_width
            attention.scaling = 1 / math.sqrt(shape.teacher.head_width)

    def stock_config(self, config: PretrainedConfig, widths: Widths) -> PretrainedConfig:
        """The teacher's config at other widths. Raises `ShapeError` unless hidden = heads x head width."""
        return stock_config_at(config, widths, _write_widths)

    def fold_attention_scale(self, shape: StudentShape) -> dict[str, float]:
        """Factors on the query weights and biases; 1 while the head width is the teacher's."""
        factor = math.sqrt(shape.widths.head_width / shape.teacher.head_width)
        queries = [f"{_layer(layer)}.attention.self.query" for layer in range(shape.layers)]
        return {f"{query}.{kind}": factor for query in queries for kind in ("weight", "bias")}

    def signals(self, model: PreTrainedModel, batch: Batch, with_logits: bool = True) -> Signals:
        """One forward pass. `model` must use an attention function that hands out (query, key) as its weights.

        Modules are called and their parameters never read here, so that ZeRO-3 gathers them in time.
        """
        outputs = model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask if batch.padded else None,
            token_type_ids=batch.token_type_ids,
            output_hidden_states=True,
            output_attentions=True,
        )
        logits = partial(self.logits, self.head(model)) if with_logits else None
        return signals_of(outputs, next(_attentions(model)).scaling, batch, logits)

    def head(self, model: Any) -> nn.Module:
        """Masked: transform and decoder; a classifier's pooler, dropout and last map; a span's last map."""
        if self.kind == "masked":
            return model.cls
        if self.kind == "span":
            return model.qa_outputs
        return nn.Sequential(model.bert.pooler, model.dropout, model.classifier)

    def logits(self, head: nn.Module, states_BTD: Tensor, batch: Batch) -> Tensor:
        """(B, S, V); a pooler takes the first token's state by itself."""
        if self.kind == "masked":
            return head(at_slots(states_BTD, batch))
        return spans(head(states_BTD), batch) if self.kind == "span" else head(states_BTD).unsqueeze(1)


def _attentions(model: nn.Module) -> Iterator[BertSelfAttention]:
    return (module for module in model.modules() if isinstance(module, BertSelfAttention))


def _hidden_members(layers: int) -> tuple[Member, ...]:
    embeddings = "bert.embeddings"
    members = columns(WORDS) + columns(f"{embeddings}.position_embeddings")
    members += columns(f"{embeddings}.token_type_embeddings")
    members += norm(f"{embeddings}.LayerNorm", written_by=(f"{WORDS}.weight", 1))
    for name in map(_layer, range(layers)):
        for projection in ("query", "key", "value"):
            members += columns(f"{name}.attention.self.{projection}")
        members += columns(f"{name}.intermediate.dense")
        members += _writer(f"{name}.attention.output") + _writer(f"{name}.output")
    return members


def _head_members(kind: Kind) -> tuple[Member, ...]:
    """A square map before the last one keeps the same dimensions on both axes."""
    if kind == "masked":
        return _writer(TRANSFORM) + columns(f"{TRANSFORM}.dense")
    if kind == "span":
        return columns("qa_outputs")
    return rows(POOLER) + columns(POOLER) + columns("classifier")


def _ffn_group(layer: int, shape: StudentShape) -> PrunableGroup:
    name = _layer(layer)
    members = rows(f"{name}.intermediate.dense") + columns(f"{name}.output.dense")
    return PrunableGroup(ffn(layer), shape.widths.ffn, members)


def _heads_group(layer: int, shape: StudentShape) -> PrunableGroup:
    name, width = _layer(layer), shape.widths.head_width
    members = columns(f"{name}.attention.output.dense", width=width)
    for projection in ("query", "key", "value"):
        members += rows(f"{name}.attention.self.{projection}", width=width)
    return PrunableGroup(heads(layer), shape.widths.heads, members)


def _head_width_groups(layer: int, shape: StudentShape) -> list[PrunableGroup]:
    name, width = _layer(layer), shape.widths.head_width
    groups = []
    for position, head in enumerate(shape.kept[heads(layer)]):
        offset, parent = position * width, (heads(layer), position)
        queries, keys, values = (rows(f"{name}.attention.self.{p}", offset) for p in ("query", "key", "value"))
        written = columns(f"{name}.attention.output.dense", offset)
        groups.append(PrunableGroup(qk(layer, head), width, queries + keys, parent))
        groups.append(PrunableGroup(vo(layer, head), width, values + written, parent))
    return groups


def _layer(layer: int) -> str:
    return f"bert.encoder.layer.{layer}"


def _writer(block: str) -> tuple[Member, ...]:
    """A dense map into the residual stream and the LayerNorm behind it."""
    return rows(f"{block}.dense") + norm(f"{block}.LayerNorm", written_by=(f"{block}.dense.weight", 0))


def _write_widths(config: PretrainedConfig, widths: Widths) -> None:
    config.hidden_size = widths.hidden
    config.intermediate_size = widths.ffn
    config.num_attention_heads = widths.heads
