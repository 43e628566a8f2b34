"""Masked sequences a second from one loader process: python -m benchmarks.loader

`stream` is this project's: packed members, hashed masks, exact order, one worker thread. `one a member` is a webdataset
with a sample in each tar member, masked by the same code; `collator` masks the same packed rows with transformers'
collator. Each arm reads the same sequences, in batches of the same size, into tensors.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import BertTokenizer, DataCollatorForLanguageModeling

from benchmarks.interleaved import interleave, leave
from homodistil.config import DataConfig
from homodistil.data.masking import Masker, training_masks
from homodistil.data.shards import Sequences, ShardIndex, SpecialTokens, read_shard, write_shard
from homodistil.data.stream import Stream
from homodistil.data.tokenizer import tokenizer_hash
from homodistil.engine import started_ranks
from homodistil.ranks import Ranks

VOCABULARY = 30522
SPECIAL = SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4)
TARGET = 25_000
"""Sequences a second that feed a node of eight A100s at the floor's speed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=8192, help="of a shard")
    parser.add_argument("--batch", type=int, default=256, help="sequences of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with started_ranks() as ranks, tempfile.TemporaryDirectory(prefix="loader_") as folder:
        torch.set_num_threads(1)
        rows = measure(options, Path(folder), ranks)
    table = Table("loader", "sequences/s", "times as fast", title=f"{options.length} tokens, one process")
    for row in rows:
        table.add_row(row["loader"], f"{row['sequences/s']:,.0f}", f"{row['stream is']:.1f}")
    Console().print(table)
    print(f"target {TARGET:,} sequences/s; written to {leave('loader', rows)}")


def measure(options: argparse.Namespace, folder: Path, ranks: Ranks) -> list[dict[str, Any]]:
    index, total = build(options, folder), options.shards * options.sequences
    updates = total // options.batch
    config = DataConfig(shards=folder, lanes=4, global_batch=options.batch)
    stream = Stream(config, 0, ranks)
    one_each = folder / "one_a_member.tar"
    write_singly(one_each, read_shard(folder, index, index.splits["train"][0]))
    masker = Masker(config.mask_probability, VOCABULARY, SPECIAL)
    collator = DataCollatorForLanguageModeling(BertTokenizer.from_pretrained(folder / "tokenizer"))
    arms: dict[str, Callable[[], int]] = {
        "stream": lambda: sum(len(batch) for _, batch in stream.updates(0, updates)),
        "one a member": lambda: sum(len(masker(*rows, *training_masks(0, 0))) for rows in singly(one_each, options)),
        "collator": lambda: sum(len(rows["input_ids"]) for rows in collated(folder, index, collator, options)),
    }
    counts = {name: arm() for name, arm in arms.items()}
    timings = interleave(arms, options.rounds)
    speeds = {name: counts[name] / timings.median(name) for name in arms}
    return [
        {"loader": name, "sequences/s": speed, "stream is": speeds["stream"] / speed} for name, speed in speeds.items()
    ]


def build(options: argparse.Namespace, folder: Path) -> ShardIndex:
    """Shards of random ids, with a tokenizer of made-up words."""
    random = np.random.default_rng(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, VOCABULARY))]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder / "tokenizer")

    def shard(name: str) -> Any:
        ids = random.integers(5, VOCABULARY, (options.sequences, options.length)).astype(np.uint16)
        return write_shard(folder / name, np.split(ids, max(1, options.sequences // 512)))

    index = ShardIndex(
        sequence_length=options.length,
        dtype="uint16",
        vocab_size=VOCABULARY,
        tokenizer_sha256=tokenizer_hash(folder / "tokenizer"),
        special_tokens=SPECIAL,
        documents=1,
        tokens=(options.shards + 1) * options.sequences * options.length,
        sources={},
        splits={"train": [shard(f"train-{i}.tar") for i in range(options.shards)], "validation": [shard("held.tar")]},
    )
    index.save(folder)
    return index


def write_singly(path: Path, sequences: Sequences) -> None:
    with wds.TarWriter(str(path)) as tar:
        for number, row in enumerate(sequences):
            tar.write({"__key__": f"{number:08d}", "npy": row})


def singly(path: Path, options: argparse.Namespace) -> Iterator[tuple[Sequences, NDArray[np.int64]]]:
    samples = wds.DataPipeline(wds.SimpleShardList([str(path)]), wds.tarfile_to_samples())
    rows: list[Sequences] = []
    for member in samples:
        rows.append(np.load(io.BytesIO(member["npy"]), allow_pickle=False))
        if len(rows) == options.batch:
            yield np.stack(rows), np.arange(len(rows))
            rows.clear()


def collated(folder: Path, index: ShardIndex, collator: Any, options: argparse.Namespace) -> Iterator[Any]:
    rows = read_shard(folder, index, index.splits["train"][0]).astype(np.int64)
    for start in range(0, len(rows), options.batch):
        yield collator([{"input_ids": torch.from_numpy(row)} for row in rows[start : start + options.batch]])


if __name__ == "__main__":
    main()
