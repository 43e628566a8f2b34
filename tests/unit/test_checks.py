"""What TED, fine-tuning and other starts than the teacher's cannot do is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from homodistil.config import RunConfig
from homodistil.data.shards import ShardIndex
from homodistil.ds_config import DeepSpeedConfig
from homodistil.errors import ConfigError, HomodistilError, ModelError
from homodistil.finetune import finetune
from homodistil.knowledge.filters import FilterDescription, save_filters
from homodistil.models.loading import load_config, load_model, model_hash
from homodistil.opening import provide_data
from homodistil.run_plan import draw_blueprint, plan_run
from homodistil.stage_one import stage_one
from homodistil.tasks import TASKS
from tests import fixtures
from tests.fixtures import SilentRanks

ZERO2 = Path(__file__).parents[2] / "ds_configs" / "zero2.json"
ALONE = SilentRanks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of four layers; students of two, as wide and narrower; shards; RTE's files."""
    folder = tmp_path_factory.mktemp("checks")
    fixtures.save_bert(folder / "teacher", num_hidden_layers=4)
    fixtures.save_bert(folder / "student", seed=1, num_hidden_layers=2)
    fixtures.save_bert(folder / "narrow", seed=2, num_hidden_layers=2, hidden_size=42)
    fixtures.save_shards(folder / "shards")
    (folder / "RTE").mkdir()
    for name in ("train", "dev"):
        rows = [f"{n}\tw{n + 5} w9\tw8 w{n + 6}\t{'entailment' if n % 2 else 'not_entailment'}" for n in range(8)]
        (folder / "RTE" / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    return folder


def save_some(directory: Path, model: Path, layers: list[int], width: int = 72, task: str = "mlm") -> Path:
    weights = {
        f"{k}.linear.{n}": torch.ones(72, width) if n == "weight" else torch.ones(72) for k in layers for n in NAMES
    }
    values = {"model": str(model), "model_sha256": model_hash(model), "task": task, "layers": layers}
    return save_filters(directory, weights, FilterDescription(**values, width_in=width, width_out=72))


NAMES = ("weight", "bias")
FILTERED = {"hidden": {"aligner": "filter"}, "attention": {"weight": 0}}
RANDOM = {"hidden": {"projection_init": "random"}, "attention": {"weight": 0}}


def run_config(folder: Path, **sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "run": {"directory": str(folder / "runs")},
        "teacher": {"path": str(folder / "teacher")},
        "student": {"path": str(folder / "student")},
        "data": {"shards": str(folder / "shards"), "global_batch": 8, "micro_batch": 2, "lanes": 4},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return RunConfig.model_validate(values)


def planned(folder: Path, **sections: Any) -> Any:
    run = run_config(folder, **sections).with_filter_folders()
    return plan_run(run, provide_data(run, ALONE), DeepSpeedConfig.load(ZERO2), 1)


def refused(kind: type[HomodistilError], words: list[str], folder: Path, **sections: Any) -> None:
    with pytest.raises(kind) as caught:
        planned(folder, **sections)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_student_of_its_own_is_compared_with_evenly_spaced_layers(folder: Path) -> None:
    plan = planned(folder, objective=RANDOM)
    assert (plan.blueprint.compared.student, plan.blueprint.compared.teacher) == ((0, 1), (1, 3))
    last = planned(folder, objective=RANDOM, knowledge={"interval": 2})
    assert (last.blueprint.compared.student, last.blueprint.compared.teacher) == ((1,), (3,))


def test_filters_of_both_models_are_found_where_stage_one_leaves_them(folder: Path) -> None:
    run = run_config(folder, objective=FILTERED, run={"directory": str(folder / "found"), "name": "mine"})
    for of, layers in (("teacher", [1, 3]), ("student", [0, 1])):
        first = stage_one(run, of, draw_blueprint(run, fixtures.VOCABULARY))  # type: ignore[arg-type]
        assert first.filters.layers == layers
        save_some(first.run.path / "filters", folder / of, layers)
    plan = planned(folder, objective=FILTERED, run={"directory": str(folder / "found"), "name": "mine"})
    assert str(plan.run.student.filters).endswith("mine-student_filters/filters")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"knowledge": {"interval": 3}}, ["knowledge.interval", "3 does not fit", "2 layers", "[1, 2]"]),
        ({"knowledge": {"interval": 5}}, ["knowledge.interval", "[1, 2]"]),
        ({"knowledge": {"top": 0.2}, "objective": FILTERED}, ["knowledge.top", "no filters", "knowledge.interval"]),
        (
            {"knowledge": {"top": 0.2}, "objective": {"hidden": {"projection_init": "random"}}},
            ["knowledge.top", "no attention"],
        ),
        ({"student": {"init": "random"}}, ["student.init is random", "student.path"]),
        ({"student": {"config": {"hidden_size": 4}}}, ["student.config", "made from nothing"]),
        ({"objective": {"hidden": {"aligner": "indexed"}}}, ["indexed", "student.path", "none of the teacher's"]),
        ({"objective": FILTERED}, ["teacher_filters", "no filters", "learn_filters.py"]),
        ({"task": {"name": "clm"}}, ["task.name is clm", "built for mlm", "--task clm"]),
        ({"task": {"name": "rte"}, "teacher": {"path": None}, "student": {"path": None}}, ["no model", "student.path"]),
    ],
)
def test_a_run_that_contradicts_itself_is_refused(folder: Path, sections: dict[str, Any], words: list[str]) -> None:
    refused(HomodistilError, words, folder, **sections)


