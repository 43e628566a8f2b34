"""A causal language model small enough to ask token by token: GPT-2 of two layers, and a byte-level BPE of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

POSITIONS = 24
END = "<|endoftext|>"
TEXT = """A lobster is a large animal that lives in the sea .
It has a hard shell , which it must shed in order to grow .

The sea is cold , and the lobster is blue ; only cooking makes it red .
"""


def save_tokenizer(directory: Path, *, special: bool = True) -> PreTrainedTokenizerFast:
    """320 pieces over bytes, trained on `TEXT`; `END` begins and ends a text, unless there are no special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[END] if special else [], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    names = {"bos_token": END, "eos_token": END} if special else {}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.save_pretrained(directory)
    return wrapped


def save_gpt2(directory: Path, **changes: Any) -> Path:
    """A Hugging Face directory with the tiny model, whose weights are large enough to have opinions."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = len(save_tokenizer(directory))
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": POSITIONS, "vocab_size": vocab_size}
    config = GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes})
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(directory)
    return directory


def log_probability(model: GPT2LMHeadModel, before: list[int], token: int) -> tuple[float, bool]:
    """Of one token, given those before it, by a forward pass of its own: in nats, and whether it is the likeliest."""
    with torch.no_grad():
        logits = model(torch.tensor([before])).logits[0, -1].double()
    return float(logits.softmax(0).log()[token]), int(logits.argmax()) == token
