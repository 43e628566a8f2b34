"""What cannot be run is refused before any engine is built, by file, key, value, expectation and mend."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM

from homodistil.config import RunConfig
from homodistil.data.shards import ShardIndex
from homodistil.ds_config import DeepSpeedConfig
from homodistil.errors import ConfigError, DataError, HomodistilError, ModelError, Preempted, ShapeError
from homodistil.forecast import update_flops
from homodistil.models.loading import load_model
from homodistil.preemption import Preemption
from homodistil.run_plan import original_config, plan_run
from homodistil.train import train
from tests import fixtures

ZERO2 = Path(__file__).parents[2] / "ds_configs" / "zero2.json"
TEACHER = ZERO2.with_name("teacher_zero3.json")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixtures.save_bert(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    fixtures.save_shards(folder)
    return folder


def opened(teacher: Path, shards: Path, world_size: int = 1, /, **sections: Any) -> Any:
    values: dict[str, Any] = {
        "teacher": {"path": str(teacher)},
        "data": {"shards": str(shards), "global_batch": 8, "micro_batch": 2, "lanes": 4},
        "pruning": {"target": {"hidden": 36, "head_width": 6, "ffn": 69}},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    index = ShardIndex.load(shards)
    return plan_run(RunConfig.model_validate(values), index, DeepSpeedConfig.load(ZERO2), world_size)


def refused(kind: type[HomodistilError], words: list[str], *arguments: Any, **sections: Any) -> None:
    with pytest.raises(kind) as caught:
        opened(*arguments, **sections)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_the_arithmetic_of_an_update_is_that_of_stock_models(teacher: Path, shards: Path) -> None:
    """The teacher's forward, and thrice as much for a student that is as wide: of all matrix products of the body, and
    of the head at masked positions."""
    plan = opened(teacher, shards)
    stock, length = BertForMaskedLM.from_pretrained(teacher, attn_implementation="eager"), plan.source.sequence_length
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stock.bert(torch.zeros(8, length, dtype=torch.int64))
    body = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stock.cls(torch.zeros(1, stock.config.hidden_size))
    head = counter.get_total_flops() * 8 * length * plan.run.data.mask_probability
    assert update_flops(plan, plan.family.widths(stock.config)) == pytest.approx(4 * (body + head))


def test_a_sound_run_gets_its_ladder(teacher: Path, shards: Path) -> None:
    plan = opened(teacher, shards)
    assert str(plan.ladder.rungs[-1].widths) == "36 hidden, 6 x 6 heads, 69 FFN"
    assert all(rung.widths.is_stock for rung in plan.ladder.rungs)


def test_a_target_that_no_stock_config_expresses_names_the_nearest_that_one_can(teacher: Path, shards: Path) -> None:
    words = ["pruning.target", "40", "42 (6 x 7)", "36 (6 x 6)"]
    refused(ShapeError, words, teacher, shards, pruning={"target": {"hidden": 40}})


def test_a_target_wider_than_the_teacher_is_refused(teacher: Path, shards: Path) -> None:
    refused(ShapeError, ["pruning.target.ffn", "200", "136"], teacher, shards, pruning={"target": {"ffn": 200}})


def test_a_global_batch_that_the_ranks_cannot_share_names_those_they_can(teacher: Path, shards: Path) -> None:
    data = {"global_batch": 10, "lanes": 4}
    refused(ConfigError, ["data.global_batch = 10", "8 or 12"], teacher, shards, data=data)


def test_lanes_that_do_not_divide_are_refused(teacher: Path, shards: Path) -> None:
    refused(ConfigError, ["data.lanes = 3", "data.global_batch = 8"], teacher, shards, data={"lanes": 3})
    refused(ConfigError, ["data.lanes = 4", "3 ranks"], teacher, shards, 3)


def test_shards_of_another_vocabulary_size_are_refused(tmp_path: Path, shards: Path) -> None:
    other = fixtures.save_bert(tmp_path / "other", vocab_size=1000)
    refused(ConfigError, ["data.shards", "997", "1000", "--tokenizer"], other, shards)


def test_shards_of_other_pieces_are_refused_though_the_size_is_the_same(tmp_path: Path, shards: Path) -> None:
    other = fixtures.save_bert(tmp_path / "other")
    for name in ("tokenizer.json", "vocab.txt"):
        if (other / name).exists():
            (other / name).write_text(
                (other / name).read_text().replace('"w17"', '"x17"').replace("\nw17\n", "\nx17\n")
            )
    refused(ConfigError, ["data.shards", "other pieces", "--tokenizer"], other, shards)


def test_sequences_longer_than_the_models_positions_are_refused(tmp_path: Path, shards: Path) -> None:
    short = fixtures.save_bert(tmp_path / "short", max_position_embeddings=16)
    refused(ConfigError, ["24", "16 positions", "--sequence_length"], short, shards)


def test_missing_shards_name_the_command_that_builds_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="build_shards"):
        ShardIndex.load(tmp_path / "nowhere")


def damaged(directory: Path, **tensors: torch.Tensor | None) -> Path:
    fixtures.save_bert(directory)
    weights = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        weights.pop(name.replace("__", "."))
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


QUERY = "bert__encoder__layer__1__attention__self__query__weight"


@pytest.mark.parametrize(
    ("tensor", "word"), [(None, "missing"), (torch.zeros(72, 72), "all zero")], ids=["missing", "all_zero"]
)
def test_a_teacher_with_an_untrained_weight_is_refused_by_the_weights_name(
    tmp_path: Path, tensor: torch.Tensor | None, word: str
) -> None:

    broken = damaged(tmp_path / "broken", **{QUERY: tensor})
    with pytest.raises(ModelError, match=word) as caught:
        load_model(broken, torch.float32)
    assert QUERY.replace("__", ".") in str(caught.value)


def test_a_teacher_that_is_nowhere_is_refused(shards: Path, tmp_path: Path) -> None:
    refused(ModelError, ["no such directory"], tmp_path / "nowhere", shards)


def test_compiling_what_zero_3_gathers_is_refused_by_name(teacher: Path, shards: Path) -> None:
    compiled = {"performance": {"compile": True}}
    refused(ConfigError, ["performance.compile", "teacher.sharding", "replicated"], teacher, shards, 2, **compiled)
    zero3 = DeepSpeedConfig.load(ZERO2.with_name("zero3.json"))
    values = {
        "teacher": {"path": str(teacher)},
        "data": {"shards": str(shards), "global_batch": 8, "micro_batch": 2, "lanes": 4},
    }
    run = RunConfig.model_validate({**values, **compiled})
    with pytest.raises(ConfigError, match="ZeRO stage 3"):
        plan_run(run, ShardIndex.load(shards), zero3, 1)


def test_a_run_that_would_replace_its_own_teacher_is_refused(teacher: Path, shards: Path, tmp_path: Path) -> None:
    home = fixtures.save_bert(tmp_path / "own" / "student")
    refused(ConfigError, ["teacher.path", "--run.name"], home, shards, run={"directory": str(tmp_path), "name": "own"})


def test_a_folder_that_is_no_export_is_refused_before_training(teacher: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "student").mkdir(parents=True)
    refused(ModelError, ["exists"], teacher, shards, run={"directory": str(tmp_path), "name": "mine"})


def test_a_target_without_a_teacher_is_refused(teacher: Path, shards: Path) -> None:
    plain = {"teacher": {"path": None}, "student": {"config": {"hidden_size": 72, "num_attention_heads": 6}}}
    refused(ConfigError, ["pruning.target", "teacher.path"], teacher, shards, **plain)


def test_an_empty_teacher_path_is_not_taken_for_none() -> None:
    with pytest.raises(ValueError, match="path is empty"):
        RunConfig.model_validate({"teacher": {"path": ""}})


def test_a_teacher_with_a_layer_that_its_config_forgets_is_refused(tmp_path: Path) -> None:
    extra = damaged(tmp_path / "extra")
    config = (extra / "config.json").read_text()
    (extra / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    with pytest.raises(ModelError, match=r"encoder\.layer\.2.*no layer"):
        load_model(extra, torch.float32)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"student": {"layers": [0, 3]}}, ["student.layers", "[0, 3]", "0 to 2"]),
        ({"student": {"layers": []}}, ["student.layers", "0 to 2"]),
        ({"student": {"layers": [1, 0]}}, ["student.layers", "in order"]),
        ({"student": {"layers": [1, 1]}}, ["student.layers", "once"]),
        (
            {"student": {"layers": [0]}, "knowledge": {"layers": [0, 1]}},
            ["knowledge.layers", "found 2", "but 1 of the student's"],
        ),
        ({"knowledge": {"layers": [0, 1, 7]}}, ["knowledge.layers", "0 to 2"]),
    ],
)
def test_layers_that_are_not_there_are_refused(
    teacher: Path, shards: Path, sections: dict[str, Any], words: list[str]
) -> None:
    refused(ConfigError, words, teacher, shards, **sections)


def test_a_student_of_two_layers_is_planned(teacher: Path, shards: Path) -> None:
    plan = opened(teacher, shards, student={"layers": [0, 2]})
    assert (plan.start.layers, plan.blueprint.compared.teacher) == (2, (1, 2))


def test_a_mistyped_teacher_is_not_taken_for_one_that_the_recipe_makes() -> None:
    run = RunConfig.load("quickstart", {"teacher": {"path": "/models/typo"}})
    with pytest.raises(
        ConfigError, match=r"(?s)/models/typo does not exist.*leave its model in .*teacher.recipe to none"
    ):
        original_config(run, 4096)


def test_a_signal_while_one_run_ends_keeps_the_next_from_beginning(teacher: Path, shards: Path, tmp_path: Path) -> None:
    plan, ranks = (
        opened(teacher, shards, run={"directory": tmp_path}),
        fixtures.SilentRanks(0, 1, 0, torch.device("cpu")),
    )
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted, match="what is done is on disk"):
            train(plan, DeepSpeedConfig.load_teacher(TEACHER, plan.ds_config), ranks, preemption)
    assert not list(tmp_path.iterdir())