def test_the_lowest_layer_may_be_compared_with_the_teachers_embeddings(folder: Path) -> None:
    plan = planned(folder, objective=RANDOM, knowledge={"top": 0.2})
    assert plan.blueprint.compared.teacher[0] == -1  # the state below its first layer


def test_a_run_in_a_folder_of_its_own_finds_its_filters(folder: Path) -> None:
    run = run_config(folder, objective=FILTERED, run={"name": "mine/first"})
    first = stage_one(run, "teacher", draw_blueprint(run, fixtures.VOCABULARY))
    assert first.run.path / "filters" == run.with_filter_folders().teacher.filters


def test_a_narrower_student_has_neither_identity_nor_the_teachers_heads(folder: Path) -> None:
    narrow = {"path": str(folder / "narrow")}
    no_attention = {"attention": {"weight": 0}}
    refused(ConfigError, ["identity", "42 wide", "72"], folder, student=narrow, objective=no_attention)
    random = {"hidden": {"projection_init": "random"}}
    refused(
        ConfigError, ["objective.attention.weight", "6 heads of 7", "6 of 12"], folder, student=narrow, objective=random
    )


def test_filters_of_another_model_task_layer_or_width_are_refused(folder: Path, tmp_path: Path) -> None:
    good = save_some(tmp_path / "good", folder / "student", [0, 1])
    cases = {
        "other weights": (folder / "student", [1, 3], 72, "mlm"),
        "for the task rte": (folder / "teacher", [1, 3], 72, "rte"),
        "layers [3] are compared": (folder / "teacher", [1, 2], 72, "mlm"),
        "maps 42 dimensions to 72": (folder / "teacher", [1, 3], 42, "mlm"),
    }
    for number, (words, (model, layers, width, task)) in enumerate(cases.items()):
        bad = save_some(tmp_path / str(number), model, layers, width, task)
        sections = {"teacher": {"filters": bad}, "student": {"filters": good}}
        refused(ModelError, ["teacher.filters", words, "learn_filters.py"], folder, objective=FILTERED, **sections)


def test_damaged_filters_are_refused(folder: Path, tmp_path: Path) -> None:
    for number, damage in enumerate(("filters.json", "filters.safetensors")):
        broken = save_some(tmp_path / str(number), folder / "teacher", [1, 3])
        (broken / damage).write_bytes(b"{")
        refused(ModelError, [str(broken), "cannot be read"], folder, objective=FILTERED, teacher={"filters": broken})


