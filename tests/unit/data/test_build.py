"""Building: complete, reproducible shards of packed text, or one clear error and nothing left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from homodistil.data import build, dealing, encoding, sampling
from homodistil.data.shards import ShardIndex, read_shard, verify
from homodistil.data.sources import documents, parts_of
from homodistil.data.tokenizer import continuation_pieces, open_tokenizer, tokenizer_hash
from homodistil.data.workers import Workers
from homodistil.errors import DataError
from tests.unit.data.corpora import SEQUENCE_LENGTH, small_shards, write_text


def sequences_of(folder: Path, split: str) -> np.ndarray:
    index = ShardIndex.load(folder)
    return np.concatenate([read_shard(folder, index, entry) for entry in index.splits[split]])  # type: ignore[index]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def test_sequences_are_the_text_cut_into_equal_lengths_between_cls_and_sep(shards: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shards / "tokenizer")
    texts = [document.text for document in documents([str(write_text(tmp_path / "text.txt"))])]
    whole = "|".join(as_text(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    for split in ("train", "validation"):
        for cls, *body, sep in sequences_of(shards, split).tolist():
            assert (cls, sep) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
            parts = as_text(body).split(f" {tokenizer.sep_token_id} ")
            assert all(part in whole for part in parts)


def as_text(ids: list[int]) -> str:
    return "".join(f" {token} " for token in ids)


def test_training_text_and_held_out_documents_do_not_overlap(shards: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shards / "tokenizer")

    def numbers(split: str) -> set[str]:
        """Titles, `Article N`, that are whole within a sequence."""
        text = " ".join(tokenizer.decode(row[1:-1]) for row in sequences_of(shards, split))
        return set(re.findall(r"\barticle (\d+)\b", text))

    assert len(numbers("train")) > 20
    assert numbers("validation")
    assert not numbers("train") & numbers("validation")


def test_every_training_shard_holds_equally_many_sequences_and_nearly_all_text(shards: Path) -> None:
    index = ShardIndex.load(shards)
    assert len({entry.sequences for entry in index.splits["train"]}) == 1
    assert len(index.splits["train"]) == 8
    packed = (index.sequences("train") + index.sequences("validation")) * (SEQUENCE_LENGTH - 2)
    assert 0 <= index.tokens + index.documents - packed < (8 + 2) * SEQUENCE_LENGTH
    rows = {row.tobytes() for row in sequences_of(shards, "train")}
    assert len(rows) == index.sequences("train")


def test_the_same_text_gives_the_same_bytes_and_another_seed_another_order(text: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        small_shards(str(text), tmp_path / name, seed=seed)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) >= 8 + 1 + 1 + 2
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    shard = "train-00000.tar"
    assert (tmp_path / "one" / shard).read_bytes() != (tmp_path / "three" / shard).read_bytes()


def test_counts_are_kept_by_source(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"the student learns {i}"}) for i in range(7)))
    index = small_shards([str(text), str(other)], tmp_path / "out")
    assert index.sources["text.txt"].documents == 60
    assert index.sources["other.jsonl"].documents == 7
    assert sum(count.tokens for count in index.sources.values()) == index.tokens


def test_a_given_tokenizer_is_used_and_copied(shards: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(shards / "tokenizer")
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    for given in (shards / "tokenizer", shards / "tokenizer" / "tokenizer.json", tmp_path / "vocab.txt"):
        output = tmp_path / f"from_{given.name}"
        index = small_shards(str(text), output, tokenizer=given)
        assert index.tokenizer_sha256 == tokenizer_hash(shards / "tokenizer") == tokenizer_hash(output / "tokenizer")
        assert (sequences_of(output, "train") == sequences_of(shards, "train")).all()


def test_large_vocabularies_are_stored_in_four_bytes(text: Path, tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"[unused{i}]" for i in range(2**16)), "student"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    assert small_shards(str(text), tmp_path / "out", tokenizer=tmp_path / "vocab.txt").dtype == "uint32"
    assert sequences_of(tmp_path / "out", "train").max() == len(pieces) - 1
    verify(tmp_path / "out")


def test_reading_stops_at_max_tokens(text: Path, tmp_path: Path) -> None:
    index = small_shards(str(text), tmp_path / "out", max_tokens=3000)
    assert 3000 <= index.tokens + index.documents < 3000 + 300


def test_a_tokenizers_training_text_is_an_even_bounded_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_text(tmp_path / "long.txt", articles=400)
    monkeypatch.setattr(sampling, "TOKENIZER_CHARACTERS", 8000)
    sample = sampling.tokenizer_text(parts_of([str(text)]), Workers())
    titles = [int(document.split()[1]) for document in sample]
    assert 2000 < sum(map(len, sample)) <= 8000
    assert min(titles) < 150
    assert max(titles) >= 250


def test_continuation_pieces_are_those_with_the_prefix(shards: Path) -> None:
    tokenizer = open_tokenizer(shards / "tokenizer")
    continues = continuation_pieces(shards / "tokenizer", len(tokenizer))
    assert 0 < continues.sum() < len(tokenizer)
    assert {tokenizer.convert_ids_to_tokens(int(i))[:2] for i in np.nonzero(continues)[0]} == {"##"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shards": 100_000}, ["fewer than --shards 100000", "at most --shards"]),
        ({"sequence_length": 100_000}, ["no held-out sequence", "--sequence_length"]),
        ({"tokenizer": Path("nowhere")}, ["tokenizer nowhere", "no such file"]),
    ],
)
def test_bad_requests_leave_nothing_behind(text: Path, tmp_path: Path, options: dict, named: list[str]) -> None:
    with pytest.raises(DataError) as refused:
        small_shards(str(text), tmp_path / "out", **options)
    assert all(part in str(refused.value) for part in named), refused.value
    assert not (tmp_path / "out").exists()


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.txt: 0 documents"):
        small_shards(str(tmp_path / "empty.txt"), tmp_path / "out")


def test_a_tokenizer_without_a_mask_token_is_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nword")
    with pytest.raises(DataError, match="mask_token"):
        small_shards(str(text), tmp_path / "out", tokenizer=tmp_path / "vocab.txt")


def test_existing_shards_are_never_overwritten(text: Path, tmp_path: Path) -> None:
    small_shards(str(text), tmp_path / "out")
    before = (tmp_path / "out" / "index.json").read_bytes()
    with pytest.raises(DataError, match="exists already"):
        small_shards(str(text), tmp_path / "out", seed=5)
    assert (tmp_path / "out" / "index.json").read_bytes() == before


def test_an_interrupted_build_leaves_nothing_that_looks_done_and_goes_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dealing, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small_shards(str(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr(encoding, "read", interrupted)
    small_shards(str(text), tmp_path / "out")
    verify(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


@pytest.mark.parametrize("seed", range(4))
def test_a_document_too_large_to_hold_out_is_trained_on(seed: int) -> None:
    assert build._held_out(np.array([600, 100_000]), 128, seed).tolist() == [True, False]


def test_a_vocabulary_with_a_repeated_piece_is_refused_by_its_line(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nfox\nthe\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 6, 'the'"):
        open_tokenizer(vocabulary)
