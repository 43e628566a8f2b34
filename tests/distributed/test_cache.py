"""A run from a cache is the run beside its teacher: bit for bit where nothing is compressed, else near it."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from homodistil.errors import CheckpointError
from tests import fixtures, runs
from tests.distributed.test_families import save_teacher
from tests.stages import slow
from tests.unit.data.small_tasks import write_glue, write_squad
from tests.unit.evaluation.test_tasks import save_task_model

EXACT = {"values": "fp32", "logits": "states"}
LANGUAGE = {
    "objective__attention": {"weight": 0},
    "data__global_batch": 16,
    "data__micro_batch": 4,
    "data__maskings": 2,
    "checkpoint__every": runs.UPDATES,
    "validation__every": runs.UPDATES,
}
"""Of 96 sequences an epoch takes 6 updates: the first masking comes again in the third."""
JOINT = {"knowledge__keep": "2l_5t_0.2h", "knowledge__units": "magnitude"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare(tmp_path_factory.mktemp("cache"))


def configured(folder: Path, name: str, cached: str | None = None, kind: dict[str, Any] = EXACT, **changes: Any) -> Any:
    """Of a run; cached: the name of its cache, none for a live teacher."""
    values = runs.configuration(folder, name, **{**LANGUAGE, **changes})
    return values if cached is None else {**values, "cache": {"path": str(folder / cached), **kind}}


@pytest.fixture(scope="module")
def everything(folder: Path, pool: Any) -> str:
    """A cache that leaves nothing out."""
    pool(1).run(runs.record, configured(folder, "everything", "cache-everything"), folder)
    return "cache-everything"


@pytest.fixture(scope="module")
def joint(folder: Path, pool: Any) -> str:
    """A cache of two states, five tokens, a fifth of the units: for any aligner, whatever becomes of other units."""
    pool(1).run(runs.record, configured(folder, "joint", "cache-joint", **JOINT), folder)
    return "cache-joint"


@pytest.fixture(scope="module")
def outcome(folder: Path, pool: Any) -> Any:
    """`outcome(name, ranks)` after `run(name, values, ranks)`."""

    @cache
    def run(name: str, cached: str | None, changes: str = "{}", ranks: int = 1) -> str:
        values = configured(folder, name, cached, **json.loads(changes))
        pool(ranks).run(runs.execute, values, folder, 2)
        return name

    return lambda name, cached=None, ranks=1, **changes: run(name, cached, json.dumps(changes), ranks)


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / name / "student" / "model.safetensors")


def summary(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs" / name / "summary.json").read_text())
    return found


def assert_same(folder: Path, ours: str, theirs: str) -> None:
    assert len(runs.losses(folder, ours)) >= 6
    assert runs.losses(folder, ours) == runs.losses(folder, theirs)
    assert runs.kept(folder, ours) == runs.kept(folder, theirs)
    one, other = weights(folder, ours), weights(folder, theirs)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    kls = [summary(folder, name)["validation"]["kl"] for name in (ours, theirs)]
    assert kls[0] == kls[1] > 0


def assert_near(folder: Path, ours: str, theirs: str, rel: float, updates: int = runs.UPDATES) -> None:
    expected = runs.losses(folder, theirs)
    for update in range(1, updates + 1):
        assert runs.losses(folder, ours)[update] == pytest.approx(expected[update], rel=rel, abs=1e-6), update


def test_with_everything_kept_a_shrinking_student_cannot_tell(folder: Path, outcome: Any, everything: str) -> None:
    assert_same(folder, outcome("cached", everything), outcome("live"))
    teachers = [summary(folder, name)["teacher"] for name in ("cached", "live")]
    assert teachers[0] == teachers[1]


ALIGNED = {
    "projection": {},
    "indexed": {"objective__hidden": {"aligner": "indexed"}},
    "zero": {"knowledge__left_out": "zero"},
    "indexed_zero": {"objective__hidden": {"aligner": "indexed"}, "knowledge__left_out": "zero"},
}


@pytest.mark.parametrize("kind", [slow("projection"), slow("indexed"), slow("zero"), "indexed_zero"])
def test_one_cache_of_a_joint_selection_serves_every_aligner_bit_for_bit(
    folder: Path, outcome: Any, joint: str, kind: str
) -> None:
    changes = {**JOINT, **ALIGNED[kind]}
    assert_same(folder, outcome(f"cached-{kind}", joint, **changes), outcome(f"live-{kind}", **changes))


def test_another_micro_batch_than_the_cache_was_written_with_changes_only_the_last_digits(
    folder: Path, outcome: Any, joint: str
) -> None:
    live, cached = outcome("live-projection", **JOINT), outcome("cached-micro-8", joint, **JOINT, data__micro_batch=8)
    assert_near(folder, cached, live, rel=1e-6, updates=1)
    assert_near(folder, cached, live, rel=5e-4)
    assert runs.kept(folder, cached) == runs.kept(folder, live)


def test_two_ranks_from_a_cache_do_as_one(folder: Path, outcome: Any, joint: str) -> None:
    one, two = outcome("cached-projection", joint, **JOINT), outcome("cached-2-ranks", joint, ranks=2, **JOINT)
    assert_near(folder, two, one, rel=5e-4)
    assert runs.kept(folder, two) == runs.kept(folder, one)


def arrays(path: Path) -> dict[str, Any]:
    """Member -> array, of all a cache's files, by webdataset itself."""
    import webdataset as wds

    found = {}
    for file in sorted(path.glob("*.tar")):
        for sample in wds.WebDataset(str(file), shardshuffle=False).decode():
            found |= {f"{sample['__key__']}.{k}": v for k, v in sample.items() if k.endswith("npy")}
    return found


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.name != "lock"}


