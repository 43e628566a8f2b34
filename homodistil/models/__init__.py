"""Architectures: one `ModelFamily` per Hugging Face model type."""

from transformers import PretrainedConfig

from homodistil.errors import ModelError, nearest
from homodistil.models.base import ModelFamily
from homodistil.models.bert import BertFamily

FAMILIES: dict[str, ModelFamily] = {"bert": BertFamily()}
"""Hugging Face `model_type` -> its family."""


def family_of(config: PretrainedConfig) -> ModelFamily:
    """The family of a config's model type. Raises `ModelError`."""
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{config._name_or_path or 'config.json'}: model_type is '{config.model_type}', which is not supported."
            f"{nearest(config.model_type, FAMILIES)} Use a model of type: {', '.join(FAMILIES)}."
        )
    return FAMILIES[config.model_type]
