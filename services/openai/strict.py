"""What every request body keeps to: known fields of known types. What OpenAI has and this service lacks has a name."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

UNSUPPORTED = "unsupported_parameter"
"""Type of the fault, and code of the answer to the client."""


class Strict(BaseModel):
    """An object whose keys are all known.

    Of more keys than there are fields only the first unknown one is looked at: each is an error of its own, made while
    the event loop waits, and a body has room for a hundred thousand.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, given: object) -> object:
        fields = cls.__pydantic_fields__
        if not isinstance(given, dict) or len(given) <= len(fields):
            return given
        unknown = next(key for key in given if key not in fields)
        return {name: given[name] for name in fields if name in given} | {unknown: given[unknown]}


def lacks(*values: object, instead: str = "leave it out") -> BeforeValidator:
    """Refuses values that OpenAI knows, or objects of such a type. What is no value of OpenAI's is left to the type."""

    def check(given: object) -> object:
        named = given.get("type") if isinstance(given, dict) else given
        if named in values:
            raise PydanticCustomError(
                UNSUPPORTED, "{named} is not supported: {instead}", {"named": repr(named), "instead": instead}
            )
        return given

    return BeforeValidator(check)


def _empty(given: object) -> object:
    if given is None or given == [] or given == "":
        return given
    raise PydanticCustomError(UNSUPPORTED, "is not supported: leave it out")


def at_most(count: int) -> BeforeValidator:
    """Refuses a longer object before any of its values is looked at; pydantic itself counts the faultless ones."""

    def check(given: object) -> object:
        if isinstance(given, dict) and len(given) > count:
            sizes = {"field_type": "Dictionary", "max_length": count, "actual_length": len(given)}
            raise PydanticKnownError("too_long", sizes)
        return given

    return BeforeValidator(check)


Absent = Annotated[None, BeforeValidator(_empty)]
EmptyText = Annotated[Annotated[str, Field(max_length=0)] | None, BeforeValidator(_empty)]
EmptyList = Annotated[Annotated[list[Any], Field(max_length=0)] | None, BeforeValidator(_empty)]
