"""Who a rank is: what the launcher said, Slurm's variables where srun started it, else a world of one."""

from __future__ import annotations

import os

import pytest

from homodistil.errors import ConfigError
from homodistil.ranks import rendezvous

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STEP = {"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "node01", "MASTER_PORT": "1234"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name in NAMES or name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return monkeypatch


def found(environment: pytest.MonkeyPatch, given: dict[str, str]) -> dict[str, str]:
    os.environ.update(given)
    rendezvous()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_a_task_of_srun_is_the_rank_that_slurm_says(environment: pytest.MonkeyPatch) -> None:
    seen = found(environment, {**STEP, "MASTER_ADDR": "node01", "MASTER_PORT": "29500"})
    assert (seen["RANK"], seen["WORLD_SIZE"], seen["LOCAL_RANK"]) == ("9", "16", "1")


def test_srun_without_an_address_is_refused_with_the_mend(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="export MASTER_PORT=29500 MASTER_ADDR="):
        found(environment, STEP)


def test_mpirun_within_an_allocation_is_left_to_mpi(environment: pytest.MonkeyPatch) -> None:
    """Slurm starts a daemon a node there: its numbers are the daemons'."""
    seen = found(environment, {**STEP, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"})
    assert "RANK" not in seen


def test_torchrun_within_an_allocation_has_said_it_all(environment: pytest.MonkeyPatch) -> None:
    for slurm in (STEP, {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}):
        assert found(environment, {**slurm, **TORCHRUN}) == TORCHRUN


@pytest.mark.parametrize("slurm", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}])
def test_a_script_alone_is_a_world_of_one(environment: pytest.MonkeyPatch, slurm: dict[str, str]) -> None:
    """Also in a batch script, before any srun."""
    seen = found(environment, slurm)
    assert (seen["RANK"], seen["WORLD_SIZE"], seen["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
