"""An interrupted run goes on as if nothing had happened: bit for bit on as many ranks, closely on others."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from homodistil.convert import to_deepspeed, to_huggingface
from tests import runs
from tests.stages import matrix


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def samples() -> dict[str, dict[int, list[int]]]:
    """Name of a whole run -> update -> the numbers of its sequences, in order."""
    return {}


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, pool: Any, samples: dict[str, dict[int, list[int]]]) -> Any:
    """`uninterrupted(world_size, stage)`: name of a finished run that nothing disturbed."""

    def run(world_size: int, stage: int) -> str:
        name = f"whole-{world_size}-{stage}"
        if name not in samples:
            seen = pool(world_size).run(runs.execute, runs.configuration(folder, name), folder, stage)
            samples[name] = runs.global_batches(seen)
        return name

    return run


KILLS = [
    ("between_backward_and_step", runs.PRUNES[0]),
    ("within_a_prune", runs.PRUNES[0]),
    ("after_a_prune", runs.PRUNES[0]),
    ("between_backward_and_step", 9),
    ("while_writing", 8),
    ("preempted", 9),
]


@pytest.mark.parametrize(
    ("stage", "fault"),
    matrix([1, 2, 3], KILLS, lambda stage, fault: stage == 2 or (stage == 3 and fault[0] == "within_a_prune")),
    ids=lambda value: f"{value[0]}_{value[1]}" if isinstance(value, tuple) else f"zero{value}",
)
def test_a_killed_run_goes_on_bit_for_bit(
    folder: Path, pool: Any, uninterrupted: Any, stage: int, fault: tuple[str, int]
) -> None:
    whole, name = uninterrupted(2, stage), f"{fault[0]}-{fault[1]}-{stage}"
    values = runs.configuration(folder, name)
    assert all("killed" in seen for seen in pool(2).run(runs.execute, values, folder, stage, fault))
    checkpoints = folder / "runs" / name / "checkpoints"
    resumed_at = sorted(path.parent.name for path in checkpoints.glob("step_*/manifest.json"))[-1]
    resumed = pool(2).run(runs.execute, values, folder, stage)
    first_update = min(resumed[0]["samples"])
    assert first_update == int(resumed_at.removeprefix("step_")) + 1 > 1
    assert runs.losses(folder, name) == runs.losses(folder, whole)
    assert runs.kept(folder, name) == runs.kept(folder, whole)
    ours, theirs = (load_file(folder / "runs" / run / "student" / "model.safetensors") for run in (name, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_buffers_kept_per_weight_and_a_background_writer_resume_bit_for_bit(folder: Path, pool: Any) -> None:
    """PLATON's two averages travel with the weights; a write may still be going on when the run is killed."""
    changes = {"pruning__metric": "platon", "checkpoint__background": True}
    whole, cut = (runs.configuration(folder, name, **changes) for name in ("platon", "platon-cut"))
    pool(2).run(runs.execute, whole, folder, 2)
    for killed_at in (4, 12):
        pool(2).run(runs.execute, cut, folder, 2, ("between_backward_and_step", killed_at))
    pool(2).run(runs.execute, cut, folder, 2)
    assert runs.losses(folder, "platon-cut") == runs.losses(folder, "platon")
    assert runs.kept(folder, "platon-cut") == runs.kept(folder, "platon")


KILLED_AT = {"before_a_prune": runs.PRUNES[0], "after_a_prune": runs.PRUNES[1] + 1}
CHANGES = [((4, 2), (2, 2)), ((2, 2), (4, 2)), ((2, 2), (1, 2)), ((2, 2), (2, 3))]
"""(ranks, ZeRO stage) that wrote the checkpoint -> those that go on from it."""
QUICK = [(CHANGES[2], "before_a_prune"), (CHANGES[3], "after_a_prune")]


@pytest.mark.parametrize(
    ("change", "moment"),
    matrix(CHANGES, KILLED_AT, lambda *case: case in QUICK),
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{ranks}x_zero{stage}" for ranks, stage in value),
)
def test_another_world_size_or_stage_goes_on_closely(
    folder: Path,
    pool: Any,
    uninterrupted: Any,
    samples: dict[str, dict[int, list[int]]],
    change: tuple[tuple[int, int], tuple[int, int]],
    moment: str,
) -> None:
    (writer, reader), killed_at = change, KILLED_AT[moment]
    whole, name = uninterrupted(*writer), f"moved-{writer}-{reader}-{killed_at}"
    values = runs.configuration(folder, name)
    pool(writer[0]).run(runs.execute, values, folder, writer[1], ("between_backward_and_step", killed_at))
    saved = saved_state(folder / "runs" / name / "checkpoints" / f"step_{killed_at - 1:08d}")
    seen = pool(reader[0]).run(runs.execute, values, folder, reader[1])

    loaded = held_state([rank["state"] for rank in seen])
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    expected, found = runs.losses(folder, whole), runs.losses(folder, name)
    for update, tolerance in ((killed_at, 1e-6), (killed_at + 9, 1e-4)):
        assert found[update] == pytest.approx(expected[update], rel=tolerance)
    batches = runs.global_batches(seen)
    assert batches == {update: samples[whole][update] for update in range(killed_at, runs.UPDATES + 1)}
    assert runs.kept(folder, name) == runs.kept(folder, whole)


def test_a_checkpoint_becomes_the_directory_that_the_run_itself_leaves(
    folder: Path, uninterrupted: Any, tmp_path: Path
) -> None:
    run = folder / "runs" / uninterrupted(2, 2)
    checkpoint = max((run / "checkpoints").glob("step_*"))
    to_huggingface(checkpoint, tmp_path / "student")
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "student", run / "student"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_zero_to_fp32_reads_an_exported_checkpoint(folder: Path, uninterrupted: Any, tmp_path: Path) -> None:
    checkpoint = max((folder / "runs" / uninterrupted(2, 2) / "checkpoints").glob("step_*"))
    to_deepspeed(checkpoint, tmp_path)
    script = [sys.executable, str(tmp_path / "zero_to_fp32.py"), str(tmp_path), str(tmp_path / "fp32")]
    subprocess.run(script, check=True, capture_output=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    weights = torch.load(tmp_path / "fp32" / "pytorch_model.bin", weights_only=True)
    masters = {name: part for (name, kind), part in saved_state(checkpoint).items() if kind == "master"}
    assert {f"model.{name}" for name in weights} == {name for name in masters if name.startswith("model.")}
    assert all(torch.equal(weight.flatten(), masters[f"model.{name}"]) for name, weight in weights.items())


def saved_state(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(parameter, kind) -> the whole flat tensor, put together from a checkpoint's files by hand."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for file in manifest["files"]:
        with safe_open(checkpoint / file["name"], framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # a safe_open is no mapping
                name, kind = key.split("/")
                if name in file["ranges"]:
                    start, count = file["ranges"][name]
                    size = math.prod(manifest["parameters"][name])
                    whole.setdefault((name, kind), torch.full((size,), torch.nan))[start : start + count] = (
                        tensors.get_tensor(key)
                    )
    return whole


def held_state(states: list[Any]) -> dict[tuple[str, str], torch.Tensor]:
    """The same, of the state that the ranks of a live engine hold."""
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for state in states:
        for name, piece in state.pieces.items():
            for kind, part in piece.values.items():
                size = math.prod(piece.shape)
                tensor = whole.setdefault((name, kind), torch.full((size,), torch.nan))
                tensor[piece.start : piece.start + len(part)] = part
    return whole
