"""Gpt2Family against stock GPT-2: the same signals, the same model after narrowing, nothing left uncovered."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from homodistil.batch import Batch
from homodistil.config import PruningConfig, RunConfig
from homodistil.data.causal import CausalScorer
from homodistil.errors import ModelError, ShapeError
from homodistil.kernels.compiling import compile_encoder
from homodistil.knowledge.teacher import FrozenModel
from homodistil.models import family_of
from homodistil.models.attention import attention_implementation
from homodistil.models.gpt2 import Gpt2Family
from homodistil.models.groups import kept_positions
from homodistil.models.loading import AUTO_CLASSES
from homodistil.models.shape import StudentShape, Widths
from homodistil.pruning.importance import Importance
from homodistil.pruning.surgery import narrow
from homodistil.state import Fragment
from homodistil.student import Blueprint, Student, as_tuple
from homodistil.tasks import Kind
from tests.fixtures import SilentRanks, batch, gpt2, gpt2_config

FAMILY = Gpt2Family()
LAYERS, N = 3, 72
FULL = StudentShape.full(LAYERS, Widths(72, 136, 6, 12))
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("kind", Gpt2Family.kinds)


def full_rows(tokens: int = 24) -> Batch:
    rows = batch(tokens=tokens)
    ids = torch.where(rows.attention_mask == 1, rows.input_ids, 7)
    return replace(rows, input_ids=ids, attention_mask=torch.ones_like(ids), padded=False)


def draw(widths: Widths, seed: int = 1) -> dict[str, tuple[int, ...]]:
    """Random kept units of the awkward GPT-2 for `widths`, in every group, pruned heads' groups left out."""
    random = torch.Generator().manual_seed(seed)
    counts = {"hidden": widths.hidden, "ffn": widths.ffn, "heads": widths.heads}
    kept = {}
    for name, units in FULL.kept.items():
        count = counts.get(name.rsplit(".", 1)[-1], widths.head_width)
        kept[name] = tuple(sorted(torch.randperm(len(units), generator=random)[:count].tolist()))
    return dict(FULL.narrowed(kept).kept)


def pruned(
    model: PreTrainedModel, kept: dict[str, tuple[int, ...]], family: Gpt2Family = FAMILY
) -> tuple[Any, StudentShape]:
    shape = FULL.narrowed(kept)
    student = copy.deepcopy(model)
    narrow(student, kept_positions(family.groups(FULL), kept))
    family.configure(student, shape)
    return student, shape


def hand_sliced(model: PreTrainedModel, kept: dict[str, tuple[int, ...]], widths: Widths, kind: Kind) -> Any:
    """The twin: a stock GPT-2 of the small shape, filled by plain indexing, matrix by matrix, head by head."""
    config = gpt2_config(n_embd=widths.hidden, n_head=widths.heads, n_inner=widths.ffn, num_labels=2)
    big, small, h = model.state_dict(), {}, list(kept["hidden"])
    for name in ("wte", "wpe"):
        small[f"transformer.{name}.weight"] = big[f"transformer.{name}.weight"][:, h]
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}"
        f, alive = list(kept[f"layers.{layer}.ffn"]), kept[f"layers.{layer}.heads"]
        qk = [12 * head + i for head in alive for i in kept[f"layers.{layer}.heads.{head}.qk"]]
        vo = [12 * head + i for head in alive for i in kept[f"layers.{layer}.heads.{head}.vo"]]
        query, key, value = big[f"{at}.attn.c_attn.weight"].split(N, dim=1)
        biases = big[f"{at}.attn.c_attn.bias"].split(N)
        fold = math.sqrt(widths.head_width / 12)
        small[f"{at}.attn.c_attn.weight"] = torch.cat([fold * query[h][:, qk], key[h][:, qk], value[h][:, vo]], dim=1)
        small[f"{at}.attn.c_attn.bias"] = torch.cat([fold * biases[0][qk], biases[1][qk], biases[2][vo]])
        for conv, inputs, outputs in (("attn.c_proj", vo, h), ("mlp.c_fc", h, f), ("mlp.c_proj", f, h)):
            small[f"{at}.{conv}.weight"] = big[f"{at}.{conv}.weight"][inputs][:, outputs]
            small[f"{at}.{conv}.bias"] = big[f"{at}.{conv}.bias"][outputs]
        for norm in (f"{at}.ln_1", f"{at}.ln_2", "transformer.ln_f"):
            small |= {f"{norm}.{part}": big[f"{norm}.{part}"][h] for part in ("weight", "bias")}
    for head in ("lm_head", "score", "qa_outputs"):
        if f"{head}.weight" in big:
            small[f"{head}.weight"] = big[f"{head}.weight"][:, h]
        if f"{head}.bias" in big:
            small[f"{head}.bias"] = big[f"{head}.bias"]
    twin = AUTO_CLASSES[kind].from_config(config).eval()
    twin.load_state_dict(small)
    return twin


