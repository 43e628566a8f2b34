"""DebertaFamily: what DeBERTa v2 and v3 and their heads are made of. Only `models/` knows these modules' names.

v3 shares the maps of contents with those of relative positions, v2 has maps of its own for these, and a convolution
beside its first layer: `Parts` says which. Rows of the embeddings, the relative positions among them, and the
decoder's bias are per word, type, position and bucket, and those of a task's head per class: no group owns them.

Attention compared with a teacher's is content with content alone [ours]: positions enter the values, as in any model,
through the hidden states.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from homodistil.batch import Batch
from homodistil.errors import ShapeError
from homodistil.models.deberta_attention import POSITIONS, adopt, attentions
from homodistil.models.groups import Member, PrunableGroup, columns, norm, rows
from homodistil.models.outputs import at_slots, signals_of, spans
from homodistil.models.shape import HIDDEN, StudentShape, Widths, ffn, heads, nearest_stock, qk, stock_config_at, vo
from homodistil.signals import Signals
from homodistil.tasks import Kind

# B sequences, T tokens, D hidden width, S scored slots, V vocabulary

EMBEDDINGS = "deberta.embeddings"
WORDS = f"{EMBEDDINGS}.word_embeddings"
ENCODER = "deberta.encoder"
RELATIVE = f"{ENCODER}.rel_embeddings"
CONVOLUTION = f"{ENCODER}.conv"
TRANSFORM = "cls.predictions.transform"
LM_HEAD = "lm_predictions.lm_head"
HEADS: dict[Kind, tuple[str, ...]] = {
    "masked": ("cls", "lm_predictions"),
    "classification": ("pooler", "classifier"),
    "regression": ("pooler", "classifier"),
    "span": ("qa_outputs",),
}

PUBLISHED = {"relative_attention": True, "tie_word_embeddings": True, "conv_groups": 1, "z_steps": 0}
"""What all published checkpoints have in common, and how we know their tensors."""


@dataclass(frozen=True)
class Parts:
    """Which tensors a config asks for; the defaults are DeBERTaV3's."""

    shared_keys: bool = True
    """Positions go through the query and key maps of contents."""
    positions: tuple[str, ...] = POSITIONS
    """Which scores are added to those of contents."""
    relative_norm: bool = True
    convolution: bool = False
    absolute_positions: bool = False
    token_types: bool = False
    legacy_head: bool = True
    """A masked model's head is BERT's, with a tied decoder; else one that is handed the word embeddings."""

    @classmethod
    def of(cls, config: Any) -> Parts:
        return cls(
            shared_keys=getattr(config, "share_att_key", False),
            positions=tuple(kind for kind in POSITIONS if kind in (config.pos_att_type or ())),
            relative_norm="layer_norm" in getattr(config, "norm_rel_ebd", "none").lower(),
            convolution=getattr(config, "conv_kernel_size", 0) > 0,
            absolute_positions=config.position_biased_input,
            token_types=config.type_vocab_size > 0,
            legacy_head=config.legacy,
        )

    @property
    def query_maps(self) -> tuple[str, ...]:
        """Of a layer's attention: what scores are scaled by, once each."""
        return ("query_proj",) + (("pos_query_proj",) if "p2c" in self.positions and not self.shared_keys else ())

    @property
    def key_maps(self) -> tuple[str, ...]:
        return ("key_proj",) + (("pos_key_proj",) if "c2p" in self.positions and not self.shared_keys else ())


