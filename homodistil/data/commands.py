"""What the data commands accept and print; the work itself is in build.py, tokenizer.py and shards.py.

Libraries are imported when a command runs, so that `--help` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from homodistil.config import Section
from homodistil.data.options import Deduplicate, Packing
from homodistil.errors import DataError
from homodistil.tasks import LanguageTask

if TYPE_CHECKING:
    from homodistil.data.removals import Removals


class BuildShards(Section):
    """Turn text into shards of packed sequences, with an index, a tokenizer and a held-out split."""

    source: list[str]
    """Text: a .txt, .txt.gz, .jsonl, .jsonl.gz (key `text`) or .parquet (column `text`) file, a folder of those;
    `wikipedia[:DUMP]`, `bookcorpus[:MIRROR]`, `openwebtext[:MIRROR]` or `hf:NAME[:config[:split]]` from the Hugging
    Face hub; or `embedded` for this Python installation's documentation. Repeat the flag to join several."""
    output: Path
    """New folder for the shards."""
    task: LanguageTask = "mlm"
    """`mlm`: sequences to mask, each between [CLS] and [SEP]. `clm`: for a causal model such as GPT-2, plain text whose
    documents are joined by the end-of-text token."""
    tokenizer: Path | None = None
    """Hugging Face directory (the teacher's), tokenizer.json, vocab.txt, or a folder with GPT-2's vocab.json and
    merges.txt; without it one is trained, WordPiece for `mlm`, byte-level BPE for `clm`."""
    vocab_size: int = Field(default=8192, ge=256)
    """Pieces of a tokenizer that is trained here."""
    sequence_length: list[Annotated[int, Field(ge=3)]] = Field(default=[128], min_length=1)
    """Tokens a sequence, special ones included. Repeat the flag for several: each length gets a folder of its own, of
    the same documents, and text is read once."""
    packing: Packing = "documents"
    """`documents`: documents are joined and cut, nothing is repeated. `sentences`: every sequence starts with a
    sentence; the one that did not fit into the sequence before is repeated."""
    deduplicate: Deduplicate = "near"
    """What goes of documents that say the same: `near` duplicates (alike to about 80 %), `exact` ones, or `none`."""
    decontaminate: list[Path] = Field(default=[])
    """Texts that models will be judged by, as .txt, .tsv, .csv, .json or .jsonl files, each also with .gz, or folders
    of them: documents that share 13 words in a row with them go. Repeat the flag to name several."""
    shards: int = Field(default=64, ge=1)
    """Training shards; `data.lanes` must divide it."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Stop reading after about so many tokens."""
    seed: int = 0
    """Decides which documents are held out, and the order of sequences."""
    workers: int | None = Field(default=None, ge=1)
    """Processes; one for each core without. Below `mpirun` or `srun` their processes do the work, all but the first, on
    a folder that all machines share. What is written does not depend on it."""


class TrainTokenizer(Section):
    """Train a tokenizer on text: uncased WordPiece, or byte-level BPE."""

    source: list[str]
    """As for build_shards.py."""
    output: Path
    """New folder for the tokenizer, in Hugging Face's layout."""
    task: LanguageTask = "mlm"
    """`mlm`: uncased WordPiece. `clm`: byte-level BPE, which keeps case and spaces."""
    vocab_size: int = Field(default=8192, ge=256)
    """Pieces, special tokens included."""
    seed: int = 0
    """Decides which documents are sampled from a large source."""


class VerifyShards(Section):
    """Read every shard and compare hashes, counts and ids with the index."""

    shards: Path
    """Folder with index.json."""


def build_shards(options: BuildShards) -> None:
    from homodistil.data import build

    indices, removals = build.build_shards(**dict(options), mpi=True)
    _show(removals)
    print(f"{options.output}: {indices[0].tokens:,} tokens of {indices[0].documents:,} documents")
    for index in indices:
        train, held_out = index.sequences("train"), index.sequences("validation")
        print(f"  {train:,} training and {held_out:,} held-out sequences of {index.sequence_length} tokens")


def _show(removals: Removals) -> None:
    """A row a source: what was read, what went, what stays."""
    from rich.console import Console
    from rich.table import Table

    columns = list(next(iter(removals.sources.values())).model_dump())
    table = Table("documents of", *(name.replace("_", " ") for name in columns))
    for name, report in removals.sources.items():
        table.add_row(name, *(f"{count:,}" for count in report.model_dump().values()))
    Console(width=160).print(table)


def train_tokenizer(options: TrainTokenizer) -> None:
    from homodistil.data import tokenizer
    from homodistil.data.sampling import tokenizer_text
    from homodistil.data.sources import parts_of
    from homodistil.data.workers import Workers

    if options.output.exists():
        raise DataError(f"--output {options.output}: exists already. Remove it first, or give another folder.")
    text = tokenizer_text(parts_of(options.source), Workers(), seed=options.seed)
    trained = tokenizer.train_tokenizer(text, options.vocab_size, task=options.task, progress=True)
    trained.save_pretrained(options.output)
    print(f"{options.output}: {len(trained):,} pieces")


def verify_shards(options: VerifyShards) -> None:
    from homodistil.data import shards

    index = shards.verify(options.shards, progress=True)
    print(f"{options.shards}: {len(index.entries())} shards are whole, {index.tokens:,} tokens")
