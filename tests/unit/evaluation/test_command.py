"""`homodistil evaluate`: which flags go together, what is refused, what is printed and kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest

from homodistil.cli import main
from homodistil.config import TaskConfig
from homodistil.evaluation.command import MEASURES, Evaluate, table
from homodistil.tasks import TASKS
from tests.fixtures import save_bert, save_shards
from tests.unit.evaluation.tiny_gpt2 import TEXT, save_gpt2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, shards and text."""
    folder = tmp_path_factory.mktemp("place")
    save_bert(folder / "bert")
    save_gpt2(folder / "gpt2")
    save_shards(folder / "shards")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"text": "The sea is cold"}\n{"text": "A lobster"}\n', encoding="utf-8")
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def printed(capsys: pytest.CaptureFixture[str], command: str) -> dict[str, str]:
    """What a command prints, by the name at the beginning of each line."""
    main(["evaluate", *command.split()])
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.split()}


def refusal(capsys: pytest.CaptureFixture[str], command: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *command.split()])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "figures"),
    [
        ("--task mlm --model bert --data.shards shards --sequences 5", {"mlm_loss", "mlm_accuracy"}),
        ("--task pseudo_perplexity --model bert --data.shards shards --sequences 2", {"pseudo_perplexity"}),
        ("--task pseudo_perplexity --model bert --data.path text.txt --sequences 2", {"pseudo_perplexity"}),
        ("--task perplexity --model gpt2 --data.path text.txt --perplexity.detokenize", {"word_perplexity"}),
        ("--task lambada --model gpt2 --data.path rows.jsonl --dtype bfloat16", {"lambada_accuracy"}),
    ],
)
def test_every_measure_runs_from_its_flags_and_prints_its_figures(
    command: str, figures: set[str], here: Path, capsys: Any
) -> None:
    shown = printed(capsys, command)
    assert figures <= shown.keys()
    assert all(float(shown[name].replace(",", "")) >= 0 for name in figures)


def test_limits_on_rows_and_windows_arrive(here: Path, capsys: Any) -> None:
    shown = printed(capsys, "--task lambada --model gpt2 --data.path rows.jsonl --sequences 1")
    assert shown["examples"] == "1"
    flags = "--perplexity.window 12 --perplexity.stride 4"
    main(["evaluate", *f"--task perplexity --model gpt2 --data.path text.txt {flags}".split()])
    assert "Windows of 12 tokens, stride 4," in " ".join(capsys.readouterr().out.split())


