"""Studies: which runs they start, with which rates and lengths, what they keep, and that nothing is run twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import steps, studies, study_runs
from benchmarks.steps import Step, kept_rows
from benchmarks.study_runs import RATES, SEEDS, Bench

BEST = {"one_shot": "4e-3", "one_shot+": "1e-3", "indexed": "3.2e-2"}
"""Arm -> the rate at which the runs below end nearest to their teacher; 2e-3 of all others."""
TRIED = {
    "one_shot": ["2e-3", "4e-3", "8e-3"],
    "one_shot+": ["5e-4", "1e-3", "2e-3", "4e-3"],
    "indexed": ["2e-3", "4e-3", "8e-3", "1.6e-2", "3.2e-2"],  # there are no more
}
"""Arm -> rates until the best has one tried on both sides; 1e-3, 2e-3, 4e-3 of all others."""
TERA = {"homodistil": 30, "one_shot": 20, "random_start": 15}


class Runs:
    """Stands for training: every step ends at once with figures that follow from its name."""

    def __init__(self) -> None:
        self.updates: dict[str, int] = {}
        """Of each run, in the order of their starts."""

    def __call__(self, step: Step, logs: Path, parallel: int) -> None:
        assert step.name not in self.updates
        flags = dict(zip(step.flags[::2], step.flags[1::2], strict=True))
        self.updates[step.name] = int(flags["--run.updates"])
        arm, rate, seed = re.fullmatch(r"(.+?)-([\d.]+e-\d)-(\d)", step.name).groups()  # type: ignore[union-attr]
        kl = 1.0 + 0.1 * int(seed) + abs(RATES.index(rate) - RATES.index(BEST.get(arm, "2e-3")))
        summary: dict[str, Any] = {"exit_status": 0, "steps": self.updates[step.name], "seconds": 1.0}
        summary |= {"flops": TERA.get(arm, 25) * 1e12, "student": {"parameters": 7}}
        summary |= {"validation": {"kl": kl, "student": {"mlm_loss": 2 * kl, "mlm_accuracy": 0.5}}}
        step.result.parent.mkdir(parents=True)
        step.result.write_text(json.dumps(summary))
        looks = [0, 50, 73, 100] if step.name == "homodistil-2e-3-1" else [0, 50, 100]  # the former was resumed at 73
        points = [{"update": update, "validation/kl": update / 50} for update in looks]
        points.append({"update": 20, "pruning/prune_jump": 0.25})
        (step.result.parent / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runs:
    found = Runs()
    monkeypatch.setattr(steps, "_run", found)
    monkeypatch.setattr(study_runs, "RUNS", tmp_path / "runs")
    return found


def bench(folder: Path) -> Bench:
    return Bench("small", 96, folder / "shared", folder / "shards", folder / "results", parallel=2)


def test_core_tries_rates_until_the_best_is_not_at_an_edge_and_repeats_it(runs: Runs, tmp_path: Path) -> None:
    studies.pretrain(bench(tmp_path), "core", SEEDS)
    arms = study_runs.STUDIES["core"].arms
    best = {arm: BEST.get(arm, "2e-3") for arm in arms}
    tried = {arm: TRIED.get(arm, ["1e-3", "2e-3", "4e-3"]) for arm in arms}
    assert runs.updates.keys() == {f"{arm}-{rate}-1" for arm in arms for rate in tried[arm]} | {
        f"{arm}-{best[arm]}-{seed}" for arm in arms for seed in SEEDS
    }
    at_equal_flops = {"one_shot+": 300, "random_start+": 400}  # 200 updates, times what HomoDistil's cost more
    assert all(count == at_equal_flops.get(name.split("-")[0], 200) for name, count in runs.updates.items())
    rows = json.loads((tmp_path / "results/studies_small.json").read_text())
    row = rows["homodistil-2e-3-3"]
    assert (row["kl"], row["mlm_loss"], row["largest_jump"], row["flops"]) == (1.3, 2.6, 0.25, 3e13)
    assert row["curve"] == {"0": 0.0, "50": 1.0, "100": 2.0}
    assert (tmp_path / "results/studies_small_core.png").is_file()


def test_tables_are_markdown_with_means_deviations_and_paired_intervals(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studies.pretrain(bench(tmp_path), "core", SEEDS)
    lines = [re.sub(" +", " ", line).strip() for line in capsys.readouterr().out.splitlines()]
    assert "| KL at rate | 5e-4 | 1e-3 | 2e-3 | 4e-3 | 8e-3 | 1.6e-2 | 3.2e-2 |" in lines
    assert "| `one_shot+` | 2.100 | 1.100 | 2.100 | 3.100 | | | |" in lines
    figures = "200 | 30.0 | 1.2000 (0.1000) | 2.4000 (0.2000) | 0.5000 (0.0000) | 0.2500 (0.0000)"
    assert f"| `homodistil` | 2e-3 | 3 | {figures} | | |" in lines
    once = figures.replace("30.0", "20.0")
    assert f"| `one_shot` | 4e-3 | 3 | {once} | +0.0000 ± 0.0000 (3) | +0.0000 ± 0.0000 (3) |" in lines


def test_what_is_a_row_or_a_finished_run_is_not_run_again(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studies.pretrain(bench(tmp_path), "core", SEEDS)
    count = len(runs.updates)
    studies.pretrain(bench(tmp_path), "core", SEEDS)
    assert f"studies_small.json has {count} rows" in capsys.readouterr().out
    (tmp_path / "results/studies_small.json").unlink()
    studies.pretrain(bench(tmp_path), "core", SEEDS)
    assert len(runs.updates) == count == len(json.loads((tmp_path / "results/studies_small.json").read_text()))


def test_ablations_have_homodistils_rate_and_a_seed_that_did_not_choose_it(runs: Runs, tmp_path: Path) -> None:
    studies.pretrain(bench(tmp_path), "core", SEEDS)
    core = set(runs.updates)
    studies.pretrain(bench(tmp_path), "ablations", SEEDS)
    arms = set(study_runs.STUDIES["ablations"].arms) - {"homodistil"}
    assert runs.updates.keys() - core == {f"{arm}-2e-3-2" for arm in arms}


def test_of_some_arms_all_are_tried_at_a_rate_before_the_next(runs: Runs, tmp_path: Path) -> None:
    studies.pretrain(bench(tmp_path), "core", SEEDS, ["homodistil", "random_start"])
    first = [f"{arm}-{rate}-1" for rate in ("2e-3", "4e-3") for arm in ("homodistil", "random_start")]
    assert list(runs.updates)[:4] == first and len(runs.updates) == 2 * (3 + 2)
    for alone in (["prunes_4"], ["homodistil"], ["one_shot", "magnitude"]):
        with pytest.raises(
            SystemExit, match=f"--arms: nothing to compare .*{alone[-1]}.* with. Groups are: homodistil"
        ):
            studies.pretrain(bench(tmp_path), "core", SEEDS, alone)


def test_fine_tuning_waits_for_every_rate_of_core(runs: Runs, tmp_path: Path) -> None:
    unfinished = bench(tmp_path)
    unfinished.finish([study_runs.Run("homodistil", rate, 1) for rate in RATES[2:5]], "interrupted")
    with pytest.raises(SystemExit, match="one_shot at every rate yet: finish the study core first"):
        studies.finetune(unfinished, "finetuned", SEEDS)


def test_rows_that_lie_there_are_named_with_their_commits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kept_rows(tmp_path / "none.json") == {} and not capsys.readouterr().out
    rows = {"a": {"commit": "5d70f29"}, "b": {"commit": None}, "c": {"commit": "5d70f29"}}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert kept_rows(tmp_path / "rows.json") == rows
    assert "rows.json has 3 rows, of commit 5d70f29, None: " in capsys.readouterr().out
