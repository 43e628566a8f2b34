"""Caches of another run, damaged, half written or without room: refused by name before training, and mended as told."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from homodistil import cache_folder, cache_plan, caching
from homodistil.claim import Claim
from homodistil.config import RunConfig
from homodistil.data.records import RecordWriter
from homodistil.data.shards import ShardIndex
from homodistil.data.tokenizer import tokenizer_hash
from homodistil.ds_config import DeepSpeedConfig
from homodistil.errors import CacheError, ConfigError, DataError, ShardError
from homodistil.opening import open_teacher_and_stream
from homodistil.run_plan import plan_run
from tests import fixtures, processes, runs
from tests.faults.test_checkpoint_faults import edit, flip_a_bit, read_only_folder
from tests.stages import slow

ALONE = fixtures.SilentRanks(0, 1, 0, torch.device("cpu"))
CHANGES = {
    "objective__attention": {"weight": 0},
    "data__global_batch": 16,
    "data__micro_batch": 4,
    "data__maskings": 2,  # an epoch takes three updates
    "knowledge__keep": "2l_5t_0.2h",
    "checkpoint__every": runs.UPDATES,
    "run__updates": 8,
}
HEAD, BAD = "head.safetensors", "masking-0-00003.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.prepare(tmp_path_factory.mktemp("cache_faults"))
    fixtures.save_shards(folder / "shards", shards=4)
    record(configured(folder, folder / "cache"), folder)
    return folder


@pytest.fixture
def cache(folder: Path, tmp_path: Path) -> Path:
    """A copy of a complete cache, to damage."""
    shutil.copytree(folder / "cache", tmp_path / "cache")
    return tmp_path / "cache"


def configured(folder: Path, cache: Path, name: str = "run", **changes: Any) -> dict[str, Any]:
    values = runs.configuration(folder, name, **{**CHANGES, **changes})
    return {**values, "cache": {"path": str(cache), "values": "fp16", "logits": "top_k", **values.get("cache", {})}}


def planned(values: dict[str, Any], folder: Path, settings: str = "zero2.json") -> tuple[Any, DeepSpeedConfig]:
    run, student = RunConfig.model_validate(copy.deepcopy(values)), DeepSpeedConfig.load(folder / settings)
    index = ShardIndex.load(run.data.shards, check_files=False)
    return plan_run(run, index, student, 1), DeepSpeedConfig.load_teacher(folder / "teacher.json", student)


def record(values: dict[str, Any], folder: Path) -> None:
    """What cache_teacher.py does, in this process."""
    caching.record(*planned(values, folder), ALONE)


def opened(values: dict[str, Any], folder: Path, settings: str = "zero2.json") -> Any:
    """Teacher and stream of a run that would train now."""
    return open_teacher_and_stream(*planned(values, folder, settings), ALONE)


def contents(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.iterdir()) if path.name != "lock"}


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "mask_seed": ({"data__mask_seed": 5}, "data.mask_seed is 5, the cache's 0"),
    "seed": ({"run__seed": 5}, "data.mask_seed is 5, the cache's 0"),
    "mask_probability": ({"data__mask_probability": 0.2}, "data.mask_probability is 0.2, the cache's 0.15"),
    "tokens": ({"knowledge__keep": "2l_4t_0.2h"}, "knowledge.keep tokens is 4, the cache's 5"),
    "units": ({"knowledge__keep": "2l_5t"}, "knowledge.keep units is None, the cache's 0.2"),
    "states": ({"knowledge__keep": "1l_5t_0.2h"}, r"teacher's states is \[3\], the cache's \[2, 3\]"),
    "layers": ({"knowledge__layers": [0, 0, 2]}, r"teacher's states is \[1, 3\], the cache's \[2, 3\]"),
    "which_tokens": ({"knowledge__tokens": "left"}, "knowledge.tokens is 'left', the cache's 'attention_no_sep'"),
    "which_units": ({"knowledge__units": "uniform"}, "knowledge.units is 'uniform', the cache's 'magnitude'"),
    "temperature": ({"objective__kl": {"temperature": 3}}, "objective.kl.temperature is 3.0, the cache's 2.0"),
    "values": ({"cache__values": "int4"}, "cache.values is 'int4', the cache's 'fp16'"),
    "logits": ({"cache__logits": "draws"}, "cache.logits is 'draws', the cache's 'top_k'"),
    "top_k": ({"cache__top_k": 8}, "cache.top_k is 8, the cache's 32"),
}
MEND = r"Set it to what the cache has, or give another cache\.path and write that with cache_teacher\.py"


@pytest.mark.parametrize("other", OTHERS)
def test_a_run_that_asks_for_other_knowledge_is_refused_by_key_and_values(folder: Path, other: str) -> None:
    changes, words = OTHERS[other]
    values = configured(folder, folder / "cache", **changes)
    with pytest.raises(CacheError, match=f"cache: it holds other knowledge .*: {words}[.;].*{MEND}") as said:
        opened(values, folder)
    with pytest.raises(CacheError) as as_well:
        record(values, folder)  # nor is it written over
    assert str(as_well.value) == str(said.value)


def other_teacher(folder: Path) -> dict[str, Any]:
    return {"teacher__path": str(fixtures.save_bert(folder / "teacher", seed=1))}


def other_data(folder: Path) -> dict[str, Any]:
    fixtures.save_shards(folder / "shards", shards=4, seed=1)
    return {"data__shards": str(folder / "shards")}


def other_tokenizer(folder: Path) -> dict[str, Any]:
    """The same ids, of other pieces; a teacher that brings no tokenizer cannot tell."""
    index = fixtures.save_shards(folder / "shards", shards=4)
    tokenizer = folder / "shards" / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w17"', '"x17"'))
    index.tokenizer_sha256 = tokenizer_hash(folder / "shards" / "tokenizer")
    index.save(folder / "shards")
    fixtures.bert().save_pretrained(folder / "teacher")
    return {"data__shards": str(folder / "shards"), "teacher__path": str(folder / "teacher")}


@pytest.mark.parametrize(
    ("other", "word"),
    [(other_teacher, "teacher.path"), (other_data, "the data"), (other_tokenizer, "the tokenizer")],
    ids=["teacher", "data", "tokenizer"],
)
def test_another_teacher_corpus_or_tokenizer_is_refused_by_its_hash(
    folder: Path, tmp_path: Path, other: Callable[[Path], dict[str, Any]], word: str
) -> None:
    values = configured(folder, folder / "cache", **other(tmp_path))
    with pytest.raises(CacheError, match=rf"hash of {word} is '[0-9a-f]{{64}}', the cache's '[0-9a-f]{{64}}'.*{MEND}"):
        opened(values, folder)


def test_another_precision_is_refused(folder: Path) -> None:
    shutil.copy(folder / "zero2.json", folder / "bf16.json")
    edit(folder / "bf16.json", lambda values: values.update(bf16={"enabled": True}))
    with pytest.raises(CacheError, match=r"precision is 'bfloat16', the cache's 'float32'"):
        opened(configured(folder, folder / "cache"), folder, "bf16.json")


ALLOWED = {
    "aligner": {"objective__hidden": {"aligner": "indexed", "weight": 3.0}},
    "left_out": {"knowledge__left_out": "zero"},
    "seed": {"run__seed": 7, "data__mask_seed": 0},
    "weights": {"objective__kl": {"weight": 9.0}, "optimizer__learning_rate": 1e-5},
    "micro_batch": {"data__micro_batch": 1, "data__global_batch": 8, "data__lanes": 2},
    "fewer": {"data__maskings": 1, "run__updates": 2},
    "more_maskings_than_epochs": {"data__maskings": 50, "run__updates": 6},
}


@pytest.mark.parametrize("change", ALLOWED)
def test_what_does_not_change_the_knowledge_is_not_compared(folder: Path, change: str) -> None:
    teacher, stream = opened(configured(folder, folder / "cache", **ALLOWED[change]), folder)
    for _, batch in stream.updates(0, 2):
        assert teacher.knowledge(batch).targets is not None


@pytest.mark.parametrize(
    "changes", [{"data__maskings": 3, "run__updates": 7}, {"data__maskings": None, "run__updates": 7}], ids=str
)
def test_too_few_maskings_are_refused_before_training_and_added_without_touching_the_others(
    folder: Path, cache: Path, changes: dict[str, Any]
) -> None:
    """7 updates begin a third epoch."""
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.tar")}
    values = configured(folder, cache, **changes)
    with pytest.raises(CacheError, match=r"it has 2 maskings .* reads more. Set data.maskings to 2, or run"):
        opened(values, folder)
    record(values, folder)
    assert len(list(cache.glob("*.tar"))) == len(before) + 4
    assert all((cache / name).stat().st_mtime_ns == time for name, time in before.items())
    opened(values, folder)
    opened(configured(folder, cache), folder)  # nor is it lost to those who read fewer


def test_too_few_held_out_sequences_are_refused_before_training_and_added(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_plan, "SMALLEST_HELD_OUT", 4)
    few, more = (configured(folder, tmp_path / "cache", validation__sequences=count) for count in (4, 9))
    record(few, folder)
    with pytest.raises(CacheError, match=r"it has 4 held-out sequences, but .* Set validation.sequences to 4, or run"):
        opened(more, folder)
    record(more, folder)
    teacher, stream = opened(more, folder)
    assert sum(teacher.knowledge(batch).logits.shape[0] for batch in stream.validation(9, 4)) == 9


def overwrite(path: Path, text: str) -> None:
    path.write_text(text)


AGAIN = r"[Rr]un cache_teacher\.py again: it writes what is missing"
FOUND_AT_ONCE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda cache: os.truncate(cache / BAD, 700),
        rf"{BAD}: it has 700 bytes, .*{AGAIN}",
    ),
    "missing": (lambda cache: (cache / BAD).unlink(), rf"{BAD}: it is missing, .*{AGAIN}"),
    "no_head": (lambda cache: (cache / HEAD).unlink(), rf"{HEAD}: .*it is missing.* {AGAIN}"),
    "other_head": (
        lambda cache: flip_a_bit(cache / HEAD),
        rf"{HEAD}: its checksum is .*{AGAIN}",
    ),
}


@pytest.mark.parametrize("damage", FOUND_AT_ONCE)
def test_a_damaged_cache_is_refused_before_training_and_mended_by_writing_again(
    folder: Path, cache: Path, damage: str
) -> None:
    act, words = FOUND_AT_ONCE[damage]
    act(cache)
    values = configured(folder, cache)
    with pytest.raises(DataError, match=words):
        opened(values, folder)
    record(values, folder)
    assert contents(cache) == contents(folder / "cache")


MANIFESTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut_short": (lambda path: os.truncate(path, 300), "manifest.json: file: Invalid JSON"),
    "of_another_version": (
        lambda path: edit(path, lambda values: values.update(format_version=7)),
        "manifest.json: format_version is 7, expected 1",
    ),
    "naming_a_path": (
        lambda path: edit(path, lambda values: values["files"]["masking-0"][3].update(name="../train-0.tar")),
        r"manifest.json: files.masking-0.3.name: String should match pattern",
    ),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_manifest_that_cannot_be_read_is_refused_and_nothing_is_written_over(
    folder: Path, cache: Path, damage: str
) -> None:
    act, words = MANIFESTS[damage]
    act(cache / "manifest.json")
    before = contents(cache)
    for use in (opened, record):
        with pytest.raises(CacheError, match=f"{words}.* Restore it, or remove .*cache and write it anew"):
            use(configured(folder, cache), folder)
    assert contents(cache) == before


def test_where_nothing_was_written_the_command_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"there is no manifest.json.* deepspeed launchers/cache_teacher.py"):
        opened(configured(folder, tmp_path / "nowhere"), folder)


@pytest.mark.parametrize("shard", [0, slow(1)])
def test_a_flipped_byte_stops_all_ranks_when_it_is_read_and_the_run_goes_on_after_the_mend(
    folder: Path, cache: Path, pool: Any, shard: int
) -> None:
    bad = cache / f"masking-0-0000{shard}.tar"
    flip_a_bit(bad)
    name = f"flipped-{shard}"
    values = configured(folder, cache, name)
    opened(values, folder)  # of the right size, so only reading tells
    words = rf"{bad.name}: its checksum is .*Remove it, and run cache_teacher\.py again"
    with pytest.raises(ShardError, match=words) as stopped:
        pool(2).run(runs.execute, values, folder, 2)
    assert str(stopped.value).count(bad.name) == 1  # though both may have found it
    assert json.loads((folder / "runs" / name / "summary.json").read_text())["exit_status"] == 2
    bad.unlink()
    record(values, folder)
    assert contents(cache) == contents(folder / "cache")
    _, stream = opened(values, folder)
    assert len(list(stream.updates(0, 8))) == 8


def read_together() -> tuple[int, str]:
    """In a rank: something that all can read, then what rank 1 cannot. Collective."""
    from homodistil.ranks import Ranks

    ranks = Ranks.current()

    def read(bad: int) -> int:
        if ranks.rank == bad:
            raise CacheError(f"of rank {bad}")
        return ranks.rank

    found = ranks.together(lambda: read(bad=-1))
    try:
        ranks.together(lambda: read(bad=1))
    except ShardError as error:
        return found, str(error)
    return found, "nothing"


def test_what_one_rank_cannot_read_stops_all_of_them(pool: Any) -> None:
    said = f"rank 1 on {socket.gethostname()}: of rank 1"
    assert pool(2).run(read_together) == [(0, said), (1, said)]


def test_a_record_of_another_input_is_never_taken_for_this_ones(folder: Path, cache: Path) -> None:
    """As if two files had changed places with their entries."""
    manifest = json.loads((cache / "manifest.json").read_text())
    files = manifest["files"]["masking-0"]
    files[0], files[1] = files[1], files[0]
    (cache / "manifest.json").write_text(json.dumps(manifest))
    _, stream = opened(configured(folder, cache), folder)
    with pytest.raises(ShardError, match=r"what it holds of sequence \d+ \(masking-0\) was said of another input"):
        list(stream.updates(0, 3))


class Killed(BaseException):
    """As if the process had ended."""


@contextmanager
def killed_after(files: int) -> Iterator[None]:
    finish, done = caching._File.finish, [0]

    def counted(file: Any) -> str:
        done[0] += 1
        if done[0] > files:
            raise Killed
        return str(finish(file))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(caching._File, "finish", counted)
        yield


def test_a_half_written_cache_is_refused_for_reading_and_for_another_run(folder: Path, tmp_path: Path) -> None:
    values = configured(folder, tmp_path / "cache")
    with killed_after(5):
        record(values, folder)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 5
    assert list((tmp_path / "cache").glob("*.partial"))
    with pytest.raises(CacheError, match=r"it was not written to its end. Go on with: .*cache_teacher.py"):
        opened(values, folder)
    with pytest.raises(CacheError, match=r"cache.values is 'int8', the cache's 'fp16'"):
        record(configured(folder, tmp_path / "cache", cache__values="int8"), folder)
    record(values, folder)
    assert contents(tmp_path / "cache") == contents(folder / "cache")


@pytest.mark.parametrize("at", ["begin", "save_head", "complete"])
def test_a_death_at_any_other_moment_costs_nothing_either(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def after(step: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*arguments: Any) -> Any:
            step(*arguments)
            raise Killed

        return dying

    values, place = configured(folder, tmp_path / "cache"), caching if at == "save_head" else cache_folder.Work
    if at == "complete":  # between the manifest and the end of the note that it is being written
        monkeypatch.setattr(Path, "unlink", _dying_at("writing.json", Path.unlink))
    else:
        monkeypatch.setattr(place, at, after(getattr(place, at)))
    with pytest.raises(Killed):
        record(values, folder)
    monkeypatch.undo()
    record(values, folder)
    assert contents(tmp_path / "cache") == contents(folder / "cache")


def _dying_at(name: str, unlink: Callable[..., None]) -> Callable[..., None]:
    def dying(path: Path, missing_ok: bool = False) -> None:
        if path.name == name:
            raise Killed
        unlink(path, missing_ok)

    return dying


LAUNCH = processes.ROOT / "launchers" / "cache_teacher.py"


def launched(folder: Path, recipe: Path) -> subprocess.Popen[str]:
    flags = ["--ds_config", str(folder / "zero2.json"), "--teacher_ds_config", str(folder / "teacher.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(processes.ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, str(LAUNCH), *flags, "--recipe", str(recipe)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_process_is_taken_up_where_it_was_by_the_same_command(folder: Path, tmp_path: Path) -> None:
    values = configured(folder, tmp_path / "cache", data__maskings=12)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    record(configured(folder, tmp_path / "whole", data__maskings=12), folder)
    process, deadline = launched(folder, tmp_path / "recipe.yaml"), time.monotonic() + 120
    while len(list((tmp_path / "cache").glob("*.tar.json"))) < 9:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.tar.json")}
    assert 9 <= len(there) < 49 and not (tmp_path / "cache" / "manifest.json").exists()
    again = launched(folder, tmp_path / "recipe.yaml")
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")  # and so no leftovers
    assert all((tmp_path / "cache" / name).stat().st_mtime_ns == then for name, then in there.items())


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond `room` bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def recorded_on_a_full_disk(values: dict[str, Any], folder: Path, room: int, rank: int) -> None:
    """In a rank: write a cache, while one of the ranks has so little room. Collective."""
    from homodistil.ranks import Ranks

    with full_disk(room if Ranks.current().rank == rank else 2**40):
        runs.record(values, folder)


@pytest.mark.parametrize(
    ("sharding", "rank", "who"),
    [("zero3", 1, "rank 1: "), slow("replicated", 1, "rank 1: "), ("replicated", 0, "cannot be written .")],
)
def test_a_full_disk_of_one_rank_stops_all_and_the_same_command_goes_on(
    folder: Path, pool: Any, tmp_path: Path, sharding: str, rank: int, who: str
) -> None:
    """A shard's records take 40 kB; the head, which is rank 0's to write, takes more."""
    values = configured(folder, tmp_path / "cache", teacher__sharding=sharding, cache__logits="states")
    words = rf"{who}.*too large.*; \d+ of 9 files are whole. Remove the cause, then run the same command"
    with pytest.raises(CacheError, match=words):
        pool(2).run(recorded_on_a_full_disk, values, folder, ROOM, rank)
    assert not list((tmp_path / "cache").glob("*.partial"))
    assert {path.name + ".json" for path in (tmp_path / "cache").glob("*.tar")} == {
        path.name for path in (tmp_path / "cache").glob("*.tar.json")
    }
    pool(2).run(runs.record, values, folder)
    assert (tmp_path / "cache" / "manifest.json").is_file() and not list((tmp_path / "cache").glob("*.partial"))


ROOM = 30_000


def test_a_disk_that_fills_in_the_midst_of_a_file_leaves_nothing_of_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    writer = RecordWriter(tmp_path / "some-0.tar")
    with full_disk(ROOM):
        with pytest.raises(OSError, match="too large"):
            for _ in range(9):
                writer.add({"x": np.zeros((100, 50))})
        writer.abandon()
    del writer
    assert not list(tmp_path.iterdir()) and capfd.readouterr().err == ""


def test_where_nobody_may_write_is_refused_before_the_teacher_is_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "load_model", None)
    with pytest.raises(CacheError, match=r"cannot be written \(.*Set cache\.path to a folder with room"):
        record(configured(folder, read_only_folder(tmp_path) / "cache"), folder)


def test_without_enough_room_the_teacher_is_not_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda path: usage(10**9, 0, 100_000))
    monkeypatch.setattr(caching, "load_model", None)
    words = r"cache: \d+ kB are to be written, but 100 kB are free. Keep less \(knowledge.keep\), store it smaller"
    with pytest.raises(CacheError, match=words):
        record(configured(folder, tmp_path / "cache"), folder)


def test_room_is_asked_only_for_what_is_missing(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / BAD).unlink()
    (cache / f"{BAD}.partial").write_bytes(b"of a process that was killed")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda path: usage(10**9, 0, 40_000))
    record(configured(folder, cache), folder)
    assert contents(cache) == contents(folder / "cache")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_cache_is_left_alone(folder: Path, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "mine"
    if kind == "folder":
        place.mkdir()
        (place / "thesis.txt").write_text("years of work")
        (place / "draft.partial").write_text("more of it")
    else:
        place.write_text("a file")
    before = sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(CacheError, match=r"mine: something else lies there. Give an empty folder"):
        record(configured(folder, place), folder)
    assert sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()) == before


def test_a_cache_is_written_by_one_command_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "Claim", partial(Claim, patience_seconds=0.3))
    values = configured(folder, tmp_path / "cache")
    with (
        Claim(tmp_path / "cache", ALONE),
        pytest.raises(CacheError, match=r"running already \(process \d+ on .* another cache.path"),
    ):
        record(values, folder)
    record(values, folder)
    assert contents(tmp_path / "cache") == contents(folder / "cache")


def test_a_teacher_that_says_nan_is_not_recorded(folder: Path, tmp_path: Path) -> None:
    teacher = fixtures.save_bert(tmp_path / "teacher")
    weights = load_file(teacher / "model.safetensors")
    weights["bert.encoder.layer.2.output.dense.bias"][7] = torch.nan
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    words = r"cannot be written \(rank 0: the teacher's hidden values: \d+ of \d+ tokens have one that is not finite"
    with pytest.raises(CacheError, match=f"{words}.*mend its weights"):
        record(configured(folder, tmp_path / "cache", teacher__path=str(teacher)), folder)
    assert not list((tmp_path / "cache").glob("*.tar*"))


def test_a_bad_shard_stops_all_ranks_that_write_by_name(folder: Path, pool: Any, tmp_path: Path) -> None:
    shutil.copytree(folder / "shards", tmp_path / "shards")
    flip_a_bit(tmp_path / "shards" / "train-2.tar")
    values = configured(folder, tmp_path / "cache", data__shards=str(tmp_path / "shards"), teacher__sharding="zero3")
    with pytest.raises(ShardError, match=r"train-2\.tar"):
        pool(2).run(runs.record, values, folder)
    assert not list((tmp_path / "cache").glob("*.partial"))


NEVER: dict[str, tuple[dict[str, Any], str]] = {
    "attention": (
        {"objective__attention": {"weight": 0.5}},
        r"objective.attention.weight is 0.5, but a cache never holds attention.* Set it to 0, or drop cache.path",
    ),
    "no_teacher": (
        {"teacher__path": "none", "pruning__target": {}, "student__config": {"hidden_size": 72}},
        r"cache.path is .*cache, but there is no teacher. Set teacher.path, or drop it",
    ),
    "padding": (
        {"knowledge__padding": True, "knowledge__keep": None},
        r"knowledge.padding is true, but a cache holds nothing of padding. Drop it, or cache.path",
    ),
}


@pytest.mark.parametrize("what", NEVER)
def test_what_a_cache_can_never_hold_is_refused_by_key_and_value(folder: Path, what: str) -> None:
    changes, words = NEVER[what]
    with pytest.raises(ConfigError, match=words):
        planned(configured(folder, folder / "cache", **changes), folder)


@pytest.mark.parametrize(("without", "word"), [("cache", "cache.path, the folder"), ("teacher", "teacher.path, whose")])
def test_without_a_teacher_or_a_place_there_is_nothing_to_write(folder: Path, without: str, word: str) -> None:
    values = configured(folder, folder / "cache")
    values[without] = {"path": None}
    if without == "teacher":
        values["pruning"] = {}
    student = DeepSpeedConfig.load(folder / "zero2.json")
    with pytest.raises(ConfigError, match=f"nothing to write without {word}"):
        caching.cache_teacher(RunConfig.model_validate(values), student, student)
