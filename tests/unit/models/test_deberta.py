"""DebertaFamily against stock DeBERTa: the same signals, the same model after narrowing, nothing left uncovered."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, DebertaV2Config, DebertaV2Model, PreTrainedModel
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

from homodistil.batch import Batch
from homodistil.config import RunConfig
from homodistil.errors import ModelError, ShapeError
from homodistil.export import export_student
from homodistil.models import family_of
from homodistil.models.attention import attention_implementation
from homodistil.models.deberta import DebertaFamily
from homodistil.models.groups import kept_positions
from homodistil.models.loading import AUTO_CLASSES, load_model, materialise, new_model, skeleton
from homodistil.models.shape import StudentShape, Widths
from homodistil.pruning.sums import AxisSums
from homodistil.pruning.surgery import narrow, slice_flat
from homodistil.student import Blueprint
from homodistil.tasks import TASKS, Kind
from tests.fixtures import batch, deberta, deberta_config, save_tokenizer

LAYERS = 3
FULL = Widths(72, 136, 6, 12)
Kept = dict[str, tuple[int, ...]]

VARIANTS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v2": {"share_att_key": False, "conv_kernel_size": 3, "conv_act": "gelu"},
    "v2, content to position": {"share_att_key": False, "pos_att_type": "c2p", "norm_rel_ebd": "none"},
    "v3, position to content": {"pos_att_type": "p2c", "legacy": False},
    "v1's embeddings": {"share_att_key": False, "position_biased_input": True, "type_vocab_size": 2},
}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
every_kind = pytest.mark.parametrize("kind", ["masked", "classification", "regression", "span"])


def family_for(model: PreTrainedModel, kind: Kind = "masked") -> DebertaFamily:
    return cast(DebertaFamily, family_of(model.config, kind))


def draw(widths: Widths, seed: int = 1) -> Kept:
    """Random kept units of the awkward DeBERTa for `widths`, in every group, pruned heads' groups left out."""
    random = torch.Generator().manual_seed(seed)

    def some(count: int, of: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(of, generator=random)[:count].tolist()))

    kept = {"hidden": some(widths.hidden, 72)}
    for layer in range(LAYERS):
        kept[f"layers.{layer}.ffn"] = some(widths.ffn, 136)
        kept[f"layers.{layer}.heads"] = some(widths.heads, 6)
        for head in kept[f"layers.{layer}.heads"]:
            for dims in ("qk", "vo"):
                kept[f"layers.{layer}.heads.{head}.{dims}"] = some(widths.head_width, 12)
    return kept


def pruned(model: PreTrainedModel, kept: Kept, kind: Kind = "masked") -> tuple[PreTrainedModel, StudentShape]:
    family, full = family_for(model, kind), StudentShape.full(LAYERS, FULL)
    student = copy.deepcopy(model)
    narrow(student, kept_positions(family.groups(full), kept))
    family.configure(student, full.narrowed(kept))
    return student, full.narrowed(kept)


def cut(name: str, tensor: Tensor, kept: Kept, fold: float) -> Tensor:
    """The twin: how one stock tensor of DeBERTa is narrowed, by its name, in plain indexing."""
    h, is_matrix = list(kept["hidden"]), tensor.ndim > 1
    if "embeddings" in name and is_matrix:
        return tensor[:, h]
    if name.startswith(("classifier", "qa_outputs")):
        return tensor[:, h] if is_matrix else tensor
    if name in ("cls.predictions.bias", "lm_predictions.lm_head.bias"):
        return tensor
    if ".layer." not in name:  # embeddings' and encoder's norms, convolution, pooler, transform
        return tensor[h][:, h] if is_matrix else tensor[h]
    layer = int(name.split(".layer.")[1].split(".")[0])
    f, heads = list(kept[f"layers.{layer}.ffn"]), kept[f"layers.{layer}.heads"]
    qk, vo = (
        [12 * head + i for head in heads for i in kept[f"layers.{layer}.heads.{head}.{dims}"]] for dims in ("qk", "vo")
    )
    if "query_proj" in name or "key_proj" in name:
        tensor = tensor * (fold if "query" in name else 1.0)
        return tensor[qk][:, h] if is_matrix else tensor[qk]
    if "value_proj" in name:
        return tensor[vo][:, h] if is_matrix else tensor[vo]
    if "intermediate" in name:
        return tensor[f][:, h] if is_matrix else tensor[f]
    if not is_matrix:
        return tensor[h]
    return tensor[h][:, vo] if "attention.output" in name else tensor[h][:, f]


