"""Hugging Face directories as stock transformers loads them: a model of any architecture, its tokenizer, its limits.

What would be measured wrongly without anyone noticing is refused here: weights that are not in the directory, an
encoder asked for the next word, a tokenizer of another vocabulary. Architectures that are trained here are
models/loading.py's; forward passes are scoring.py's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from homodistil.data.shards import ShardIndex
from homodistil.errors import DataError, ModelError
from homodistil.models.loading import AUTO_CLASSES
from homodistil.tasks import Kind

Precision = Literal["float32", "bfloat16"]
WORDS: dict[Kind, str] = {"masked": "masked language model", "causal": "causal language model"}
TASKS_OF: dict[Kind, str] = {"masked": "mlm or pseudo_perplexity", "causal": "perplexity or lambada"}
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError, StrictDataclassError)
"""What transformers raises for a directory that it cannot read."""


def check_kind(directory: Path, kind: Kind) -> PretrainedConfig:
    """The config of a model in a directory, masked or causal; no weight is read. Raises `ModelError` for another kind.

    Transformers loads an encoder as a causal model without a word, and it then sees the very tokens it is to foretell.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory}: no config.json here. Expected a Hugging Face model directory; check --model.")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except UNREADABLE as error:
        raise ModelError(f"{directory}: no {WORDS[kind]} to load: {error}") from error
    found = _kinds(config)
    if kind not in found:
        what = " or ".join(WORDS[one] for one in found) or "no language model"
        mend = f"Use --task {TASKS_OF[found[0]]}, or another --model." if found else "Use another --model."
        raise ModelError(f"{directory}: expected a {WORDS[kind]}, found {what} ({config.model_type}). {mend}")
    return config


def _kinds(config: PretrainedConfig) -> list[Kind]:
    """What a model can be asked for. Encoders with a causal head (BERT, RoBERTa, ...) are causal only as decoders."""
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    decoder = getattr(config, "is_decoder", False) or not masked
    if causal and decoder and not config.is_encoder_decoder:
        return ["causal"]
    return ["masked"] if masked else []


def check_fits(directory: Path, config: PretrainedConfig, shards: Path, index: ShardIndex) -> None:
    """Raises `ModelError` for a model with another vocabulary than the shards, or fewer positions, `DataError` for
    shards without masks."""
    if index.task != "mlm":
        raise DataError(
            f"{shards}: built for {index.task}, but a masked language model is measured on shards for mlm. Build them "
            "with: data_prep/build_shards.py --task mlm."
        )
    if config.vocab_size != index.vocab_size:
        raise ModelError(
            f"{directory}: vocab_size is {config.vocab_size}, but {shards} was tokenized with {index.vocab_size} "
            f"tokens. Build shards with the model's tokenizer: data_prep/build_shards.py --tokenizer {directory}."
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and limit < index.sequence_length:
        raise ModelError(
            f"{directory}: {limit} positions, but {shards} holds sequences of {index.sequence_length} tokens. "
            f"Build shards with --sequence_length {limit} or less."
        )


def load_stock(directory: Path, dtype: str, kind: Kind = "masked") -> PreTrainedModel:
    """The language model in a directory, of any architecture, in eval mode, on the host. Raises `ModelError`."""
    check_kind(directory, kind)
    model = load_whole(directory, dtype, kind, WORDS[kind], f"saved with its {WORDS[kind].replace(' ', '-')} head")
    model.config.use_cache = False  # keys and values for words to come, which nobody asks for
    return model


def load_whole(directory: Path, dtype: str, kind: Kind, words: str, whose: str) -> PreTrainedModel:
    """A model of this kind in eval mode, on the host. words: what it is; whose: what a checkpoint must be to have all
    its weights. Raises `ModelError` where some are missing."""
    try:
        model, report = AUTO_CLASSES[kind].from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except UNREADABLE as error:
        raise ModelError(f"{directory}: no {words} to load: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{directory}: {', '.join(missing)} missing, so its scores would be those of random numbers. "
            f"Expected a checkpoint {whose}."
        )
    return model.eval()


def stock_tokenizer(directory: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises `ModelError` where there is none, or one whose ids the model lacks.

    Without its files transformers makes one that knows no word.
    """
    mend = "Copy the files of the tokenizer that it was trained with into the directory."
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the libraries raise many kinds, all meaning the same to a user
        raise ModelError(f"{directory}: the tokenizer cannot be read ({error}). {mend}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(f"{directory}: no tokenizer here, expected a tokenizer.json or its like. {mend}")
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, but config.json's vocab_size is "
            f"{config.vocab_size}. {mend}"
        )
    return tokenizer


def positions(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens of the longest sequence that a model reads; None where neither config nor tokenizer has a limit.

    RoBERTa's config counts two positions that no token can have; its tokenizer knows better.
    """
    of_config = getattr(config, "max_position_embeddings", None)
    limits = [limit for limit in (of_config, tokenizer.model_max_length) if limit and 0 < limit < 1e9]
    return min(limits, default=None)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
