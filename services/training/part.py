"""What every section of a recipe refuses: unknown keys, numbers that are not finite, and truth values for numbers."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator


def no_truth(value: Any) -> Any:
    """Raises ValueError for true and false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a truth value where none is expected")
    return value


Amount = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(no_truth)]


class Part(BaseModel):
    """A section."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return value if cls.model_fields[info.field_name].annotation is bool else no_truth(value)
