"""Shards: how packed sequences lie on disk, as webdataset tars of integer blocks beside an index.

A shard's members are .npy blocks of hundreds of sequences, since one sample a member reads two orders of magnitude
slower. Owns the index, writing, reading and verifying. Leaves what is in them to build.py, their order to stream.py.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from homodistil.data.tokenizer import NEEDED, tokenizer_hash
from homodistil.errors import DataError, first_fault
from homodistil.files import sha256
from homodistil.tasks import LanguageTask

FORMAT_VERSION = 1
SEQUENCES_PER_MEMBER = 512
BUILD_COMMAND = "python data_prep/build_shards.py --source <text> --output"
VERIFY = "Find damaged shards with: python data_prep/verify_shards.py --shards"

Split = Literal["train", "validation"]
Sequences = NDArray[np.unsignedinteger]


class ShardEntry(BaseModel):
    """One tar file of a split."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    """A plain file name: what an index from elsewhere calls a shard is never a path or a command."""
    sequences: int
    bytes: int
    sha256: str


class SourceCount(BaseModel):
    """How much of the corpus one source gave."""

    documents: int = 0
    tokens: int = 0


class SpecialTokens(BaseModel):
    """Ids that are never masked; None for what a tokenizer lacks."""

    pad: int | None = None
    """Of padding alone: None where the same token also ends a text."""
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    unk: int | None = None
    eos: int | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, task: LanguageTask) -> SpecialTokens:
        """Of a tokenizer that has what a task needs, as `open_tokenizer` ensures."""
        found = {name: getattr(tokenizer, f"{name}_token_id") for name in cls.model_fields}
        if task == "clm" and found["pad"] == found["eos"]:
            found["pad"] = None
        return cls(**found)

    @property
    def ids(self) -> list[int]:
        """All there are."""
        return [token for token in self.model_dump().values() if token is not None]


class ShardIndex(BaseModel):
    """index.json: everything a reader must know before it opens a shard."""

    format_version: int = FORMAT_VERSION
    task: LanguageTask = "mlm"
    """What the sequences were cut for."""
    sequence_length: int
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    tokenizer_sha256: str
    """Of the vocabulary's pieces in id order (see `tokenizer_hash`)."""
    special_tokens: SpecialTokens
    documents: int
    tokens: int
    sources: dict[str, SourceCount]
    splits: dict[Split, list[ShardEntry]]

    @classmethod
    def load(cls, folder: Path, check_files: bool = True) -> ShardIndex:
        """Read `folder`/index.json and check that every shard is there at its size. Raises `DataError`."""
        path = folder / "index.json"
        if not path.is_file():
            found = "it has no index.json" if folder.is_dir() else "there is no such folder"
            raise DataError(f"data.shards = {folder}: {found}. Build shards with: {BUILD_COMMAND} {folder}")
        try:
            index = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise DataError(f"{path}: {first_fault(error)}. Rebuild with: {BUILD_COMMAND} {folder}") from None
        index._check(folder)
        if check_files:
            index._check_files(folder)
        return index

    def _check(self, folder: Path) -> None:
        path, rebuild = folder / "index.json", f"Remove it and rebuild with: {BUILD_COMMAND} {folder}"
        if self.format_version != FORMAT_VERSION:
            raise DataError(f"{path}: format_version is {self.format_version}, expected {FORMAT_VERSION}. {rebuild}")
        for name in (role.removesuffix("_token") for role in NEEDED[self.task]):
            if getattr(self.special_tokens, name) is None:
                raise DataError(f"{path}: special_tokens.{name}: none, but shards for {self.task} need it. {rebuild}")
        for split in ("train", "validation"):
            if not self.sequences(split):
                raise DataError(f"{path}: splits.{split} holds no sequences, expected at least one. {rebuild}")

    def _check_files(self, folder: Path) -> None:
        rebuild = f"Remove it and rebuild with: {BUILD_COMMAND} {folder}"
        for entry in self.entries():
            shard = folder / entry.name
            size = shard.stat().st_size if shard.is_file() else None
            if size != entry.bytes:
                found = "it is missing" if size is None else f"it has {size} bytes"
                raise DataError(f"{shard}: {found}, expected {entry.bytes} bytes. {rebuild}")

    def save(self, folder: Path) -> None:
        (folder / "index.json").write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def entries(self) -> list[ShardEntry]:
        return [entry for entries in self.splits.values() for entry in entries]

    def sequences(self, split: Split) -> int:
        """Sequences in a split."""
        return sum(entry.sequences for entry in self.splits.get(split, []))

    @property
    def sha256(self) -> str:
        """Of the corpus: what every shard holds, in order, and how it is to be read."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def mean_length(self) -> float:
        """Tokens a sequence, on average: all are full."""
        return float(self.sequence_length)

    @property
    def sep_token_id(self) -> int | None:
        return self.special_tokens.sep

    tokenizer_name: ClassVar[str] = "tokenizer"
    """Folder of the tokenizer, below the shards'."""


