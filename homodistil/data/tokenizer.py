"""Tokenizers: opened from wherever they come, or trained on the corpus itself, as WordPiece or as byte-level BPE.

Owns special tokens, the vocabulary's hash, and which pieces continue a word. Leaves encoding to encoder.py.
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
from homodistil.tasks import LanguageTask

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CONTINUATION = "##"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
"""How the names of GPT-2's files end."""
WORD_STARTS = ("\u2581", "\u0120")
"""What SentencePiece and byte-level BPE write for the space before a word: their pieces say where a word begins,
WordPiece's where not."""
ROLES = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
END_OF_TEXT = "<|endoftext|>"
GPT2_ROLES = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
NEEDED: dict[LanguageTask, tuple[str, ...]] = {"mlm": tuple(ROLES), "clm": ("eos_token",)}
"""Special tokens without which text cannot be cut into sequences."""


def open_tokenizer(path: Path, task: LanguageTask | None = None) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a Hugging Face directory, a tokenizer.json, a BERT vocab.txt, or GPT-2's vocab.json and
    merges.txt: the one or the folder with both. task: what its special tokens must suffice for. Raises `DataError`."""
    if not path.exists():
        raise DataError(f"tokenizer {path}: no such file or folder. Give a Hugging Face directory or a vocab.txt.")
    try:
        tokenizer = _open(path)
    except Exception as error:  # the libraries raise many kinds, all meaning the same to a user
        raise DataError(f"tokenizer {path}: cannot be read ({error}). Give a Hugging Face directory.") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"tokenizer {path}: found {type(tokenizer).__name__}, expected one with a tokenizer.json.")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes of a folder without its files
        raise DataError(f"tokenizer {path}: it has no words. Copy a tokenizer.json or vocab.txt into the folder.")
    needed = NEEDED[task] if task else ()
    if missing := [role for role in needed if getattr(tokenizer, role) is None]:
        raise DataError(
            f"tokenizer {path}: has no {', '.join(missing)}. Sequences for {task} need all of {list(needed)}. "
            "Give another tokenizer, or another --task."
        )
    return tokenizer


def _open(path: Path) -> PreTrainedTokenizerBase:
    if path.is_dir() and _is_bare(path):
        path = _only_vocabulary(path)
    if path.is_dir():
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    if path.name.endswith(VOCABULARY):
        merges = path.with_name(path.name.removesuffix(VOCABULARY) + MERGES)
        return _wrap(_byte_level(models.BPE.from_file(str(path), str(merges))))
    if path.suffix == ".json":
        return _wrap(Tokenizer.from_file(str(path)))
    pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # other separators may be pieces
    repeated = [piece for piece, count in Counter(pieces).items() if count > 1]
    if repeated:
        raise ValueError(f"line {pieces.index(repeated[0]) + 1}, '{repeated[0]}', stands there more than once")
    cased = any(piece != piece.lower() for piece in pieces if piece not in SPECIAL)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return _wrap(_word_piece(vocabulary, lowercase=not cased))


def _is_bare(folder: Path) -> bool:
    """Whether a folder holds GPT-2's two files without anything that says so."""
    described = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "config.json"))
    return not described and any(folder.glob(f"*{MERGES}"))


def _only_vocabulary(folder: Path) -> Path:
    found = sorted(folder.glob(f"*{VOCABULARY}"))
    if len(found) != 1:
        raise ValueError(f"expected one *{VOCABULARY} beside the merges, found {[path.name for path in found]}")
    return found[0]


def train_tokenizer(
    texts: Sequence[str], vocab_size: int, *, task: LanguageTask = "mlm", progress: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of about `vocab_size` pieces, special tokens first; the same for the same text.

    For `mlm` an uncased WordPiece; for `clm` a byte-level BPE, of 257 pieces at least: every byte, and the end of text.
    """
    train = _trained_word_piece if task == "mlm" else _trained_byte_level
    return _wrap(train(texts, vocab_size, progress))


def _trained_byte_level(texts: Sequence[str], vocab_size: int, progress: bool) -> Tokenizer:
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    """GPT-2's splitting and bytes around a vocabulary and its merges; nothing is added to a text."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _trained_word_piece(texts: Sequence[str], vocab_size: int, progress: bool) -> Tokenizer:
    """The library numbers the continuations of characters in the order of a randomly seeded hash map, and breaks ties
    by number: one text would give many vocabularies. Given as special tokens, they are numbered in our order instead.
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
    return _word_piece(tokenizer.get_vocab(), lowercase=True)


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
    roles = (*GPT2_ROLES.items(), *ROLES.items())  # where both are there, BERT's count
    present = {role: token for role, token in roles if token in vocabulary}
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
    continued = isinstance(tokenizer.backend_tokenizer.model, models.WordPiece)
    continues = np.zeros(vocab_size, dtype=np.bool_)
    for piece, number in tokenizer.get_vocab().items():
        continues[number] = piece.startswith(CONTINUATION) if continued else not piece.startswith(WORD_STARTS)
    continues[tokenizer.all_special_ids] = False
    return continues


def piece_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What each piece looks like in a text, in id order."""
    alone = [[number] for number in range(len(tokenizer))]
    return tokenizer.backend_tokenizer.decode_batch(alone, skip_special_tokens=False)
