"""Command lines from typed settings: every field is a flag, its docstring the help, a misspelt flag an error.

Only what was given comes back, so that a recipe is overridden by exactly that.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, NoReturn

from pydantic import BaseModel, create_model
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from homodistil.errors import ConfigError, nearest


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See `{self.prog} --help`.")


def parse(model: type[BaseModel], program: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The flags given, as nested values that `model` is still to check. Raises `ConfigError`; `--help` exits."""
    usage = "%(prog)s [--flag value ...]"
    parser = _Parser(prog=program, usage=usage, description=model.__doc__, allow_abbrev=False)
    source: CliSettingsSource[Any] = CliSettingsSource(
        create_model(model.__name__, __base__=(model, BaseSettings)),  # type: ignore[arg-type]
        root_parser=parser,
        parse_args_method=_parse_known,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_use_class_docs_for_groups=True,
    )
    try:
        return source(args=list(arguments))()
    except SettingsError as error:
        raise ConfigError(f"{error}. See `{program} --help`.") from None


def _parse_known(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [option for option in parser._option_string_actions if option.startswith("--")]
        raise ConfigError(f"{flag}: no such flag.{nearest(flag, known)} See `{parser.prog} --help`.")
    return parsed
