"""Who am I among the ranks, and the few collectives the library uses."""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from homodistil.errors import ConfigError, DataError, DivergenceError, HomodistilError, Refused, ShardError
from homodistil.hardware import cores

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size`. Its methods are collective: every rank must call them."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    def current(cls) -> Ranks:
        """The ranks of the process group that is already running."""
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, device)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place, of a tensor on `device`. Collective."""
        dist.all_reduce(values)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's picklable value, on every rank. Collective."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's picklable value, in rank order. Collective."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. Collective."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())

    def all(self, flag: bool) -> bool:
        """Whether every rank says so. Collective."""
        return not self.any(not flag)

    def seed(self, *keys: int) -> None:
        """From here on, torch's draws (dropout) depend on these keys and the rank alone: no checkpoint needs them."""
        digest = hashlib.sha256(repr((*keys, self.rank)).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def barrier(self) -> None:
        """Collective."""
        self.sum(torch.zeros(1, device=self.device))

    def assert_same(self, what: str, value: object) -> None:
        """Raise `DivergenceError`, naming the ranks, unless all ranks hold an equal value. Collective."""
        digests = self.gather(hashlib.sha256(pickle.dumps(value)).hexdigest())
        different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if different:
            raise DivergenceError(
                f"{what}: rank(s) {different} hold another value than rank 0. The run cannot go on; start it again."
            )

    def once(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 only; every rank gets its result, or raises its error. Collective."""
        outcome: Any = None
        if self.is_first:
            try:
                outcome = ("result", work())
            except Exception as error:  # re-raised below, on every rank
                outcome = ("error", error)
        kind, value = self.broadcast(outcome)
        if kind == "error":
            raise value
        return value

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; what any of them found wrong ends it on all, with the words of each that has words
        of its own: a `ShardError` where it is data alone, else `Refused`. Collective."""
        result, fault = None, None
        try:
            result = work()
        except HomodistilError as error:
            fault = error
        if self.any(fault is not None):
            said = self.gather(None if fault is None else (str(fault), socket.gethostname()))
            is_data = self.all(fault is None or isinstance(fault, DataError))
            raise (ShardError if is_data else Refused)(_told(said))
        return result  # type: ignore[return-value]


def _told(said: list[tuple[str, str] | None]) -> str:
    """Each fault once: by itself if all ranks found it, else with the first rank that did, and its host."""
    found: dict[str, str] = {}
    for rank, fault in enumerate(said):
        if fault is not None:
            found.setdefault(fault[0], f"rank {rank} on {fault[1]}")
    if len(found) == 1 and None not in said:
        return next(iter(found))
    return "\n".join(f"{who}: {words}" for words, who in found.items())


def local_world_size() -> int:
    """Ranks on this host, from whichever launcher started them; 1 without a launcher."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


def share_cores() -> None:
    """Divide this host's cores between its ranks, unless the user set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] == "":
        torch.set_num_threads(max(1, cores() // local_world_size()))


def rendezvous() -> None:
    """Fill in what a launcher did not say: Slurm's variables, or a world of one."""
    launched = {"RANK", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"} & os.environ.keys()  # by torchrun, mpirun, Hydra
    if not launched and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # by srun: a batch script is a step of one
        if "MASTER_ADDR" not in os.environ:
            raise ConfigError(
                "srun started several tasks, but MASTER_ADDR is not set. Before srun: export MASTER_PORT=29500 "
                'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            )
        slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        os.environ.update({name: os.environ[source] for name, source in slurm.items()})
    if "RANK" not in os.environ and not any(name.startswith(("OMPI_COMM", "PMI_")) for name in os.environ):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
