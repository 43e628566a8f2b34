"""DeBERTa's tokenizer: a Unigram one, whose pieces say where a word begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import DebertaV2Tokenizer

from homodistil.data.tokenizer import continuation_pieces, open_tokenizer, tokenizer_hash

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
PIECES = ["\u2581a", "\u2581wo", "rd", "\u2581", "b", "."]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Ids in the order of DeBERTaV3's own: [PAD] 0, [CLS] 1, [SEP] 2, [UNK] 3, pieces, [MASK] last."""
    scores = [-1.0, -2.0, -2.5, -3.0, -4.0, -3.5]
    vocabulary = [(token, 0.0) for token in SPECIAL] + list(zip(PIECES, scores, strict=True)) + [("[MASK]", 0.0)]
    DebertaV2Tokenizer(vocab=vocabulary).save_pretrained(tmp_path)
    return tmp_path


def test_a_debertas_directory_opens_with_its_own_ids_and_template(directory: Path) -> None:
    tokenizer = open_tokenizer(directory)
    encoded = tokenizer("a word.", "b")
    assert encoded["input_ids"] == [1, 4, 5, 6, 9, 2, 7, 8, 2]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
    assert ids == [0, 3, 1, 2, 10]


def test_a_copy_has_the_same_hash(directory: Path, tmp_path: Path) -> None:
    open_tokenizer(directory).save_pretrained(tmp_path / "copy")
    assert tokenizer_hash(tmp_path / "copy") == tokenizer_hash(directory)


def test_pieces_without_a_space_continue_a_word_and_special_tokens_do_not(directory: Path) -> None:
    continues = continuation_pieces(directory, vocab_size=12)  # one id more than pieces, as DeBERTa's tables have
    assert continues.tolist() == [False] * 4 + [False, False, True, False, True, True] + [False, False]
