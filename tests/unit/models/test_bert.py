"""BertFamily against stock BERT: the same signals, the same model after narrowing, nothing left uncovered."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from homodistil.errors import ModelError, ShapeError
from homodistil.models import family_of
from homodistil.models.attention import attention_implementation
from homodistil.models.bert import BertFamily
from homodistil.models.groups import kept_positions
from homodistil.models.shape import StudentShape, Widths
from homodistil.pruning.surgery import narrow
from tests.fixtures import batch, bert, bert_config

FAMILY = BertFamily()
LAYERS = 3


def full_shape() -> StudentShape:
    config = bert_config()
    return StudentShape.full(FAMILY.layers(config), FAMILY.widths(config))


def draw(widths: Widths, seed: int = 1) -> dict[str, tuple[int, ...]]:
    """Random kept units of the awkward BERT for `widths`, in every group, pruned heads' groups left out."""
    random = torch.Generator().manual_seed(seed)

    def some(count: int, of: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(of, generator=random)[:count].tolist()))

    kept = {"hidden": some(widths.hidden, 72)}
    for layer in range(LAYERS):
        kept[f"layers.{layer}.ffn"] = some(widths.ffn, 136)
        kept[f"layers.{layer}.heads"] = some(widths.heads, 6)
        for head in kept[f"layers.{layer}.heads"]:
            for kind in ("qk", "vo"):
                kept[f"layers.{layer}.heads.{head}.{kind}"] = some(widths.head_width, 12)
    return kept


def pruned(model: BertForMaskedLM, kept: dict[str, tuple[int, ...]]) -> tuple[BertForMaskedLM, StudentShape]:
    shape = full_shape().narrowed(kept)
    student = copy.deepcopy(model)
    narrow(student, kept_positions(FAMILY.groups(full_shape()), kept))
    FAMILY.configure(student, shape)
    return student, shape


def hand_sliced(model: BertForMaskedLM, kept: dict[str, tuple[int, ...]], widths: Widths) -> BertForMaskedLM:
    """The twin: a stock BERT of the small shape, filled by plain indexing, matrix by matrix, head by head."""
    config = bert_config(hidden_size=widths.hidden, num_attention_heads=widths.heads, intermediate_size=widths.ffn)
    big, small = model.state_dict(), {}
    h = list(kept["hidden"])
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        small[f"bert.embeddings.{name}.weight"] = big[f"bert.embeddings.{name}.weight"][:, h]
    for norm in ("bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"):
        small |= {f"{norm}.{kind}": big[f"{norm}.{kind}"][h] for kind in ("weight", "bias")}
    for layer in range(LAYERS):
        at = f"bert.encoder.layer.{layer}"
        f = list(kept[f"layers.{layer}.ffn"])
        heads = kept[f"layers.{layer}.heads"]
        qk = [12 * head + i for head in heads for i in kept[f"layers.{layer}.heads.{head}.qk"]]
        vo = [12 * head + i for head in heads for i in kept[f"layers.{layer}.heads.{head}.vo"]]
        fold = math.sqrt(widths.head_width / 12)
        for name, rows, factor in (("query", qk, fold), ("key", qk, 1.0), ("value", vo, 1.0)):
            linear = f"{at}.attention.self.{name}"
            small[f"{linear}.weight"] = big[f"{linear}.weight"][rows][:, h] * factor
            small[f"{linear}.bias"] = big[f"{linear}.bias"][rows] * factor
        for linear, rows, columns in (
            ("attention.output.dense", h, vo),
            ("intermediate.dense", f, h),
            ("output.dense", h, f),
        ):
            small[f"{at}.{linear}.weight"] = big[f"{at}.{linear}.weight"][rows][:, columns]
            small[f"{at}.{linear}.bias"] = big[f"{at}.{linear}.bias"][rows]
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            small |= {f"{at}.{norm}.{kind}": big[f"{at}.{norm}.{kind}"][h] for kind in ("weight", "bias")}
    small["cls.predictions.transform.dense.weight"] = big["cls.predictions.transform.dense.weight"][h][:, h]
    small["cls.predictions.transform.dense.bias"] = big["cls.predictions.transform.dense.bias"][h]
    small["cls.predictions.bias"] = small["cls.predictions.decoder.bias"] = big["cls.predictions.bias"]
    small["cls.predictions.decoder.weight"] = small["bert.embeddings.word_embeddings.weight"]
    twin = BertForMaskedLM(config).eval()
    twin.load_state_dict(small)
    return twin


