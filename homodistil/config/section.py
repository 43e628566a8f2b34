"""Section: what all sections of a configuration have in common."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are checked when assigned."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _none_takes_a_value_back(cls, value: Any, info: ValidationInfo) -> Any:
        """`none`, as a command line can say it, for what may be left out."""
        is_optional = info.field_name and type(None) in get_args(cls.model_fields[info.field_name].annotation)
        return None if is_optional and isinstance(value, str) and value.lower() == "none" else value
