"""History: what a run's folder tells, as far as it got and as far as it can be read.

A run that was killed, or is still going on, or whose files are damaged, has a history too; what is missing is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from homodistil.errors import DataError
from homodistil.pruning.record import GroupRecord, read_prune
from homodistil.summary import FILE, RunSummary

LOG, SETTINGS = "metrics.jsonl", "run.yaml"
JUMP = "pruning/prune_jump"
ENDINGS = {0: "finished", 2: "stopped by an error", 75: "preempted: the same command goes on"}


@dataclass(frozen=True)
class Curve:
    """One tag's points, in order."""

    updates: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class History:
    """Of one run."""

    name: str
    curves: dict[str, Curve]
    """Tag -> its points; what was not finite is left out."""
    prunes: dict[int, dict[str, GroupRecord]]
    """Update -> importance and fate of every unit, group by group."""
    settings: dict[str, Any]
    """Of run.yaml."""
    summary: RunSummary | None
    """None of a run that did not end."""
    faults: list[str]
    """What could not be read."""

    @classmethod
    def read(cls, folder: Path) -> History:
        """Raises `DataError` where there is no run at all."""
        if not (folder / LOG).is_file():
            found = "there is no such folder" if not folder.is_dir() else f"it has no {LOG}"
            raise DataError(f"report {folder}: {found}. Give the folder of a run, such as runs/quickstart.")
        faults: list[str] = []
        curves = _curves(folder / LOG, faults)
        prunes = {update: read_prune(folder, update) for update in curves.get(JUMP, Curve()).updates}
        if missing := [update for update, record in prunes.items() if record is None]:
            faults.append(f"units of the prunes after updates {', '.join(map(str, missing))} are not recorded")
        recorded = {update: record for update, record in prunes.items() if record is not None}
        settings, summary = _settings(folder / SETTINGS, faults), _summary(folder, faults)
        return cls(folder.resolve().name, curves, recorded, settings, summary, faults)

    @property
    def last_update(self) -> int:
        return max((curve.updates[-1] for curve in self.curves.values()), default=0)

    @property
    def status(self) -> str:
        """In words."""
        if self.summary is not None:
            return ENDINGS.get(self.summary.exit_status, f"ended with exit code {self.summary.exit_status}")
        planned = self.settings.get("run", {}).get("updates")
        return f"not finished: update {self.last_update:,}" + (f" of {planned:,}" if planned else "")

    @property
    def flat_settings(self) -> dict[str, Any]:
        """Dotted key -> value."""
        return dict(_flat(self.settings))

    def last(self, tag: str) -> float | None:
        """A tag's newest value."""
        curve = self.curves.get(tag)
        return curve.values[-1] if curve else None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _curves(path: Path, faults: list[str]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            point = json.loads(line)
            update = int(point.pop("update"))
            values = {str(tag): float(value) for tag, value in point.items() if value is not None}
        except (ValueError, KeyError, TypeError, AttributeError):
            broken += 1
            continue
        for tag, value in values.items():
            curve = curves.setdefault(tag, Curve())
            curve.updates.append(update)
            curve.values.append(value)
    if broken:
        faults.append(f"{broken} of the log's lines cannot be read")
    return curves


def _settings(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        faults.append(f"{SETTINGS} holds no settings")
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        faults.append(f"{SETTINGS} cannot be read ({type(error).__name__})")
    return {}


def _summary(folder: Path, faults: list[str]) -> RunSummary | None:
    if not (folder / FILE).exists():
        return None
    try:
        return RunSummary.read(folder)
    except (OSError, ValidationError) as error:
        faults.append(f"{FILE} cannot be read ({type(error).__name__})")
        return None
