"""Progress bars that stay readable in a log file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    Bar = tqdm[Any]
else:
    Bar = tqdm


def progress_bar(name: str, total: int, unit: str, shown: bool = True, start: int = 0) -> Bar:
    """A tqdm bar on a terminal; elsewhere a line every ten seconds or so."""
    settings: dict[str, Any] = {"desc": f"{name}: ", "total": total, "initial": start, "unit": unit}
    settings["disable"] = not shown
    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, **settings)
    return _Lines(mininterval=10, bar_format="{desc}{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]", **settings)


class _Lines(Bar):
    """Writes its state as a new line instead of over the last one."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        self.fp.write((str(self) if msg is None else msg).rstrip() + "\n")
