"""Workers: processes that share the work on a corpus, on this machine or, below mpirun, on all of its machines.

Who tells the story submits functions of picklable things and gets their results in order; so nothing that comes out can
depend on how many workers there are.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar, cast

from homodistil.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")
"""What Open MPI, MPICH and its relatives, and srun tell each process that they start."""
AHEAD = 4
"""Items that are handed out at a time, for each worker: enough that a long one keeps nobody waiting."""


class Workers:
    """This process alone, or an executor's."""

    def __init__(self, count: int = 1, executor: Executor | None = None) -> None:
        self.count = count
        self._executor = executor

    @property
    def alone(self) -> bool:
        return self._executor is None

    def results(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """In the items' order; who stops asking leaves the rest undone. Raises `DataError` where a worker died."""
        if self._executor is None:
            yield from map(function, items)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(self._executor.submit(function, item))
                if len(waiting) >= AHEAD * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"one of {self.count} workers was killed, most likely for want of memory. Give fewer --workers; the "
                "same command goes on from what is done."
            ) from error
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def open_workers(count: int, mpi: bool = False) -> Iterator[Workers]:
    """`count` processes. mpi: where mpirun or srun started this one and others, all of them call this, and all but the
    first are the workers; they end here when the work is done."""
    if mpi and any(int(os.environ.get(name, 1)) > 1 for name in MPI_SIZES):
        with _mpi() as workers:
            yield workers
    elif count == 1:
        yield Workers()
    else:  # from a server that has only imported: a fork of this process would copy threads in whatever state they are
        context = get_context("forkserver")
        context.set_forkserver_preload(["homodistil.data.encoding"])
        with ProcessPoolExecutor(count, mp_context=context, initializer=_join) as pool:
            yield Workers(count, pool)


@contextmanager
def _mpi() -> Iterator[Workers]:
    try:
        from mpi4py import MPI  # initialises MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"several processes were started, but mpi4py cannot reach MPI ({error}). Install Open MPI or MPICH, or "
            "start one process and give --workers."
        ) from error
    if MPI.COMM_WORLD.Get_size() == 1:
        raise DataError(
            "several processes were started, but for MPI each is alone: mpirun and the MPI library that mpi4py found "
            "don't belong together. Start one process and give --workers, or use that library's own mpirun."
        )
    alone_on_a_core()
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        if executor is not None:
            yield Workers(MPI.COMM_WORLD.Get_size() - 1, cast(Executor, executor))
    if MPI.COMM_WORLD.Get_rank():
        sys.exit(0)


def _join() -> None:
    """A process of the pool: Ctrl-C reaches it as well, but the first process decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    alone_on_a_core()


def alone_on_a_core(*_: Any) -> None:
    """One thread in each of many processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
