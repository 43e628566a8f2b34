"""Causal data: text cut into sequences of nothing else, each token's label the next one, byte-level tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from homodistil.cli import main
from homodistil.data.causal import CausalScorer
from homodistil.data.corpus import Corpus, PackedSequences
from homodistil.data.shards import ShardIndex, SpecialTokens, read_shard, verify
from homodistil.data.tokenizer import open_tokenizer, tokenizer_hash, train_tokenizer
from homodistil.errors import ConfigError, DataError
from tests.unit.data.corpora import SENTENCE, SEQUENCE_LENGTH, small_shards, stream, write_text

END = "<|endoftext|>"
ODD = "Ünïcode, 3  SPACES   and CASE\n\n\ttabs; 漢字 \N{PILE OF POO}."
REAL = Path(__file__).parents[4] / "shared" / "data" / "vocab"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def causal_shards(text: Path) -> Path:
    small_shards(str(text), text.parent / "shards", task="clm")
    return text.parent / "shards"


@pytest.fixture
def gpt2_files(tmp_path: Path) -> Path:
    """GPT-2's two files, as they are published, and nothing beside them."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    train_tokenizer([SENTENCE] * 3, 300, task="clm").backend_tokenizer.model.save(str(folder), "gpt2")
    assert sorted(path.name for path in folder.iterdir()) == ["gpt2-merges.txt", "gpt2-vocab.json"]
    return folder


def sequences_of(folder: Path, split: str) -> np.ndarray:
    index = ShardIndex.load(folder)
    return np.concatenate([read_shard(folder, index, entry) for entry in index.splits[split]])  # type: ignore[index]


@pytest.mark.parametrize("frame", [None, (1, 2)], ids=["bare", "framed"])
def test_documents_are_joined_and_cut_into_equal_lengths(tmp_path: Path, frame: tuple[int, int] | None) -> None:
    documents = [[10, 11, 12, 3], [30, 31, 32, 33, 34, 35, 3], [40, 41, 3], [3]]
    corpus = Corpus.join(tmp_path / "ids", map(np.array, documents), np.dtype(np.uint16))
    packed = PackedSequences(corpus, 5, frame)
    joined = [token for document in documents for token in document]
    body = 3 if frame else 5
    cuts = [joined[start : start + body] for start in range(0, len(joined) - body + 1, body)]
    expected = [[1, *cut, 2] for cut in cuts] if frame else cuts
    assert packed.rows(np.arange(len(packed))).tolist() == expected