def test_files_are_the_same_whoever_wrote_them(folder: Path, pool: Any, joint: str) -> None:
    for name, sharding in (("replicated", "replicated"), ("sharded", "zero3")):
        values = configured(folder, name, f"cache-{name}", **JOINT, teacher__sharding=sharding)
        pool(2).run(runs.record, values, folder)
    assert contents(folder / "cache-replicated") == contents(folder / joint)
    sharded, whole = (arrays(folder / name) for name in ("cache-sharded", joint))
    assert sharded.keys() == whole.keys() and len(whole) > 50
    for name, array in whole.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(sharded[name], array, rtol=1e-6, atol=1e-5)
        else:
            assert np.array_equal(sharded[name], array), name


def test_a_killed_run_goes_on_bit_for_bit_from_a_cache_that_was_moved(
    folder: Path, pool: Any, outcome: Any, joint: str
) -> None:
    values = configured(folder, "cut", joint, **JOINT, checkpoint__every=2)
    pool(1).run(runs.execute, values, folder, 2, ("between_backward_and_step", 9))  # in the midst of an epoch
    live = {**values, "cache": {**values["cache"], "path": None}}
    with pytest.raises(CheckpointError, match="knowledge was 'cached' and is None"):
        pool(1).run(runs.execute, live, folder, 2)
    shutil.copytree(folder / joint, folder / "elsewhere")
    for path in (folder / "elsewhere").iterdir():
        path.chmod(0o400)
    (folder / "elsewhere").chmod(0o500)
    try:
        pool(1).run(runs.execute, configured(folder, "cut", "elsewhere", **JOINT, checkpoint__every=2), folder, 2)
    finally:
        (folder / "elsewhere").chmod(0o700)
    assert contents(folder / "elsewhere") == contents(folder / joint)
    assert_same(folder, "cut", outcome("cached-projection", joint, **JOINT))


def maskings_seen(values: dict[str, Any], folder: Path) -> list[tuple[int, dict[int, list[int]]]]:
    """In a rank: of every update, the masking and the masked inputs by number."""
    from homodistil.opening import open_teacher_and_stream
    from homodistil.ranks import Ranks

    plan, settings = runs.planned(values, folder, 2)
    _, stream = open_teacher_and_stream(plan, settings, Ranks.current())
    return [
        (batch.masking, dict(zip(batch.samples.tolist(), batch.input_ids.tolist(), strict=True)))
        for _, batch in stream.updates(0, runs.UPDATES)
        if batch.recorded
    ]


def test_an_epoch_reads_the_masking_of_its_number_modulo_their_count(folder: Path, pool: Any, everything: str) -> None:
    (seen,) = pool(1).run(maskings_seen, configured(folder, "seen", everything), folder)
    assert [masking for masking, _ in seen] == [0] * 6 + [1] * 6 + [0] * 4
    first, second, third = ({n: ids for _, rows in seen[a:b] for n, ids in rows.items()} for a, b in EPOCHS)
    assert sorted(first) == sorted(second) == list(range(96))
    assert all(first[number] == ids for number, ids in third.items())
    assert sum(first[number] == ids for number, ids in second.items()) < 10


EPOCHS = ((0, 6), (6, 12), (12, 16))

COMPRESSED = {
    "top_k": {"values": "int8", "logits": "top_k", "top_k": fixtures.VOCABULARY},
    "draws": {"values": "fp16", "logits": "draws", "draws": 1000},
}
"""Of a teacher that never learned anything, few words say little."""
SHORT = {"run__updates": 8}