def hand_sliced(model: PreTrainedModel, kept: Kept, widths: Widths, kind: Kind, changes: dict[str, Any]) -> Any:
    """A stock model of the small shape, its queries folded."""
    sizes = {"hidden_size": widths.hidden, "num_attention_heads": widths.heads, "intermediate_size": widths.ffn}
    twin = AUTO_CLASSES[kind].from_config(deberta_config(**changes, **sizes)).eval()
    big = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(cut(name, big[name], kept, math.sqrt(widths.head_width / 12)))
    return twin


@torch.no_grad()
def stock_logits(model: Any) -> Tensor:
    """(B, T, V), (B, classes), or (B, 2, T) of spans."""
    rows = batch()
    out = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, token_type_ids=rows.token_type_ids)
    return out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits], dim=1)


def scores_of(attention: Any, states: Tensor) -> Tensor:
    """(B, A, T, T) of contents alone, unscaled, from the projections of a stock module."""
    q, k = (p(states).unflatten(-1, (6, 12)).transpose(1, 2) for p in (attention.query_proj, attention.key_proj))
    return q @ k.transpose(-1, -2)


@every_variant
def test_signals_are_those_of_the_stock_forward_pass(changes: dict[str, Any]) -> None:
    rows, stock = batch(), deberta(**changes)
    with torch.no_grad():
        told = stock(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            token_type_ids=rows.token_type_ids,
            output_hidden_states=True,
        )
        signals = family_for(stock).signals(copy.deepcopy(stock), rows)
        scores = [
            scores_of(layer.attention.self, states)
            for layer, states in zip(stock.deberta.encoder.layer, told.hidden_states, strict=False)
        ]
    for found, expected in zip(signals.hidden_states, told.hidden_states, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for sequence, positions in enumerate(rows.scored_positions):
        torch.testing.assert_close(signals.logits[sequence], told.logits[sequence, positions], rtol=1e-4, atol=1e-4)
    for (query, key), expected in zip(signals.queries_keys, scores, strict=True):
        assert query.shape == key.shape == (6, 6, 24, 12)
        torch.testing.assert_close(query @ key.transpose(-1, -2), expected, rtol=1e-4, atol=1e-4)
    assert signals.attention_scale == pytest.approx(1 / math.sqrt(12))


@pytest.mark.parametrize("part", ["position", "content"])
def test_the_fixture_is_sharp_enough_to_notice_a_part_of_attention(part: str) -> None:
    model = deberta()
    before = stock_logits(model)
    with torch.no_grad():
        for layer in model.deberta.encoder.layer:
            table = model.deberta.encoder.LayerNorm if part == "position" else layer.attention.self.key_proj
            table.weight.mul_(0.9)
    assert (stock_logits(model) - before).abs().max() > 1e-2


def test_long_sequences_fall_into_the_same_buckets_as_in_stock_code() -> None:
    rows = batch(sequences=2, tokens=60)
    stock = deberta(position_buckets=4, share_att_key=False)
    with torch.no_grad():
        told = stock(rows.input_ids, rows.attention_mask, output_hidden_states=True).hidden_states
        found = family_for(stock).signals(copy.deepcopy(stock), rows).hidden_states
    torch.testing.assert_close(found[-1], told[-1], rtol=1e-5, atol=1e-5)


@every_kind
def test_heads_of_every_kind_give_stock_logits(kind: Kind) -> None:
    rows, stock = batch(), deberta(kind=kind, num_labels=1 if kind == "regression" else 2)
    family = family_for(stock, kind)
    expected = stock_logits(stock)
    with torch.no_grad():
        found = family.signals(copy.deepcopy(stock), rows).logits
    if kind == "masked":
        expected = torch.stack([e[positions] for e, positions in zip(expected, rows.scored_positions, strict=True)])
    if kind == "span":
        real = rows.attention_mask[:, None].bool().expand(-1, 2, -1)
        assert (found[~real] == -1e4).all()
        found, expected = found[real], expected[real]
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("widths", [Widths(54, 136, 6, 9), Widths(20, 33, 4, 5)], ids=str)
@every_variant
def test_a_narrowed_deberta_is_the_hand_sliced_stock_model(changes: dict[str, Any], widths: Widths) -> None:
    kept, teacher = draw(widths), deberta(**changes)
    student, shape = pruned(teacher, kept)
    assert shape.widths == widths
    twin = hand_sliced(teacher, kept, widths, "masked", changes)
    assert {n: p.shape for n, p in student.named_parameters()} == {n: p.shape for n, p in twin.named_parameters()}
    torch.testing.assert_close(stock_logits(student), stock_logits(twin), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["classification", "span"])
def test_narrowed_heads_of_tasks_are_the_hand_sliced_ones(kind: Kind) -> None:
    widths = Widths(36, 80, 4, 9)
    kept, teacher = draw(widths), deberta(kind=kind)
    student, _ = pruned(teacher, kept, kind)
    twin = hand_sliced(teacher, kept, widths, kind, {})
    torch.testing.assert_close(stock_logits(student), stock_logits(twin), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["v3", "v2"])
def test_without_the_original_scale_a_narrowed_student_would_be_another_model(variant: str) -> None:
    student, shape = pruned(deberta(**VARIANTS[variant]), draw(Widths(42, 51, 6, 7)))
    before = stock_logits(student)
    family_for(student).configure(student, StudentShape.full(LAYERS, shape.widths))
    assert (stock_logits(student) - before).abs().max() > 1e-2


def test_configuring_again_and_copying_change_nothing() -> None:
    student, shape = pruned(deberta(), draw(Widths(54, 80, 6, 9)))
    before, family = stock_logits(student), family_for(student)
    family.configure(student, shape)
    with torch.no_grad():
        signals = family.signals(student, batch())
    assert torch.equal(stock_logits(student), before)
    assert torch.equal(stock_logits(copy.deepcopy(student)), before)
    assert signals.attention_scale == pytest.approx(1 / math.sqrt(12))


def test_a_second_prune_continues_from_the_first() -> None:
    teacher = deberta(share_att_key=False, conv_kernel_size=3)
    family = family_for(teacher)
    student, shape = pruned(teacher, draw(Widths(54, 100, 5, 9)))
    halfway = {name: len(units) for name, units in shape.kept.items()}
    second = {name: tuple(range(0, count, 2))[: count // 3] for name, count in halfway.items()}
    narrow(student, kept_positions(family.groups(shape), second))
    shape = shape.narrowed(second)
    family.configure(student, shape)
    assert shape.widths == Widths(18, 33, 1, 3)
    at_once, _ = pruned(teacher, dict(shape.kept))
    assert torch.equal(stock_logits(student), stock_logits(at_once))


@every_variant
@every_kind
def test_groups_own_each_axis_of_the_model_once_per_kind_of_unit(kind: Kind, changes: dict[str, Any]) -> None:
    """Widths that differ from each other and from all counts tell by their size which group an axis belongs to."""
    sizes = {"hidden_size": 60, "num_attention_heads": 5, "intermediate_size": 136}
    model = deberta(kind=kind, **changes, **sizes)
    groups = family_for(model, kind).groups(StudentShape.full(LAYERS, Widths(60, 136, 5, 12)))
    inner = {
        (name, 0 if "_proj" in name else 1)
        for name, _ in model.named_parameters()
        if "_proj" in name or name.endswith("attention.output.dense.weight")
    }
    axes = {(name, axis): n for name, p in model.named_parameters() for axis, n in enumerate(p.shape)}
    owned = {
        unit: {(m.parameter, m.axis) for g in groups if g.name.endswith(unit) for m in g.members}
        for unit in ("hidden", "ffn", "heads", "qk", "vo")
    }
    assert owned["hidden"] == {key for key, size in axes.items() if size == 60 and key not in inner}
    assert owned["ffn"] == {key for key, size in axes.items() if size == 136}
    assert owned["heads"] == inner
    values = {key for key in inner if "value" in key[0] or "output" in key[0]}
    assert (owned["qk"], owned["vo"]) == (inner - values, values)


@every_variant
def test_every_scored_member_names_a_matrix_of_its_own_group(changes: dict[str, Any]) -> None:
    for group in family_for(deberta(**changes)).groups(StudentShape.full(LAYERS, FULL)):
        own = [(member.parameter, member.axis) for member in group.members]
        assert len(own) == len(set(own))
        assert all(m.scored_with in own and m.scored_with[0].endswith("weight") for m in group.members if m.scored_with)
        assert all(m.scored_with for m in group.members)


def test_fragments_of_a_convolution_are_summed_and_sliced_as_the_whole() -> None:
    """(D, D, K): three ranks' shares of any lengths, along both prunable axes."""
    name = "deberta.encoder.conv.conv.weight"
    model = deberta(share_att_key=False, conv_kernel_size=3)
    groups = family_for(model).groups(StudentShape.full(LAYERS, FULL))
    whole = model.get_parameter(name).detach()
    sums = AxisSums(groups, torch.device("cpu"))
    totals = sums.zeros()
    hidden = [0, 3, 4, 40, 71]
    positions = {0: torch.tensor(hidden), 1: torch.tensor(hidden)}
    bounds, pieces = [0, 5000, 5001, 11111, whole.numel()], []
    for start, end in itertools.pairwise(bounds):
        fragment = whole.flatten()[start:end]
        sums.add(totals, name, whole.shape, start, fragment.abs())
        pieces.append(slice_flat(fragment, whole.shape, start, positions))
    for axis, others in ((0, (1, 2)), (1, (0, 2))):
        (member,) = (m for m in groups[0].members if (m.parameter, m.axis) == (name, axis))
        expected = whole.double().abs().sum(dim=others)
        torch.testing.assert_close(sums.units(totals, groups[0], member), expected)
    assert torch.equal(torch.cat([values for values, _ in pieces]), whole[hidden][:, hidden].flatten())
    assert [start for _, start in pieces] == [sum(len(v) for v, _ in pieces[:i]) for i in range(len(pieces))]


def test_a_narrowed_convolution_says_its_own_size() -> None:
    student, _ = pruned(deberta(share_att_key=False, conv_kernel_size=3), draw(Widths(20, 33, 4, 5)))
    convolution = student.deberta.encoder.conv.conv
    assert (convolution.in_channels, convolution.out_channels) == convolution.weight.shape[:2] == (20, 20)


def gradients(model: PreTrainedModel, rows: Batch) -> dict[str, Tensor]:
    """Of a loss that looks at hidden states, at queries and keys, and at logits."""
    signals = family_for(model).signals(model.train(), rows)
    loss = signals.logits.square().mean() + sum(
        (q @ k.transpose(2, 3)).square().mean() for q, k in signals.queries_keys
    )
    (loss + sum(states.abs().mean() for states in signals.hidden_states)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("variant", ["v3", "v2"])
def test_activation_checkpointing_gives_the_same_gradients(variant: str) -> None:
    plain, _ = pruned(
        deberta(**VARIANTS[variant], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), draw(FULL)
    )
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    expected, found = gradients(plain, batch()), gradients(checkpointed, batch())
    assert set(expected) == {name for name, _ in plain.named_parameters()}
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_gradients_are_those_of_stock_code() -> None:
    stock = deberta(share_att_key=False, conv_kernel_size=3)
    ours, rows = copy.deepcopy(stock), batch()
    told = stock(rows.input_ids, rows.attention_mask, output_hidden_states=True).hidden_states
    seen = torch.randn(4, 6, 24, 72, generator=torch.Generator().manual_seed(5))
    (torch.stack(told) * seen).sum().backward()
    (torch.stack(family_for(ours).signals(ours, rows).hidden_states) * seen).sum().backward()
    for name, parameter in stock.deberta.named_parameters():
        torch.testing.assert_close(ours.deberta.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_the_encoder_is_traced_as_one_graph() -> None:
    student, _ = pruned(deberta(), draw(Widths(42, 51, 6, 7)))
    family, rows = family_for(student), batch()
    with torch.no_grad():
        expected = family.signals(copy.deepcopy(student), rows)
        student.base_model.compile(fullgraph=True, dynamic=False, backend="eager")
        found = family.signals(student, rows)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


@every_variant
@pytest.mark.parametrize("widths", [FULL, Widths(42, 101, 6, 7)], ids=str)
def test_the_exported_student_computes_the_same_in_stock_transformers(
    widths: Widths, changes: dict[str, Any], tmp_path: Path
) -> None:
    teacher = deberta(**changes)
    teacher.save_pretrained(tmp_path / "teacher")
    save_tokenizer(tmp_path / "teacher")
    run = RunConfig.model_validate({"recipe": "tried", "teacher": str(tmp_path / "teacher"), "run": {"updates": 7}})
    config = AutoConfig.from_pretrained(tmp_path / "teacher")
    student, shape = pruned(teacher, draw(widths))
    weights = {name: parameter.detach() for name, parameter in student.named_parameters()}
    blueprint = Blueprint(family_of(config), config, run, "eager")
    directory = export_student(weights, blueprint, shape, tmp_path / "student", tmp_path / "teacher")
    stock = AutoModelForMaskedLM.from_pretrained(directory).eval()
    assert type(stock.deberta.encoder.layer[0].attention.self) is DisentangledSelfAttention
    torch.testing.assert_close(stock_logits(stock), stock_logits(student), rtol=1e-4, atol=1e-4)


def test_a_materialised_skeleton_has_the_stock_models_names_ties_and_buffers() -> None:
    frame = skeleton(deberta_config(position_biased_input=True), attention_implementation("sdpa"))
    materialise(frame)
    stock = AutoModelForMaskedLM.from_config(deberta_config(position_biased_input=True))
    assert frame.cls.predictions.decoder.weight is frame.deberta.embeddings.word_embeddings.weight
    assert [name for name, _ in frame.named_parameters()] == [name for name, _ in stock.named_parameters()]
    buffers = dict(frame.named_buffers())
    assert set(buffers) == {"deberta.embeddings.position_ids"}
    assert torch.equal(buffers["deberta.embeddings.position_ids"], torch.arange(64)[None])


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager"])
def test_any_attention_function_may_be_asked_for(kernel: Any, tmp_path: Path) -> None:
    """DeBERTa's attention is its own, whatever performance.attention says."""
    deberta().save_pretrained(tmp_path)
    attention = attention_implementation(kernel)
    loaded, expected = load_model(tmp_path, torch.float32, attention), deberta()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
    torch.testing.assert_close(stock_logits(loaded.eval()), stock_logits(expected))
    assert isinstance(new_model(deberta_config(), attention, "span"), nn.Module)


def test_layers_are_dropped_and_the_convolution_stays_beside_the_first() -> None:
    changes: dict[str, Any] = {"share_att_key": False, "conv_kernel_size": 3}
    model = deberta(**changes)
    weights = model.state_dict()
    renamed = {
        name.replace(".layer.2.", ".layer.0."): tensor
        for name, tensor in weights.items()
        if ".layer.0." not in name and ".layer.1." not in name
    }
    twin = AutoModelForMaskedLM.from_config(deberta_config(**changes, num_hidden_layers=1)).eval()
    twin.load_state_dict(renamed)
    family_for(model).keep_layers(model, [2])
    assert model.config.num_hidden_layers == 1
    assert torch.equal(stock_logits(model), stock_logits(twin))


def test_a_stock_config_keeps_all_but_the_widths() -> None:
    before = deberta_config(hidden_dropout_prob=0.17, attention_head_size=12)
    after = DebertaFamily().stock_config(before, Widths(36, 64, 6, 6)).to_dict()
    changed = {key for key, value in before.to_dict().items() if after[key] != value}
    assert changed == {"hidden_size", "intermediate_size", "pooler_hidden_size", "attention_head_size"}


def test_a_shape_that_no_stock_config_expresses_names_the_nearest_ones() -> None:
    with pytest.raises(ShapeError, match=r"42 \(6 x 7\) or 36 \(6 x 6\)"):
        DebertaFamily().stock_config(deberta_config(), Widths(40, 64, 6, 7))


@pytest.mark.parametrize(
    "change",
    [
        {"tie_word_embeddings": False},
        {"hidden_size": 70},
        {"embedding_size": 36},
        {"attention_head_size": 16},
        {"pooler_hidden_size": 36},
        {"relative_attention": False},
        {"conv_kernel_size": 3, "conv_groups": 2},
        {"z_steps": 2},
        {"pos_att_type": None},
    ],
    ids=str,
)
def test_a_deberta_that_cannot_be_distilled_is_refused_by_the_field_at_fault(change: dict[str, Any]) -> None:
    with pytest.raises(ShapeError, match=list(change)[-1]):
        DebertaFamily().widths(deberta_config(**change))


def body(config: DebertaV2Config) -> PreTrainedModel:
    return DebertaV2Model(config)


def classifier(_: DebertaV2Config) -> PreTrainedModel:
    return deberta(kind="classification")


@pytest.mark.parametrize("saved", [body, classifier])
def test_a_teacher_without_a_language_model_head_is_refused_and_told_what_it_can_do(
    saved: Callable[[DebertaV2Config], PreTrainedModel], tmp_path: Path
) -> None:
    saved(deberta_config()).save_pretrained(tmp_path)
    complaint = (
        r"'cls\.predictions\.transform\.dense\.weight' is missing.*no masked-language-model head at all.*task\.name"
    )
    with pytest.raises(ModelError, match=complaint):
        load_model(tmp_path, torch.float32)


def test_one_lost_tensor_is_no_missing_head(tmp_path: Path) -> None:
    model = deberta()
    weights = {name: p for name, p in model.named_parameters() if name != "cls.predictions.transform.dense.bias"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelError, match=r"transform\.dense\.bias' is missing") as refusal:
        load_model(tmp_path, torch.float32)
    assert "at all" not in str(refusal.value)


def test_a_body_may_be_given_a_new_classifier(tmp_path: Path) -> None:
    body(deberta_config()).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32, task=TASKS["mnli"], new_head=True)
    assert model.classifier.weight.shape == (3, 72)


def test_the_family_follows_from_a_config() -> None:
    shared, own = (family_of(deberta_config(share_att_key=flag, pos_att_type="p2c")) for flag in (True, False))
    assert shared != own
    assert hash(shared) == hash(family_of(deberta_config(pos_att_type="p2c")))
    shape = StudentShape.full(1, FULL).narrowed(
        {
            name: units[:3] if name.endswith(("qk", "vo")) else units
            for name, units in StudentShape.full(1, FULL).kept.items()
        }
    )
    at = "deberta.encoder.layer.0.attention.self"
    assert own.fold_attention_scale(shape) == {
        f"{at}.{projection}.{part}": 0.5
        for projection in ("query_proj", "pos_query_proj")
        for part in ("weight", "bias")
    }
