"""Fixtures that every test may ask for: rank pools, and tiny real models with awkward sizes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from tests.pool import RankPool

WORLD_SIZES = (1, 2, 4)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A script's background job ignores Ctrl-C, and so would all processes that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], RankPool]]:
    """`pool(world_size)`: that many ranks, shared by all tests of this session."""
    pools = {world_size: RankPool(world_size) for world_size in WORLD_SIZES}
    yield pools.__getitem__
    for one in pools.values():
        one.close()


@pytest.fixture(params=WORLD_SIZES, ids=lambda size: f"{size}_ranks")
def ranks_pool(request: pytest.FixtureRequest, pool: Callable[[int], RankPool]) -> RankPool:
    """The test runs once on 1, on 2 and on 4 ranks."""
    return pool(request.param)
