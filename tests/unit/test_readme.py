"""README: every command in it can be typed, every file and recipe it names exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from pydantic import BaseModel

from homodistil import cli
from homodistil.arguments import parse
from homodistil.config import RunConfig
from homodistil.data.commands import BuildShards
from homodistil.recipe import recipe_names

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = {
    "pretrain.py": cli.Pretrain,
    "measure_weights.py": cli.Pretrain,
    "learn_filters.py": cli.LearnFilters,
    "cache_teacher.py": cli.CacheTeacher,
    "finetune.py": cli.FineTune,
    "evaluate.py": cli.Evaluate,
    "build_shards.py": BuildShards,
}


def commands() -> list[str]:
    """The commands of README's bash blocks, continued lines joined."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in blocks.splitlines() if line.split("#")[0].strip()]


def flags_of(words: list[str]) -> tuple[type[BaseModel], list[str]]:
    """The settings that a command parses, and its flags."""
    if words[0] == "homodistil":
        assert words[1] in cli.COMMANDS
        return {"plan": cli.PlanRun, "report": cli.Report}.get(words[1], cli.Pretrain), words[2:]
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    return SETTINGS[Path(script).name], words[words.index(script) + 1 :]


@pytest.mark.parametrize("command", [command for command in commands() if not command.startswith("make ")])
def test_a_command_of_the_readme_is_one_that_can_be_typed(command: str) -> None:
    settings, flags = flags_of(shlex.split(command))
    given = parse(settings, "program", flags)
    recipe = given.get("recipe")
    if issubclass(settings, cli.Launch):
        own = settings.model_fields.keys() - RunConfig.model_fields.keys()
        values = {name: value for name, value in given.items() if name not in {*own, "recipe"}}
        recipe = recipe or settings.model_fields["recipe"].default
        assert RunConfig.load(recipe, values)
        assert (ROOT / given.get("ds_config", "ds_configs/zero2.json")).is_file()
    else:
        assert settings.model_validate(given)


@pytest.mark.parametrize("target", [command.split()[1] for command in commands() if command.startswith("make ")])
def test_a_make_target_of_the_readme_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:homodistil|launchers|docs|ds_configs)/[\w/]*[\w.]*)`", TEXT)))
)
def test_a_path_of_the_readme_exists(name: str) -> None:
    assert (ROOT / name).exists()


def test_every_recipe_is_in_the_readme_or_made_on_the_way_by_one_that_is() -> None:
    on_the_way = {RunConfig.load(name).teacher.recipe for name in recipe_names()}
    for name in set(recipe_names()) - on_the_way:
        short = name.removeprefix("homobert").removeprefix("ted_deberta").removeprefix("hsk_task")
        assert f"`{name}`" in TEXT or f"`{short}`" in TEXT
