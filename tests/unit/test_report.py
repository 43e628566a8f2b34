"""The report shows what logs, records and summary hold, needs nothing beside itself, and says what is missing."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from homodistil.cli import main
from homodistil.errors import DataError
from homodistil.models.shape import StudentShape, Widths
from homodistil.pruning.coordinator import PrunePlan, select
from homodistil.pruning.record import read_prune, record_prune
from homodistil.report import compare, pictures_of, write_report
from homodistil.report.history import History
from homodistil.report.units import _fates, fates
from homodistil.summary import RunSummary
from tests.unit.test_summary import FIGURES

POINTS: list[dict[str, Any]] = [
    {"update": 0, "shape/hidden": 8, "shape/ffn": 12, "shape/heads": 2, "shape/head_width": 4, "shape/parameters": 900},
    {"update": 10, "loss/total": 3.0, "loss/task": 3.0, "loss/kl": 0.0, "speed/tokens_per_second": 50.0},
    {"update": 10, "pruning/prune_jump": 0.125, "pruning/kl_before": 0.25, "pruning/kl_after": 0.375},
    {"update": 10, "shape/hidden": 6, "shape/ffn": 9, "shape/heads": 2, "shape/head_width": 3, "shape/parameters": 600},
    {"update": 16, "pruning/prune_jump": 0.25, "pruning/kl_before": 0.3125, "pruning/kl_after": 0.5625},
    {"update": 16, "shape/hidden": 2, "shape/ffn": 6, "shape/heads": 1, "shape/head_width": 2, "shape/parameters": 200},
    {"update": 20, "loss/total": None, "loss/task": 2.5, "loss/kl": 0.2, "memory/peak_bytes": 2.0**30},
    {"update": 20, "validation/kl": 0.625, "validation/student_loss": 3.5, "validation/student_accuracy": 0.35},
]
LADDER = [(10, Widths(6, 9, 2, 3)), (16, Widths(2, 6, 1, 2))]


class Group:
    """What `select` asks of a group."""

    def __init__(self, name: str) -> None:
        self.name = name
        found = re.match(r"(layers[.][0-9]+[.]heads)[.]([0-9]+)[.]", name)
        self.parent = None
        self.number = int(found[2]) if found else None
        self.above = found[1] if found else None


def narrowed(folder: Path) -> list[StudentShape]:
    """The shapes along LADDER, each prune recorded, units chosen by drawn scores."""
    draw = torch.Generator().manual_seed(3)
    shapes = [StudentShape.full(2, Widths(8, 12, 2, 4))]
    for update, widths in LADDER:
        before = shapes[-1]
        scores = {name: torch.rand(len(units), generator=draw).double() for name, units in before.kept.items()}
        groups: list[Any] = [Group(name) for name in before.kept]
        for group in groups:
            if group.above is not None:
                group.parent = (group.above, before.kept[group.above].index(group.number))
        kept = select(groups, scores, widths)
        record_prune(folder, PrunePlan(update, widths, kept, scores), before)
        shapes.append(before.narrowed(kept))
    return shapes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run <1>"
    directory.mkdir()
    RunSummary.model_validate(FIGURES).write(directory)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in POINTS))
    (directory / "run.yaml").write_text(yaml.safe_dump({"run": {"name": "run <1>", "updates": 40}}))
    narrowed(directory)
    return directory


def test_the_page_is_self_contained_and_holds_the_table(run: Path) -> None:
    page = write_report(run).read_text()
    assert (run / "report" / "discrepancy.png").read_bytes().startswith(b"\x89PNG")
    assert "<h1>run &lt;1&gt;</h1>" in page and "finished" in page
    assert "<td>student</td><td>500,000</td><td>3.500</td><td>35.0%</td><td>0.625</td>" in page
    assert "on 2 ranks (4 CPU cores), ZeRO-2" in page
    assert "25% of the teacher&#39;s parameters and keeps 88% of the teacher&#39;s" in page  # 3.6 of 4.1
    links = re.findall(r'(?:src|href)="([^"]*)', page)
    assert len(links) > 10 and all(link.startswith("data:") for link in links)


def test_the_figures_draw_the_logged_points(run: Path) -> None:
    history = History.read(run)
    assert history.curves["loss/total"].updates == [10]  # the other was not finite
    pictures = {picture.name: picture for picture in pictures_of([history])}
    top, middle = pictures["discrepancy"].figure.axes
    assert np.array_equal(top.lines[0].get_xydata(), [[20, 0.625]])
    assert np.array_equal(top.lines[1].get_xydata(), [[10, 0.25], [10, 0.375], [16, 0.3125], [16, 0.5625]])
    assert np.array_equal(middle.lines[0].get_xydata(), [[0, 1], [10, 6 / 8], [16, 2 / 8], [20, 2 / 8]])
    panels = pictures["losses"].figure.axes
    assert [axes.get_title(loc="left").split(":")[0] for axes in panels] == ["task", "kl"]
    assert np.array_equal(panels[1].lines[0].get_xydata(), [[10, 0.0], [20, 0.2]])
    memory = next(a for a in pictures["workings"].figure.axes if "memory" in a.get_title(loc="left"))
    assert np.array_equal(memory.lines[0].get_xydata(), [[20, 1.0]])


def test_numbers_within_the_page_are_those_of_the_log(run: Path) -> None:
    page = write_report(run).read_text()
    found = {}
    for name, data in re.findall(r'download="([^"]*)" href="data:text/csv;base64,([^"]*)"', page):
        text = base64.b64decode(data).decode()
        assert text == (run / "report" / name).read_text()
        found[name] = list(csv.DictReader(io.StringIO(text)))
    for name, tag in (
        ("discrepancy.csv", "pruning/prune_jump"),
        ("widths.csv", "shape/ffn"),
        ("losses.csv", "loss/kl"),
    ):
        seen = [(int(r["update"]), float(r["value"])) for r in found[name] if r["tag"] == tag]
        assert seen == [(point["update"], point[tag]) for point in POINTS if tag in point], tag


def test_a_record_tells_which_units_of_the_teacher_stayed(tmp_path: Path) -> None:
    shapes = narrowed(tmp_path)
    for (update, _), before, after in zip(LADDER, shapes, shapes[1:], strict=False):
        record = read_prune(tmp_path, update)
        assert record is not None and record.keys() == before.kept.keys()
        for name, units in before.kept.items():
            assert record[name].units.tolist() == list(units)
            assert record[name].units[record[name].kept].tolist() == list(after.kept.get(name, ()))
            left = record[name].scores[record[name].kept]
            assert not len(left) or left.min() >= record[name].scores[~record[name].kept].max(initial=-1)


def test_the_map_of_units_shows_when_each_went(run: Path) -> None:
    shapes = narrowed(run)
    history = History.read(run)
    for kind, groups in (("hidden", ["hidden"]), ("ffn", ["layers.0.ffn", "layers.1.ffn"])):
        fate = _fates(history, kind)
        for row, name in enumerate(groups):
            for unit in range(fate.shape[1]):
                gone = next(
                    (u for (u, _), s in zip(LADDER, shapes[1:], strict=True) if unit not in s.kept[name]), np.inf
                )
                assert fate[row, unit] == gone
    image = next(iter(fates(history, "").figure.axes)).images[0]  # of hidden, from above
    assert [bool(shade > image.norm.vmax) for shade in image.get_array()[0]] == [
        unit in shapes[-1].kept["hidden"] for unit in range(8)
    ]
    fate = _fates(history, "vo")
    assert fate.shape == (2, 2 * 4)
    for layer in range(2):
        for head in range(2):
            for unit in range(4):
                name = f"layers.{layer}.heads.{head}.vo"
                gone = next(
                    (u for (u, _), s in zip(LADDER, shapes[1:], strict=True) if unit not in s.kept.get(name, ())),
                    np.inf,
                )
                assert fate[layer, head * 4 + unit] == gone, (layer, head, unit)


def test_what_a_prune_took_is_relative_to_a_blind_one(run: Path) -> None:
    shape = narrowed(run)[0]
    picture = next(picture for picture in pictures_of([History.read(run)]) if picture.name == "importance")
    line = next(line for line in picture.figure.axes[0].lines if line.get_label() == "hidden")
    record = read_prune(run, 10)
    assert record is not None and len(shape.kept["hidden"]) == 8
    hidden = record["hidden"]
    share = hidden.scores[~hidden.kept].sum() / hidden.scores.sum() / (2 / 8)
    assert tuple(line.get_xydata()[0]) == pytest.approx((10, share))


def test_a_browser_of_a_phones_width_shows_it_all(run: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on PATH")
    page = tmp_path / "measured.html"
    measure = "document.title = [document.documentElement.scrollWidth, document.images.length, "
    measure += "[...document.images].filter(image => image.naturalWidth > 500).length].join(' ')"
    page.write_text(write_report(run).read_text().replace("</html>", f"<script>{measure}</script></html>"))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=500,900",
        f"--user-data-dir={tmp_path / 'me'}",
    ]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    width, images, drawn = map(int, found.groups())
    assert width <= 500 and images == drawn >= 6


def test_tensorboard_shows_figures_words_and_settings(run: Path) -> None:
    write_report(run)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    assert {"discrepancy", "widths", "losses", "units"} <= set(events.Tags()["images"])
    text = events.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "finished" in text and "| student | 500,000 | 3.500 |" in text
    plugins = events.PluginTagToContent("hparams")
    assert any(b"run.updates" in content for content in plugins.values())
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in POINTS[:4]))
    page = compare([run, other], tmp_path / "both").read_text()
    assert "run &lt;1&gt;, other" in page
    assert "<td>other</td><td>not finished: update 10</td><td>10</td><td>600</td>" in page
    assert "<td>run.updates</td><td>40</td><td></td>" in page
    assert page.count("<td>teacher</td>") == page.count("<td>unigram guess</td>") == 1
    rows = list(csv.DictReader((tmp_path / "both" / "widths.csv").open()))
    assert {row["run"] for row in rows} == {"run <1>", "other"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / "summary.json").unlink(), "not finished: update 20 of 40"),
        (lambda run: (run / "summary.json").write_text("{"), "summary.json cannot be read"),
        (lambda run: (run / "run.yaml").write_text("a: [1"), "run.yaml cannot be read"),
        (lambda run: (run / "run.yaml").unlink(), "run.yaml cannot be read"),
        (lambda run: (run / "prunes/00000016.safetensors").write_bytes(b"x" * 30), "after updates 16 are not recorded"),
        (lambda run: (run / "metrics.jsonl").open("a").write('{"update": 30, "loss/'), "1 of the log&#39;s lines"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "finished"),
    ],
)
def test_a_broken_or_unfinished_run_has_a_report_that_says_so(run: Path, damage: Any, said: str) -> None:
    damage(run)
    assert said in write_report(run).read_text()


def test_runs_of_one_name_and_other_teachers_stay_apart(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / run.name
    shutil.copytree(run, other)
    figures = json.loads(json.dumps(FIGURES))
    figures["validation"]["teacher"]["mlm_loss"] = 2.5
    RunSummary.model_validate(figures).write(other)
    page = compare([run, other, run], tmp_path / "both").read_text()
    rows = [html.unescape(name) for name in re.findall(r"<tr><td>([^<]*)</td>", page)]
    assert rows[:5] == ["teacher", f"teacher of {other}", str(run), str(other), "unigram guess"]


def test_a_stopped_run_says_how_it_ended(run: Path) -> None:
    stopped = RunSummary.model_validate({**FIGURES, "validation": None, "exit_status": 75})
    stopped.write(run)
    assert "preempted" in write_report(run).read_text()


def test_plain_training_has_a_report_too(run: Path) -> None:
    (run / "metrics.jsonl").write_text(json.dumps({"update": 10, "loss/total": 3.0, "loss/task": 3.0}) + "\n")
    assert write_report(run).is_file()


def test_the_command_names_the_page_and_refuses_what_is_no_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", str(run), str(run), "--output", str(tmp_path / "there")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "there/report.html")
    with pytest.raises(DataError, match=r"has no metrics\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "nowhere")])
    assert "there is no such folder" in capsys.readouterr().err
