"""The threads' patience is set before torch loads what reads it, unless the user has chosen one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

UNSET = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
SHOW = "import sys, homodistil, os; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_spin_briefly_unless_told_otherwise(chosen: dict[str, str], seen: str) -> None:
    done = subprocess.run([sys.executable, "-c", SHOW], env={**UNSET, **chosen}, capture_output=True, text=True)
    assert done.stdout.split() == [seen, "False"]
