"""Architectures: one `ModelFamily` per Hugging Face model type."""

from collections.abc import Callable

from transformers import PretrainedConfig

from homodistil.errors import ModelError, nearest
from homodistil.models.base import ModelFamily
from homodistil.models.bert import BertFamily
from homodistil.models.deberta import DebertaFamily
from homodistil.models.gpt2 import Gpt2Family
from homodistil.tasks import Kind

FAMILIES: dict[str, Callable[[Kind], ModelFamily]] = {
    "bert": BertFamily,
    "gpt2": Gpt2Family,
    "deberta-v2": DebertaFamily,
}
"""Hugging Face `model_type` -> its family, given what its models are asked for."""


def family_of(config: PretrainedConfig, kind: Kind = "masked") -> ModelFamily:
    """The family of a config's model type. Raises `ModelError`."""
    where = config._name_or_path or "config.json"
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{where}: model_type is '{config.model_type}', which is not supported."
            f"{nearest(config.model_type, FAMILIES)} Use a model of type: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[config.model_type](kind)
    if kind not in family.kinds:
        raise ModelError(
            f"{where}: a {config.model_type} model serves {', '.join(family.kinds)} tasks, not {kind} ones. "
            "Set task.name to another task, or use another model."
        )
    return family.for_config(config)
