"""Signals and deaths, on real launches: a complete checkpoint, a clear word, and no orphan."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from homodistil.errors import Preempted, RankLostError
from tests import processes, runs
from tests.faults import campaign
from tests.faults.test_checkpoint_faults import is_whole
from tests.stages import slow

LONG = {"run__updates": 2000, "checkpoint__every": 10, "validation__every": 1000}
"""Far longer than any of these tests."""

GIVES_UP = """
import threading, time, torch
from homodistil.ranks import Ranks
from homodistil.watchdog import Watchdog
dog = Watchdog(Ranks(0, 2, 0, torch.device("cpu")), timeout_seconds=1)
threading.Thread(target=dog._give_up, args=["rank 1 is lost."]).start()
time.sleep(60)  # as a main thread that waits in a collective
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare(tmp_path_factory.mktemp("processes"))


def preempted(launch: processes.Launch, number: signal.Signals, group: bool) -> None:
    """The launch trains, gets the signal, and leaves a complete checkpoint within an update and a write."""
    launch.until(lambda: launch.updates() >= 3, "update 3")
    at = launch.updates()
    started = time.monotonic()
    (launch.signal_group if group else launch.signal)(number)
    launch.ended()
    assert time.monotonic() - started < 30  # Kubernetes' grace period
    summary = json.loads((launch.run / "summary.json").read_text())
    assert summary["exit_status"] == Preempted.exit_code == 75
    assert at <= summary["steps"] < LONG["run__updates"]
    newest = launch.run / "checkpoints" / launch.checkpoints()[-1]
    assert int(newest.name[5:]) == summary["steps"]
    assert is_whole(newest)


def test_sigterm_to_torchrun(folder: Path) -> None:
    launch = processes.Launch(folder, "torchrun", "torchrun", **LONG)
    preempted(launch, signal.SIGTERM, group=False)
    assert "Run the same command to resume" in launch.log.read_text()


@pytest.mark.parametrize("number", [slow(signal.SIGTERM), signal.SIGINT])
def test_a_signal_to_the_process_group_of_deepspeed(folder: Path, number: signal.Signals) -> None:
    launch = processes.Launch(folder, "deepspeed", f"deepspeed-{number.name}", **LONG)
    preempted(launch, number, group=True)  # SIGINT: as a terminal's Ctrl-C does
    assert "Run the same command to resume" in launch.log.read_text()


@pytest.mark.skipif(processes.mpirun() is None, reason="no mpirun here")
def test_sigterm_to_mpirun(folder: Path) -> None:
    preempted(processes.Launch(folder, "mpirun", "mpirun", **LONG), signal.SIGTERM, group=False)


def test_slurms_sigusr1_to_every_rank(folder: Path) -> None:
    launch = processes.Launch(folder, "torchrun", "slurm", **LONG)
    launch.until(lambda: launch.updates() >= 3, "update 3")
    for rank in launch.ranks():
        rank.send_signal(signal.SIGUSR1)
    launch.ended()
    assert json.loads((launch.run / "summary.json").read_text())["exit_status"] == 75


def test_a_killed_rank_is_named_by_the_others(folder: Path) -> None:
    launch = processes.Launch(folder, "torchrun", "dead-rank", **LONG)
    launch.until(lambda: launch.checkpoints() and launch.updates() > 10, "a checkpoint")
    launch.ranks()[1].kill()
    assert launch.ended() != 0
    assert f"Rank 1 on {socket.gethostname()} is stopped or dead" in launch.log.read_text()
    assert is_whole(launch.run / "checkpoints" / launch.checkpoints()[-1])


def test_a_stopped_rank_is_named_in_bounded_time(folder: Path) -> None:
    launch = processes.Launch(folder, "torchrun", "stopped-rank", health__hang_timeout_seconds=8, **LONG)
    launch.until(lambda: launch.checkpoints() and launch.updates() > 10, "a checkpoint")
    stopped: psutil.Process = launch.ranks()[1]
    stopped.suspend()
    named = f"Rank 1 on {socket.gethostname()} is stopped or dead"
    launch.until(lambda: named in launch.log.read_text(), "the stopped rank's name")
    stopped.kill()  # as torchrun does, but after half a minute
    assert launch.ended() != 0
    log = launch.log.read_text()
    assert "no progress for 8 s" in log
    assert f"exitcode  : {RankLostError.exit_code}" in log  # torchrun's report of the rank that gave up
    assert is_whole(launch.run / "checkpoints" / launch.checkpoints()[-1])


def test_a_rank_gives_up_though_its_launcher_took_stderr_with_it() -> None:
    nobody_reads, stderr = os.pipe()
    os.close(nobody_reads)
    program = [sys.executable, "-c", GIVES_UP]
    done = subprocess.run(program, stderr=stderr, cwd=processes.ROOT, timeout=processes.PATIENCE_SECONDS)
    os.close(stderr)
    assert done.returncode == RankLostError.exit_code


def test_a_short_campaign_of_kills_ends_like_the_undisturbed_run(folder: Path) -> None:
    report = campaign.conduct(folder, kills=2, seed=0, updates=40)
    assert report.kills >= 2
    assert report.differences == []