def logits(model: Any) -> Tensor:
    rows = batch()
    with torch.no_grad():
        out = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask)
    return torch.stack([out.start_logits, out.end_logits]) if hasattr(out, "start_logits") else out.logits


@KINDS
@pytest.mark.parametrize("widths", [Widths(54, 136, 6, 9), Widths(42, 51, 6, 7), Widths(20, 33, 4, 5)], ids=str)
def test_a_narrowed_gpt2_is_the_hand_sliced_stock_model(widths: Widths, kind: Kind) -> None:
    kept, model = draw(widths), gpt2(kind=kind, num_labels=2)
    student, shape = pruned(model, kept, Gpt2Family(kind))
    assert shape.widths == widths
    expected = logits(hand_sliced(model, kept, widths, kind))
    torch.testing.assert_close(logits(student), expected, rtol=1e-5, atol=1e-5)


def test_a_stock_model_with_the_scale_folded_in_is_the_student() -> None:
    widths = Widths(36, 80, 4, 9)
    student, shape = pruned(gpt2(), draw(widths))
    stock = GPT2LMHeadModel(FAMILY.stock_config(gpt2_config(), widths)).eval()
    factors = FAMILY.fold_attention_scale(shape)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            parameter.copy_(student.get_parameter(name) * factors.pop(name, 1.0))
    assert not factors
    torch.testing.assert_close(logits(stock), logits(student), rtol=1e-5, atol=1e-5)
    plain = GPT2LMHeadModel(stock.config).eval()
    plain.load_state_dict(student.state_dict())
    assert (logits(plain) - logits(student)).abs().max() > 1e-3  # sharp enough to tell


