"""The command line: flags override the recipe, teach themselves, and say which flag was meant."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from homodistil.cli import DS_CONFIGS, INTERRUPTED, main
from homodistil.config import RunConfig
from homodistil.errors import DataError, DivergenceError, HomodistilError, ModelError
from homodistil.recipe import recipe_names

LAUNCHERS = Path(__file__).parents[2] / "launchers"


class Called(dict[str, Any]):
    """What train.pretrain was called with."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    """Stands in for train.pretrain: the command line is tested, not the training behind it."""
    calls = Called()

    def pretrain(run: RunConfig, student: Any, teacher: Any, dry_run: bool) -> None:
        calls.update(run=run, student=student, teacher=teacher, dry_run=dry_run)

    stand_in = ModuleType("homodistil.train")
    stand_in.pretrain = pretrain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "homodistil.train", stand_in)
    monkeypatch.setattr("homodistil.train", stand_in, raising=False)
    return calls


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err


def test_without_any_flag_it_is_the_quickstart_on_zero_2(called: Called) -> None:
    main(["pretrain"])
    assert called["run"].recipe == "quickstart"
    assert called["student"].path == DS_CONFIGS / "zero2.json"
    assert called["teacher"].path == DS_CONFIGS / "teacher_zero3.json"
    assert called["dry_run"] is False


def test_a_flag_overrides_the_recipe_and_the_recipe_the_defaults(called: Called) -> None:
    main(["pretrain", "--recipe", "smoke", "--pruning.events", "5", "--objective.kl.weight=2.5"])
    run = called["run"]
    assert (run.pruning.events, run.objective.kl.weight) == (5, 2.5)
    assert run.pruning.target.hidden == 32
    assert run.optimizer.eps == 1e-6


def test_only_flags_that_were_given_count_as_set(called: Called) -> None:
    main(["pretrain", "--recipe", "smoke", "--optimizer.eps", "1e-6"])
    assert called["run"].origin("optimizer.eps") == "--optimizer.eps on the command line"
    assert called["run"].origin("optimizer.betas") is None


def test_values_of_every_kind_arrive_with_their_type(called: Called) -> None:
    flags = "--dry_run --optimizer.betas 0.8,0.9 --performance.compile true --teacher.path none --data.shards /x"
    main(
        ["pretrain", *flags.split(), "--student.config", "hidden_size=72", "--student.config", "intermediate_size=136"]
    )
    run = called["run"]
    assert called["dry_run"] is True
    assert (run.optimizer.betas, run.performance.compile) == ((0.8, 0.9), True)
    assert (run.teacher.path, run.data.shards) == (None, Path("/x"))
    assert run.student.config == {"hidden_size": 72, "intermediate_size": 136}


def test_the_deepspeed_launchers_own_flag_changes_nothing(called: Called) -> None:
    main(["pretrain", "--local_rank=1"])
    assert called["run"] == RunConfig.load("quickstart", {})


def test_a_value_in_the_json_reaches_the_run(called: Called, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    settings = (DS_CONFIGS / "zero2.json").read_text(encoding="utf-8")
    path.write_text(settings.replace('"lr": "auto"', '"lr": 0.25'), encoding="utf-8")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("teacher: none", encoding="utf-8")
    main(["pretrain", "--ds_config", str(path), "--recipe", str(recipe)])
    assert called["run"].optimizer.learning_rate == 0.25
    assert called["student"].dtype in {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--pruning.evens", "--pruning.events"),
        ("--prunning.events", "--pruning.events"),
        ("--dryrun", "--dry_run"),
        ("--ds_confg", "--ds_config"),
        ("--pruning.event", "--pruning.events"),
    ],
)
def test_a_misspelt_flag_names_the_one_that_was_meant(flag: str, meant: str, capsys: Any) -> None:
    assert f"Did you mean '{meant}'?" in refusal(capsys, "pretrain", flag, "3")


def test_a_wrong_value_is_blamed_on_its_flag(capsys: Any) -> None:
    message = refusal(capsys, "pretrain", "--data.lanes", "many")
    assert "--data.lanes on the command line" in message
    assert "found 'many'" in message


def test_a_missing_deepspeed_json_is_named_before_anything_is_loaded(capsys: Any) -> None:
    assert "nowhere.json cannot be read" in refusal(capsys, "pretrain", "--ds_config", "nowhere.json")


def test_a_misspelt_command_names_the_one_that_was_meant(capsys: Any) -> None:
    assert "Did you mean 'pretrain'?" in refusal(capsys, "pretrian")


@pytest.mark.parametrize(("prefix", "ranks"), [("", ("RANK", "LOCAL_RANK")), ("error on rank 8", ("RANK",))])
def test_what_is_wrong_before_the_ranks_met_is_printed_once_a_machine(
    monkeypatch: Any, capsys: Any, prefix: str, ranks: tuple[str, ...]
) -> None:
    for name in ranks:
        monkeypatch.setenv(name, "8")
    said = refusal(capsys, "pretrain", "--recipe", "nowhere")
    assert said.startswith(f"{prefix}: --recipe nowhere") if prefix else said == ""


@pytest.mark.parametrize("error", [DataError, ModelError])
def test_an_error_of_one_rank_is_printed_by_that_rank(
    called: Called, monkeypatch: Any, capsys: Any, error: type[HomodistilError]
) -> None:
    def fail(*_: Any) -> None:
        raise error("held-out shard: cannot be read")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("homodistil.train.pretrain", fail)
    assert "error on rank 3: held-out" in refusal(capsys, "pretrain")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory.\nTried"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_want_of_memory_is_answered_with_what_helps(
    called: Called, monkeypatch: Any, capsys: Any, error: RuntimeError
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("homodistil.train.pretrain", fail)
    said = refusal(capsys, "pretrain")
    assert "--data.micro_batch" in said and str(error).splitlines()[0] in said


def test_an_error_of_ours_keeps_its_traceback(called: Called, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("homodistil.train.pretrain", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["pretrain"])


def test_ctrl_c_before_training_ends_with_a_word(called: Called, monkeypatch: Any, capsys: Any) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("homodistil.train.pretrain", interrupt)
    with pytest.raises(SystemExit) as ended:
        main(["pretrain"])
    assert ended.value.code == INTERRUPTED and capsys.readouterr().err == "interrupted\n"


def test_an_error_that_ends_all_ranks_together_is_printed_by_the_first(
    called: Called, monkeypatch: Any, capsys: Any
) -> None:
    def diverge(*_: Any) -> None:
        raise DivergenceError("plan: rank(s) [3] hold another value")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("homodistil.train.pretrain", diverge)
    assert refusal(capsys, "pretrain") == ""


def test_help_teaches_every_field_without_loading_torch() -> None:
    program = "import sys; from homodistil.cli import main\ntry: main(['pretrain', '--help'])\n"
    program += "finally: assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    for section, field in RunConfig.model_fields.items():
        for name in getattr(field.annotation, "model_fields", {}):
            assert f"--{section}.{name}" in shown
    assert "Rungs of the ladder" in shown


@pytest.mark.parametrize("launcher", ["pretrain", "evaluate"])
def test_a_launcher_is_the_command_of_its_name(launcher: str) -> None:
    command = [sys.executable, str(LAUNCHERS / f"{launcher}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"usage: homodistil {launcher}")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_passes_the_checks_before_training(name: str, called: Called) -> None:
    main(["pretrain", "--recipe", name])
    assert called["student"].resolved(called["run"], world_size=2)["train_batch_size"] > 0
