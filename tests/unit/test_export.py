"""An exported student is a stock model: loaded elsewhere, it computes what the student computed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
)

from homodistil.config import RunConfig
from homodistil.errors import ModelError, ShapeError
from homodistil.export import export_student, verify_export
from homodistil.models.bert import BertFamily
from homodistil.models.gpt2 import Gpt2Family
from homodistil.models.groups import kept_positions
from homodistil.models.shape import StudentShape, Widths
from homodistil.pruning.surgery import narrow
from homodistil.student import Blueprint
from homodistil.tasks import Kind
from tests.fixtures import batch, bert, bert_config, gpt2, gpt2_config, save_bert
from tests.pool import RankPool

FULL = Widths(hidden=72, ffn=136, heads=6, head_width=12)
NARROWER = {
    "as the teacher": FULL,
    "fewer FFN neurons": Widths(72, 101, 6, 12),
    "narrower heads": Widths(42, 136, 6, 7),
    "fewer heads": Widths(48, 136, 4, 12),
    "everything": Widths(30, 55, 5, 6),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("teacher") / "awkward")


@pytest.fixture
def blueprint(teacher: Path) -> Blueprint:
    run = RunConfig.model_validate({"recipe": "tried", "teacher": str(teacher), "run": {"updates": 7}})
    return Blueprint(BertFamily(), AutoConfig.from_pretrained(teacher), run, "eager")


def shape_of(widths: Widths, seed: int = 3) -> StudentShape:
    """Randomly kept units of the awkward teacher."""
    random = np.random.default_rng(seed)
    full, counts = StudentShape.full(3, FULL), {"hidden": widths.hidden, "ffn": widths.ffn, "heads": widths.heads}
    kept = {}
    for name, units in full.kept.items():
        count = counts.get(name.rsplit(".", 1)[-1], widths.head_width)
        kept[name] = tuple(sorted(random.choice(len(units), count, replace=False).tolist()))
    return full.narrowed(kept)


def sliced_weights(shape: StudentShape) -> dict[str, Tensor]:
    """The awkward teacher's weights, cut to `shape`."""
    weights = {name: p.detach().clone() for name, p in bert().named_parameters()}
    groups = BertFamily().groups(StudentShape.full(3, FULL))
    for (name, axis), positions in kept_positions(groups, shape.kept).items():
        weights[name] = weights[name].index_select(axis, positions)
    return weights


def with_original_scale(weights: Mapping[str, Tensor], widths: Widths) -> BertForMaskedLM:
    """A student by hand: its attention scores keep the teacher's scale."""
    config = bert_config(hidden_size=widths.hidden, num_attention_heads=widths.heads, intermediate_size=widths.ffn)
    model = BertForMaskedLM(config).eval()
    model.load_state_dict(weights, strict=False)
    rescale(model, FULL.head_width)
    return model


def rescale(model: BertForMaskedLM, head_width: int) -> None:
    layers: Any = model.bert.encoder.layer
    for layer in layers:
        layer.attention.self.scaling = 1 / math.sqrt(head_width)


@torch.no_grad()
def stock_logits(directory: Path) -> Tensor:
    """What a process that knows nothing of homodistil computes."""
    model, rows = AutoModelForMaskedLM.from_pretrained(directory).eval(), batch()
    return model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits


@pytest.mark.parametrize("widths", NARROWER.values(), ids=NARROWER.keys())
def test_stock_transformers_in_another_process_computes_the_students_logits(
    widths: Widths, blueprint: Blueprint, teacher: Path, tmp_path: Path, pool: Callable[[int], RankPool]
) -> None:
    shape = shape_of(widths)
    weights = sliced_weights(shape)
    directory = export_student(weights, blueprint, shape, tmp_path / "student", teacher)
    rows = batch()
    with torch.no_grad():
        expected = with_original_scale(weights, widths)(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask
        ).logits
    (found,) = pool(1).run(stock_logits, directory)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_plain_slice_would_have_scaled_its_attention_wrongly() -> None:
    """The fixture is sharp enough to tell: without folding, logits are off by far more than 1e-5."""
    widths = NARROWER["narrower heads"]
    weights, rows = sliced_weights(shape_of(widths)), batch()
    right, wrong = with_original_scale(weights, widths), with_original_scale(weights, widths)
    rescale(wrong, widths.head_width)
    with torch.no_grad():
        difference = (right(rows.input_ids).logits - wrong(rows.input_ids).logits).abs().max()
    assert difference > 1e-3


def test_dropout_dtype_and_tokenizer_are_ready_for_fine_tuning(
    blueprint: Blueprint, teacher: Path, tmp_path: Path
) -> None:
    shape = shape_of(NARROWER["everything"])
    directory = export_student(sliced_weights(shape), blueprint, shape, tmp_path / "student", teacher)
    config = AutoConfig.from_pretrained(directory)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.1
    assert str(config.dtype).removeprefix("torch.") == "float32"
    assert AutoTokenizer.from_pretrained(directory)("w5 w8")["input_ids"] == [2, 5, 8, 3]
    assert "30 hidden, 5 x 6 heads, 55 FFN" in (directory / "README.md").read_text()


