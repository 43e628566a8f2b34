"""Models from a directory, from a config, or from nothing; every weight accounted for.

Leaves to others which directory is meant, and what is done with the model.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
)

from homodistil.errors import ConfigError, ModelError, nearest
from homodistil.files import sha256
from homodistil.models import family_of
from homodistil.models.base import ModelFamily
from homodistil.tasks import TASKS, Kind, Task

AUTO_CLASSES: dict[Kind, Any] = {
    "masked": AutoModelForMaskedLM,
    "causal": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "span": AutoModelForQuestionAnswering,
}
"""What stock transformers loads a model of each kind with."""
HEAD_WORDS: dict[Kind, str] = {
    "masked": "masked-language-model",
    "causal": "language-model",
    "classification": "classifier's",
    "regression": "regressor's",
    "span": "question-answering",
}
CONFIGS: dict[Kind, Any] = {"masked": BertConfig, "causal": GPT2Config}
"""What models are made from nothing."""
BINARIES = ("pytorch_model.bin", "pytorch_model-*.bin")
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


@cache
def model_directory(name: str | Path) -> Path:
    """The directory of a model: `name` itself, or where the Hugging Face hub's model of that name was downloaded.

    Raises `ModelError` for what is neither.
    """
    if Path(name).exists():
        return Path(name)
    try:
        found = Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
        if not any(found.glob("*.safetensors")):  # some models come in torch's older format alone
            found = Path(snapshot_download(str(name), allow_patterns=[*HUB_FILES, *BINARIES]))
        return found
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{name}: no such directory, and no model of that name could be had from the Hugging Face hub "
            f"({type(error).__name__}). Correct teacher.path or student.path; if a run leaves it there, do that run "
            "first (the comments of a recipe say which); without a network, download the model and give its directory."
        ) from None


def load_model(
    path: str | Path,
    dtype: torch.dtype,
    attention: str | None = None,
    task: Task = TASKS["mlm"],
    new_head: bool = False,
) -> PreTrainedModel:
    """The model in a Hugging Face directory, with a head for `task`, in `dtype`.

    attention: name of a registered attention function; None for transformers' own choice. new_head: the directory need
    not have this task's head; what is missing of it is drawn from torch's global generator. Raises `ModelError` for
    what else is missing, and for any weight that did not come from the directory or is all zero.
    """
    path = model_directory(path)
    config, files = load_config(path, task), weight_files(path)
    family = family_of(config, task.kind)
    try:
        model, report = AUTO_CLASSES[task.kind].from_pretrained(
            path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_attention_setting(family, attention),
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path}: the weights cannot be read: {error}. Copy or save the model again.") from error
    excused = family.head_names if new_head else ()
    missing = [name for name in sorted(report["missing_keys"]) if not name.startswith(excused)]
    mismatched = [fault for fault in sorted(report["mismatched_keys"]) if not fault[0].startswith(excused)]
    faults = [f"'{name}' is missing, and would be new random numbers" for name in missing]
    faults += [
        f"'{name}' has shape {tuple(found)}, config.json expects {tuple(expected)}"
        for name, found, expected in mismatched
    ]
    faults += [f"'{name}' is all zero" for name in _zero_weights(model)]
    layers = sorted(name for name in report["unexpected_keys"] if re.search(r"\.(layer|h)\.\d", name))
    faults += [f"'{name}' belongs to no layer that config.json describes" for name in layers]
    if faults:
        raise ModelError(
            f"{', '.join(str(file) for file in files)}: {'; '.join(faults)}. Every weight of {type(model).__name__} "
            f"must be trained: use a checkpoint saved from that class, with its {HEAD_WORDS[task.kind]} head."
            + (_headless(task) if _own_names(model, family.head_names) <= set(missing) else "")
        )
    return model


def load_config(path: str | Path, task: Task = TASKS["mlm"]) -> PretrainedConfig:
    """The config of a supported model in a directory, as it is for `task`. Raises `ModelError`."""
    path = model_directory(path)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json here. Expected a Hugging Face model directory; check the path.")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"{path / 'config.json'} cannot be read: {error}. Save the model again.") from error
    family_of(config, task.kind)
    return for_task(config, task)


def for_task(config: PretrainedConfig, task: Task) -> PretrainedConfig:
    """The config with a task's labels, in place; as it is for language modelling and spans. Raises `ModelError` for one
    that has them in another order."""
    if task.kind in ("classification", "regression"):
        names = task.classes or ("score",)
        found = [str(name).lower() for _, name in sorted((config.id2label or {}).items())]
        if sorted(found) == sorted(names) and found != list(names):
            raise ModelError(
                f"{config._name_or_path}: config.json's labels are {found}, but those of {task.name} are numbered as "
                f"{list(names)} here. Use a model with this order."
            )
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        config.problem_type = "regression" if task.kind == "regression" else "single_label_classification"
    return config


def weight_files(path: str | Path) -> list[Path]:
    """A directory's weight files, in name order. Raises `ModelError` when there is none."""
    for patterns in (("*.safetensors",), BINARIES):
        if files := sorted(file for pattern in patterns for file in model_directory(path).glob(pattern)):
            return files
    raise ModelError(f"{path}: no weights here. Expected model.safetensors; save the model with save_pretrained.")


