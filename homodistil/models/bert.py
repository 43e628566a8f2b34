"""BertFamily: what a BertForMaskedLM is made of. The only file that knows BERT's module names.

`BertForMaskedLM` carries no pooler and ties its decoder to the word embeddings; a config that says otherwise is
refused by `widths`. Rows of the word, position and token-type embeddings, and the decoder's bias, are per word,
position and type: no group owns them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.bert.modeling_bert import BertForMaskedLM, BertSelfAttention

from homodistil.batch import Batch
from homodistil.errors import ShapeError
from homodistil.models.groups import Member, PrunableGroup
from homodistil.models.shape import HIDDEN, StudentShape, Widths, ffn, heads, nearest_stock, qk, vo
from homodistil.signals import Signals

# B sequences, T tokens, D hidden width, S scored slots, V vocabulary

WORDS = "bert.embeddings.word_embeddings"
TRANSFORM = "cls.predictions.transform"


class BertFamily:
    """BERT with absolute positions and a tied masked-language-model head."""

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
        assert isinstance(model, BertForMaskedLM)
        encoder = model.bert.encoder
        encoder.layer = nn.ModuleList(encoder.layer[layer] for layer in layers)
        for config in {id(module.config): module.config for module in (model, model.bert, encoder)}.values():
            config.num_hidden_layers = len(layers)

    def groups(self, shape: StudentShape) -> list[PrunableGroup]:
        """SPEC 1.2's table for a model of this shape; a head's group comes before those of its dimensions."""
        groups = [PrunableGroup(HIDDEN, shape.widths.hidden, _hidden_members(shape.layers))]
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
        if not widths.is_stock:
            near = nearest_stock(widths.hidden, widths.heads, widths.hidden)
            raise ShapeError(
                f"A BertConfig cannot express {widths}: hidden must be heads x head width. "
                f"Nearest that it can, with {widths.heads} heads: hidden {near}."
            )
        stock = copy.deepcopy(config)
        _write_widths(stock, widths)
        return stock

    def fold_attention_scale(self, shape: StudentShape) -> dict[str, float]:
        """Factors on the query weights and biases; 1 while the head width is the teacher's."""
        factor = math.sqrt(shape.widths.head_width / shape.teacher.head_width)
        queries = [f"{_layer(layer)}.attention.self.query" for layer in range(shape.layers)]
        return {f"{query}.{kind}": factor for query in queries for kind in ("weight", "bias")}

    def signals(self, model: PreTrainedModel, batch: Batch) -> Signals:
        """One forward pass. `model` must use an attention function that hands out (query, key) as its weights.

        Modules are called and their parameters never read here, so that ZeRO-3 gathers them in time.
        """
        assert isinstance(model, BertForMaskedLM)
        outputs = model.bert(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask if batch.padded else None,
            token_type_ids=torch.zeros_like(batch.input_ids),
            output_hidden_states=True,
            output_attentions=True,
        )
        last_BTD = outputs.last_hidden_state
        index_BSD = batch.scored_positions.unsqueeze(-1).expand(-1, -1, last_BTD.shape[-1])
        return Signals(
            hidden_states=tuple(outputs.hidden_states),
            queries_keys=tuple(outputs.attentions),
            attention_scale=next(_attentions(model)).scaling,
            logits=model.cls(last_BTD.gather(1, index_BSD)),
        )


def _attentions(model: nn.Module) -> Iterator[BertSelfAttention]:
    return (module for module in model.modules() if isinstance(module, BertSelfAttention))


def _hidden_members(layers: int) -> tuple[Member, ...]:
    embeddings = "bert.embeddings"
    members = _columns(WORDS) + _columns(f"{embeddings}.position_embeddings")
    members += _columns(f"{embeddings}.token_type_embeddings")
    members += _norm(f"{embeddings}.LayerNorm", written_by=(f"{WORDS}.weight", 1))
    for name in map(_layer, range(layers)):
        for projection in ("query", "key", "value"):
            members += _columns(f"{name}.attention.self.{projection}")
        members += _columns(f"{name}.intermediate.dense")
        members += _writer(f"{name}.attention.output") + _writer(f"{name}.output")
    return members + _writer(TRANSFORM) + _columns(f"{TRANSFORM}.dense")


def _ffn_group(layer: int, shape: StudentShape) -> PrunableGroup:
    name = _layer(layer)
    members = _rows(f"{name}.intermediate.dense") + _columns(f"{name}.output.dense")
    return PrunableGroup(ffn(layer), shape.widths.ffn, members)


def _heads_group(layer: int, shape: StudentShape) -> PrunableGroup:
    name, width = _layer(layer), shape.widths.head_width
    members = _columns(f"{name}.attention.output.dense", width=width)
    for projection in ("query", "key", "value"):
        members += _rows(f"{name}.attention.self.{projection}", width=width)
    return PrunableGroup(heads(layer), shape.widths.heads, members)


def _head_width_groups(layer: int, shape: StudentShape) -> list[PrunableGroup]:
    name, width = _layer(layer), shape.widths.head_width
    groups = []
    for position, head in enumerate(shape.kept[heads(layer)]):
        offset, parent = position * width, (heads(layer), position)
        queries, keys, values = (_rows(f"{name}.attention.self.{p}", offset) for p in ("query", "key", "value"))
        written = _columns(f"{name}.attention.output.dense", offset)
        groups.append(PrunableGroup(qk(layer, head), width, queries + keys, parent))
        groups.append(PrunableGroup(vo(layer, head), width, values + written, parent))
    return groups


def _layer(layer: int) -> str:
    return f"bert.encoder.layer.{layer}"


def _rows(linear: str, offset: int = 0, width: int = 1) -> tuple[Member, ...]:
    """Outputs of a linear map: its rows, with their biases."""
    matrix = (f"{linear}.weight", 0)
    return Member(*matrix, matrix, offset, width), Member(f"{linear}.bias", 0, matrix, offset, width)


def _columns(linear: str, offset: int = 0, width: int = 1) -> tuple[Member, ...]:
    """Inputs of a linear map, or the dimensions of an embedding."""
    matrix = (f"{linear}.weight", 1)
    return (Member(*matrix, matrix, offset, width),)


def _norm(norm: str, written_by: tuple[str, int]) -> tuple[Member, ...]:
    return Member(f"{norm}.weight", 0, written_by), Member(f"{norm}.bias", 0, written_by)


def _writer(block: str) -> tuple[Member, ...]:
    """A dense map into the residual stream and the LayerNorm behind it."""
    return _rows(f"{block}.dense") + _norm(f"{block}.LayerNorm", written_by=(f"{block}.dense.weight", 0))


def _write_widths(config: PretrainedConfig, widths: Widths) -> None:
    config.hidden_size = widths.hidden
    config.intermediate_size = widths.ffn
    config.num_attention_heads = widths.heads
