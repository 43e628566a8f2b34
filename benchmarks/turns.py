"""Arms of a benchmark in processes of their own that take turns: none runs while another does.

In one process they would share the C library's heap. What one arm makes it keep, another then finds: R+ took 0.45 s an
update in a process whose heap this project's arm had grown, 0.57 s in its own.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

Step = Callable[[], Any]
Make = Callable[..., Any]
"""A context manager that gives a `Step`; importable, since a new process has to find it."""


class Turns:
    """One process that makes a step and takes it whenever it is called; what the step returns comes back."""

    def __init__(self, make: Make, *arguments: Any) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self) -> Any:
        """Take the step. Raises `EOFError` if the process has died, which has then said why."""
        self._connection.send(True)
        return self._connection.recv()

    def __enter__(self) -> Turns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, make: Make, arguments: tuple[Any, ...]) -> None:
    with make(*arguments) as step:
        while True:
            try:
                connection.recv()
            except EOFError:
                return
            connection.send(step())
