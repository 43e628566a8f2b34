"""What a corpus costs beside its tokenizer: python -m benchmarks.corpus

Real Wikipedia and books (../shared/data/text) and BERT's vocabulary, by as many processes as there are cores. One arm
tokenizes cleaned documents that lie in memory, and nothing else; its time is that of a perfect division among the
processes. The other is all of data_prep/build_shards.py: reading, cleaning, comparing, looking for quotations,
tokenizing, packing, writing. Starting the processes counts for neither.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.table import Table

from benchmarks.interleaved import Timings, leave
from homodistil.data import build
from homodistil.data.encoding import CHARACTERS_AT_ONCE
from homodistil.data.sources import documents
from homodistil.data.tokenizer import open_tokenizer
from homodistil.data.workers import Workers, open_workers
from homodistil.hardware import cores
from homodistil.progress import progress_bar

SHARED = Path("../shared")
TOKENIZER, TEXT = SHARED / "teacher/minilm-l6-mlm", SHARED / "data/text"
EVALUATION = [SHARED / "data/lm", SHARED / "data/squad/dev-v1.1.json"]
EVALUATION += [SHARED / f"data/glue/{task}/dev.tsv" for task in ("CoLA", "SST-2", "MRPC", "RTE")]
FILE_CHARACTERS = 6_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100, help=f"of {FILE_CHARACTERS:,} characters, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=cores())
    options = parser.parse_args()
    if not TEXT.is_dir():
        raise SystemExit(f"{TEXT}: not there. This benchmark reads real text.")
    with tempfile.TemporaryDirectory() as name, open_workers(options.workers) as workers:
        files = write_files(Path(name) / "text", options.files)
        megabytes = sum(len(text) for file in files for batch in cleaned(file) for text in batch) / 1e6
        cleaned.cache_clear()
        timings, removed = Timings({"tokenizer": [], "build": []}), 0
        with progress_bar("corpus", 1 + options.rounds, "round") as bar:
            for turn in range(1 + options.rounds):  # the first warms caches and does not count
                alone = sum(workers.results(tokenize, files)) / options.workers
                whole, removed = seconds_of_build(files, Path(name) / f"shards{turn}", workers)
                if turn:
                    timings.seconds["tokenizer"].append(alone)
                    timings.seconds["build"].append(whole)
                bar.update()
    report(options, megabytes, timings, removed)


def write_files(folder: Path, count: int) -> list[Path]:
    """Rows of real documents, or as many files as there are of them."""
    folder.mkdir()
    files: list[Path] = []
    stream = documents([str(TEXT)])
    while len(files) < count and (document := next(stream, None)):
        files.append(folder / f"{len(files):03d}.jsonl")
        size = 0
        with files[-1].open("w", encoding="utf-8") as file:
            while document:
                file.write(json.dumps({"text": document.text}) + "\n")
                size += len(document.text)
                document = next(stream, None) if size < FILE_CHARACTERS else None
    return files


def tokenize(file: Path) -> float:
    """Seconds that a file's cleaned documents take until their ids are there, in batches like the build's."""
    batches = cleaned(file)
    backend = open_tokenizer(TOKENIZER).backend_tokenizer
    backend.no_truncation()
    started = time.perf_counter()
    for batch in batches:
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            _ = encoding.ids
    return time.perf_counter() - started


@cache
def cleaned(file: Path) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    for document in documents([str(file)]):
        batches[-1].append(document.text)
        if sum(map(len, batches[-1])) > CHARACTERS_AT_ONCE:
            batches.append([])
    return batches


def seconds_of_build(files: list[Path], output: Path, workers: Workers) -> tuple[float, int]:
    """And how many documents it removed."""
    with mock.patch.object(build, "open_workers", lambda *_: nullcontext(workers)):
        started = time.perf_counter()
        _, removals = build.build_shards(
            str(files[0].parent), output, tokenizer=TOKENIZER, shards=16, decontaminate=EVALUATION, progress=False
        )
        return time.perf_counter() - started, len(removals.removed)


def report(options: argparse.Namespace, megabytes: float, timings: Timings, removed: int) -> None:
    share = 1 / timings.ratio("build", "tokenizer")
    row = {
        "workers": options.workers,
        "MB": megabytes,
        "tokenizer alone, MB/s": megabytes / timings.median("tokenizer"),
        "whole build, MB/s": megabytes / timings.median("build"),
        "build / tokenizer": share,
        "documents removed": removed,
    }
    table = Table(*row)
    table.add_row(*(f"{value:,.3g}" for value in row.values()))
    Console(width=120).print(table)
    print(f"written to {leave('corpus', [row])}")


if __name__ == "__main__":
    main()