def test_the_filters_of_a_student_without_a_model_cannot_be_learned(folder: Path) -> None:
    run = run_config(folder, student={"path": None, "layers": [1, 3]}, objective=FILTERED)
    with pytest.raises(ConfigError, match=r"no student\.path"):
        stage_one(run, "student", draw_blueprint(run, fixtures.VOCABULARY))
    alone = run_config(folder, teacher={"path": None})
    with pytest.raises(ConfigError, match=r"no teacher\.path"):
        stage_one(alone, "teacher", draw_blueprint(alone, fixtures.VOCABULARY))


def test_shards_built_for_another_task_are_refused(folder: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(folder / "shards")
    index.task, index.special_tokens.eos = "clm", fixtures.SEP
    run = run_config(folder)
    with pytest.raises(ConfigError, match="built for clm"):
        plan_run(run, index, DeepSpeedConfig.load(ZERO2), 1)


def test_fine_tuning_is_for_benchmarks_and_for_seeds_that_differ(folder: Path) -> None:
    config = DeepSpeedConfig.load(ZERO2)
    with pytest.raises(ConfigError, match=r"pretrain\.py"):
        finetune(run_config(folder), [0], config, config)
    task = run_config(folder, task={"name": "rte", "path": str(folder / "RTE")})
    for seeds in ([], [1, 1]):
        with pytest.raises(ConfigError, match="each once"):
            finetune(task, seeds, config, config)


def test_an_unknown_task_is_refused_by_name(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("task: {name: mrcp}\n")
    with pytest.raises(ConfigError, match=r"task\.name.*mrpc"):
        RunConfig.load(str(recipe))


def test_a_new_task_brings_a_new_head_for_a_student_never_for_a_teacher(folder: Path) -> None:
    task = TASKS["rte"]
    with pytest.raises(ModelError, match=r"classifier\.weight.*is missing.*classifier's head"):
        load_model(folder / "teacher", torch.float32, task=task)
    model = load_model(folder / "student", torch.float32, task=task, new_head=True)
    assert isinstance(model, BertForSequenceClassification) and model.config.num_labels == 2
    stock = BertForMaskedLM.from_pretrained(folder / "student")
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, stock.bert.embeddings.word_embeddings.weight)


def test_a_body_without_its_weights_is_refused_even_with_a_new_head(folder: Path, tmp_path: Path) -> None:
    config = fixtures.bert_config(num_hidden_layers=2)
    body = BertModel(config)
    del body.encoder.layer[1].output.dense
    body.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"layer\.1\.output\.dense\.weight.*missing"):
        load_model(tmp_path, torch.float32, task=TASKS["rte"], new_head=True)


@pytest.mark.parametrize("labels", [{0: "not_entailment", 1: "entailment"}, {0: "NOT_ENTAILMENT", 1: "ENTAILMENT"}])
def test_labels_in_another_order_are_refused(tmp_path: Path, labels: dict[int, str]) -> None:
    fixtures.bert_config(id2label=labels, label2id={v: k for k, v in labels.items()}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"in another|with this order"):
        load_config(tmp_path, TASKS["rte"])


def test_epochs_become_updates_that_see_every_example(folder: Path) -> None:
    task = {"name": "rte", "path": str(folder / "RTE"), "epochs": 3, "max_length": 64}
    sections = {"task": task, "data": {"global_batch": 5}}
    plan = planned(folder, **sections, teacher={"path": None}, objective=RANDOM)
    assert plan.run.run.updates == 5  # 24 examples in batches of 5
    assert plan.tokens_per_update == round(5 * plan.source.mean_length)


def test_an_example_longer_than_the_models_positions_is_refused(folder: Path) -> None:
    task = {"name": "rte", "path": str(folder / "RTE"), "max_length": 128}
    refused(ConfigError, ["task.max_length is 128", "64 positions"], folder, task=task, teacher={"path": None})
