"""Tokenizers: opened from wherever they come, or trained as WordPiece on the corpus itself.

Owns special tokens, the vocabulary's hash, and which pieces continue a word. Leaves encoding to build.py.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from homodistil.errors import DataError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CONTINUATION = "##"
WORD_START = "\u2581"
"""What SentencePiece writes for the space before a word: its pieces say where a word begins, WordPiece's where not."""
ROLES = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def open_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a Hugging Face directory, a tokenizer.json or a BERT vocab.txt. Raises `DataError`."""
    if not path.exists():
        raise DataError(f"tokenizer {path}: no such file or folder. Give a Hugging Face directory or a vocab.txt.")
    try:
        tokenizer = _open(path)
    except Exception as error:  # the libraries raise many kinds, all meaning the same to a user
        raise DataError(f"tokenizer {path}: cannot be read ({error}). Give a Hugging Face directory.") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"tokenizer {path}: found {type(tokenizer).__name__}, expected one with a tokenizer.json.")
    missing = [role for role in ROLES if getattr(tokenizer, role) is None]
    if missing:
        raise DataError(f"tokenizer {path}: has no {', '.join(missing)}. Masked sequences need all of {list(ROLES)}.")
    return tokenizer


def _open(path: Path) -> PreTrainedTokenizerBase:
    if path.is_dir():
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    if path.suffix == ".json":
        return _wrap(Tokenizer.from_file(str(path)))
    pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # other separators may be pieces
    repeated = [piece for piece, count in Counter(pieces).items() if count > 1]
    if repeated:
        raise ValueError(f"line {pieces.index(repeated[0]) + 1}, '{repeated[0]}', stands there more than once")
    cased = any(piece != piece.lower() for piece in pieces if piece not in SPECIAL)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return _wrap(_word_piece(vocabulary, lowercase=not cased))


def train_tokenizer(texts: Sequence[str], vocab_size: int, *, progress: bool = False) -> PreTrainedTokenizerFast:
    """An uncased WordPiece tokenizer of about `vocab_size` pieces, special tokens first; the same for the same text.

    The library numbers the continuations of characters in the order of a randomly seeded hash map, and breaks ties by
    number: one text would give many vocabularies. Given as special tokens, they are numbered in our order instead.
    """
    tokenizer = _word_piece({}, lowercase=True)
    alphabet = _alphabet(tokenizer, texts, max(64, vocab_size // 32))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *(CONTINUATION + character for character in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(_word_piece(tokenizer.get_vocab(), lowercase=True))


def _alphabet(tokenizer: Tokenizer, texts: Iterable[str], size: int) -> list[str]:
    """The most frequent characters of the normalised text, in code order."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    visible = (character for character in counts if not character.isspace())
    return sorted(sorted(visible, key=lambda character: (-counts[character], character))[:size])


def _word_piece(vocabulary: dict[str, int], *, lowercase: bool) -> Tokenizer:
    """BERT's normalisation, splitting and `[CLS] A [SEP] B [SEP]` template around a WordPiece vocabulary."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix=CONTINUATION))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
    if {"[CLS]", "[SEP]"} <= vocabulary.keys():
        ends = ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
        tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    vocabulary = tokenizer.get_vocab()
    present = {role: token for role, token in ROLES.items() if token in vocabulary}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **present)


def tokenizer_hash(path: Path) -> str:
    """sha256 of a tokenizer's pieces in id order: equal for two serialisations of one vocabulary."""
    return vocabulary_hash(open_tokenizer(path))


def vocabulary_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()


def continuation_pieces(path: Path, vocab_size: int) -> NDArray[np.bool_]:
    """(vocab_size,) of whether a piece continues the word of the piece before it."""
    tokenizer = open_tokenizer(path)
    pieces = tokenizer.get_vocab()
    marks_starts = any(piece.startswith(WORD_START) for piece in pieces)
    continues = np.zeros(vocab_size, dtype=np.bool_)
    for piece, number in pieces.items():
        continues[number] = not piece.startswith(WORD_START) if marks_starts else piece.startswith(CONTINUATION)
    continues[tokenizer.all_special_ids] = False
    return continues
