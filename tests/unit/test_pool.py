"""The rank pool itself: answers in order, errors with their traceback, no hang that outlives its test."""

import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from homodistil.errors import ConfigError, DivergenceError, HomodistilError, ModelError, Refused
from homodistil.ranks import Ranks
from tests.pool import RankPool, RankTraceback


def summed_rank(factor: int) -> tuple[int, float]:
    ranks = Ranks.current()
    return ranks.rank, factor * ranks.sum(torch.tensor(1.0 + ranks.rank)).item()


def fails_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} says no")
    Ranks.current().barrier()


def disagree() -> None:
    Ranks.current().assert_same("the rank", dist.get_rank())


def sleeps_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def dies_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    Ranks.current().barrier()


def test_every_rank_answers_in_rank_order(ranks_pool: RankPool) -> None:
    total = sum(range(1, ranks_pool.world_size + 1))
    assert ranks_pool.run(summed_rank, 10) == [(rank, 10.0 * total) for rank in range(ranks_pool.world_size)]


def refusals() -> list[str]:
    """In a rank: what is said where all find the same, where one does, and where each finds something else."""
    ranks, said = Ranks.current(), []

    def fail(error: HomodistilError) -> None:
        raise error

    everybody, one = ConfigError("no such recipe"), ModelError("no weights here")
    for work in (
        lambda: fail(everybody),
        lambda: fail(one) if ranks.rank == 1 else None,
        lambda: fail(one) if ranks.rank else fail(everybody),
    ):
        try:
            ranks.together(work)
        except Refused as error:
            said.append(str(error))
    return said


def test_what_some_ranks_find_wrong_ends_all_of_them_with_its_words(pool: Callable[[int], RankPool]) -> None:
    here = socket.gethostname()
    expected = ["no such recipe", f"rank 1 on {here}: no weights here"]
    expected += [f"rank 0 on {here}: no such recipe\nrank 1 on {here}: no weights here"]
    assert pool(2).run(refusals) == [expected, expected]


def test_processes_are_kept_between_jobs(pool: Callable[[int], RankPool]) -> None:
    assert pool(2).run(os.getpid) == pool(2).run(os.getpid)


def test_an_error_of_all_ranks_is_the_tests_and_keeps_the_pool(pool: Callable[[int], RankPool]) -> None:
    before = pool(2).run(os.getpid)
    with pytest.raises(DivergenceError, match=r"rank\(s\) \[1\]"):
        pool(2).run(disagree)
    assert pool(2).run(os.getpid) == before


@pytest.fixture(scope="module")
def broken() -> Iterator[RankPool]:
    """A pool of its own for what breaks it."""
    one = RankPool(2)
    yield one
    one.close()


def test_names_the_rank_whose_error_came_first_and_recovers(broken: RankPool) -> None:
    with pytest.raises(ValueError, match="rank 1 says no") as caught:
        broken.run(fails_on, 1)
    assert isinstance(caught.value.__cause__, RankTraceback)
    assert "rank 1: Traceback" in str(caught.value.__cause__) and "fails_on" in str(caught.value.__cause__)
    assert len(broken.run(summed_rank, 1)) == 2


def test_shows_where_a_late_rank_stands(broken: RankPool) -> None:
    with pytest.raises(TimeoutError, match=r"(?s)rank\(s\) \[0\].*sleeps_on"):
        broken.run(sleeps_on, 0, timeout=1)


def test_reports_a_dead_rank(broken: RankPool) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 died with exit code 7|closed|reset"):
        broken.run(dies_on, 1)