def test_a_second_prune_continues_from_the_first() -> None:
    teacher = gpt2()
    student, shape = pruned(teacher, draw(Widths(54, 100, 5, 9)))
    second = {name: tuple(range(0, len(units), 2))[: len(units) // 3] for name, units in shape.kept.items()}
    narrow(student, kept_positions(FAMILY.groups(shape), second))
    shape = shape.narrowed(second)
    FAMILY.configure(student, shape)
    assert shape.widths == Widths(18, 33, 1, 3)
    at_once, _ = pruned(teacher, dict(shape.kept))
    assert torch.equal(logits(student), logits(at_once))


@KINDS
def test_narrowed_parameters_have_the_shapes_of_a_stock_model(kind: Kind) -> None:
    widths, family = Widths(48, 80, 6, 8), Gpt2Family(kind)
    student, _ = pruned(gpt2(kind=kind, num_labels=3), draw(widths), family)
    stock = AUTO_CLASSES[kind].from_config(family.stock_config(gpt2_config(num_labels=3), widths))
    assert {n: p.shape for n, p in student.named_parameters()} == {n: p.shape for n, p in stock.named_parameters()}
    assert [str(module) for module in student.modules()][1:] == [str(module) for module in stock.modules()][1:]


@KINDS
def test_every_scored_member_names_a_matrix_of_its_own_group(kind: Kind) -> None:
    names = {name for name, _ in gpt2(kind=kind).named_parameters()}
    for group in Gpt2Family(kind).groups(FULL):
        own = {(member.parameter, member.axis) for member in group.members}
        assert {member.parameter for member in group.members} <= names
        assert all(member.scored_with in own and member.scored_with[0].endswith("weight") for member in group.members)


@KINDS
def test_the_hidden_group_owns_everything_that_is_as_wide_as_the_residual_stream(kind: Kind) -> None:
    model = gpt2(kind=kind, n_embd=60)  # no other width is 60, but that of all heads together
    hidden = Gpt2Family(kind).groups(StudentShape.full(LAYERS, Widths(60, 136, 6, 10)))[0]
    expected = {
        (name, axis)
        for name, parameter in model.named_parameters()
        for axis, size in enumerate(parameter.shape)
        if size == 60 and not (name.endswith("attn.c_proj.weight") and axis == 0)
    }
    found = [(member.parameter, member.axis) for member in hidden.members]
    assert set(found) == expected and len(found) == len(expected)


def test_queries_keys_and_values_weigh_the_same_in_a_heads_score() -> None:
    """Though they lie in one tensor, and values are a thousand times larger here: large queries still win."""
    group = next(group for group in FAMILY.groups(FULL) if group.name == "layers.1.heads")
    importance = Importance(
        PruningConfig(metric="magnitude", smoothing_window=1), [group], SilentRanks(0, 1, 0, CPU), 0
    )
    attention: Any = gpt2().transformer.h[1].attn
    weights = {"c_attn.weight": attention.c_attn.weight, "c_attn.bias": attention.c_attn.bias}
    weights |= {"c_proj.weight": attention.c_proj.weight}
    with torch.no_grad():
        attention.c_attn.weight[:, 2 * N :] *= 1000
        attention.c_attn.weight[:, :12] *= 5  # the first head's queries
    importance.observe(
        Fragment(f"transformer.h.1.attn.{name}", w.shape, 0, w.detach().flatten(), torch.zeros(w.numel()), {})
        for name, w in weights.items()
    )
    joint = (attention.c_attn.weight.abs().sum(0) + attention.c_attn.bias.abs()).double()
    blocks = [*joint.view(3, 6, 12).sum(-1), attention.c_proj.weight.abs().sum(1).double().view(6, 12).sum(-1)]
    expected = sum(block / block.sum() for block in blocks)
    torch.testing.assert_close(importance.scores()[group.name], expected.detach(), rtol=1e-6, atol=0)
    assert expected.argmax() == 0


@pytest.mark.parametrize("rows", [batch(), full_rows()], ids=["padded", "full"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_signals_are_those_of_the_stock_forward_pass(kernel: Any, rows: Batch) -> None:
    stock: Any = gpt2(attn_implementation="eager")
    blocks: list[Tensor] = []
    stock.transformer.h[0].register_forward_pre_hook(lambda _, inputs: blocks.append(inputs[0]))
    for block in stock.transformer.h:
        block.register_forward_hook(lambda _, inputs, output: blocks.append(output))
    with torch.no_grad():
        told = stock(input_ids=rows.input_ids, attention_mask=rows.attention_mask, output_attentions=True)
        signals = FAMILY.signals(gpt2(attn_implementation=attention_implementation(kernel)), rows)
    assert len(signals.hidden_states) == LAYERS + 1
    for found, expected in zip(signals.hidden_states, blocks, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for sequence, positions in enumerate(rows.scored_positions):
        expected = told.logits[sequence, positions]
        torch.testing.assert_close(signals.logits[sequence], expected, rtol=1e-5, atol=1e-5)
    hidden = (rows.attention_mask[:, None, None, :] == 0) | torch.ones(24, 24, dtype=torch.bool).triu(1)
    for (query, key), expected in zip(signals.queries_keys, told.attentions, strict=True):
        scores = query @ key.transpose(-1, -2) * signals.attention_scale
        torch.testing.assert_close(scores.masked_fill(hidden, -math.inf).softmax(dim=-1), expected)


def test_the_head_makes_the_models_logits_of_the_last_blocks_output() -> None:
    model, rows = gpt2(attn_implementation=attention_implementation("sdpa")), batch()
    signals = FAMILY.signals(model, rows)
    found = FAMILY.logits(FAMILY.head(model), signals.hidden_states[-1], rows)
    torch.testing.assert_close(found, signals.logits)
    states = signals.hidden_states[1]
    normed = torch.nn.functional.layer_norm(
        states, (72,), model.transformer.ln_f.weight, model.transformer.ln_f.bias, model.config.layer_norm_epsilon
    )
    expected = (normed @ model.transformer.wte.weight.T).gather(
        1, rows.scored_positions[:, :, None].expand(-1, -1, 997)
    )
    torch.testing.assert_close(FAMILY.logits(FAMILY.head(model), states, rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "labels"), [("classification", 3), ("regression", 1)])
def test_a_classifier_looks_at_the_last_token_as_the_stock_model_does(kind: Kind, labels: int) -> None:
    rows = batch()
    last = rows.attention_mask.sum(dim=1, keepdim=True) - 1
    rows = replace(rows, scored_positions=last)
    model = gpt2(kind=kind, num_labels=labels, attn_implementation=attention_implementation("sdpa"))
    with torch.no_grad():
        signals = Gpt2Family(kind).signals(model, rows)
        expected = gpt2(kind=kind, num_labels=labels)(rows.input_ids, attention_mask=rows.attention_mask).logits
    assert signals.logits.shape == (6, 1, labels)
    torch.testing.assert_close(signals.logits[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_a_span_extractor_gives_the_stock_models_logits_and_never_padding() -> None:
    rows, model = batch(), gpt2(kind="span", attn_implementation=attention_implementation("sdpa"))
    with torch.no_grad():
        found = Gpt2Family("span").signals(model, rows).logits
        stock = gpt2(kind="span")(rows.input_ids, attention_mask=rows.attention_mask)
    real = rows.attention_mask.bool()
    for slot, expected in enumerate((stock.start_logits, stock.end_logits)):
        torch.testing.assert_close(found[:, slot][real], expected[real], rtol=1e-5, atol=1e-5)
        assert found[:, slot].softmax(dim=-1)[~real].count_nonzero() == 0


def test_gradients_survive_activation_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = gpt2(attn_implementation=attention_implementation("sdpa"), **NO_DROPOUT).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        signals = FAMILY.signals(model, batch())
        loss = signals.logits.square().mean() + sum(state.square().mean() for state in signals.hidden_states)
        loss = loss + sum((query @ key.mT).square().mean() for query, key in signals.queries_keys)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [batch(), full_rows()], ids=["padded", "full"])
def test_the_decoder_compiles_to_one_graph_with_the_same_signals(rows: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **settings: plain(*a, **{**settings, "backend": "eager"}))
    model = gpt2(attn_implementation=attention_implementation("sdpa"), n_layer=2)
    expected = FAMILY.signals(model, rows)
    compile_encoder(model)
    found = FAMILY.signals(model, rows)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found.queries_keys, expected.queries_keys, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_layers_that_are_dropped_leave_the_others_as_a_smaller_stock_model() -> None:
    model, small = gpt2(), GPT2LMHeadModel(gpt2_config(n_layer=2)).eval()
    weights = {n: w for n, w in model.state_dict().items() if ".h.1." not in n}
    small.load_state_dict({name.replace(".h.2.", ".h.1."): weight for name, weight in weights.items()})
    FAMILY.keep_layers(model, (0, 2))
    assert [block.attn.layer_idx for block in model.transformer.h] == [0, 1]
    assert FAMILY.layers(model.config) == 2 == FAMILY.with_layers(gpt2_config(), 2).n_layer
    torch.testing.assert_close(logits(model), logits(small), rtol=0, atol=0)


def test_a_narrowed_student_keeps_the_attention_scale_of_its_teacher() -> None:
    student, _ = pruned(gpt2(), draw(Widths(54, 80, 6, 9)))
    student.set_attn_implementation(attention_implementation("sdpa"))
    assert FAMILY.signals(student, batch()).attention_scale == pytest.approx(1 / math.sqrt(12))


def test_a_stock_config_keeps_all_but_the_widths_and_always_names_the_inner_one() -> None:
    before = gpt2_config(resid_pdrop=0.17, n_inner=None)
    after = FAMILY.stock_config(before, Widths(36, 288, 6, 6)).to_dict()
    changed = {key for key, value in before.to_dict().items() if after[key] != value}
    assert changed == {"n_embd", "n_inner"} and after["n_inner"] == 288


def test_without_an_inner_width_it_is_four_times_the_hidden_one() -> None:
    assert FAMILY.widths(gpt2_config(n_inner=None)) == Widths(72, 288, 6, 12)


def test_a_shape_that_no_stock_config_expresses_names_the_nearest_ones() -> None:
    with pytest.raises(ShapeError, match=r"42 \(6 x 7\) or 36 \(6 x 6\)"):
        FAMILY.stock_config(gpt2_config(), Widths(40, 64, 6, 7))


@pytest.mark.parametrize(
    "field",
    [
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"n_embd": 70},
    ],
    ids=str,
)
def test_a_gpt2_that_cannot_be_distilled_is_refused_by_the_field_at_fault(field: dict[str, object]) -> None:
    with pytest.raises(ShapeError, match=next(iter(field))):
        FAMILY.widths(gpt2_config(**field))


def test_a_classifier_has_no_head_to_tie() -> None:
    assert Gpt2Family("classification").widths(gpt2_config(tie_word_embeddings=False)).hidden == 72


def test_gpt2_masks_no_words() -> None:
    assert family_of(gpt2_config(), "causal") == FAMILY
    with pytest.raises(ModelError, match=r"gpt2 model serves causal, .* not masked"):
        family_of(gpt2_config(), "masked")


def test_a_student_that_starts_as_its_teacher_differs_from_it_in_nothing() -> None:
    run = RunConfig.model_validate({"teacher": {"path": "in memory"}})
    blueprint = Blueprint(FAMILY, gpt2_config(), run, attention_implementation("sdpa"))
    student = Student(gpt2(attn_implementation=blueprint.attention), blueprint, FULL)
    teacher = FrozenModel(gpt2(attn_implementation=blueprint.attention), FAMILY)
    sequences = np.random.default_rng(0).integers(1, 997, (4, 24))
    rows = CausalScorer(pad=None)(sequences, np.arange(4))
    with torch.no_grad():
        _, parts = student(as_tuple(rows), teacher(*as_tuple(rows) or ()), rows.counts().vector)
        expected = gpt2()(rows.input_ids, labels=rows.input_ids).loss
    assert [parts[name].item() for name in ("kl", "hidden", "attention")] == [0, 0, 0]
    torch.testing.assert_close(parts["task"], expected, rtol=1e-5, atol=1e-5)
