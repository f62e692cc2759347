"""What every request body keeps to: known fields of known types. What OpenAI has and this service lacks has a name."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

UNSUPPORTED = "unsupported_parameter"
"""Type of the fault, and code of the answer to the client."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


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


Absent = Annotated[None, BeforeValidator(_empty)]
EmptyText = Annotated[Annotated[str, Field(max_length=0)] | None, BeforeValidator(_empty)]
EmptyList = Annotated[Annotated[list[Any], Field(max_length=0)] | None, BeforeValidator(_empty)]
