"""The record of a prune: every unit's importance at that moment, and whether it stayed, for people who ask why.

One safetensors file a prune, beside the log. A run never reads them; one that went back writes its own over them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from homodistil.files import write_durably
from homodistil.models.shape import StudentShape
from homodistil.pruning.coordinator import PrunePlan

logger = logging.getLogger(__name__)

# U units of a group before the prune

FOLDER = "prunes"


@dataclass(frozen=True)
class GroupRecord:
    """One group's units, numbered as in the teacher."""

    units: NDArray[np.int32]
    """(U,)"""
    scores: NDArray[np.float32]
    """(U,)"""
    kept: NDArray[np.bool_]
    """(U,)"""


def record_prune(run_directory: Path, plan: PrunePlan, before: StudentShape) -> None:
    """Write `prunes/UPDATE.safetensors`; where it cannot be written, a warning says so, and the run goes on. before:
    the shape that the plan narrows."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, scores in plan.scores.items():
        units = np.array(before.kept[name], dtype=np.int32)
        arrays[f"units/{name}"] = units
        arrays[f"scores/{name}"] = scores.cpu().float().numpy()
        arrays[f"kept/{name}"] = np.isin(np.arange(len(units)), plan.kept.get(name, ()))
    path = run_directory / FOLDER / f"{plan.update:08d}.safetensors"
    try:
        path.parent.mkdir(exist_ok=True)
        write_durably(path, lambda partial: save_file(arrays, partial))
    except (OSError, SafetensorError) as error:
        logger.warning("the prune after update %d cannot be recorded: %s", plan.update, error)


def read_prune(run_directory: Path, update: int) -> dict[str, GroupRecord] | None:
    """Group -> its record at the prune after an update; None where there is none, or none that can be read."""
    path = run_directory / FOLDER / f"{update:08d}.safetensors"
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError):
        return None
    names = [name.removeprefix("units/") for name in arrays if name.startswith("units/")]
    return {n: GroupRecord(arrays[f"units/{n}"], arrays[f"scores/{n}"], arrays[f"kept/{n}"]) for n in names}
