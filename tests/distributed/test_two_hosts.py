"""One run on two hosts, by every launcher, to a finished student; and what happens when their cable is cut."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from tests import processes, runs
from tests.hosts import Host, NoHosts, two_hosts

Hosts = tuple[Host, Host]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(processes.ROOT)}
"""What ssh does not carry to the other host."""
PORT = "29500"
HANG_SECONDS = 8


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
    return [hosts[0].words(*program, *where, *exported, sys.executable, cwd=folder)]


Launcher = Callable[[Path, Hosts], list[list[str]]]


def start(launcher: Launcher, folder: Path, hosts: Hosts, name: str, **changes: object) -> list[processes.Launch]:
    return [processes.Launch(folder, words, name, **changes) for words in launcher(folder, hosts)]


def hosts_of_ranks(launch: processes.Launch, hosts: Hosts) -> list[str]:
    return [host.name for rank in launch.ranks() for host in hosts if host.holds(rank)]


@pytest.mark.parametrize("launcher", [by_torchrun, by_deepspeed, by_mpirun])
def test_two_hosts_train_one_student(launcher: Launcher, folder: Path, hosts: Hosts) -> None:
    received = [host.received_bytes() for host in hosts]
    launches = start(launcher, folder, hosts, f"two-{launcher.__name__[3:6]}")
    first = launches[0]
    first.until(lambda: first.updates() >= 1, "update 1")
    assert sorted(hosts_of_ranks(first, hosts)) == ["alpha", "beta"]
    assert [launch.ended() for launch in launches] == [0] * len(launches), first.log.read_text()[-3000:]
    summary = json.loads((first.run / "summary.json").read_text())
    assert (summary["exit_status"], summary["world_size"], summary["steps"]) == (0, 2, runs.UPDATES)
    assert summary["prunes"] == len(runs.PRUNES) and summary["student"]["shape"]["hidden"] == 42
    model = AutoModelForMaskedLM.from_pretrained(first.run / "student")
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()
    gradients = runs.UPDATES * 4 * summary["student"]["parameters"]
    for host, before in zip(hosts, received, strict=True):
        assert host.received_bytes() - before > gradients


def test_a_cut_cable_ends_the_run_on_both_hosts_with_a_word_and_it_resumes_when_it_is_back(
    folder: Path, hosts: Hosts
) -> None:
    many = {"run__updates": 300, "checkpoint__every": 20, "validation__every": 1000}
    launches = start(by_torchrun, folder, hosts, "cut", health__hang_timeout_seconds=HANG_SECONDS, **many)
    first = launches[0]
    first.until(lambda: first.checkpoints() and first.updates() > 30, "a checkpoint")
    hosts[1].unplug()
    at = time.monotonic()
    try:
        codes = [launch.ended() for launch in launches]
    finally:
        hosts[1].plug()
    print("took", time.monotonic() - at, codes, first.log.read_text())
    assert 0 not in codes and time.monotonic() - at < 60
    assert 0
