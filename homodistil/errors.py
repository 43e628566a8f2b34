"""One class per thing a user can act on. Every message says what, where, what was expected, and the mend."""

from collections.abc import Iterable
from difflib import get_close_matches


class HomodistilError(Exception):
    """Base of all errors that are the user's to mend; launchers print them without a traceback."""


class ConfigError(HomodistilError):
    """A recipe, command line or DeepSpeed JSON that cannot be run as written."""


class ShapeError(HomodistilError):
    """A student shape that cannot be built, or that no stock Hugging Face config expresses."""


class DataError(HomodistilError):
    """Shards, text or a tokenizer that are missing, empty, damaged or do not belong together."""


class ModelError(HomodistilError):
    """A model directory that cannot serve as asked: missing, newly initialised or zero weights."""


class DivergenceError(HomodistilError):
    """Ranks that should hold the same value do not."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A ready-made ` Did you mean 'x'?`, or nothing when no known name is close."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
