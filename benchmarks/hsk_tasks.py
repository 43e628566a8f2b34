"""How little of a teacher's hidden states is enough, on two tasks of GLUE: python -m benchmarks.hsk_tasks

Teacher: ../shared/teacher/minilm-l6-mlm, fine-tuned. Student: its layers 2, 4 and 6, distilled in two stages from
caches, first the hidden states that an arm keeps, then predictions alone, three seeds each, judged by the last weights.
`none` has the second stage's loss all the way, with as many updates. Beside every share that is chosen as the paper
does (Liu et al., ACL 2021) stands one of equal size that is drawn. A step that is done is not done again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.intervals import interval, spread
from benchmarks.steps import Step, study_of_tasks
from benchmarks.ted_tasks import SETTINGS, summaries
from homodistil.tasks import TASKS

TASKS_HERE = {"mrpc": 3, "sst2": 2}
"""Task -> passes over its training examples, of both stages together."""
SEEDS = (1, 2, 3)
LONGEST = {"mrpc": 128, "sst2": 72}
"""Tokens that an example is cut to: hardly any."""
STATES, MEAN_TOKENS = 4, {"mrpc": 53, "sst2": 13}
"""What there is: three layers and the embeddings; tokens of an example, on average."""
RUNS = Path("runs/hsk_tasks")
ROWS, PICTURE = Path("docs/experiments/hsk_tasks.json"), Path("docs/experiments/hsk_tasks.png")
CHOSEN, DRAWN = ("attention_no_sep", "magnitude"), ("random", "random")
MEASURES = ("task_loss", "kl")
TICKS = (1, 5, 25, 50, 75)


class Arm(NamedTuple):
    """One share of the knowledge."""

    dimension: str
    """depth, length, width, or joint: all three."""
    share: float
    """In per cent, of what there is."""
    keep: str | None
    """In the recipes' words; None: everything."""
    drawn: bool = False

    @property
    def name(self) -> str:
        return f"{self.dimension}-{self.share:g}{'-random' if self.drawn else ''}"


def arms(task: str) -> list[Arm]:
    """Both ends, then each dimension and all jointly. Numbers of layers and tokens are whole, so shares are near; of
    shares that come to the same, the largest stands."""
    tokens = MEAN_TOKENS[task]

    def length(share: float) -> int:
        return max(1, round(share / 100 * tokens))

    found = [Arm("none", 0, None), Arm("all", 100, None)]
    found += [Arm("depth", 100 * k / STATES, f"{k}l") for k in (1, 2, 3)]
    for drawn in (False, True):
        found += [Arm("length", share, f"{length(share)}t", drawn) for share in (1, 5, 25)]
        found += [Arm("width", share, f"{share / 100}h", drawn) for share in (1, 5, 25)]
        joint = {1: (1, 25, 0.16), 5: (1, 50, 0.4), 25: (2, 70, 0.7)}
        found += [Arm("joint", s, f"{k}l_{length(t)}t_{u}h", drawn) for s, (k, t, u) in joint.items()]
    return list({(arm.keep, arm.dimension, arm.drawn): arm for arm in found}.values())


def main() -> None:
    rows, file = study_of_tasks(__doc__, TASKS_HERE, ROWS, RUNS / "logs", steps, collected)
    for task, row in rows.items():
        show(task, row)
    draw(rows, file.with_name(PICTURE.name))


def collected(task: str) -> dict[str, Any]:
    figures = {arm.name: summaries(RUNS, task, arm.name) for arm in arms(task)}
    return {"teacher": summaries(RUNS, task, "teacher"), "arms": figures}


