"""What a run's log holds, compared with sums done by hand."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from homodistil.config import RunConfig
from homodistil.metrics import Metrics, Progress, Work
from homodistil.ranks import Ranks
from tests.fixtures import SilentRanks
from tests.pool import RankPool

WIDTHS = {"hidden": 48, "ffn": 96, "heads": 6, "head_width": 8}


ALONE = SilentRanks(0, 1, 0, torch.device("cpu"))


def config(directory: Path, **run: Any) -> RunConfig:
    weights = {"task": {"weight": 1.0}, "kl": {"weight": 2.0}, "hidden": {"weight": 0.5}, "attention": {"weight": 0.0}}
    settings = {"directory": directory, "name": "tried", "updates": 4, "log_every": 2, **run}
    return RunConfig.model_validate({"run": settings, "objective": weights})


def losses(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def points(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "tried" / "metrics.jsonl").read_text().splitlines()]


def record_by_rank(directory: Path) -> None:
    ranks = Ranks.current()
    with Metrics(config(directory), ranks, 1e12) as metrics:
        for update in (1, 2):
            metrics.record(update, losses(task=float(update + ranks.rank), kl=1.0), Work(10, 1e9), 1e-3, 0.5)


def test_a_point_is_the_mean_over_updates_of_the_sum_over_ranks(ranks_pool: RankPool, tmp_path: Path) -> None:
    ranks_pool.run(record_by_rank, tmp_path)
    (point,) = points(tmp_path)
    by_hand = [sum(update + rank for rank in range(ranks_pool.world_size)) for update in (1, 2)]
    assert point["update"] == 2
    assert point["loss/task"] == pytest.approx(sum(by_hand) / 2)
    assert point["loss/kl"] == pytest.approx(ranks_pool.world_size)


def test_total_and_shares_are_weighted(tmp_path: Path) -> None:
    with Metrics(config(tmp_path, updates=1), ALONE, 1e12) as metrics:
        metrics.record(1, losses(task=3.0, kl=1.0, hidden=10.0, attention=7.0), Work(10, 1e9), 1e-3, None)
    (point,) = points(tmp_path)
    assert point["loss/total"] == pytest.approx(1 * 3 + 2 * 1 + 0.5 * 10)
    assert [point[f"share/{name}"] for name in ("task", "kl", "hidden", "attention")] == [0.3, 0.2, 0.5, 0.0]
    assert "optimizer/gradient_norm" not in point


def test_tensorboard_holds_the_same_points_as_the_json_lines(tmp_path: Path) -> None:
    with Metrics(config(tmp_path), ALONE, 1e12) as metrics:
        metrics.shape(0, WIDTHS, 1000)
        for update in range(1, 5):
            metrics.record(update, losses(task=float(update)), Work(10, 1e9), 1e-3, torch.tensor(0.25))
        metrics.validation(4, {"mlm_loss": 2.5, "kl": None})
        metrics.pruned(4, {**WIDTHS, "hidden": 24}, 500, kl_before=0.5, kl_after=0.75, seconds=0.1)
    board = EventAccumulator(str(tmp_path / "tried" / "tensorboard")).Reload()
    from_board = {(tag, event.step): event.value for tag in board.Tags()["scalars"] for event in board.Scalars(tag)}
    from_lines = {
        (tag, point["update"]): v for point in points(tmp_path) for tag, v in point.items() if tag != "update"
    }
    assert from_board.keys() == from_lines.keys()
    assert all(from_board[key] == pytest.approx(from_lines[key]) for key in from_lines)
    assert from_lines["pruning/prune_jump", 4] == pytest.approx(0.25)
    assert from_lines["shape/hidden", 4] == 24 and from_lines["shape/hidden", 0] == 48
    assert ("validation/kl", 4) not in from_lines


def test_nothing_waits_for_the_device_between_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*arguments: Any) -> Any:
            waits.append(name)
            return method(*arguments)

        return wait

    for name in ("item", "tolist", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    with Metrics(config(tmp_path, updates=9, log_every=3), ALONE, 1e12) as metrics:
        for update in (1, 2):
            metrics.record(update, losses(task=1.0), Work(10, 1e9), 1e-3, torch.tensor(1.0))
        assert not waits
        metrics.record(3, losses(task=1.0), Work(10, 1e9), 1e-3, torch.tensor(1.0))
        assert waits


def test_a_faint_term_is_named_once_and_only_after_the_first_prune(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faint = losses(task=3.0, kl=0.001, hidden=1.0, attention=1.0)
    with caplog.at_level(logging.WARNING), Metrics(config(tmp_path, log_every=1), ALONE, 1e12) as metrics:
        metrics.record(1, faint, Work(10, 1e9), 1e-3, None)
        assert not caplog.records
        metrics.pruned(1, WIDTHS, 500, kl_before=0.0, kl_after=0.1, seconds=0.1)
        metrics.record(2, faint, Work(10, 1e9), 1e-3, None)
        metrics.record(3, faint, Work(10, 1e9), 1e-3, None)
    assert ["objective.kl" in record.getMessage() for record in caplog.records] == [True]


def test_pauses_do_not_slow_the_reported_throughput(tmp_path: Path) -> None:
    with Metrics(config(tmp_path, updates=1), ALONE, 1e12) as metrics:
        with metrics.paused():
            time.sleep(0.3)
        metrics.record(1, losses(task=1.0), Work(1000, 1e9), 1e-3, None)
        assert metrics.seconds < 0.25
        assert metrics.tokens_per_second > 1000 / 0.25


def test_a_second_run_of_the_same_name_begins_a_new_log(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        with Metrics(config(tmp_path, updates=1), ALONE, 1e12) as metrics:
            metrics.record(1, losses(task=loss), Work(10, 1e9), 1e-3, None)
    assert [point["loss/task"] for point in points(tmp_path)] == [2.0]
    board = EventAccumulator(str(tmp_path / "tried" / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("loss/task")] == [2.0]


def test_a_log_file_gets_lines_not_a_redrawn_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(config(tmp_path, updates=1), ALONE, 1e12) as metrics:
        metrics.shape(0, WIDTHS, 1000)
        metrics.record(1, losses(task=1.5), Work(10, 1e9), 1e-3, None)
    shown = capsys.readouterr().err
    assert "\r" not in shown
    *_, last = filter(None, shown.splitlines())
    assert "tried 48/96: 1/1" in last and "task=1.5" in last


def test_utilisation_is_useful_arithmetic_over_the_matrix_product_of_the_same_seconds(tmp_path: Path) -> None:
    with Metrics(config(tmp_path, updates=1), ALONE, 5e9) as metrics:
        metrics.record(1, losses(task=1.0), Work(1000, 2e9), 1e-3, None)
    (point,) = points(tmp_path)
    seconds = 1000 / point["speed/tokens_per_second"]
    assert point["speed/utilisation"] == pytest.approx(2e9 / (5e9 * seconds))


def test_a_resumed_run_forgets_what_was_logged_beyond_its_checkpoint(tmp_path: Path) -> None:
    def run(updates: range, start: int, progress: Progress | None) -> Progress:
        with Metrics(config(tmp_path, log_every=1), ALONE, 1e12, start, progress) as metrics:
            for update in updates:
                metrics.record(update, losses(task=float(update)), Work(10, 1e9), 1e-3, 0.5)
            return metrics.progress

    first = run(range(1, 4), 0, None)
    with (tmp_path / "tried" / "metrics.jsonl").open("a") as lines:
        lines.write('{"update": 2, "loss/ml')  # killed while it wrote
    time.sleep(1.1)  # TensorBoard orders files by the second
    second = run(range(3, 5), 2, first)
    assert [(point["update"], point["loss/task"]) for point in points(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert (second.tokens, second.flops) == (first.tokens + 20, first.flops + 2e9)
    assert points(tmp_path)[-1]["work/flops"] == 5e9
    assert second.seconds > first.seconds
    board = EventAccumulator(str(tmp_path / "tried" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/task")] == [1, 2, 3, 4]


def test_a_terms_mean_is_over_the_updates_in_which_it_counts(tmp_path: Path) -> None:
    with Metrics(config(tmp_path, log_every=4), ALONE, 1e12) as metrics:
        for update in range(1, 5):
            terms = losses(hidden=6.0) if update == 1 else losses(kl=2.0)
            metrics.record(update, terms, Work(10, 1e9), 1e-3, 0.5)
    (point,) = points(tmp_path)
    assert (point["loss/hidden"], point["loss/kl"]) == (6.0, 2.0)


def test_the_total_of_other_terms_is_no_spike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Metrics(config(tmp_path, log_every=1), ALONE, 1e12) as metrics, caplog.at_level(logging.WARNING):
        for update in range(1, 20):
            terms = losses(kl=30.0) if update == 18 else losses(hidden=3.0)
            metrics.record(update, terms, Work(10, 1e9), 1e-3, 0.5)
    assert not [record for record in caplog.records if "total loss" in record.getMessage()]


def test_a_log_on_a_full_disk_warns_once_and_its_end_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = Path("/dev/full")
    with Metrics(config(tmp_path, log_every=1), ALONE, 1e12) as metrics:
        metrics._log._lines = full.open("a")
        for update in (1, 2):
            metrics.record(update, losses(task=1.0), Work(10, 1e9), 1e-3, 0.5)
    (message,) = [record.getMessage() for record in caplog.records if "log cannot be written" in record.getMessage()]
    assert "from update 1 on" in message


def test_a_loss_spike_is_reported_against_the_usual_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Metrics(config(tmp_path, log_every=1), ALONE, 1e12) as metrics, caplog.at_level(logging.WARNING):
        for update in range(1, 20):
            metrics.record(update, losses(task=9.0 if update == 18 else 3.0), Work(10, 1e9), 1e-3, 0.5)
    (message,) = [record.getMessage() for record in caplog.records if "total loss" in record.getMessage()]
    assert message.startswith("update 18: the total loss is 9, 3.0 times the median of the last 16 points (3)")
