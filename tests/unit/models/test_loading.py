"""Every weight accounted for: what a directory lacks is an error that names it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from homodistil.errors import ConfigError, ModelError, ShapeError
from homodistil.models import family_of
from homodistil.models.groups import kept_positions
from homodistil.models.loading import load_model, materialise, model_hash, new_config, new_model, skeleton
from homodistil.models.shape import StudentShape, Widths
from homodistil.pruning.surgery import narrow
from tests.fixtures import batch, bert, save_bert
from tests.fixtures import bert_config as awkward

QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_bert(tmp_path / "teacher")


def damage(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of the file; None takes one out."""
    file = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in (load_file(file) | changes).items() if tensor is not None}
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_sound_directory_loads_bit_by_bit_and_a_tied_head_is_not_missing(directory: Path) -> None:
    loaded, saved = load_model(directory, torch.float32), bert()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


def test_the_dtype_asked_for_wins_over_the_one_saved(directory: Path) -> None:
    bert().half().save_pretrained(directory)
    assert {p.dtype for p in load_model(directory, torch.float32).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(directory, torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (None, f"'{QUERY}.weight' is missing"),
        (torch.ones(5, 7), rf"'{QUERY}.weight' has shape \(5, 7\), config.json expects \(72, 72\)"),
        (torch.zeros(72, 72), f"'{QUERY}.weight' is all zero"),
    ],
)
def test_a_weight_that_was_not_trained_is_refused_by_name(
    directory: Path, change: torch.Tensor | None, complaint: str
) -> None:
    damage(directory, {f"{QUERY}.weight": change})
    with pytest.raises(ModelError, match=complaint) as refusal:
        load_model(directory, torch.float32)
    assert str(directory / "model.safetensors") in str(refusal.value)


def test_a_bias_may_be_zero_and_a_layer_norm_gain_may_not(directory: Path) -> None:
    damage(directory, {f"{QUERY}.bias": torch.zeros(72)})
    load_model(directory, torch.float32)
    damage(directory, {"bert.embeddings.LayerNorm.weight": torch.zeros(72)})
    with pytest.raises(ModelError, match=r"embeddings\.LayerNorm\.weight' is all zero"):
        load_model(directory, torch.float32)


def test_weights_without_a_language_model_head_are_refused(directory: Path) -> None:
    names = load_file(directory / "model.safetensors")
    damage(directory, {name: None for name in names if name.startswith("cls.")})
    with pytest.raises(ModelError, match=r"cls\.predictions\.transform\.dense\.weight' is missing"):
        load_model(directory, torch.float32)


@pytest.mark.parametrize(
    ("lacking", "complaint"), [("config.json", "config.json"), ("model.safetensors", "no weights")]
)
def test_a_directory_that_lacks_a_file_is_refused(directory: Path, lacking: str, complaint: str) -> None:
    (directory / lacking).unlink()
    with pytest.raises(ModelError, match=complaint):
        load_model(directory, torch.float32)


def test_a_truncated_file_is_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(directory, torch.float32)


def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        load_model(tmp_path / "nowhere", torch.float32)


def test_the_hash_follows_the_weights_alone(directory: Path) -> None:
    before = model_hash(directory)
    (directory / "notes.txt").write_text("anything")
    assert model_hash(directory) == before
    damage(directory, {f"{QUERY}.bias": torch.zeros(72)})
    assert model_hash(directory) != before


def test_a_recipe_makes_a_bert_of_its_tokenizers_vocabulary() -> None:
    config = new_config({"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1}, vocab_size=101)
    torch.manual_seed(3)
    first = new_model(config)
    torch.manual_seed(3)
    again = new_model(config)
    assert first.bert.embeddings.word_embeddings.weight.shape == (101, 24)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"hiden_size": 24}, "'hiden_size'.*Did you mean 'hidden_size'"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": 7}, "vocab_size is 7.*101"),
    ],
)
def test_a_wrong_student_config_is_refused_by_key(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        new_config(fields, vocab_size=101)


def test_a_student_config_with_uneven_heads_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"28 \(4 x 7\) or 24 \(4 x 6\)"):
        new_config({"hidden_size": 26, "num_attention_heads": 4}, vocab_size=101)


def test_a_skeleton_narrowed_on_the_meta_device_and_filled_is_the_narrowed_model() -> None:
    teacher = bert()
    family = family_of(teacher.config)
    full = StudentShape.full(3, family.widths(teacher.config))
    shape = full.first(Widths(42, 64, 6, 7))
    positions = kept_positions(family.groups(full), shape.kept)
    frame, expected = skeleton(awkward()), copy.deepcopy(teacher)
    for model in (frame, expected):
        narrow(model, positions)
        family.configure(model, shape)
    assert all(parameter.is_meta for parameter in frame.parameters())
    materialise(frame)
    frame.eval().load_state_dict(expected.state_dict())
    rows = batch()
    assert torch.equal(frame(rows.input_ids).logits, expected(rows.input_ids).logits)


def test_a_materialised_skeleton_keeps_ties_and_buffers() -> None:
    frame = skeleton(awkward())
    materialise(frame)
    stock = BertForMaskedLM(awkward())
    assert frame.cls.predictions.decoder.weight is frame.bert.embeddings.word_embeddings.weight
    assert frame.cls.predictions.decoder.bias is frame.cls.predictions.bias
    assert all(torch.equal(dict(frame.named_buffers())[name], buffer) for name, buffer in stock.named_buffers())
    assert [name for name, _ in frame.named_parameters()] == [name for name, _ in stock.named_parameters()]
