"""RankPool: real gloo ranks on this machine, started once and kept for the whole pytest session.

A 2-rank test that starts its own processes waits 11 s for imports; one that borrows a pool waits for nothing.
The pool owns processes, process group and timeouts. What a test leaves behind in its ranks (engines, groups of
its own) it must destroy itself. Rank processes end when their pipe does, so none outlives pytest.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

START_SECONDS = 180.0
"""Bound on imports and rendezvous of a new pool."""
GRACE_SECONDS = 2.0
"""After one rank failed, how long the others may still need to say so too."""


class RankTraceback(Exception):
    """Where in which rank an exception came from; the cause of the one that the test sees."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


@dataclass
class _Answer:
    value: Any = None
    error: BaseException | None = None
    where: str = ""


class RankPool:
    """`world_size` processes in one gloo process group, with deepspeed initialised on it."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._files = tempfile.TemporaryDirectory(prefix="ranks_")

    def run(self, function: Callable[..., T], *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[T]:
        """Every rank's result, in rank order, of `function(*args, **kwargs)`; each rank starts from seed 0.

        `function` is a module-level function, of a test file too. An exception in a rank is raised here, caused
        by a `RankTraceback`. After `timeout` seconds: `TimeoutError` with the ranks' stacks. Wherever ranks may
        have lost step with each other, the next call starts new ones.
        """
        self._ensure_started()
        job = pickle.dumps((sys.path, pickle.dumps((function, args, kwargs))))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        answers, late = self._collect(timeout)
        errors = [answer for answer in answers.values() if answer.error is not None]
        if late and not errors:
            stacks = self._stacks(late)
            self.close()
            raise TimeoutError(f"{function.__name__}: no answer within {timeout:.0f} s from rank(s) {late}\n{stacks}")
        if errors:
            if len(errors) < self.world_size:
                self.close()
            first = errors[0]
            assert first.error is not None
            raise first.error from RankTraceback(first.where)
        return [answers[rank].value for rank in range(self.world_size)]

    def close(self) -> None:
        """Kill the ranks; the next `run` starts new ones."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            pipe.close()
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _ensure_started(self) -> None:
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        self.close()
        context = get_context("spawn")
        rendezvous = Path(tempfile.mkdtemp(dir=self._files.name)) / "store"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world_size, rendezvous, self._stack_file(rank), theirs)
            process = context.Process(target=_serve, args=arguments, name=f"rank {rank} of {self.world_size}")
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        answers, late = self._collect(START_SECONDS)
        if late or any(answer.error for answer in answers.values()):
            self.close()
            reasons = "\n".join(answer.where for answer in answers.values() if answer.error)
            raise RuntimeError(f"the {self.world_size} ranks did not start; late: {late}\n{reasons}")

    def _collect(self, timeout: float) -> tuple[dict[int, _Answer], list[int]]:
        """Answers in order of arrival, by rank, and the ranks that gave none in time."""
        answers: dict[int, _Answer] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.world_size and (left := deadline - time.monotonic()) > 0:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            for pipe in wait(waiting, left):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                answers[rank] = answer = self._receive(rank)
                if answer.error is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers, [rank for rank in range(self.world_size) if rank not in answers]

    def _receive(self, rank: int) -> _Answer:
        try:
            answer: _Answer = pickle.loads(self._pipes[rank].recv_bytes())
            return answer
        except (EOFError, OSError):
            self._processes[rank].join(GRACE_SECONDS)
            died = f"rank {rank} died with exit code {self._processes[rank].exitcode}"
            return _Answer(error=RuntimeError(died), where=died)

    def _stack_file(self, rank: int) -> Path:
        return Path(self._files.name) / f"stack_{rank}.txt"

    def _stacks(self, ranks: list[int]) -> str:
        for rank in ranks:
            os.kill(self._processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(0.5)
        return "\n".join(f"rank {rank}: {self._stack_file(rank).read_text()}" for rank in ranks)


def _serve(rank: int, world_size: int, rendezvous: Path, stack_file: Path, pipe: Connection) -> None:
    """A rank's life: join the process group, then answer jobs until the pipe ends."""
    try:
        with stack_file.open("w") as stacks:
            faulthandler.register(signal.SIGUSR1, file=stacks)
            _reply(pipe, rank, lambda: _join(rank, world_size, rendezvous))
            while True:
                _reply(pipe, rank, _job(pipe.recv_bytes()))
                gc.collect()
    except (EOFError, OSError, KeyboardInterrupt):
        os._exit(0)  # pytest is gone or has closed the pool; other ranks may be too, so no orderly farewell


def _join(rank: int, world_size: int, rendezvous: Path) -> None:
    # Before torch is imported: one thread a rank, and no accelerator, so that fp32 comparisons are exact.
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = rendezvous.as_uri()
    dist.init_process_group("gloo", store, rank=rank, world_size=world_size, timeout=timedelta(minutes=5))
    import deepspeed

    # Its compile lock can hang every later start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)


def _job(message: bytes) -> Callable[[], Any]:
    path, call = pickle.loads(message)

    def work() -> Any:
        import torch

        sys.path[:] = path
        torch.manual_seed(0)
        function, args, kwargs = pickle.loads(call)
        return function(*args, **kwargs)

    return work


def _reply(pipe: Connection, rank: int, work: Callable[[], Any]) -> None:
    try:
        reply = pickle.dumps(_Answer(value=work()))
    except Exception as error:  # whatever it is, it belongs to the test
        reply = _failure(rank, error)
    pipe.send_bytes(reply)


def _failure(rank: int, error: Exception) -> bytes:
    where = f"rank {rank}: {traceback.format_exc()}"
    try:
        reply = pickle.dumps(_Answer(error=error, where=where))
        pickle.loads(reply)
    except Exception:  # exceptions may raise anything when unpickled
        reply = pickle.dumps(_Answer(error=RuntimeError(f"{type(error).__name__}: {error}"), where=where))
    return reply
