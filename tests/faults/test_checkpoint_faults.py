"""Checkpoints that are damaged, or cannot be written, cost at most one interval and never an earlier checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from homodistil.claim import Claim
from homodistil.errors import CheckpointError, CheckpointWriteError
from homodistil.manifest import Manifest
from tests import fixtures, runs

STAGE = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def killed(folder: Path, pool: Any) -> Path:
    """A run that was killed in update 7, with whole checkpoints after updates 2, 4 and 6."""
    values = runs.configuration(folder, "killed")
    pool(2).run(runs.execute, values, folder, STAGE, ("between_backward_and_step", 7))
    return folder / "runs" / "killed"


@pytest.fixture
def copy(folder: Path, killed: Path, request: pytest.FixtureRequest) -> Path:
    """The checkpoints of a copy of it, to damage."""
    run = folder / "runs" / f"copy-{abs(hash(request.node.name))}"
    shutil.copytree(killed, run)
    return run / "checkpoints"


def found(values: dict[str, Any], folder: Path, stage: int) -> tuple[int | None, list[str]]:
    """In a rank: the update that a restart would go on from, and what was said about it. Collective."""
    from homodistil.config import RunConfig
    from homodistil.data.shards import ShardIndex
    from homodistil.ds_config import DeepSpeedConfig
    from homodistil.ranks import Ranks
    from homodistil.resume import resume
    from homodistil.run_plan import plan_run

    ranks, run = Ranks.current(), RunConfig.model_validate(values)
    plan = plan_run(run, ShardIndex.load(run.data.shards), DeepSpeedConfig.load(folder / f"zero{stage}.json"), 2)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("homodistil.resume")
    logger.addHandler(handler)
    try:
        state = resume(run, ranks.once(lambda: plan.identity), ranks)
    finally:
        logger.removeHandler(handler)
    return (state.update if state else None), said


def flip_a_bit(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def is_whole(checkpoint: Path) -> bool:
    manifest = Manifest.read(checkpoint)
    return not manifest.faults(checkpoint)


FRAGMENT = "fragments-00001-of-00002.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "bit_flipped_in_a_fragment": (lambda step: flip_a_bit(step / FRAGMENT), 4, f"{FRAGMENT}: checksum"),
    "bit_flipped_in_a_fragment_header": (lambda step: flip_a_bit(step / FRAGMENT, 0.0), 4, f"{FRAGMENT}: checksum"),
    "fragment_cut_short": (lambda step: os.truncate(step / FRAGMENT, 1000), 4, f"{FRAGMENT}: it has 1000 bytes"),
    "fragment_missing": (lambda step: (step / FRAGMENT).unlink(), 4, f"{FRAGMENT}: cannot be read (No such file"),
    "bit_flipped_in_the_manifest": (lambda step: flip_a_bit(step / "manifest.json"), 4, "manifest.json"),
    "manifest_cut_short": (lambda step: os.truncate(step / "manifest.json", 700), 4, "manifest.json: file"),
    "manifest_edited": (
        lambda step: edit(step / "manifest.json", lambda values: values.update(update=5)),
        4,
        "its digest does not match",
    ),
    "bit_flipped_in_latest": (lambda step: flip_a_bit(step.parent / "latest"), 6, ""),
    "latest_missing": (lambda step: (step.parent / "latest").unlink(), 6, ""),
}


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_name_for_the_one_before(
    folder: Path, pool: Any, copy: Path, damage: str
) -> None:
    act, expected, words = DAMAGES[damage]
    act(copy / "step_00000006")
    values = runs.configuration(folder, copy.parent.name)
    (update, said), other = pool(2).run(found, values, folder, STAGE)
    assert update == other[0] == expected
    assert words in "".join(said)
    assert bool(said) == (expected == 4)
    assert is_whole(copy / "step_00000002") and is_whole(copy / "step_00000004")
    assert (copy / "set_aside_step_00000006").is_dir() == (expected == 4)  # kept to be looked at, not taken again


def test_if_no_checkpoint_is_whole_the_run_does_not_start_over_by_itself(folder: Path, pool: Any, copy: Path) -> None:
    for update in (2, 4, 6):
        os.truncate(copy / f"step_{update:08d}" / "manifest.json", 100)
    with pytest.raises(CheckpointError, match=r"No checkpoint is intact.*--checkpoint\.resume never"):
        pool(2).run(found, runs.configuration(folder, copy.parent.name), folder, STAGE)
    assert len(list(copy.glob("step_*"))) == 3


def test_starting_over_sets_the_checkpoints_aside(folder: Path, pool: Any, copy: Path) -> None:
    values = runs.configuration(folder, copy.parent.name, checkpoint__resume="never")
    assert pool(2).run(found, values, folder, STAGE)[0] == (None, [])
    assert is_whole(copy / "set_aside_step_00000006")


def test_a_path_goes_back_to_an_earlier_checkpoint(folder: Path, pool: Any, copy: Path) -> None:
    values = runs.configuration(folder, copy.parent.name, checkpoint__resume=str(copy / "step_00000002"))
    assert pool(2).run(found, values, folder, STAGE)[0] == (2, [])
    assert sorted(path.name for path in copy.glob("*step_*")) == [
        "set_aside_step_00000004",
        "set_aside_step_00000006",
        "step_00000002",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pruning__events": 2}, "pruning.events was 3 and is 2"),
        ({"run__seed": 1}, "run.seed was 0 and is 1"),
        ({"data__global_batch": 16}, "data.global_batch was 8 and is 16"),
        ({"data__lanes": 8}, "data.lanes was 4 and is 8"),
    ],
    ids=["events", "seed", "global_batch", "lanes"],
)
def test_a_run_that_computes_something_else_is_refused(
    folder: Path, pool: Any, copy: Path, changes: dict[str, Any], words: str
) -> None:
    values = runs.configuration(folder, copy.parent.name, **changes)
    with pytest.raises(CheckpointError, match=words.replace(".", r"\.")):
        pool(2).run(found, values, folder, STAGE)
    assert is_whole(copy / "step_00000006")


def test_a_key_that_is_newer_than_the_checkpoint_was_what_it_is_by_default(folder: Path, pool: Any, copy: Path) -> None:
    for path in copy.glob("step_*/manifest.json"):
        values = json.loads(path.read_text())
        del values["run"]["pruning"]["hidden_multiple"], values["progress"]["flops"], values["digest"]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({**values, "digest": digest}))
    assert pool(2).run(found, runs.configuration(folder, copy.parent.name), folder, STAGE)[0] == (6, [])
    values = runs.configuration(folder, copy.parent.name, pruning__hidden_multiple=4)
    with pytest.raises(CheckpointError, match=r"pruning\.hidden_multiple was 8 and is 4"):
        pool(2).run(found, values, folder, STAGE)


def test_a_lower_learning_rate_may_be_allowed_by_name(folder: Path, pool: Any, copy: Path) -> None:
    changes = {"optimizer__learning_rate": 1e-4, "objective": {"kl": {"weight": 2.0}}}
    values = runs.configuration(folder, copy.parent.name, **changes)
    hint = r"--checkpoint\.allow_changes objective\.kl\.weight,optimizer\.learning_rate"
    with pytest.raises(CheckpointError, match=hint):
        pool(2).run(found, values, folder, STAGE)
    allowed = ["objective.kl.weight", "optimizer.learning_rate"]
    values = runs.configuration(folder, copy.parent.name, **changes, checkpoint__allow_changes=allowed)
    assert pool(2).run(found, values, folder, STAGE)[0] == (6, [])


@pytest.mark.parametrize("other", ["teacher", "corpus"])
def test_another_teacher_or_corpus_at_the_same_path_is_refused(
    folder: Path, pool: Any, copy: Path, tmp_path: Path, other: str
) -> None:
    if other == "teacher":
        fixtures.save_bert(tmp_path, seed=1)
        values = runs.configuration(folder, copy.parent.name, teacher__path=str(tmp_path))
    else:
        fixtures.save_shards(tmp_path, shards=8, seed=1)
        values = runs.configuration(folder, copy.parent.name, data__shards=str(tmp_path))
    with pytest.raises(CheckpointError, match=f"computes something else: {other} was"):
        pool(2).run(found, values, folder, STAGE)


def test_no_space_left_stops_the_run_with_the_earlier_checkpoint_whole(folder: Path, pool: Any) -> None:
    values = runs.configuration(folder, "full-disk")
    with pytest.raises(CheckpointWriteError, match=r"rank 1: .*No space left on device.*step_00000004.*run the same"):
        pool(2).run(runs.execute, values, folder, STAGE, ("no_space_left", 6))
    checkpoints = folder / "runs" / "full-disk" / "checkpoints"
    assert is_whole(checkpoints / "step_00000002") and is_whole(checkpoints / "step_00000004")
    assert not (checkpoints / "step_00000006").exists()
    assert pool(2).run(found, values, folder, STAGE)[0][0] == 4


def read_only_folder(tmp_path: Path) -> Path:
    """Somewhere nobody may write: root may write everywhere but into the kernel's own file systems."""
    if os.geteuid() == 0:
        return Path("/sys/kernel/homodistil")
    tmp_path.chmod(0o500)
    return tmp_path / "runs"


