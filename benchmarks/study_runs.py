"""The runs of benchmarks/studies.py: what each arm changes, its rate and its length, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.steps import Step, carry_out, circumstances, is_done, kept_rows

RUNS = Path("runs/studies")
SEEDS = (1, 2, 3)
MORE_SEEDS = (4, 5)
"""Besides, where a study is extended."""
RATES = ("2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2", "3.2e-2")
"""The grid of every arm: each begins with the two in its middle, and goes on until its best is not at an edge."""
HEADS = 12
MEASURES = {"kl": "KL", "mlm_loss": "MLM loss", "mlm_accuracy": "accuracy"}


class Size(NamedTuple):
    """What an arm is granted."""

    updates: int
    sequences: int
    """Of 128 tokens, an update."""
    held_out: int
    shards: Path
    """Where they are by default."""


SIZES = {
    "small": Size(200, 16, 192, Path("data/studies")),
    "full": Size(1000, 256, 2048, Path("data/wiki_books")),  # the 36 M tokens of ../shared once, nearly
}
WIDTHS = (96, 192, 288)
"""Hidden dimensions of a student, the first by default; heads and FFN in proportion."""

ARMS: dict[str, list[str]] = {
    "homodistil": [],
    "one_shot": ["--pruning.schedule", "one_shot"],
    "random_start": ["--student.init", "random"],
    "linear": ["--pruning.schedule", "linear"],
    "magnitude": ["--pruning.metric", "magnitude"],
    "platon": ["--pruning.metric", "platon"],
    "random_units": ["--pruning.metric", "random"],
    "indexed": ["--objective.hidden.aligner", "indexed"],
    **{f"prunes_{count}": ["--pruning.events", str(count)] for count in (1, 4, 8)},
    **{f"until_{share}": ["--pruning.end", str(share / 100)] for share in (30, 50, 100)},
    **{f"without_{term}": [f"--objective.{term}.weight", "0"] for term in ("task", "kl", "hidden", "attention")},
    "unsmoothed": ["--pruning.smoothing_window", "1", "--pruning.smoothing_beta", "0"],
}
"""Arm -> what it changes in the recipe minilm_real. With `+` it has so many updates that its FLOPs are HomoDistil's."""
COMBINED = {"neither": (), "filters": ("filters",), "cached": ("cache",), "filters_cached": ("filters", "cache")}
"""Arm -> which of the other two methods it has; none compares attention, as none can from a cache."""
MASKS = ["--data.maskings", "1", "--data.mask_seed", "0"]
"""All seeds of all combined arms read the same masks: a cache is of one set of them."""
SHARE = ["--knowledge.keep", "3l_32t_0.5h"]
"""What a cache keeps: three of seven states, a quarter of the tokens, half of the units: 5 % of the hidden states."""


class Study(NamedTuple):
    """Arms that are compared, group by group, with the first of the group."""

    groups: dict[str, tuple[str, ...]]
    seed: int | None
    """The one that every arm is run with, unless it is run with several."""
    own_rates: bool
    """Whether every arm has the rate that is best for it; else HomoDistil's."""

    @property
    def arms(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(arm for group in self.groups.values() for arm in group))

    def only(self, arms: Sequence[str] | None) -> Study:
        """With these of its arms, all if `None`, group by group. Raises `SystemExit` for an arm that no group has, or
        compares with another of them."""
        kept = {title: tuple(arm for arm in group if not arms or arm in arms) for title, group in self.groups.items()}
        found = self._replace(groups={title: group for title, group in kept.items() if len(group) > 1})
        if alone := set(arms or ()) - set(found.arms):
            groups = "; ".join(" ".join(group) for group in self.groups.values())
            raise SystemExit(f"--arms: nothing to compare {' '.join(sorted(alone))} with. Groups are: {groups}.")
        return found


