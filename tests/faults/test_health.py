"""What the run computes is watched: gradients that are not finite, ranks that drift apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from homodistil.errors import DivergenceError, NonFiniteError
from tests import runs
from tests.stages import STAGE_2, STAGES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare(tmp_path_factory.mktemp("health"))


@STAGES
def test_one_update_that_is_not_finite_is_left_out(folder: Path, pool: Any, stage: int) -> None:
    name = f"once-{stage}"
    pool(2).run(runs.execute, runs.configuration(folder, name), folder, stage, ("once_not_a_number", 4))
    losses = runs.losses(folder, name)
    assert losses[4]["loss/kl"] is None  # JSON has no NaN
    assert all(value is not None for update, point in losses.items() if update != 4 for value in point.values())
    manifest = json.loads(
        (folder / "runs" / name / "checkpoints" / f"step_{runs.UPDATES:08d}" / "manifest.json").read_text()
    )
    assert (manifest["update"], manifest["step"]) == (runs.UPDATES, runs.UPDATES - 1)


@STAGE_2
def test_too_many_in_a_row_stop_the_run_with_sane_weights_saved(folder: Path, pool: Any, stage: int) -> None:
    name = f"always-{stage}"
    values = runs.configuration(folder, name, health__max_skipped=2)
    with pytest.raises(NonFiniteError, match=r"update 9: not finite: kl on rank 1; 3 updates in a row"):
        pool(2).run(runs.execute, values, folder, stage, ("not_a_number", 7))
    run = folder / "runs" / name
    manifest = json.loads((run / "checkpoints" / "step_00000009" / "manifest.json").read_text())
    assert (manifest["update"], manifest["step"]) == (9, 6)
    assert json.loads((run / "summary.json").read_text())["exit_status"] == 2


def test_ranks_whose_weights_differ_are_named_with_the_parameter(folder: Path, pool: Any) -> None:
    values = runs.configuration(folder, "drifted", health__compare_every=3)
    words = r"in update 9 rank 1 held other weights than rank 0, first in .*layer\.1\.output\.dense\.weight"
    with pytest.raises(DivergenceError, match=words):
        pool(2).run(runs.execute, values, folder, 2, ("drifted", 8))