def test_sequences_are_nothing_but_text_with_its_documents_ends(causal_shards: Path, text: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(causal_shards / "tokenizer")
    end = tokenizer.eos_token_id
    rows = np.concatenate([sequences_of(causal_shards, split) for split in ("train", "validation")])
    pieces = [piece for row in rows.tolist() for piece in tokenizer.decode(row).split(END)]
    source = text.read_text().replace(" =", "").replace("= ", "")
    assert rows.shape[1] == SEQUENCE_LENGTH and all(piece in source for piece in pieces)
    assert 0.9 * 60 < (rows == end).sum() <= 60  # articles; the last cuts of the splits are dropped
    index = verify(causal_shards)
    assert index.task == "clm" and index.special_tokens.eos == end
    assert index.special_tokens.pad is None  # the end of a text is no padding, though it serves as such
    dropped = index.tokens + index.documents - rows.size
    assert 0 <= dropped < (8 + 2) * SEQUENCE_LENGTH


def test_the_same_text_gives_the_same_bytes_tokenizer_included(causal_shards: Path, text: Path, tmp_path: Path) -> None:
    small_shards(str(text), tmp_path / "again", task="clm")
    files = sorted(path.relative_to(causal_shards) for path in causal_shards.rglob("*") if path.is_file())
    assert len(files) >= 8 + 1 + 1 + 2
    for file in files:
        assert (causal_shards / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_a_slots_label_is_the_token_after_it_and_padding_is_none() -> None:
    ids = np.random.default_rng(0).integers(1, 997, (4, 9)).astype(np.uint16)
    ids[1, 6:], ids[2, 1:] = 0, 0
    batch = CausalScorer(pad=0)(ids, np.array([7, 3, 9, 1]))
    for row in range(4):
        targets = [(t, int(ids[row, t + 1])) for t in range(8) if ids[row, t + 1] != 0]
        slots = zip(batch.scored_positions[row].tolist(), batch.labels[row].tolist(), batch.weights[row], strict=True)
        assert [(position, label) for position, label, weight in slots if weight == 1] == targets
        assert int(batch.weights[row].sum()) == len(targets)
    assert torch.equal(batch.input_ids, torch.from_numpy(ids.astype(np.int64)))
    assert torch.equal(batch.attention_mask, (batch.input_ids != 0).long())
    assert batch.samples.tolist() == [7, 3, 9, 1] and batch.padded
    assert not CausalScorer(pad=0)(ids[:1], np.array([0])).padded
    assert not CausalScorer(pad=None)(ids, np.arange(4)).padded


def test_a_stream_of_causal_shards_foretells_every_token_but_the_first(causal_shards: Path) -> None:
    corpus = sequences_of(causal_shards, "train").astype(np.int64)
    one = stream(causal_shards)
    seen: set[int] = set()
    for _, batch in one.updates(0, one.updates_per_epoch):
        rows = torch.from_numpy(corpus[batch.samples.numpy()])
        assert torch.equal(batch.input_ids, rows) and torch.equal(batch.labels, rows[:, 1:])
        assert batch.weights.all() and not batch.padded and batch.counts().scored == 24 * (SEQUENCE_LENGTH - 1)
        seen |= set(batch.samples.tolist())
    assert len(corpus) - len(seen) < 24


def test_validation_of_causal_shards_weighs_the_same_on_any_number_of_ranks(causal_shards: Path) -> None:
    held_out = len(sequences_of(causal_shards, "validation"))
    for world_size in (1, 2, 4):
        parts = [stream(causal_shards, rank, world_size).validation(10**6, 4) for rank in range(world_size)]
        weight = sum(float(batch.weights.sum()) for batches in parts for batch in batches)
        assert weight == held_out * (SEQUENCE_LENGTH - 1)


def test_whole_words_of_causal_shards_are_refused(causal_shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.whole_word is true.*clm"):
        stream(causal_shards, whole_word=True)


def test_an_index_of_before_there_were_tasks_is_for_masking(shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "old"))
    values = json.loads((folder / "index.json").read_text())
    del values["task"], values["special_tokens"]["eos"]
    (folder / "index.json").write_text(json.dumps(values))
    assert ShardIndex.load(folder) == ShardIndex.load(shards)
    assert ShardIndex.load(folder).task == "mlm"
    del values["special_tokens"]["mask"]
    (folder / "index.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"special_tokens\.mask: none.*mlm"):
        ShardIndex.load(folder)


def test_a_byte_level_tokenizer_keeps_every_character() -> None:
    tokenizer = train_tokenizer([SENTENCE, SENTENCE.upper()], 300, task="clm")
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer(ODD)["input_ids"]) == ODD
    assert {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token} == {END}
    assert len(tokenizer(SENTENCE)["input_ids"]) < 0.9 * len(SENTENCE)


def test_one_text_trains_one_byte_level_tokenizer() -> None:
    texts = [f"{SENTENCE[number:]} {number * number}" for number in range(40)]
    trained = {train_tokenizer(texts, 400, task="clm").backend_tokenizer.to_str() for _ in range(4)}
    assert len(trained) == 1


def test_gpt2s_files_are_opened_from_their_folder_or_by_the_vocabularys_name(gpt2_files: Path) -> None:
    merges = (gpt2_files / "gpt2-merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    vocabulary = json.loads((gpt2_files / "gpt2-vocab.json").read_text(encoding="utf-8"))
    stock = GPT2Tokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges])
    for path in (gpt2_files, gpt2_files / "gpt2-vocab.json"):
        opened = open_tokenizer(path, "clm")
        for text in (SENTENCE, ODD, f"one{END}two"):
            assert opened(text)["input_ids"] == stock(text)["input_ids"]
        assert opened.eos_token_id == stock.eos_token_id


def test_a_saved_tokenizer_and_its_json_are_the_one_that_was_saved(gpt2_files: Path, tmp_path: Path) -> None:
    open_tokenizer(gpt2_files).save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path / "saved" / "tokenizer.json"):
        opened = open_tokenizer(path, "clm")
        assert isinstance(opened, PreTrainedTokenizerFast) and opened.eos_token == END
        assert tokenizer_hash(path) == tokenizer_hash(gpt2_files)


@pytest.mark.skipif(not REAL.is_dir(), reason="GPT-2's vocabulary is not in ../shared/data/vocab")
def test_the_published_gpt2_vocabulary_gives_the_published_ids() -> None:
    opened = open_tokenizer(REAL, "clm")
    assert opened("Hello world")["input_ids"] == [15496, 995]
    assert (len(opened), opened.eos_token_id) == (50257, 50256)


def test_a_tokenizer_without_an_end_of_text_cuts_no_text_for_causal_models(tmp_path: Path, text: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword")
    with pytest.raises(DataError, match=r"vocab\.txt: has no eos_token.*clm"):
        small_shards(str(text), tmp_path / "out", task="clm", tokenizer=tmp_path / "vocab.txt")


def test_gpt2s_tokenizer_masks_nothing(gpt2_files: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gpt2: has no cls_token, sep_token, mask_token.*mlm"):
        small_shards(str(text), tmp_path / "out", tokenizer=gpt2_files)


def test_a_vocabulary_without_its_merges_is_refused(gpt2_files: Path) -> None:
    (gpt2_files / "gpt2-merges.txt").unlink()
    with pytest.raises(DataError, match=r"gpt2-vocab\.json: cannot be read"):
        open_tokenizer(gpt2_files / "gpt2-vocab.json")


def test_two_vocabularies_beside_merges_are_ambiguous(gpt2_files: Path) -> None:
    shutil.copy(gpt2_files / "gpt2-vocab.json", gpt2_files / "other-vocab.json")
    with pytest.raises(DataError, match=r"expected one .*gpt2-vocab\.json.*other-vocab\.json"):
        open_tokenizer(gpt2_files)


def test_what_a_causal_tokenizer_lacks_is_none() -> None:
    special = SpecialTokens.of(train_tokenizer([SENTENCE], 300, task="clm"), "clm")
    assert special == SpecialTokens(unk=0, eos=0) and special.ids == [0, 0]


def test_causal_shards_are_built_by_the_commands(text: Path, tmp_path: Path) -> None:
    tokenizer, shards = tmp_path / "tokenizer", tmp_path / "shards"
    main(f"train-tokenizer --source {text} --output {tokenizer} --vocab_size 300 --task clm".split())
    sizes = "--sequence_length 16 --shards 4 --task clm"
    main(f"build-shards --source {text} --output {shards} --tokenizer {tokenizer} {sizes}".split())
    assert verify(shards).task == "clm"