STUDIES = {
    "core": Study(
        {
            "start": ("homodistil", "one_shot", "random_start", "one_shot+", "random_start+"),
            "schedule": ("homodistil", "linear", "one_shot"),
            "metric": ("homodistil", "magnitude", "platon", "random_units"),
            "aligner": ("homodistil", "indexed"),
        },
        seed=None,
        own_rates=True,
    ),
    "ablations": Study(
        {
            "prunes": ("homodistil", "prunes_1", "prunes_4", "prunes_8"),
            "until": ("homodistil", "until_30", "until_50", "until_100"),
            "terms": ("homodistil", "without_task", "without_kl", "without_hidden", "without_attention"),
            "smoothing": ("homodistil", "unsmoothed"),
        },
        seed=SEEDS[1],  # the first chose HomoDistil's rate
        own_rates=False,
    ),
    "combined": Study({"methods": tuple(COMBINED)}, seed=None, own_rates=False),
}


class Run(NamedTuple):
    """One training."""

    arm: str
    rate: str
    seed: int

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


@dataclass
class Bench:
    """Where runs lie, how they are started, and what is known of those that ended."""

    size: str
    width: int
    shared: Path
    shards: Path
    results: Path
    parallel: int

    @cached_property
    def rows(self) -> dict[str, Any]:
        """Name of a run -> its figures."""
        return kept_rows(self.file)

    @property
    def name(self) -> str:
        return self.size if self.width == WIDTHS[0] else f"{self.size}_{self.width}"

    @property
    def file(self) -> Path:
        return self.results / f"studies_{self.name}.json"

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    def finish(self, runs: Iterable[Run], title: str) -> None:
        """Run what is no row yet, and make rows of it."""
        missing = [run for run in dict.fromkeys(runs) if run.name not in self.rows]
        steps = list({step.name: step for run in missing for step in self.steps(run)}.values())
        try:
            carry_out(steps, self.folder / "logs", self.parallel, title)
        finally:
            for run in missing:
                if is_done(summary := self.folder / run.name / "summary.json"):
                    self.rows[run.name] = run._asdict() | _figures(summary) | circumstances()
            self.save()

    def found(self, arm: str, seeds: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Seed -> its row at the arm's best rate, as far as there are."""
        runs = [self.best(arm, seed) for seed in seeds]
        return {run.seed: self.rows[run.name] for run in runs if run.name in self.rows}

    def save(self) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")

    def steps(self, run: Run) -> list[Step]:
        """The training, after what it needs."""
        arm = run.arm.rstrip("+")
        methods = COMBINED.get(arm, ())
        flags = [*self.common(run.rate), "--run.updates", str(self.updates(run)), "--run.seed", str(run.seed)]
        flags += [*ARMS["without_attention"], *MASKS] if arm in COMBINED else ARMS[arm]
        prepared = []
        if "filters" in methods:
            prepared.append(self.filters())
            flags += self.filtered
        if "cache" in methods:
            prepared.append(self.cache(methods))
            flags += [*SHARE, "--cache.path", str(self.cache(methods).result.parent)]
        needs = tuple(step.name for step in prepared)
        flags += ["--run.name", run.name]
        return [*prepared, Step(run.name, "pretrain", flags, self.folder / run.name / "summary.json", needs)]

    def common(self, rate: str) -> list[str]:
        """What all arms share."""
        size = SIZES[self.size]
        target = {"hidden": self.width, "head_width": self.width // HEADS, "ffn": 4 * self.width}
        flags = ["--recipe", "minilm_real", "--run.directory", str(self.folder), "--data.shards", str(self.shards)]
        flags += ["--teacher.path", str(self.shared / "teacher/minilm-l6-mlm"), "--optimizer.learning_rate", rate]
        flags += [word for key, value in target.items() for word in (f"--pruning.target.{key}", str(value))]
        flags += ["--data.global_batch", str(size.sequences), "--data.micro_batch", str(min(128, size.sequences))]
        flags += ["--data.lanes", "16", "--pruning.start", "0.1", "--validation.sequences", str(size.held_out)]
        return [*flags, "--validation.every", str(size.updates // 4), "--checkpoint.every", "100000"]

    def updates(self, run: Run) -> int:
        """Those of the size; of an arm with `+`, more."""
        updates = SIZES[self.size].updates
        if not run.arm.endswith("+"):
            return updates
        dear, cheap = (self.rows[self.best(arm, SEEDS[0]).name] for arm in ("homodistil", run.arm.rstrip("+")))
        return round(updates * dear["flops"] / cheap["flops"])

    def untried(self, arm: str) -> list[str]:
        """Rates at which an arm's first seed is to be run next; none, once its best has been tried on both sides."""
        kl = self.tried(arm)
        if not kl:
            return list(RATES[3:5])
        best = RATES.index(min(kl, key=lambda rate: kl[rate]))
        return [rate for rate in RATES[max(best - 1, 0) : best + 2] if rate not in kl]

    def best(self, arm: str, seed: int) -> Run:
        """An arm's run of a seed, at the rate at which its first seed ended nearest to the teacher; of an arm that has
        no rate of its own, at HomoDistil's."""
        graded = arm if any(arm in study.arms for study in STUDIES.values() if study.own_rates) else "homodistil"
        if self.untried(graded):
            raise SystemExit(f"{self.file} does not have {graded} at every rate yet: finish the study core first.")
        kl = self.tried(graded)
        return Run(arm, min(kl, key=lambda rate: kl[rate]), seed)

    def tried(self, arm: str) -> dict[str, float]:
        """Rate -> where an arm's first seed ended at it."""
        return {row["rate"]: row["kl"] for row in self.rows.values() if (row["arm"], row["seed"]) == (arm, SEEDS[0])}

    @property
    def filtered(self) -> list[str]:
        """Flags of an arm with filters."""
        folder = self.folder / "ted-teacher_filters/filters"
        return ["--objective.hidden.aligner", "filter", "--teacher.filters", str(folder)]

    def filters(self) -> Step:
        """Stage I of TED: the teacher's filters. The student starts as the teacher, so it starts with them."""
        flags = [*self.common("1e-3"), *ARMS["without_attention"], "--objective.hidden.aligner", "filter"]
        flags += ["--of", "teacher", "--run.name", "ted", "--filters.init", "identity"]
        flags += ["--filters.updates", str(SIZES[self.size].updates // 2)]
        return Step("filters", "learn_filters", flags, self.folder / "ted-teacher_filters/summary.json")

    def cache(self, methods: tuple[str, ...]) -> Step:
        """The teacher's knowledge of what all seeds read; filtered, if there are filters."""
        name = "-".join(methods)
        folder = self.folder / "caches" / name
        flags = [*self.common("1e-3"), *ARMS["without_attention"], *MASKS, *SHARE, "--cache.path", str(folder)]
        flags += ["--run.updates", str(SIZES[self.size].updates), "--run.name", name]
        flags += self.filtered if "filters" in methods else []
        needs = ("filters",) if "filters" in methods else ()
        return Step(f"cache of {name}", "cache_teacher", flags, folder / "manifest.json", needs)


def _figures(summary: Path) -> dict[str, Any]:
    """Of a finished run, with its held-out curve."""
    found = json.loads(summary.read_text(encoding="utf-8"))
    lines = (summary.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [json.loads(line) for line in lines]
    held_out = {point["update"]: point["validation/kl"] for point in points if "validation/kl" in point}
    jumps = [point["pruning/prune_jump"] for point in points if "pruning/prune_jump" in point]
    student = found["validation"]["student"]
    return {
        "updates": found["steps"],
        "flops": found["flops"],
        "seconds": round(found["seconds"]),
        "parameters": found["student"]["parameters"],
        "kl": found["validation"]["kl"],
        "mlm_loss": student["mlm_loss"],
        "mlm_accuracy": student["mlm_accuracy"],
        "largest_jump": max(jumps, default=None),
        "curve": held_out,
    }
