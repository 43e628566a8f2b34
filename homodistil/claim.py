"""Claim: one process at a time writes a folder.

A second start of the same command, or ranks that outlived their launcher, would delete and retire each other's
checkpoints. The lock is the kernel's: it ends with the process that holds it, however that ends. On network storage the
lock of a machine that lost power lives on, for a lease or, with NFSv3, until it is back.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from homodistil.errors import CheckpointError, HomodistilError
from homodistil.ranks import Ranks

PATIENCE_SECONDS = 120.0
"""How long a process that is on its way out is waited for, or a server that takes back the lock of a lost machine."""
LOCK = "lock"
"""File in the folder; it stays."""


class Claim:
    """While entered, `folder` can be written, and is this run's alone. Collective."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        patience_seconds: float = PATIENCE_SECONDS,
        key: str = "run.directory",
        error: type[HomodistilError] = CheckpointError,
    ) -> None:
        """key: what decides the folder, for who must choose another. error: what is raised where it cannot be had."""
        self._ranks = ranks
        self._lock = lock(folder, key, error, patience_seconds)
        self._held = ExitStack()

    def __enter__(self) -> Claim:
        """Raises the error on all ranks."""
        self._ranks.once(lambda: self._held.enter_context(self._lock))
        return self

    def __exit__(self, *raised: object) -> None:
        self._held.close()


@contextmanager
def lock(
    folder: Path, key: str, error: type[HomodistilError], patience_seconds: float = PATIENCE_SECONDS
) -> Iterator[None]:
    """The same for one process: `folder`, made where it is not there, is its alone. Raises the error."""
    with ExitStack() as held:
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = held.enter_context((folder / LOCK).open("a+"))
            except OSError as fault:
                raise _unwritable(folder, key, error, fault) from None
            _wait(file, folder, key, error, patience_seconds)
            if _is_at(file, folder / LOCK):
                break  # else whoever had it removed the folder, and this is a lock on nothing
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        except OSError as fault:
            raise _unwritable(folder, key, error, fault) from None
        yield


def _unwritable(folder: Path, key: str, error: type[HomodistilError], fault: OSError) -> HomodistilError:
    return error(
        f"{folder}: cannot be written ({fault.strerror}). Set {key} to a folder with room that you may write to."
    )


def _wait(file: IO[str], folder: Path, key: str, error: type[HomodistilError], patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    while not _locked(file):
        if time.monotonic() > deadline:
            file.seek(0)
            raise error(
                f"{folder}: this run is running already ({file.read()}). Wait for it, stop it, or give this "
                f"one another {key}. If that machine is gone for good, delete {folder / LOCK}."
            )
        time.sleep(0.2)


def _is_at(file: IO[str], path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: nothing can be known
        return True
    return True