def test_whoever_may_read_new_files_may_read_an_export(blueprint: Blueprint, teacher: Path, tmp_path: Path) -> None:
    """safetensors makes files that only their owner can read."""
    (tmp_path / "new").touch()
    shape = shape_of(NARROWER["everything"])
    directory = export_student(sliced_weights(shape), blueprint, shape, tmp_path / "student", teacher)
    modes = {file.name: file.stat().st_mode for file in directory.iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {(tmp_path / "new").stat().st_mode}


def test_provenance_names_teacher_units_and_settings(blueprint: Blueprint, teacher: Path, tmp_path: Path) -> None:
    shape = shape_of(NARROWER["everything"])
    directory = export_student(sliced_weights(shape), blueprint, shape, tmp_path / "student", teacher)
    provenance = json.loads((directory / "homodistil.json").read_text())
    assert provenance["teacher"]["sha256"] == hashlib.sha256((teacher / "model.safetensors").read_bytes()).hexdigest()
    assert StudentShape.from_dict(provenance["shape"]) == shape
    assert RunConfig.model_validate(provenance["run"]) == blueprint.run


@pytest.mark.parametrize(
    ("kind", "auto", "words"),
    [
        ("causal", AutoModelForCausalLM, ("text-generation", "A causal language model of")),
        ("classification", AutoModelForSequenceClassification, ("text-classification", "A text classifier of")),
    ],
)
def test_an_exported_gpt2_is_a_stock_model_of_its_kind_with_the_students_logits(
    kind: Kind, auto: Any, words: tuple[str, str], blueprint: Blueprint, teacher: Path, tmp_path: Path
) -> None:
    shape, full = shape_of(NARROWER["everything"]), StudentShape.full(3, FULL)
    family, student, rows = Gpt2Family(kind), gpt2(kind=kind, num_labels=3), batch()
    narrow(student, kept_positions(family.groups(full), shape.kept))
    family.configure(student, shape)
    blueprint = Blueprint(family, gpt2_config(num_labels=3), blueprint.run, "eager")
    weights = {name: parameter.detach() for name, parameter in student.named_parameters()}
    directory = export_student(weights, blueprint, shape, tmp_path / "student", teacher)
    stock = auto.from_pretrained(directory).eval()
    with torch.no_grad():
        found, expected = (m(rows.input_ids, attention_mask=rows.attention_mask).logits for m in (stock, student))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    config, card = json.loads((directory / "config.json").read_text()), (directory / "README.md").read_text()
    assert config["n_inner"] == 55 and "tie_last_hidden_states" not in config
    assert all(word in card for word in (*words, f"import {auto.__name__}, AutoTokenizer"))


def test_a_shape_without_a_stock_config_is_refused_and_nothing_is_written(
    blueprint: Blueprint, teacher: Path, tmp_path: Path
) -> None:
    shape = shape_of(Widths(hidden=50, ffn=136, heads=6, head_width=7))
    with pytest.raises(ShapeError, match="hidden 54"):
        export_student(sliced_weights(shape), blueprint, shape, tmp_path / "student", teacher)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_shape_are_refused_by_name(blueprint: Blueprint, teacher: Path, tmp_path: Path) -> None:
    shape = shape_of(NARROWER["narrower heads"])
    weights = sliced_weights(shape)
    del weights["bert.encoder.layer.2.output.dense.bias"]
    weights["cls.predictions.bias"] = torch.zeros(3)
    with pytest.raises(ModelError, match=r"(?s)layer\.2\.output\.dense\.bias.*cls\.predictions\.bias.*\(3,\)"):
        export_student(weights, blueprint, shape, tmp_path / "student", teacher)


def test_an_earlier_export_is_replaced_and_anything_else_left_alone(
    blueprint: Blueprint, teacher: Path, tmp_path: Path
) -> None:
    for widths in (NARROWER["everything"], FULL):
        shape = shape_of(widths)
        directory = export_student(sliced_weights(shape), blueprint, shape, tmp_path / "student", teacher)
    assert AutoConfig.from_pretrained(directory).hidden_size == 72
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("dear to someone")
    with pytest.raises(ModelError, match=r"thesis: exists, and is no earlier export"):
        export_student(sliced_weights(shape), blueprint, shape, tmp_path / "thesis", teacher)
    assert (tmp_path / "thesis" / "chapter.txt").exists()


@pytest.mark.parametrize("damage", ["changed", "dropped"])
def test_the_check_notices_a_damaged_file(damage: str, teacher: Path, tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path)
    verify_export(tmp_path, model)
    weights, name = load_file(tmp_path / "model.safetensors"), "bert.encoder.layer.1.output.dense.weight"
    if damage == "changed":
        weights[name][3, 4] += 1e-6
    else:
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        verify_export(tmp_path, model)
