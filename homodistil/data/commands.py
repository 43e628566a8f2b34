"""What the data commands accept and print; the work itself is in build.py, tokenizer.py and shards.py.

Libraries are imported when a command runs, so that `--help` is quick.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from homodistil.config import Section
from homodistil.errors import DataError
from homodistil.tasks import LanguageTask


class BuildShards(Section):
    """Turn text into shards of packed sequences, with an index, a tokenizer and a held-out split."""

    source: list[str]
    """Text: a .txt, .txt.gz, .jsonl, .jsonl.gz (key `text`) or .parquet (column `text`) file, a folder of those,
    `hf:NAME[:config[:split]]` for a Hugging Face dataset, or `embedded` for this Python installation's
    documentation. Repeat the flag to join several."""
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
    sequence_length: int = Field(default=128, ge=3)
    """Tokens a sequence, special ones included."""
    shards: int = Field(default=64, ge=1)
    """Training shards; `data.lanes` must divide it."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Stop reading after about so many tokens."""
    seed: int = 0
    """Decides which documents are held out, and the order of sequences."""


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

    index = build.build_shards(**dict(options))
    print(f"{options.output}: {index.tokens:,} tokens of {index.documents:,} documents")
    for name, count in sorted(index.sources.items()):
        print(f"  {name}: {count.tokens:,} tokens of {count.documents:,} documents")
    print(f"  {index.sequences('train'):,} training and {index.sequences('validation'):,} held-out sequences")


def train_tokenizer(options: TrainTokenizer) -> None:
    from homodistil.data import build, tokenizer

    if options.output.exists():
        raise DataError(f"--output {options.output}: exists already. Remove it first, or give another folder.")
    text = build.tokenizer_text(options.source, seed=options.seed)
    trained = tokenizer.train_tokenizer(text, options.vocab_size, task=options.task, progress=True)
    trained.save_pretrained(options.output)
    print(f"{options.output}: {len(trained):,} pieces")


def verify_shards(options: VerifyShards) -> None:
    from homodistil.data import shards

    index = shards.verify(options.shards, progress=True)
    print(f"{options.shards}: {len(index.entries())} shards are whole, {index.tokens:,} tokens")