@dataclass(frozen=True)
class DebertaFamily:
    """DeBERTa v2 and v3, with relative positions; as a masked language model with a tied head."""

    kind: Kind = "masked"
    parts: Parts = Parts()
    kinds: ClassVar[tuple[Kind, ...]] = tuple(HEADS)
    causal: ClassVar[bool] = False
    pre_norm: ClassVar[bool] = False
    own_attention: ClassVar[bool] = True

    def for_config(self, config: PretrainedConfig) -> DebertaFamily:
        return replace(self, parts=Parts.of(config))

    @property
    def head_names(self) -> tuple[str, ...]:
        return HEADS[self.kind]

    def widths(self, config: PretrainedConfig) -> Widths:
        """The shape that a config describes. Raises `ShapeError` for what no narrowed stock config could express."""
        where = config._name_or_path or "DebertaV2Config"
        if config.hidden_size % config.num_attention_heads:
            near = nearest_stock(config.hidden_size, config.num_attention_heads, config.hidden_size)
            raise ShapeError(
                f"{where}: hidden_size {config.hidden_size} is not a multiple of "
                f"num_attention_heads {config.num_attention_heads}. Nearest that is: {near}."
            )
        widths = Widths(
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            heads=config.num_attention_heads,
            head_width=config.hidden_size // config.num_attention_heads,
        )
        wanted: dict[str, tuple[Any, ...]] = {field: (width,) for field, width in _tied_fields(widths).items()}
        wanted |= {
            "relative_attention": (True,),
            "tie_word_embeddings": (True,),
            "conv_groups": (1,),
            "z_steps": (0, 1),
        }
        for field, values in wanted.items():
            if (found := getattr(config, field, values[0])) not in values:
                raise ShapeError(
                    f"{where}: {field} is {found}, expected {values[0]}. Only DeBERTa as published, one width from the "
                    "embeddings to the head and relative positions, can be distilled; use such a teacher."
                )
        if not Parts.of(config).positions:
            raise ShapeError(f"{where}: pos_att_type is {config.pos_att_type}, expected c2p, p2c or both.")
        return widths

    def layers(self, config: PretrainedConfig) -> int:
        """Number of transformer layers."""
        return int(config.num_hidden_layers)

    def with_layers(self, config: PretrainedConfig, count: int) -> PretrainedConfig:
        config = copy.deepcopy(config)
        config.num_hidden_layers = count
        return config

    def keep_layers(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        """The convolution stays beside whichever layer is then the first."""
        encoder: Any = model.base_model.encoder
        encoder.layer = nn.ModuleList(encoder.layer[layer] for layer in layers)
        modules: tuple[Any, ...] = (model, model.base_model)
        for module in modules:
            module.config.num_hidden_layers = len(layers)

    def groups(self, shape: StudentShape) -> list[PrunableGroup]:
        """Those of docs/methods.md, "What is pruned", for this shape; a head's comes before those of its dimensions."""
        members = self._embedding_members() + self._encoder_members(shape.layers) + self._head_members()
        groups = [PrunableGroup(HIDDEN, shape.widths.hidden, members)]
        for layer in range(shape.layers):
            groups += [_ffn_group(layer, shape), self._heads_group(layer, shape)]
            groups += self._head_width_groups(layer, shape)
        return groups

    def configure(self, model: PreTrainedModel, shape: StudentShape) -> None:
        """Head counts, the original attention scale, and the width fields of the model's own config."""
        adopt(model)
        widths = shape.widths
        _write_widths(model.config, widths)
        for attention in attentions(model):
            attention.num_attention_heads = widths.heads
            attention.attention_head_size = widths.head_width
            attention.all_head_size = widths.heads * widths.head_width
            attention.original_head_width = shape.teacher.head_width

    def stock_config(self, config: PretrainedConfig, widths: Widths) -> PretrainedConfig:
        """The teacher's config at other widths. Raises `ShapeError` unless hidden = heads x head width."""
        return stock_config_at(config, widths, _write_widths)

    def fold_attention_scale(self, shape: StudentShape) -> dict[str, float]:
        """Factors on the weights and biases of queries, of contents and positions."""
        factor = math.sqrt(shape.widths.head_width / shape.teacher.head_width)
        queries = [f"{_attention(layer)}.{query}" for layer in range(shape.layers) for query in self.parts.query_maps]
        return {f"{query}.{kind}": factor for query in queries for kind in ("weight", "bias")}

    def signals(self, model: PreTrainedModel, batch: Batch, with_logits: bool = True) -> Signals:
        """One forward pass. Queries and keys are those of contents.

        Stock code reads two tables past the modules that own them, the relative positions and, in a head that is not
        a legacy one, the words: ZeRO-3 gathers these when they are asked for.
        """
        adopt(model)
        outputs = model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,  # never None: stock code would make one of another type
            token_type_ids=batch.token_type_ids,
            output_hidden_states=True,
            output_attentions=True,
        )
        logits = partial(self.logits, self.head(model)) if with_logits else None
        return signals_of(outputs, 1 / math.sqrt(next(attentions(model)).original_head_width), batch, logits)

    def head(self, model: Any) -> nn.Module:
        """Masked: transform and decoder; a classifier's pooler, dropout and last map; a span's last map."""
        if self.kind == "masked":
            return model.cls if model.legacy else _WithWords(model.lm_predictions, model.deberta.embeddings)
        if self.kind == "span":
            return model.qa_outputs
        return nn.Sequential(model.pooler, model.dropout, model.classifier)

    def logits(self, head: nn.Module, states_BTD: Tensor, batch: Batch) -> Tensor:
        """(B, S, V); a pooler takes the first token's state by itself."""
        if self.kind == "masked":
            return head(at_slots(states_BTD, batch))
        return spans(head(states_BTD), batch) if self.kind == "span" else head(states_BTD).unsqueeze(1)

    def _embedding_members(self) -> tuple[Member, ...]:
        members = columns(WORDS) + norm(f"{EMBEDDINGS}.LayerNorm", written_by=(f"{WORDS}.weight", 1))
        if self.parts.absolute_positions:
            members += columns(f"{EMBEDDINGS}.position_embeddings")
        if self.parts.token_types:
            members += columns(f"{EMBEDDINGS}.token_type_embeddings")
        return members

    def _encoder_members(self, layers: int) -> tuple[Member, ...]:
        members = columns(RELATIVE)
        if self.parts.relative_norm:
            members += norm(f"{ENCODER}.LayerNorm", written_by=(f"{RELATIVE}.weight", 1))
        if self.parts.convolution:
            members += columns(f"{CONVOLUTION}.conv") + _writer(CONVOLUTION, "conv")
        for layer in range(layers):
            name = _layer(layer)
            for projection in (*self.parts.query_maps, *self.parts.key_maps, "value_proj"):
                members += columns(f"{_attention(layer)}.{projection}")
            members += columns(f"{name}.intermediate.dense")
            members += _writer(f"{name}.attention.output") + _writer(f"{name}.output")
        return members

    def _head_members(self) -> tuple[Member, ...]:
        """A square map before the last one keeps the same dimensions on both axes."""
        if self.kind == "masked":
            transform = TRANSFORM if self.parts.legacy_head else LM_HEAD
            return _writer(transform) + columns(f"{transform}.dense")
        if self.kind == "span":
            return columns("qa_outputs")
        return rows("pooler.dense") + columns("pooler.dense") + columns("classifier")

    def _heads_group(self, layer: int, shape: StudentShape) -> PrunableGroup:
        width = shape.widths.head_width
        members = columns(f"{_layer(layer)}.attention.output.dense", width=width)
        for projection in (*self.parts.query_maps, *self.parts.key_maps, "value_proj"):
            members += rows(f"{_attention(layer)}.{projection}", width=width)
        return PrunableGroup(heads(layer), shape.widths.heads, members)

    def _head_width_groups(self, layer: int, shape: StudentShape) -> list[PrunableGroup]:
        """A dimension of a query meets one of a key, whether either is of a content or a position."""
        name, width = _attention(layer), shape.widths.head_width
        groups = []
        for position, head in enumerate(shape.kept[heads(layer)]):
            offset, parent = position * width, (heads(layer), position)
            met: tuple[Member, ...] = ()
            for projection in (*self.parts.query_maps, *self.parts.key_maps):
                met += rows(f"{name}.{projection}", offset)
            carried = rows(f"{name}.value_proj", offset) + columns(f"{_layer(layer)}.attention.output.dense", offset)
            groups.append(PrunableGroup(qk(layer, head), width, met, parent))
            groups.append(PrunableGroup(vo(layer, head), width, carried, parent))
        return groups


