"""One run on two hosts, by every launcher, to a finished student; and what happens when their cable is cut."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from homodistil.watchdog import LOOKUP_SECONDS
from tests import processes, runs
from tests.hosts import Host, NoHosts, two_hosts
from tests.stages import slow

Hosts = tuple[Host, Host]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(processes.ROOT)}
"""What ssh does not carry to the other host."""
PORT = "29500"
HANG_SECONDS = 10
SLACK_SECONDS = 20
KEEPALIVE = {"time": 2, "intvl": 1, "probes": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    try:
        with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
            yield both
    except NoHosts as reason:
        pytest.skip(f"two hosts cannot be made: {reason}")


def by_torchrun(folder: Path, hosts: Hosts) -> list[list[str]]:
    """Started on each host."""
    program = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    master = ["--master-addr", hosts[0].name, "--master-port", PORT]
    return [host.words(*program, "--node-rank", str(rank), *master, cwd=folder) for rank, host in enumerate(hosts)]


def by_deepspeed(folder: Path, hosts: Hosts) -> list[list[str]]:
    (folder / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items()))
    program = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--hostfile", "hostfile"]
    return [hosts[0].words(*program, cwd=folder)]


def by_mpirun(folder: Path, hosts: Hosts) -> list[list[str]]:
    program = [str(processes.ROOT / "launchers/mpirun.sh"), "--allow-run-as-root", "--bind-to", "none"]
    where = ["--host", ",".join(f"{host.name}:1" for host in hosts), "-np", "2"]
    exported = [word for name in ENVIRONMENT for word in ("-x", name)]
    # Open MPI notices a host that is cut off after eight minutes, unless it is told to look sooner.
    keepalive = [f"--prtemca oob_tcp_keepalive_{key} {seconds}" for key, seconds in KEEPALIVE.items()]
    options = " ".join(keepalive).split()
    return [hosts[0].words(*program, *where, *options, *exported, sys.executable, cwd=folder)]


Launcher = Callable[[Path, Hosts], list[list[str]]]


def start(launcher: Launcher, folder: Path, hosts: Hosts, name: str, **changes: object) -> list[processes.Launch]:
    return [processes.Launch(folder, words, name, **changes) for words in launcher(folder, hosts)]


def hosts_of_ranks(launch: processes.Launch, hosts: Hosts) -> list[str]:
    return [host.name for rank in launch.ranks() for host in hosts if host.holds(rank)]


Said = tuple[str, ...]
SAID: dict[Launcher, Said] = {
    by_torchrun: ("Rank 1 on beta is stopped or dead, or cut off", "The rendezvous store on alpha does not answer"),
    by_deepspeed: ("Rank 1 on beta is stopped or dead, or cut off", "beta: ssh exited with exit code 255"),
    by_mpirun: ("PRTE has lost communication with a remote daemon", "on node beta"),
}
"""Words about a cut cable, as far as they reach alpha; beta's own do if its launcher was started there."""


@pytest.fixture
def launcher(request: pytest.FixtureRequest) -> Launcher:
    if request.param is by_deepspeed and shutil.which("pdsh") is None:
        pytest.skip("no pdsh here, with which `deepspeed --hostfile` starts its ranks")
    if request.param is by_mpirun and processes.mpirun() is None:
        pytest.skip("no mpirun here")
    chosen: Launcher = request.param
    return chosen


@pytest.mark.parametrize("launcher", [by_deepspeed, slow(by_torchrun), slow(by_mpirun)], indirect=True)
def test_two_hosts_train_one_student(launcher: Launcher, folder: Path, hosts: Hosts) -> None:
    received = [host.received_bytes() for host in hosts]
    launches = start(launcher, folder, hosts, f"two-{launcher.__name__[3:6]}")
    first = launches[0]
    first.until(lambda: first.updates() >= 1, "update 1")
    assert hosts_of_ranks(first, hosts) == ["alpha", "beta"]
    summary = finished(launches)
    assert summary["steps"] == runs.UPDATES and summary["student"]["shape"]["hidden"] == 42
    model = AutoModelForMaskedLM.from_pretrained(first.run / "student")
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()
    gradients = runs.UPDATES * 4 * summary["student"]["parameters"]
    for host, before in zip(hosts, received, strict=True):
        assert host.received_bytes() - before > gradients


@pytest.mark.parametrize("launcher", [slow(by_torchrun), slow(by_deepspeed), slow(by_mpirun)], indirect=True)
def test_a_cut_cable_ends_the_run_with_a_word_and_the_same_command_resumes_it(
    launcher: Launcher, folder: Path, hosts: Hosts
) -> None:
    changes, hurry = {"run__updates": 40, "checkpoint__every": 4}, {"health__hang_timeout_seconds": HANG_SECONDS}
    launches = start(launcher, folder, hosts, name := f"cut-{launcher.__name__[3:6]}", **changes, **hurry)
    first = launches[0]
    first.until(lambda: first.updates() >= 6, "update 6")
    hosts[1].unplug()
    since = time.monotonic()
    try:
        for launch in launches:
            launch.ended()
    finally:
        hosts[1].plug()
    assert time.monotonic() - since < HANG_SECONDS + LOOKUP_SECONDS + SLACK_SECONDS
    for words in SAID[launcher]:
        assert words in first.log.read_text()
    assert not (first.run / "summary.json").exists()
    hosts[0].reach(hosts[1])
    assert finished(start(launcher, folder, hosts, name, **changes))["resumed_from"] >= 4


def finished(launches: list[processes.Launch]) -> dict[str, Any]:
    """The summary of a run on two ranks that ends, pruned, as it should."""
    codes = [launch.ended() for launch in launches]
    assert codes == [0] * len(launches), launches[0].log.read_text()[-3000:]
    summary: dict[str, Any] = json.loads((launches[0].run / "summary.json").read_text())
    assert (summary["exit_status"], summary["world_size"], summary["prunes"]) == (0, 2, 3)
    return summary
