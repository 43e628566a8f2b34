"""Manifest: what one checkpoint is, in JSON. A checkpoint exists when its manifest does.

Owns the record, the names, and the checks of a checkpoint against itself. Which one to take, and whether it fits the
run, are resume.py's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from homodistil.errors import CheckpointError, first_fault
from homodistil.files import checksum, write_text_durably
from homodistil.fragments import SavedState
from homodistil.metrics import Progress
from homodistil.models.shape import StudentShape
from homodistil.state import Layout, Range

FILE, LATEST = "manifest.json", "latest"
FORMAT_VERSION = 2


class Record(BaseModel):
    """Base of a manifest's parts."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class FragmentFile(Record):
    """One rank's file."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    bytes: int
    checksum: str
    ranges: dict[str, tuple[int, int]]
    """Parameter -> (first flat element, number of elements)."""

    @property
    def layout(self) -> Layout:
        return {name: Range(*bounds) for name, bounds in self.ranges.items()}


class Manifest(Record):
    """Everything about a checkpoint that is not a tensor."""

    format_version: int = FORMAT_VERSION
    update: int
    """Completed updates: the position in the stream, the schedule and the ladder."""
    step: int
    """Optimizer steps: updates less those left out for gradients that were not finite."""
    world_size: int
    zero_stage: int
    shape: dict[str, Any]
    """The student's, as `StudentShape.as_dict`."""
    parameters: dict[str, tuple[int, ...]]
    """Whole shapes of all trained parameters, aligners included, in the model's order."""
    observed: int
    """Updates that the importance scores have seen."""
    bad_shards: list[str]
    """Shards found damaged so far, and replaced."""
    progress: Progress
    identity: dict[str, str | int | float | None]
    """What else decides the numbers: hashes of teacher, tokenizer and corpus, precision, clipping."""
    run: dict[str, Any]
    """The resolved configuration."""
    versions: dict[str, str]
    files: list[FragmentFile]
    digest: str = Field(default="", repr=False)
    """SHA-256 of all the above."""

    @property
    def student_shape(self) -> StudentShape:
        return StudentShape.from_dict(self.shape)

    def write(self, directory: Path) -> None:
        """Make the checkpoint in `directory` exist."""
        values = json.loads(self.model_dump_json())
        write_text_durably(directory / FILE, json.dumps({**values, "digest": _digest(values)}, indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest in `directory`, if it is whole. Raises `CheckpointError`."""
        path = directory / FILE
        try:
            content = path.read_bytes()
            manifest = cls.model_validate_json(content)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
        except ValidationError as error:
            raise CheckpointError(f"{path}: {first_fault(error)}.") from None
        if manifest.format_version != FORMAT_VERSION:
            version = manifest.format_version
            raise CheckpointError(f"{path}: format_version is {version}, but this homodistil reads {FORMAT_VERSION}.")
        if manifest.digest != _digest(json.loads(content)):
            raise CheckpointError(f"{path}: its digest does not match: something in it was changed.")
        return manifest

    def faults(self, directory: Path, which: slice = slice(None)) -> list[str]:
        """What is wrong with the files in `directory`, or with some of them, in words; nothing if they are as they were
        written. Reads them whole."""
        return [fault for file in self.files[which] if (fault := _fault(directory / file.name, file))]

    def saved_state(self, directory: Path) -> SavedState:
        """The student in `directory`."""
        layouts = {directory / file.name: file.layout for file in self.files}
        return SavedState(layouts, {name: torch.Size(s) for name, s in self.parameters.items()}, self.step)


def step_name(update: int) -> str:
    """Folder of the checkpoint after an update."""
    return f"step_{update:08d}"


def update_of(checkpoint: Path) -> int | None:
    """The update that a checkpoint's folder is named for; None if it is no checkpoint of a run."""
    match = re.fullmatch(r"step_(\d{8,})", checkpoint.name)
    return int(match[1]) if match else None


def complete_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Those that exist below `root`, with their updates, newest first."""
    found = [(update_of(path.parent), path.parent) for path in root.glob(f"step_*/{FILE}")]
    return sorted(((update, path) for update, path in found if update is not None), reverse=True)


class Difference(NamedTuple):
    """A value that decides what a run computes, and is not what it was."""

    key: str
    then: Any
    now: Any


def differences(then: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...]) -> list[Difference]:
    """Keys, dotted, whose values differ between two nested configurations, except those at or below `free`."""
    before, after = (_flat(json.loads(json.dumps(values))) for values in (then, now))  # tuples become lists
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [
        Difference(key, before.get(key), after.get(key))
        for key in changed
        if not any(f"{key}.".startswith(f"{name}.") for name in free)
    ]


def _fault(path: Path, expected: FragmentFile) -> str | None:
    try:
        size = path.stat().st_size
        digest = checksum(path) if size == expected.bytes else ""
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if size != expected.bytes:
        return f"{path}: it has {size} bytes, expected {expected.bytes} bytes"
    return None if digest == expected.checksum else f"{path}: checksum {digest}, not {expected.checksum}"


def _digest(values: Mapping[str, Any]) -> str:
    """Of a manifest as it stands in its file: what later versions add to manifests is not in it."""
    sealed = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