def model_hash(path: str | Path) -> str:
    """SHA-256, in hex, over the weight files of a directory. Raises `ModelError` when there is none."""
    return sha256(*weight_files(path))


def new_config(fields: dict[str, Any], vocab_size: int, kind: Kind = "masked") -> PretrainedConfig:
    """The config of a model made from nothing, a recipe's `student.config`: a BERT, or for causal language modelling a
    GPT-2. Raises `ConfigError`, `ShapeError`."""
    if kind not in CONFIGS:
        raise ConfigError(f"a {kind} model is not made from nothing. Set student.path to a model to start from.")
    made = CONFIGS[kind]
    known = sorted(field.name for field in dataclasses.fields(made))
    for name in fields:
        if name not in known:
            hint = nearest(name, known)
            raise ConfigError(f"student.config: unknown key '{name}'.{hint} Use fields of {made.__name__}.")
    if fields.get("vocab_size", vocab_size) != vocab_size:
        raise ConfigError(
            f"student.config.vocab_size is {fields['vocab_size']}, but the shards' tokenizer has {vocab_size} tokens. "
            "Leave the key out."
        )
    try:
        config = made(**{**fields, "vocab_size": vocab_size})
    except StrictDataclassError as error:
        raise ConfigError(f"student.config: {error}") from None
    for field in ("bos_token_id", "eos_token_id"):  # GPT-2's defaults are its own vocabulary's last
        if kind == "causal" and field not in fields:
            setattr(config, field, None)
    family_of(config, kind).widths(config)
    return config


def new_model(config: PretrainedConfig, attention: str | None = None, kind: Kind = "masked") -> PreTrainedModel:
    """A fp32 model with new random weights, drawn from torch's global generator. It owns a copy of `config`."""
    setting = _attention_setting(family_of(config, kind), attention)
    return AUTO_CLASSES[kind].from_config(copy.deepcopy(config), dtype=torch.float32, **setting)


def skeleton(config: PretrainedConfig, attention: str | None = None, kind: Kind = "masked") -> PreTrainedModel:
    """A fp32 model whose parameters are on the meta device, to be narrowed, then `materialise`d.

    Its buffers are real. It owns a copy of `config`.
    """
    with torch.device("meta"):
        model = new_model(config, attention, kind)
    for module in model.modules():
        if buffers := dict(module.named_buffers(recurse=False)):
            for name, buffer in buffers.items():
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
            model._init_weights(module)
    return model


def materialise(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Give every meta parameter zeroed memory on `device`, in place; tied parameters stay one."""
    real: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta:
                filled = nn.Parameter(torch.zeros_like(parameter, device=device), parameter.requires_grad)
                setattr(module, name, real.setdefault(id(parameter), filled))


def _attention_setting(family: ModelFamily, attention: str | None) -> dict[str, str]:
    """transformers refuses some names of attention functions for a model that has no use for any."""
    return {} if attention is None or family.own_attention else {"attn_implementation": attention}


def _own_names(model: nn.Module, beginnings: tuple[str, ...]) -> set[str]:
    """Of parameters that are no other's twin."""
    return {name for name, _ in model.named_parameters() if name.startswith(beginnings)}


def _headless(task: Task) -> str:
    text = f" This one has no {HEAD_WORDS[task.kind]} head at all"
    if task.kind != "masked":
        return f"{text}: train it on the task first."
    return (
        f"{text}, as no published DeBERTaV3 has a trained one: set task.name to a benchmark's and give a teacher "
        "fine-tuned on it, or train a head on masked text first."
    )


def _zero_weights(model: nn.Module) -> Iterator[str]:
    """Matrices and LayerNorm gains without a single non-zero number; biases may be zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and not parameter.any():
            yield name
