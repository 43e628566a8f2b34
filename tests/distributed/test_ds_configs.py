"""Every JSON of ds_configs/ for a student trains, prunes and finishes on two ranks, with the losses of zero2.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from homodistil.cli import DS_CONFIGS
from tests import runs
from tests.pool import RankPool
from tests.stages import slow

SMALL = 5000
"""Elements of a bucket, so that this small a model fills several."""


def trained(pool: RankPool, folder: Path, name: str) -> dict[int, dict[str, float]]:
    """Every logged loss, in fp32, under a shipped JSON."""
    settings = json.loads((DS_CONFIGS / f"{name}.json").read_text())
    zero = settings["zero_optimization"]
    zero.update({key: SMALL for key in zero if key.endswith("bucket_size")})
    settings["bf16"] = {"enabled": False}
    (folder / f"zero{name}.json").write_text(json.dumps(settings))
    values = runs.configuration(folder, name, checkpoint__every=runs.UPDATES)
    pool.run(runs.execute, values, folder, name, timeout=240)
    return runs.losses(folder, name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare(tmp_path_factory.mktemp("ds_configs"))


@pytest.fixture(scope="module")
def expected(pool: Callable[[int], RankPool], folder: Path) -> dict[int, dict[str, float]]:
    return trained(pool(2), folder, "zero2")


@pytest.mark.parametrize("name", ["multinode", slow("zero1"), slow("zero3")])
def test_a_shipped_json_trains_like_zero2(
    name: str, pool: Callable[[int], RankPool], folder: Path, expected: dict[int, dict[str, float]]
) -> None:
    losses = trained(pool(2), folder, name)
    assert losses.keys() == expected.keys() and len(losses) == runs.UPDATES
    for update, terms in losses.items():
        assert terms == pytest.approx(expected[update], rel=1e-4), update
