"""DeepSpeed JSONs: refused in words when they cannot be run, and filled so that DeepSpeed takes them as meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig as DeepSpeedsOwn

from homodistil import hardware
from homodistil.cli import DS_CONFIGS
from homodistil.config import RunConfig
from homodistil.ds_config import DeepSpeedConfig, micro_batch_size
from homodistil.errors import ConfigError

STUDENTS = ("zero1", "zero2", "zero3")


def shipped(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((DS_CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return settings


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """`written(settings)`: path of a JSON file that holds them."""

    def write(settings: dict[str, Any]) -> Path:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        return path

    return write


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        DeepSpeedConfig.load(path)
    assert str(path) in str(error.value)
    return str(error.value)


def student(name: str = "zero2") -> DeepSpeedConfig:
    return DeepSpeedConfig.load(DS_CONFIGS / f"{name}.json")


@pytest.mark.parametrize("name", STUDENTS)
def test_deepspeed_takes_a_filled_student_json_as_it_was_meant(name: str) -> None:
    run = RunConfig.load("smoke")
    settings = student(name).resolved(run, world_size=1)
    theirs = DeepSpeedsOwn(settings)
    assert "auto" not in json.dumps(settings)
    assert theirs.zero_optimization_stage == int(name[-1])
    assert theirs.train_batch_size == 16
    assert theirs.train_micro_batch_size_per_gpu == 4
    assert theirs.gradient_accumulation_steps == 4
    assert theirs.gradient_clipping == 1.0
    assert theirs.optimizer_params["lr"] == run.optimizer.learning_rate
    assert theirs.optimizer_params["eps"] == run.optimizer.eps
    assert theirs.zero_config.reduce_bucket_size == 5_000_000


def test_deepspeed_takes_a_filled_teacher_json_and_sees_no_optimizer() -> None:
    teacher = DeepSpeedConfig.load_teacher(DS_CONFIGS / "teacher_zero3.json", student())
    theirs = DeepSpeedsOwn(teacher.resolved(RunConfig.load("smoke"), world_size=1))
    assert theirs.zero_optimization_stage == 3
    assert theirs.optimizer_name is None


@pytest.mark.parametrize(("cpu", "dtype"), [("avx512_bf16", torch.bfloat16), ("avx512f", torch.float32)])
def test_bf16_auto_follows_the_processor(cpu: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: Any) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags : fpu sse {cpu}\n", encoding="utf-8")
    monkeypatch.setattr(hardware, "CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = student()
    assert config.dtype == dtype
    assert config.resolved(RunConfig(), 1)["bf16"]["enabled"] == (dtype == torch.bfloat16)


@pytest.mark.parametrize(("major", "dtype"), [(8, torch.bfloat16), (7, torch.float32)])
def test_bf16_auto_follows_the_gpu(major: int, dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    assert student().dtype == dtype


@pytest.mark.parametrize("enabled", [True, False])
def test_a_teachers_bf16_auto_is_the_students_precision(enabled: bool, written: Any) -> None:
    student = DeepSpeedConfig.load(written({**shipped("zero2"), "bf16": {"enabled": enabled}}))
    teacher = DeepSpeedConfig.load_teacher(DS_CONFIGS / "teacher_zero3.json", student)
    assert teacher.dtype == student.dtype == (torch.bfloat16 if enabled else torch.float32)


def test_a_value_that_only_the_json_sets_is_adopted_by_the_run(written: Any) -> None:
    config = DeepSpeedConfig.load(written({**shipped("zero2"), "train_batch_size": 256}))
    run = config.adopted_by(RunConfig())
    assert run.data.global_batch == 256
    assert config.resolved(run, world_size=2)["gradient_accumulation_steps"] == 256 // (2 * run.data.micro_batch)


def test_a_value_set_in_json_and_recipe_is_refused_naming_both_places(written: Any) -> None:
    path = written({**shipped("zero2"), "train_batch_size": 256})
    with pytest.raises(ConfigError) as error:
        DeepSpeedConfig.load(path).adopted_by(RunConfig.load("smoke"))
    message = str(error.value)
    assert f"train_batch_size is 256 in {path}" in message
    assert "smoke.yaml is 16" in message


def test_a_run_that_adopted_a_value_is_repeated_with_the_same_json(written: Any, tmp_path: Path) -> None:
    settings = {**shipped("zero2"), "train_batch_size": 256}
    settings["optimizer"]["params"]["betas"] = [0.8, 0.9]
    config = DeepSpeedConfig.load(written(settings))
    config.adopted_by(RunConfig()).save(tmp_path / "run.yaml")
    again = config.adopted_by(RunConfig.load(str(tmp_path / "run.yaml"), {"run": {"name": "again"}}))
    assert again.data.global_batch == 256 and again.optimizer.betas == (0.8, 0.9)


def test_a_value_set_in_json_and_on_the_command_line_is_refused_naming_both_places(written: Any) -> None:
    settings = shipped("zero2")
    settings["optimizer"]["params"]["eps"] = 1e-8
    path = written(settings)
    with pytest.raises(ConfigError) as error:
        DeepSpeedConfig.load(path).adopted_by(RunConfig.load("quickstart", {"optimizer": {"eps": "1e-7"}}))
    assert f"optimizer.params.eps is 1e-08 in {path}" in str(error.value)
    assert "--optimizer.eps on the command line is 1e-07" in str(error.value)


def test_a_misspelt_key_names_the_nearest_right_one(written: Any) -> None:
    assert "Did you mean 'gradient_clipping'?" in refusal(written({**shipped("zero2"), "gradient_cliping": 1.0}))


def test_an_order_of_gradients_by_which_nothing_is_found_is_refused(written: Any) -> None:
    settings = shipped("zero2")
    settings["zero_optimization"]["round_robin_gradients"] = True
    assert "round_robin_gradients" in refusal(written(settings))


def test_a_misspelt_zero_key_names_the_nearest_right_one(written: Any) -> None:
    settings = shipped("zero2")
    settings["zero_optimization"]["reduce_buket_size"] = 1
    assert "Did you mean 'reduce_bucket_size'?" in refusal(written(settings))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("fp16", {"enabled": True}, "use bf16"),
        ("scheduler", {"type": "WarmupLR"}, "optimizer.schedule"),
        ("compression_training", {"layer_reduction": {}}, "pruning"),
        ("activation_checkpointing", {"partition_activations": True}, "performance.activation_checkpointing"),
    ],
)
def test_an_unsupported_section_is_refused_with_its_reason(key: str, value: Any, reason: str, written: Any) -> None:
    message = refusal(written({**shipped("zero2"), key: value}))
    assert f"{key} is not supported here" in message
    assert reason in message


def test_offloading_is_refused_with_its_reason(written: Any) -> None:
    settings = shipped("zero3")
    settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    assert "zero_optimization.offload_optimizer is not supported here" in refusal(written(settings))


@pytest.mark.parametrize("stage", [0, 4])
def test_only_zero_stages_1_to_3_are_accepted(stage: int, written: Any) -> None:
    message = refusal(written({**shipped("zero2"), "zero_optimization": {"stage": stage}}))
    assert "1, 2 or 3" in message
    assert f"found {stage}" in message


def test_fp32_accumulation_at_stage_1_in_bf16_is_refused_because_its_optimizer_cannot_be_pruned(written: Any) -> None:
    settings = {**shipped("zero1"), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert "Use stage 2" in refusal(written(settings))


def test_an_optimizer_that_cannot_be_sliced_is_refused(written: Any) -> None:
    settings = shipped("zero2")
    settings["optimizer"]["type"] = "Lamb"
    assert "found 'Lamb'" in refusal(written(settings))


def test_auto_where_nothing_fills_it_is_refused(written: Any) -> None:
    message = refusal(written({**shipped("zero2"), "gradient_clipping": "auto"}))
    assert 'gradient_clipping is "auto"' in message


def test_a_student_needs_an_optimizer_and_a_teacher_must_not_have_one(written: Any) -> None:
    assert "optimizer is missing" in refusal(DS_CONFIGS / "teacher_zero3.json")
    with pytest.raises(ConfigError, match="a teacher is frozen"):
        DeepSpeedConfig.load_teacher(DS_CONFIGS / "zero3.json", student())


def test_a_missing_file_and_broken_json_are_refused_by_name(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    assert "not valid JSON" in refusal(tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("global_batch", "world_size", "mends"), [(100, 8, "96 or 104"), (7, 2, "6 or 8"), (1, 2, "2")]
)
def test_a_batch_that_the_ranks_cannot_share_is_refused_with_the_nearest_that_they_can(
    global_batch: int, world_size: int, mends: str
) -> None:
    with pytest.raises(ConfigError) as error:
        micro_batch_size(global_batch, 4, world_size)
    assert f"data.global_batch {global_batch}" in str(error.value)
    assert f"data.global_batch to {mends}," in str(error.value)


@pytest.mark.parametrize(
    ("global_batch", "largest", "world_size", "size"), [(32, 16, 1, 16), (32, 16, 8, 4), (12, 5, 1, 4), (16, 32, 1, 16)]
)
def test_a_micro_batch_is_the_largest_of_which_every_rank_does_equally_many(
    global_batch: int, largest: int, world_size: int, size: int
) -> None:
    assert micro_batch_size(global_batch, largest, world_size) == size


def test_accumulation_in_the_json_that_contradicts_the_batches_is_refused(written: Any) -> None:
    config = DeepSpeedConfig.load(written({**shipped("zero2"), "gradient_accumulation_steps": 3}))
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 3"):
        config.resolved(RunConfig.load("smoke"), world_size=1)
