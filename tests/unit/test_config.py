"""Configuration: what a recipe or command line may not say is refused in words a person can act on."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from homodistil.config import ObjectiveConfig, RunConfig
from homodistil.errors import ConfigError
from homodistil.recipe import recipe_names


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """`recipe(text)`: path of a YAML file that says so."""

    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(recipe: str, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        RunConfig.load(recipe, overrides)
    return str(error.value)


def test_a_misspelt_key_names_file_key_and_the_nearest_right_one(recipe: Any) -> None:
    path = recipe("pruning: {evens: 3}")
    message = refusal(path)
    assert f"pruning.evens in recipe {path}" in message
    assert "Did you mean 'events'?" in message


def test_a_misspelt_section_names_the_nearest_right_one(recipe: Any) -> None:
    assert "Did you mean 'optimizer'?" in refusal(recipe("optimiser: {eps: 1.0e-8}"))


def test_a_key_of_a_nested_section_is_suggested_from_that_section(recipe: Any) -> None:
    assert "Did you mean 'temperature'?" in refusal(recipe("objective: {kl: {temprature: 1}}"))


def test_a_wrong_value_says_what_was_found_and_what_was_expected(recipe: Any) -> None:
    message = refusal(recipe("pruning: {metric: sensitive}"))
    assert "found 'sensitive'" in message
    assert "'sensitivity', 'magnitude', 'platon' or 'random'" in message


def test_every_fault_of_a_recipe_is_reported_at_once(recipe: Any) -> None:
    assert len(refusal(recipe("pruning: {events: 0, start: 2}")).splitlines()) == 2


def test_a_value_of_the_command_line_is_blamed_on_the_command_line(recipe: Any) -> None:
    message = refusal(recipe("pruning: {events: 4}"), {"pruning": {"events": "none"}})
    assert "--pruning.events on the command line" in message
    assert "recipe" not in message


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("run: quick", "quick"),
        ("task: mrpc", "mrpc"),
        ("knowledge: {keep: _}", "1l_10t_0.1h"),
        ("knowledge: {keep: 1l__0.1h}", "1l_10t_0.1h"),
        ("pruning: {start: 0.8, end: 0.5}", "end (0.5) must not be before start (0.8)"),
        (
            "teacher: some/model\noptimizer: {warmup: 0.3}\npruning: {target: {ffn: 8}}",
            "optimizer.warmup (0.3) ends after pruning.start",
        ),
    ],
)
def test_values_that_contradict_each_other_are_both_named(recipe: Any, text: str, names: str) -> None:
    assert names in refusal(recipe(text))


@pytest.mark.parametrize("text", ["- a list", "just words", "a: [unclosed"])
def test_a_file_that_is_no_recipe_is_refused_by_name(recipe: Any, text: str) -> None:
    path = recipe(text)
    assert f"recipe {path}" in refusal(path)


def test_an_unknown_recipe_names_the_nearest_and_all_there_are() -> None:
    message = refusal("quikstart")
    assert "Did you mean 'quickstart'?" in message
    assert all(name in message for name in recipe_names())


def test_the_command_line_overrides_one_key_and_leaves_its_neighbours(recipe: Any) -> None:
    run = RunConfig.load(recipe("pruning: {events: 4, end: 0.5}"), {"pruning": {"events": "9"}})
    assert (run.pruning.events, run.pruning.end, run.pruning.start) == (9, 0.5, 0.02)


def test_a_value_knows_who_set_it(recipe: Any) -> None:
    path = recipe("pruning: {events: 4}")
    run = RunConfig.load(path, {"data": {"lanes": "8"}})
    assert run.origin("pruning.events") == f"pruning.events in recipe {path}"
    assert run.origin("data.lanes") == "--data.lanes on the command line"
    assert run.origin("data.prefetch") is None


def test_a_run_is_called_after_its_recipe_unless_it_has_a_name(recipe: Any) -> None:
    assert RunConfig.load(recipe("run: {updates: 3}")).run.name == "mine"
    assert RunConfig.load(recipe("run: {name: first}")).run.name == "first"


@pytest.mark.parametrize("text", ["teacher: none", "teacher: {path: none}", "teacher: {path: None}"])
def test_teacher_none_means_no_teacher(recipe: Any, text: str) -> None:
    assert RunConfig.load(recipe(text)).teacher.path is None


def test_model_fields_given_as_words_become_numbers() -> None:
    run = RunConfig.load("smoke_teacher", {"student": {"config": {"hidden_size": "72", "hidden_act": "relu"}}})
    assert run.student.config["hidden_size"] == 72
    assert run.student.config["hidden_act"] == "relu"
    assert run.student.config["num_hidden_layers"] == 2


@pytest.mark.parametrize("name", recipe_names())
def test_a_saved_configuration_repeats_the_run(name: str, tmp_path: Path) -> None:
    run = RunConfig.load(name, {"pruning": {"smoothing_beta": "0.5"}})
    run.save(tmp_path / "run.yaml")
    assert RunConfig.load(str(tmp_path / "run.yaml")).model_dump(exclude={"recipe"}) == run.model_dump(
        exclude={"recipe"}
    )


def test_a_configuration_can_be_sent_to_another_process() -> None:
    run = RunConfig.load("smoke", {"data": {"lanes": "4"}})
    received = pickle.loads(pickle.dumps(run))
    assert received == run
    assert received.origin("data.lanes") == "--data.lanes on the command line"


def test_stages_begin_where_terms_begin_or_end() -> None:
    objective = ObjectiveConfig.model_validate(
        {"task": {"weight": 0}, "hidden": {"end": 0.5}, "kl": {"start": 0.25}, "attention": {"weight": 0, "start": 0.9}}
    )
    stages = [objective.stage(update, 8, tuple(ObjectiveConfig.model_fields)) for update in range(1, 9)]
    assert [stage.terms for stage in stages] == [("hidden",)] * 2 + [("kl", "hidden")] * 2 + [("kl",)] * 4
    assert [(stage.update, stage.updates) for stage in stages] == [
        *((1, 2), (2, 2)),
        *((1, 2), (2, 2)),
        *((1, 4), (2, 4), (3, 4), (4, 4)),
    ]


@pytest.mark.parametrize(
    "terms",
    [
        {"task": {"start": 0.5, "end": 0.5}},
        {"task": {"end": 0.4}, "kl": {"weight": 0}, "hidden": {"start": 0.5}, "attention": {"weight": 0}},
        {"task": {"start": 0.1}, "kl": {"weight": 0}, "hidden": {"weight": 0}, "attention": {"weight": 0}},
    ],
)
def test_some_term_counts_in_every_update(terms: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"before end|no term counts"):
        ObjectiveConfig.model_validate(terms)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"run": {"updates": "50"}}, (50, None)),
        ({"task": {"epochs": "2"}}, (RunConfig.load("finetune").run.updates, 2)),
        ({"run": {"updates": "50"}, "task": {"epochs": "none"}}, (50, None)),
    ],
)
def test_a_flag_for_updates_stands_above_a_recipes_epochs(flags: dict[str, Any], expected: Any) -> None:
    run = RunConfig.load("finetune", flags)
    assert (run.run.updates, run.task.epochs) == expected


def test_flags_for_updates_and_for_epochs_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"--run\.updates and --task\.epochs"):
        RunConfig.load("finetune", {"run": {"updates": "50"}, "task": {"epochs": "2"}})


@pytest.mark.parametrize("given", [{"epochs": 2}, {"train_examples": 9}, {"group_by_length": True}])
def test_text_has_no_examples(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"only for a benchmark's examples; text is counted by run\.updates"):
        RunConfig.model_validate({"task": given})


def test_without_a_teacher_the_task_alone_makes_stages() -> None:
    objective = {"kl": {"start": 0.75}, "hidden": {"end": 0.75}}
    plain = RunConfig.model_validate({"objective": objective, "run": {"updates": 100}})
    assert plain.stage(80) == (80, 100, ("task",))
    taught = RunConfig.model_validate({"objective": objective, "run": {"updates": 100}, "teacher": {"path": "x"}})
    assert taught.stage(80).updates == 25
    with pytest.raises(ValidationError, match=r"objective\.task counts from 0\.0 to 0\.5.*without teacher\.path"):
        RunConfig.model_validate({"objective": {"task": {"end": 0.5}}})


def test_what_may_be_left_out_can_be_taken_back_by_none() -> None:
    run = RunConfig.load("hsk_cached", {"cache": {"path": "none"}, "knowledge": {"keep": "None"}})
    assert run.cache.path is None and run.knowledge.keep is None and run.has_live_teacher
