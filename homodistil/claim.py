"""Claim: one process at a time writes a folder.

A second start of the same command, or ranks that outlived their launcher, would delete and retire each other's
checkpoints. The lock is the kernel's: it ends with the process that holds it, however that ends, and is never stale.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from homodistil.errors import CheckpointError, HomodistilError
from homodistil.ranks import Ranks

PATIENCE_SECONDS = 60.0
"""How long a process that is on its way out is waited for."""
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
        self._folder, self._ranks, self._patience = folder, ranks, patience_seconds
        self._key, self._error = key, error
        self._lock: IO[str] | None = None

    def __enter__(self) -> Claim:
        """Raises the error on all ranks."""
        self._ranks.once(self._take)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._lock:
            self._lock.close()

    def _take(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / LOCK).open("a+")
            self._wait(self._lock)
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._lock.flush()
        except OSError as error:
            raise self._error(
                f"{self._folder}: cannot be written ({error.strerror}). Set {self._key} to a folder with room that you "
                "may write to."
            ) from None

    def _wait(self, lock: IO[str]) -> None:
        deadline = time.monotonic() + self._patience
        while not _locked(lock):
            if time.monotonic() > deadline:
                lock.seek(0)
                raise self._error(
                    f"{self._folder}: this run is running already ({lock.read()}). Wait for it, stop it, or give this "
                    f"one another {self._key}."
                )
            time.sleep(0.2)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: nothing can be known
        return True
    return True