def test_figures_are_kept_as_json_with_what_was_measured(here: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "figures.json"
    shown = printed(capsys, f"--task perplexity --model gpt2 --data.path text.txt --output {file}")
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert (kept["task"], kept["model"], kept["data.path"]) == ("perplexity", "gpt2", "text.txt")
    assert kept["perplexity.detokenize"] is False
    assert "data.shards" not in kept
    assert f"{kept['word_perplexity']:,.4f}" == shown["word_perplexity"]
    assert "Words are those of the source" in kept["convention"]


def test_a_benchmark_gets_the_settings_of_its_training(
    here: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, Any] = {}

    def evaluate_task(model: Path, config: TaskConfig, micro_batch: int, dtype: str) -> SimpleNamespace:
        calls.update(model=model, config=config, micro_batch=micro_batch, dtype=dtype)
        metrics = {"f1": 81.25, "exact_match": 70.5}
        return SimpleNamespace(metrics=metrics, loss=0.5, examples=1234, examples_per_second=9.0, predictions={})

    stand_in = ModuleType("homodistil.evaluation.tasks")
    stand_in.evaluate_task = evaluate_task  # type: ignore[attr-defined]
    stand_in.save_predictions = lambda result, path: path.write_text("saved")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "homodistil.evaluation.tasks", stand_in)
    limits = f"--data.max_length 384 --data.stride 64 --micro_batch 7 --predictions {tmp_path / 'answers.json'}"
    shown = printed(capsys, f"--task squad2 --model bert --data.path shards {limits}")

    config = calls["config"]
    assert (calls["model"], calls["micro_batch"], calls["dtype"]) == (Path("bert"), 7, "float32")
    assert (config.name, config.path, config.max_length, config.stride) == ("squad2", Path("shards"), 384, 64)
    assert list(shown.items())[:3] == [("f1", "81.2500"), ("exact_match", "70.5000"), ("loss", "0.5000")]
    assert shown["examples"] == "1,234"
    assert (tmp_path / "answers.json").read_text() == "saved"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--task mlm --model bert", "found neither --data.shards nor --data.path, expected --data.shards"),
        ("--task lambada --model gpt2", "neither --data.shards nor --data.path, expected --data.path, a .jsonl file"),
        (
            "--task pseudo_perplexity --model bert --data.shards shards --data.path text.txt",
            "found both --data.shards and --data.path, expected either",
        ),
        (
            "--task perplexity --model gpt2 --data.shards shards",
            "--data.shards shards: --task perplexity has no use for it, only mlm, pseudo_perplexity.",
        ),
        ("--task mlm --model bert --data.shards shards --perplexity.stride 3", "--perplexity.stride 3: --task mlm has"),
        ("--task mrpc --model bert --sequences 3", "--sequences 3: --task mrpc has no use for it"),
        ("--task mrpc --model bert --data.stride 3", "no use for it, only squad, squad2."),
        ("--task lambada --model gpt2 --data.path rows.jsonl --predictions p", "--predictions p: --task lambada has"),
        ("--task perplexity --model gpt2 --data.path gone.txt", "--data.path gone.txt: no such file or folder."),
        ("--task perplexity --model gpt2 --data.path wikipedias", "--data.path wikipedias: no such file or folder."),
        ("--task perplexity --model gone --data.path text.txt", "--model gone: no such folder"),
        ("--task lambada --model gpt2 --data.path text.txt", "--data.path text.txt: a text file, expected a .jsonl"),
        ("--task mlm --model bert --data.shards shards --output gone/o.json", "--output gone/o.json: expected a file"),
        ("--task lambda --model gpt2", "--task on the command line"),
        ("--task perplexity --model bert --data.path text.txt", "expected a causal language model, found masked"),
        ("--task mlm --model gpt2 --data.shards shards", "expected a masked language model, found causal"),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_flag(command: str, words: str, here: Path, capsys: Any) -> None:
    assert words in refusal(capsys, command)


@pytest.mark.parametrize("name", ["wikipedia", "openwebtext:somewhere/else", "hf:some/name", "embedded"])
def test_a_source_that_has_a_name_is_no_missing_file(name: str, here: Path, capsys: Any) -> None:
    assert "--model gone: no such folder" in refusal(capsys, f"--task perplexity --model gone --data.path {name}")


def test_the_models_kind_is_looked_at_before_the_text(here: Path, capsys: Any) -> None:
    (here / "empty.txt").write_text("")
    assert "expected a causal" in refusal(capsys, "--task perplexity --model bert --data.path empty.txt")


def test_every_task_that_can_be_named_is_measured_and_every_benchmark_can_be_named() -> None:
    named = set(get_args(Evaluate.model_fields["task"].annotation))
    assert named == MEASURES.keys()
    assert {task.name for task in TASKS.values() if not task.is_language_modeling} <= named


def test_a_flag_that_a_measure_has_a_use_for_exists() -> None:
    sections = {"data", "perplexity"}
    known = set(Evaluate.model_fields)
    for section in sections:
        annotation: Any = Evaluate.model_fields[section].annotation
        known |= {f"{section}.{name}" for name in annotation.model_fields}
    assert {flag for measure in MEASURES.values() for flag in measure.flags} <= known - sections


def test_figures_stand_in_columns_and_words_below_them() -> None:
    lines = table({"a": 1.5, "longer_name": 12345, "why": "word " * 30}).splitlines()
    assert lines[0].split() == ["a", "1.5000"]
    assert lines[1].split() == ["longer_name", "12,345"]
    assert len(lines[0]) == len(lines[1])
    assert lines[2].startswith("why: word")
    assert len(lines) > 3 and all(len(line) <= 100 for line in lines)


def test_help_teaches_every_flag_without_loading_torch() -> None:
    program = "import sys; from homodistil.cli import main\ntry: main(['evaluate', '--help'])\n"
    program += "finally: assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for flag in ("--task", "--data.path", "--perplexity.detokenize", "--output", "--predictions"):
        assert flag in run.stdout
    assert "pseudo_perplexity" in run.stdout
