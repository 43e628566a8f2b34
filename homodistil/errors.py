"""One class per thing a user can act on. Every message says what, where, what was expected, and the mend."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class HomodistilError(Exception):
    """Base of all errors that are the user's to mend; launchers print them without a traceback."""

    exit_code = 2


class ConfigError(HomodistilError):
    """A recipe, command line or DeepSpeed JSON that cannot be run as written."""


class ShapeError(HomodistilError):
    """A student shape that cannot be built, or that no stock Hugging Face config expresses."""


class DataError(HomodistilError):
    """Shards, text or a tokenizer that are missing, empty, damaged or do not belong together."""


class ModelError(HomodistilError):
    """A model directory that cannot serve as asked: missing, newly initialised or zero weights."""


class CheckpointError(HomodistilError):
    """A checkpoint that cannot be written, read, or continued by this run."""


class Stopped(HomodistilError):
    """All ranks end the run together, in order; rank 0 says why."""


class Refused(Stopped):
    """What a run needs is missing or wrong, on all ranks or on some; found before it began."""


class DivergenceError(Stopped):
    """Ranks that should hold the same value do not."""


class ShardError(DataError, Stopped):
    """A shard, or a cache's file, that one of the ranks cannot read."""


class CheckpointWriteError(CheckpointError, Stopped):
    """A checkpoint that one of the ranks could not write."""


class CacheError(DataError, Stopped):
    """A teacher's cached knowledge that is missing, damaged, half written, not what the run asks for, or that one of
    the ranks could not write."""


class NonFiniteError(Stopped):
    """Gradients that were not finite, too often in a row."""


class RankLostError(HomodistilError):
    """Another rank died or no longer answers."""

    exit_code = 76


class Preempted(Stopped):
    """The machine is being reclaimed; the same command resumes elsewhere."""

    exit_code = 75  # sysexits' EX_TEMPFAIL

    def __init__(self, update: int | None) -> None:
        """update: the last one; None between two runs of one command."""
        done = "what is done is on disk" if update is None else f"the checkpoint after update {update} is complete"
        super().__init__(f"{done}. Run the same command to resume.")


class OutOfMemory(HomodistilError):
    """A GPU or this machine has less memory than the run takes."""

    def __init__(self, words: str) -> None:
        """words: the library's."""
        super().__init__(
            "out of memory. The same command resumes with a smaller --data.micro_batch, which changes nothing but "
            "rounding, or with --performance.activation_checkpointing true; --dry_run foretells what a run holds. "
            + words.partition("\n")[0]
        )


def first_fault(error: ValidationError) -> str:
    """Where in a file, and what."""
    fault = error.errors()[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A ready-made ` Did you mean 'x'?`, or nothing when no known name is close."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