class _WithWords(nn.Module):
    """A head that stock code hands the word embeddings, as one that takes states alone."""

    def __init__(self, head: nn.Module, embeddings: Any) -> None:
        super().__init__()
        self.head, self.words = head, embeddings.word_embeddings

    def forward(self, states: Tensor) -> Tensor:
        logits: Tensor = self.head(states, self.words)
        return logits


def _ffn_group(layer: int, shape: StudentShape) -> PrunableGroup:
    name = _layer(layer)
    members = rows(f"{name}.intermediate.dense") + columns(f"{name}.output.dense")
    return PrunableGroup(ffn(layer), shape.widths.ffn, members)


def _layer(layer: int) -> str:
    return f"{ENCODER}.layer.{layer}"


def _attention(layer: int) -> str:
    return f"{_layer(layer)}.attention.self"


def _writer(block: str, written_by: str = "dense") -> tuple[Member, ...]:
    """A map into the residual stream and the LayerNorm behind it."""
    matrix = f"{block}.{written_by}"
    return rows(matrix) + norm(f"{block}.LayerNorm", written_by=(f"{matrix}.weight", 0))


def _tied_fields(widths: Widths) -> dict[str, int]:
    """Fields that a config may leave out, and what they then are."""
    return {
        "pooler_hidden_size": widths.hidden,
        "embedding_size": widths.hidden,
        "attention_head_size": widths.head_width,
    }


def _write_widths(config: PretrainedConfig, widths: Widths) -> None:
    config.hidden_size = widths.hidden
    config.intermediate_size = widths.ffn
    config.num_attention_heads = widths.heads
    for field, width in _tied_fields(widths).items():
        if hasattr(config, field):
            setattr(config, field, width)
