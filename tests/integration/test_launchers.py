"""The scripts as people start them: every ZeRO stage on one and two ranks, from nothing to a model that stock loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from homodistil.ranks import free_port
from tests.stages import slow

REPOSITORY = Path(__file__).parents[2]
KEYS = {
    "recipe", "steps", "world_size", "zero_stage", "seed", "teacher", "student", "validation", "prunes", "seconds",
    "tokens_per_second", "device", "flops", "peak_memory_bytes", "resumed_from", "exit_status",
}  # fmt: skip


def deepspeed(ranks: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_accelerators RANKS launchers/...` from another folder, as a user's shell would start it."""
    program = [sys.executable, str(Path(sys.executable).parent / "deepspeed"), "--master_port", str(free_port())]
    launcher = [*program, "--num_accelerators", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def pretrain(ranks: int, stage: int, cwd: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    script, settings = REPOSITORY / "launchers/pretrain.py", REPOSITORY / f"ds_configs/zero{stage}.json"
    return deepspeed(ranks, str(script), "--ds_config", str(settings), "--recipe", "smoke", *flags, cwd=cwd)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that shards and teacher are made once and found by the later launches."""
    return tmp_path_factory.mktemp("workplace")


@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), slow(3, 2), slow(1, 2), slow(1, 1), slow(2, 2), slow(3, 1)])
def test_a_run_leaves_a_model_a_summary_and_a_report(workplace: Path, stage: int, ranks: int) -> None:
    name = f"smoke-zero{stage}-{ranks}"
    done = pretrain(ranks, stage, workplace, "--run.name", name)
    assert done.returncode == 0, done.stderr[-3000:]
    run = workplace / "runs" / name
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == KEYS
    assert (summary["zero_stage"], summary["world_size"], summary["exit_status"]) == (stage, ranks, 0)
    assert summary["prunes"] == 2 and summary["student"]["shape"]["hidden"] == 32
    for left in ("run.yaml", "metrics.jsonl", "report/report.html", "tensorboard"):
        assert (run / left).exists(), left
    model = AutoModelForMaskedLM.from_pretrained(run / "student")
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()
    assert "unigram guess" in done.stdout and str(Path("runs") / name) in done.stdout


def test_a_dry_run_shows_the_ladder_and_trains_nothing(workplace: Path) -> None:
    done = pretrain(1, 2, workplace, "--run.name", "dry", "--dry_run")
    assert done.returncode == 0, done.stderr[-3000:]
    for word in ("after update", "32 hidden, 4 x 8 heads, 64 FFN", "GiB", "hours"):
        assert word in done.stdout
    assert not (workplace / "runs/dry").exists()


def test_an_error_is_one_message_and_exit_code_2(workplace: Path) -> None:
    done = pretrain(2, 2, workplace, "--pruning.target.hidden", "30")
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert said.count("error: pruning.target: hidden 30") == 1
    assert "Traceback" not in said