def test_a_read_only_folder_is_refused_before_any_training(folder: Path, pool: Any, tmp_path: Path) -> None:
    values = runs.configuration(folder, "read-only", run__directory=str(read_only_folder(tmp_path)))
    with pytest.raises(CheckpointError, match=r"checkpoints: cannot be written \(.*Set run\.directory"):
        pool(2).run(runs.execute, values, folder, STAGE)


def claimed_twice(place: Path) -> str:
    """In a rank: what a second claim is told while the first holds. Collective."""
    from homodistil.claim import Claim
    from homodistil.ranks import Ranks

    with Claim(place, Ranks.current()):
        try:
            with Claim(place, Ranks.current(), patience_seconds=0.5):
                return "both"
        except CheckpointError as error:
            return str(error)


def test_a_run_that_is_running_is_not_started_again(pool: Any, tmp_path: Path) -> None:
    assert all("this run is running already (process " in told for told in pool(2).run(claimed_twice, tmp_path / "run"))
    with Claim(tmp_path / "run", fixtures.SilentRanks(0, 1, 0, torch.device("cpu"))):
        pass  # free again


def test_only_the_newest_and_every_mth_checkpoint_are_kept(folder: Path, pool: Any) -> None:
    values = runs.configuration(folder, "retained", checkpoint__keep=1, checkpoint__keep_every=4)
    pool(2).run(runs.execute, values, folder, STAGE, ("between_backward_and_step", 11))
    kept = sorted(path.name for path in (folder / "runs" / "retained" / "checkpoints").glob("step_*"))
    assert kept == ["step_00000004", "step_00000008", "step_00000010"]


def test_no_file_of_a_run_is_world_writable(killed: Path) -> None:
    assert [path for path in killed.rglob("*") if path.stat().st_mode & 0o002] == []