def logits(model: BertForMaskedLM) -> Tensor:
    rows = batch()
    with torch.no_grad():
        return model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits


@pytest.mark.parametrize("widths", [Widths(54, 136, 6, 9), Widths(42, 51, 6, 7), Widths(20, 33, 4, 5)], ids=str)
def test_a_narrowed_bert_is_the_hand_sliced_stock_model(widths: Widths) -> None:
    kept = draw(widths)
    student, shape = pruned(bert(), kept)
    assert shape.widths == widths
    torch.testing.assert_close(logits(student), logits(hand_sliced(bert(), kept, widths)), rtol=1e-5, atol=1e-5)


def test_a_stock_model_with_the_scale_folded_in_is_the_student() -> None:
    widths = Widths(36, 80, 4, 9)
    student, shape = pruned(bert(), draw(widths))
    stock, factors = (
        BertForMaskedLM(FAMILY.stock_config(bert_config(), widths)).eval(),
        FAMILY.fold_attention_scale(shape),
    )
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            parameter.copy_(student.get_parameter(name) * factors.pop(name, 1.0))
    assert not factors
    torch.testing.assert_close(logits(stock), logits(student), rtol=1e-5, atol=1e-5)


def test_a_second_prune_continues_from_the_first() -> None:
    teacher, first = bert(), draw(Widths(54, 100, 5, 9))
    student, shape = pruned(teacher, first)
    halfway = {name: len(units) for name, units in shape.kept.items()}
    second = {name: tuple(range(0, count, 2))[: count // 3] for name, count in halfway.items()}
    narrow(student, kept_positions(FAMILY.groups(shape), second))
    shape = shape.narrowed(second)
    FAMILY.configure(student, shape)
    widths = Widths(18, 33, 1, 3)
    assert shape.widths == widths
    at_once, _ = pruned(teacher, dict(shape.kept))
    assert torch.equal(logits(student), logits(at_once))


def test_units_that_carry_nothing_leave_no_trace() -> None:
    model = bert()
    kept = draw(Widths(72, 60, 4, 7))
    with torch.no_grad():
        for layer, block in enumerate(model.bert.encoder.layer):
            alive = kept[f"layers.{layer}.heads"]
            qk, vo = (
                [12 * head + i for head in alive for i in kept[f"layers.{layer}.heads.{head}.{kind}"]]
                for kind in ("qk", "vo")
            )
            keep_only(block.output.dense.weight.T, kept[f"layers.{layer}.ffn"])
            keep_only(block.attention.output.dense.weight.T, vo)
            keep_only(block.attention.self.query.weight, qk)
            keep_only(block.attention.self.query.bias, qk)
    student, _ = pruned(model, kept)
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-5, atol=1e-5)


def keep_only(rows: Tensor, kept: object) -> None:
    lost = torch.ones(len(rows), dtype=torch.bool)
    lost[list(kept)] = False  # type: ignore[call-overload]
    rows[lost] = 0


def test_narrowed_parameters_have_the_shapes_of_a_stock_model() -> None:
    widths = Widths(48, 80, 6, 8)
    student, _ = pruned(bert(), draw(widths))
    stock = BertForMaskedLM(FAMILY.stock_config(bert_config(), widths))
    assert {n: p.shape for n, p in student.named_parameters()} == {n: p.shape for n, p in stock.named_parameters()}
    assert [str(module) for module in student.modules()][1:] == [str(module) for module in stock.modules()][1:]


def test_every_scored_member_names_a_matrix_of_its_own_group() -> None:
    names = {name for name, _ in bert().named_parameters()}
    for group in FAMILY.groups(full_shape()):
        own = {(member.parameter, member.axis) for member in group.members}
        assert {member.parameter for member in group.members} <= names
        assert all(member.scored_with in own and member.scored_with[0].endswith("weight") for member in group.members)


def test_the_hidden_group_owns_everything_that_is_as_wide_as_the_residual_stream() -> None:
    model = bert(hidden_size=60)  # no other width is 60
    hidden = FAMILY.groups(StudentShape.full(LAYERS, Widths(60, 136, 6, 10)))[0]
    inner = ("self.query.weight", "self.key.weight", "self.value.weight", "self.query.bias", "self.key.bias")
    expected = set()
    for name, parameter in model.named_parameters():
        for axis, size in enumerate(parameter.shape):
            heads_side = (name.endswith((*inner, "self.value.bias")) and axis == 0) or (
                name.endswith("attention.output.dense.weight") and axis == 1
            )
            if size == 60 and not heads_side:
                expected.add((name, axis))
    assert {(member.parameter, member.axis) for member in hidden.members} == expected


def test_signals_are_those_of_the_stock_forward_pass() -> None:
    rows, stock = batch(), bert(attn_implementation="eager")
    with torch.no_grad():
        told = stock(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            output_hidden_states=True,
            output_attentions=True,
        )
        model = copy.deepcopy(stock)
        model.set_attn_implementation(attention_implementation("eager"))
        signals = FAMILY.signals(model, rows)
    for found, expected in zip(signals.hidden_states, told.hidden_states, strict=True):
        torch.testing.assert_close(found, expected)
    for sequence, positions in enumerate(rows.scored_positions):
        torch.testing.assert_close(signals.logits[sequence], told.logits[sequence, positions])
    padding = torch.where(rows.attention_mask[:, None, None, :] == 0, -math.inf, 0.0)
    for (query, key), expected in zip(signals.queries_keys, told.attentions, strict=True):
        scores = query @ key.transpose(-1, -2) * signals.attention_scale
        torch.testing.assert_close((scores + padding).softmax(dim=-1), expected)


def test_a_narrowed_student_keeps_the_attention_scale_of_its_teacher() -> None:
    student, _ = pruned(bert(), draw(Widths(54, 80, 6, 9)))
    student.set_attn_implementation(attention_implementation("sdpa"))
    assert FAMILY.signals(student, batch()).attention_scale == pytest.approx(1 / math.sqrt(12))


def test_configuring_a_student_leaves_the_config_it_was_copied_from_alone() -> None:
    teacher = bert()
    student, _ = pruned(teacher, draw(Widths(54, 80, 6, 9)))
    assert (student.config.hidden_size, student.config.intermediate_size) == (54, 80)
    assert (teacher.config.hidden_size, teacher.config.intermediate_size) == (72, 136)


def test_a_stock_config_keeps_all_but_the_widths() -> None:
    before = bert_config(hidden_dropout_prob=0.17)
    after = FAMILY.stock_config(before, Widths(36, 64, 6, 6)).to_dict()
    changed = {key for key, value in before.to_dict().items() if after[key] != value}
    assert changed == {"hidden_size", "intermediate_size"}


def test_a_shape_that_no_stock_config_expresses_names_the_nearest_ones() -> None:
    with pytest.raises(ShapeError, match=r"42 \(6 x 7\) or 36 \(6 x 6\)"):
        FAMILY.stock_config(bert_config(), Widths(40, 64, 6, 7))


@pytest.mark.parametrize("field", [{"is_decoder": True}, {"tie_word_embeddings": False}, {"hidden_size": 70}], ids=str)
def test_a_bert_that_cannot_be_distilled_is_refused_by_the_field_at_fault(field: dict[str, object]) -> None:
    with pytest.raises(ShapeError, match=next(iter(field))):
        FAMILY.widths(bert_config(**field))


def test_an_unknown_architecture_is_refused_by_name() -> None:
    config = BertConfig()
    config.model_type = "berd"
    with pytest.raises(ModelError, match=r"'berd'.*Did you mean 'bert'"):
        family_of(config)