@pytest.mark.parametrize("kind", [slow("top_k"), "draws"])
def test_a_compressed_cache_comes_near_the_live_teacher(folder: Path, pool: Any, outcome: Any, kind: str) -> None:
    settings = configured(folder, kind, f"cache-{kind}", COMPRESSED[kind], **JOINT, **SHORT)
    pool(1).run(runs.record, settings, folder)
    pool(1).run(runs.execute, settings, folder, 2)
    live = runs.losses(folder, outcome("live-short", **JOINT, **SHORT))
    for update, losses in runs.losses(folder, kind).items():
        assert losses == pytest.approx(live[update], rel=0.15, abs=0.005), update
    ours, theirs = (summary(folder, name)["validation"] for name in (kind, "live-short"))
    assert ours["kl"] == pytest.approx(theirs["kl"], rel=0.15)  # held-out text is measured exactly
    assert ours["teacher"]["mlm_loss"] == theirs["teacher"]["mlm_loss"]


@pytest.mark.parametrize("keep", [None, slow("3t_0.5h")])
def test_a_causal_teacher_can_be_cached(pool: Any, tmp_path: Path, keep: str | None) -> None:
    folder = runs.prepare(tmp_path)
    save_teacher(folder / "teacher", fixtures.gpt2())
    index = fixtures.save_shards(folder / "shards", shards=8)
    index.task, index.special_tokens.eos = "clm", fixtures.SEP
    index.save(folder / "shards")
    changes = {"task__name": "clm", "knowledge__keep": keep, "data__maskings": 1, **SHORT}
    cached, live = configured(folder, "cached", "cache", **changes), configured(folder, "live", **changes)
    pool(1).run(runs.record, cached, folder)
    for values in (cached, live):
        pool(1).run(runs.execute, values, folder, 2)
    assert_same(folder, "cached", "live")


@pytest.mark.slow
def test_a_teacher_with_disentangled_attention_can_be_cached(pool: Any, tmp_path: Path) -> None:
    folder = runs.prepare(tmp_path)
    save_teacher(folder / "teacher", fixtures.deberta())
    cached, live = configured(folder, "cached", "cache", **JOINT), configured(folder, "live", **JOINT)
    pool(1).run(runs.record, cached, folder)
    for values in (cached, live):
        pool(1).run(runs.execute, values, folder, 2)
    assert_same(folder, "cached", "live")


def benchmark(folder: Path, name: str) -> dict[str, Any]:
    """A benchmark's files, a teacher with its head, and a tokenizer whose padding has another id than 0."""
    runs.prepare(folder)
    write_squad(folder / name, impossible=True) if name == "squad2" else write_glue(folder / name, name)
    shutil.rmtree(folder / "teacher")
    save_task_model(folder / "teacher", name)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.pad_token = "[UNK]"
    tokenizer.save_pretrained(folder / "teacher")
    lengths = {"task__max_length": 40, "task__stride": 8} if name == "squad2" else {"task__max_length": 24}
    return {"task__name": name, "task__path": str(folder / name), **lengths, "data__global_batch": 4}


TASKS = [
    ("mrpc", "12t_0.3h"),  # more tokens than most sentences have
    slow("mrpc", None),
    slow("stsb", "12t_0.3h"),
    slow("squad2", "12t_0.3h"),
    slow("squad2", None),
]


@pytest.mark.parametrize(("name", "keep"), TASKS)
def test_a_benchmarks_teacher_can_be_cached_narrower_and_wider_than_it_is_read(
    pool: Any, tmp_path: Path, name: str, keep: str | None
) -> None:
    changes = {**benchmark(tmp_path, name), "knowledge__keep": keep, **SHORT}
    live = configured(tmp_path, "live", **changes)
    pool(1).run(runs.execute, live, tmp_path, 2)
    for written in (1, 26):  # each as wide as it is itself; all as wide as the longest
        cached = configured(tmp_path, f"cached-{written}", f"cache-{written}", **changes)
        pool(1).run(runs.record, {**cached, "data": {**cached["data"], "micro_batch": written}}, tmp_path)
        pool(1).run(runs.execute, cached, tmp_path, 2)
        assert_near(tmp_path, f"cached-{written}", "live", rel=1e-5, updates=2)
        assert_near(tmp_path, f"cached-{written}", "live", rel=2e-3, updates=8)
        assert runs.kept(tmp_path, f"cached-{written}") == runs.kept(tmp_path, "live")