def write_shard(path: Path, blocks: Iterable[Sequences]) -> ShardEntry:
    """Write each block, shape (rows, T), as one member. Equal blocks give equal bytes."""
    sequences = 0
    with path.open("wb") as file, wds.TarWriter(file, mtime=0) as tar:
        for number, block in enumerate(blocks):
            tar.write({"__key__": f"{path.stem}-{number:05d}", "npy": block.astype(block.dtype.newbyteorder("<"))})
            sequences += len(block)
    return ShardEntry(name=path.name, sequences=sequences, bytes=path.stat().st_size, sha256=sha256(path))


def read_shard(folder: Path, index: ShardIndex, entry: ShardEntry) -> Sequences:
    """A shard's sequences, (entry.sequences, T) of the index's dtype. Raises `DataError` if they are not those that
    were written, to the last bit. Members are read in memory, and never unpickled."""
    path = folder / entry.name
    try:
        found = sha256(path)
        blocks = list(_blocks(path)) if found == entry.sha256 else []
    except Exception as error:  # tar, npy and I/O faults alike: whatever it is, this shard cannot be read
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error}). {VERIFY} {folder}") from error
    if found != entry.sha256:
        raise DataError(f"{path}: sha256 is {found[:12]}..., expected {entry.sha256[:12]}.... {VERIFY} {folder}")
    block = np.concatenate(blocks)
    expected = (entry.sequences, index.sequence_length)
    if block.shape != expected or block.dtype != np.dtype(index.dtype):
        raise DataError(
            f"{path}: holds {block.dtype} of shape {block.shape}, expected {index.dtype} of {expected}. "
            f"{VERIFY} {folder}"
        )
    return block


def _blocks(path: Path) -> Iterator[Sequences]:
    members = wds.DataPipeline(wds.SimpleShardList([str(path.absolute())]), wds.tarfile_to_samples())
    for member in members:
        yield np.load(io.BytesIO(member["npy"]), allow_pickle=False)


def verify(folder: Path, *, progress: bool = False) -> ShardIndex:
    """Read everything: hashes, counts, ids, the tokenizer. Raises one `DataError`."""
    index = ShardIndex.load(folder)
    faults = []
    if tokenizer_hash(folder / index.tokenizer_name) != index.tokenizer_sha256:
        faults.append(f"{folder / index.tokenizer_name}: not the tokenizer these shards were built with")
    for entry in tqdm(index.entries(), desc="verifying", unit="shard", disable=not progress):
        faults += _faults(folder, index, entry)
    if faults:
        mend = f"Copy these files again from where they were built, or rebuild with: {BUILD_COMMAND} {folder}"
        raise DataError("\n".join([*faults, mend]))
    return index


def _faults(folder: Path, index: ShardIndex, entry: ShardEntry) -> list[str]:
    path, padding = folder / entry.name, index.special_tokens.pad
    try:
        ids = read_shard(folder, index, entry)
    except DataError as error:
        return [str(error)]
    faults = [] if (largest := ids.max()) < index.vocab_size else [f"id {largest}, expected below {index.vocab_size}"]
    if padding is not None and (padded := np.count_nonzero(ids == padding)):
        faults.append(f"{padded} of {ids.size} ids are padding, which packed sequences have none of; build them again")
    return [f"{path}: {fault}" for fault in faults]
