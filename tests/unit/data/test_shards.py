"""Shards: what is missing, damaged or foreign is found, and the message says how to mend it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from homodistil.data.shards import SEQUENCES_PER_MEMBER, ShardIndex, read_shard, verify, write_shard
from homodistil.errors import DataError


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """Shards that a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "index.json").read_text())
    edit(values)
    (folder / "index.json").write_text(json.dumps(values))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def test_blocks_come_back_as_they_were_written(shards: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(shards)
    rows = np.random.default_rng(0).integers(0, 2**16, (1200, index.sequence_length)).astype(np.uint16)
    members = [rows[start : start + SEQUENCES_PER_MEMBER] for start in range(0, 1200, SEQUENCES_PER_MEMBER)]
    entry = write_shard(tmp_path / "train-00000.tar", members)
    assert entry.sequences == 1200
    assert entry.bytes == (tmp_path / entry.name).stat().st_size
    assert (read_shard(tmp_path, index, entry) == rows).all()


def test_whole_shards_verify(shards: Path) -> None:
    assert verify(shards) == ShardIndex.load(shards)


def test_flipped_bytes_are_found_in_every_shard_that_has_one(copy: Path) -> None:
    for name in ("train-00002.tar", "validation-00000.tar"):
        flip_a_byte(copy / name)
    with pytest.raises(DataError) as refused:
        verify(copy)
    message = str(refused.value)
    assert "train-00002.tar: sha256" in message
    assert "validation-00000.tar: sha256" in message
    assert "train-00001" not in message
    assert "Copy these files again" in message


def test_ids_beyond_the_vocabulary_are_found(copy: Path) -> None:
    edit_index(copy, lambda values: values.update(vocab_size=50))
    with pytest.raises(DataError, match=r"train-00000\.tar: id \d+, expected below 50"):
        verify(copy)


def test_padding_within_packed_sequences_is_found(copy: Path) -> None:
    index = ShardIndex.load(copy)
    entry = index.splits["train"][0]
    rows = read_shard(copy, index, entry)
    rows[3, 5:9] = index.special_tokens.pad
    written = write_shard(
        copy / entry.name, [rows[i : i + SEQUENCES_PER_MEMBER] for i in range(0, len(rows), SEQUENCES_PER_MEMBER)]
    )
    edit_index(copy, lambda values: values["splits"]["train"][0].update(written.model_dump()))
    with pytest.raises(DataError, match=rf"{entry.name}: 4 of \d+ ids are padding"):
        verify(copy)


def test_another_tokenizer_is_found(copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"the"', '"thee"'))
    with pytest.raises(DataError, match="not the tokenizer these shards were built with"):
        verify(copy)


def test_a_wrong_count_is_found_when_a_shard_is_read(copy: Path) -> None:
    edit_index(copy, lambda values: values["splits"]["train"][0].update(sequences=3))
    index = ShardIndex.load(copy)
    with pytest.raises(DataError, match=r"train-00000\.tar: holds uint16 of shape .* expected uint16 of \(3, 16\)"):
        read_shard(copy, index, index.splits["train"][0])


@pytest.mark.parametrize("keep", [0, 700])
def test_a_torn_tar_is_an_error_that_names_it(copy: Path, keep: int) -> None:
    index = ShardIndex.load(copy)
    shard = copy / "train-00003.tar"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train-00003\.tar: sha256"):
        read_shard(copy, index, index.splits["train"][3])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: shutil.rmtree(folder), ["no such folder", "build_shards.py"]),
        (lambda folder: (folder / "index.json").unlink(), ["no index.json", "build_shards.py"]),
        (lambda folder: (folder / "index.json").write_text("{"), ["index.json: file", "Rebuild"]),
        (lambda folder: edit_index(folder, lambda v: v.pop("dtype")), ["index.json: dtype", "required"]),
        (
            lambda folder: edit_index(folder, lambda v: v.update(format_version=9)),
            ["format_version is 9", "expected 1"],
        ),
        (lambda folder: edit_index(folder, lambda v: v["splits"].update(train=[])), ["splits.train", "no sequences"]),
        (lambda folder: (folder / "train-00001.tar").unlink(), ["train-00001.tar: it is missing", "expected"]),
        (lambda folder: (folder / "train-00001.tar").write_bytes(b"x"), ["train-00001.tar: it has 1 bytes"]),
    ],
)
def test_missing_or_damaged_folders_are_refused_at_once(
    copy: Path, damage: Callable[[Path], object], named: list[str]
) -> None:
    damage(copy)
    with pytest.raises(DataError) as refused:
        ShardIndex.load(copy)
    assert all(text in str(refused.value) for text in [str(copy), *named]), refused.value
