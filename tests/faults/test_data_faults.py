"""Shards that are truncated, bit-flipped, missing or foreign: the run stops on all ranks, or replaces them, exactly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from homodistil.errors import DataError, ShardError
from tests import runs
from tests.faults.test_checkpoint_faults import flip_a_bit
from tests.stages import slow

STAGE = 2
BAD = "train-5.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare(tmp_path_factory.mktemp("data_faults"))


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    """A copy of the shards, to damage."""
    shutil.copytree(folder / "shards", tmp_path / "shards")
    return tmp_path / "shards"


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda shard: os.truncate(shard, 700),
    "bit_flipped": flip_a_bit,
    "missing": lambda shard: shard.unlink(),
    "foreign": lambda shard: shutil.copy(shard.with_name("train-0.tar"), shard),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_shard_stops_all_ranks_by_name(folder: Path, pool: Any, shards: Path, damage: str) -> None:
    DAMAGES[damage](shards / BAD)
    values = runs.configuration(folder, f"stop-{damage}", data__shards=str(shards))
    with pytest.raises(DataError, match=BAD.replace(".", r"\.")) as stopped:
        pool(2).run(runs.execute, values, folder, STAGE)
    if damage in ("bit_flipped", "foreign"):  # of the right size, so only reading tells
        assert isinstance(stopped.value, ShardError)
        assert "--data.on_bad_shard replace" in str(stopped.value)


@pytest.mark.parametrize("damage", ["bit_flipped", slow("missing")])
def test_a_replaced_shard_is_counted_and_replaced_the_same_way_after_a_kill(
    folder: Path, pool: Any, shards: Path, damage: str
) -> None:
    DAMAGES[damage](shards / BAD)
    changes = {"data__shards": str(shards), "data__on_bad_shard": "replace"}
    whole, cut = (runs.configuration(folder, f"{name}-{damage}", **changes) for name in ("whole", "cut"))
    seen = pool(2).run(runs.execute, whole, folder, STAGE)
    bad_samples = set(range(5 * 12, 6 * 12))
    assert not bad_samples & {sample for batch in runs.global_batches(seen).values() for sample in batch}
    pool(2).run(runs.execute, cut, folder, STAGE, ("between_backward_and_step", 14))
    manifest = json.loads(next((folder / "runs" / f"cut-{damage}").glob("checkpoints/*12/manifest.json")).read_text())
    assert manifest["bad_shards"] == [BAD]
    pool(2).run(runs.execute, cut, folder, STAGE)
    assert runs.losses(folder, f"cut-{damage}") == runs.losses(folder, f"whole-{damage}")
    lines = (folder / "runs" / f"cut-{damage}" / "metrics.jsonl").read_text().splitlines()
    counted = [point["data/bad_shards"] for point in map(json.loads, lines) if "data/bad_shards" in point]
    assert (counted[0], counted[-1]) == (0, 1)


def test_a_member_that_would_have_to_be_unpickled_is_never_read(folder: Path, shards: Path) -> None:
    """A foreign index may well match its shard's hash."""
    import io
    import pickle
    import tarfile

    import numpy as np

    from homodistil.data.shards import ShardIndex, read_shard
    from homodistil.files import sha256

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(shards / "harm"),))

    payload = io.BytesIO()
    np.save(payload, np.array([Harmful()], dtype=object), allow_pickle=True)
    with tarfile.open(shards / BAD, "w") as tar:
        for name, content in (("0.npy", payload.getvalue()), ("1.pickle", pickle.dumps(Harmful()))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index = ShardIndex.load(shards, check_files=False)
    entry = next(entry for entry in index.entries() if entry.name == BAD)
    entry = entry.model_copy(update={"sha256": sha256(shards / BAD)})
    with pytest.raises(DataError, match=r"train-5\.tar: cannot be read"):
        read_shard(shards, index, entry)
    assert not (shards / "harm").exists()


@pytest.mark.parametrize("name", ["../train-0.tar", "/etc/passwd", "pipe:touch harm", "a/b.tar"])
def test_an_index_cannot_name_a_path_or_a_command(shards: Path, name: str) -> None:
    from homodistil.data.shards import ShardIndex

    values = json.loads((shards / "index.json").read_text())
    values["splits"]["train"][0]["name"] = name
    (shards / "index.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"splits\.train\.0\.name"):
        ShardIndex.load(shards)
