"""Small made-up texts, and shards built from them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from homodistil.config import DataConfig
from homodistil.data.build import build_shards
from homodistil.data.shards import ShardIndex
from homodistil.data.stream import Stream
from tests.fixtures import SilentRanks

SENTENCE = "the student learns from a teacher that shrinks slowly while every neuron of importance stays near"
SEQUENCE_LENGTH = 16


def write_text(path: Path, articles: int = 60) -> Path:
    """`articles` of a few paragraphs each, of made-up words so that they differ."""
    draw = random.Random(0)
    lines = []
    for article in range(articles):
        lines.append(f"= Article {article} =")
        lines += [" ".join(draw.choices(SENTENCE.split(), k=30)) + f" {draw.randrange(1000)}." for _ in range(4)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def small_shards(source: str | list[str], output: Path, **options: Any) -> ShardIndex:
    """Of text that repeats itself, all of which stays."""
    usual = {"vocab_size": 300, "shards": 8, "deduplicate": "none", "workers": 1, "progress": False}
    length = options.pop("sequence_length", SEQUENCE_LENGTH)
    (index,), _ = build_shards(source, output, sequence_length=[length], **{**usual, **options})
    return index


def ranks(rank: int, world_size: int) -> SilentRanks:
    """A place among ranks, without a process group."""
    return SilentRanks(rank, world_size, 0, torch.device("cpu"))


def stream(shards: Path, rank: int = 0, world_size: int = 1, seed: int = 0, **options: object) -> Stream:
    settings = {"global_batch": 24, "lanes": 4, "micro_batch": 8, "shards": shards, **options}
    return Stream(DataConfig.model_validate(settings), seed, ranks(rank, world_size))