def steps(task: str, shared: Path) -> list[Step]:
    """Teacher; for every arm its cache, then its seeds."""
    setting, folder = SETTINGS[task], RUNS / task
    common = ["--task.name", task, "--task.path", str(shared / "data/glue" / setting.folder)]
    common += ["--task.max_length", str(LONGEST[task]), "--task.group_by_length", "true"]
    common += ["--run.directory", str(folder), "--checkpoint.every", "100000", "--validation.every", "100000"]
    if setting.examples:
        common += ["--task.train_examples", str(setting.examples)]
    teacher = folder / "teacher/seed_0"
    original = str(shared / "teacher/minilm-l6-mlm")
    flags = ["--recipe", "finetune", *common, "--run.name", "teacher", "--student.path", original, "--seeds", "0"]
    found = [Step(f"{task}/teacher", "finetune", flags, teacher / "summary.json")]
    for arm in arms(task):
        tokens, units = DRAWN if arm.drawn else CHOSEN
        flags = ["--recipe", "hsk_task", *common, "--run.name", arm.name, "--teacher.path", str(teacher / "student")]
        flags += ["--task.epochs", str(TASKS_HERE[task]), "--cache.path", str(folder / "caches" / arm.name)]
        flags += ["--data.mask_seed", "0", "--knowledge.tokens", tokens, "--knowledge.units", units]
        flags += ["--knowledge.keep", arm.keep or "none"]
        flags += ["--objective.hidden.weight", "0", "--objective.kl.start", "0"] if arm.dimension == "none" else []
        cache = Step(f"{task}/{arm.name}/cache", "cache_teacher", flags, folder / "caches" / arm.name / "manifest.json",
                     (f"{task}/teacher",))  # fmt: skip
        seeds = ["--seeds", ",".join(map(str, SEEDS))]
        result = folder / arm.name / f"seed_{SEEDS[-1]}/summary.json"
        found += [cache, Step(f"{task}/{arm.name}", "finetune", [*flags, *seeds], result, (cache.name,))]
    return found


def show(task: str, row: dict[str, Any]) -> None:
    """Means and deviations; and what is lost against everything, paired seed by seed, with 95 % intervals."""
    console, metric = Console(width=150), TASKS[task].metrics[0]
    columns = (metric, *MEASURES)
    table = Table("arm", "seeds", *columns, "loss - all", "KL - all", title=f"{task}, {row['device']}, {row['commit']}")
    whole = row["arms"]["all-100"]
    for name, seeds in row["arms"].items():
        cells = [spread([seed[key] for seed in seeds.values()]) for key in columns]
        for key in MEASURES:
            both = sorted(seeds.keys() & whole.keys())
            differences = [seeds[seed][key] - whole[seed][key] for seed in both]
            enough = len(differences) > 1 and name != "all-100"
            cells.append("{:+.4f} ± {:.4f}".format(*interval(differences)) if enough else "")
        table.add_row(name, str(len(seeds)), *cells)
    console.print(table)


def draw(rows: dict[str, Any], picture: Path) -> None:
    """KL to the teacher over the share of its hidden states, dimension by dimension, as a PNG file."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for panel, (task, row) in zip(panels, rows.items(), strict=True):
        for colour, dimension in enumerate(("depth", "length", "width", "joint")):
            for drawn in (False, True):
                here = [arm for arm in arms(task) if (arm.dimension, arm.drawn) == (dimension, drawn)]
                points = [arm for arm in here if row["arms"][arm.name]]
                if not points:
                    continue
                heights = [[s["kl"] for s in row["arms"][arm.name].values()] for arm in points]
                means = [sum(height) / len(height) for height in heights]
                style = {"linestyle": ":" if drawn else "-", "marker": "o", "color": f"C{colour}"}
                label = f"{dimension}, drawn" if drawn else dimension
                panel.plot([arm.share for arm in points], means, label=label, **style)
        for end in ("none-0", "all-100"):
            values = [seed["kl"] for seed in row["arms"][end].values()]
            if values:
                label, line = ("predictions alone", "--") if end == "none-0" else ("everything", "-")
                panel.axhline(sum(values) / len(values), color="grey", linestyle=line, label=label)
        panel.set(title=task, xscale="log", xlabel="% of the hidden states", ylabel="KL to the teacher, nats")
        panel.set_xticks(TICKS, map(str, TICKS))
        panel.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main()
