"""Typed reading of a config's fields; every refusal names the field, its value and what was expected."""

import sys
from collections.abc import Mapping, Sequence


class ConfigError(ValueError):
    """config.json holds something that cannot be served; the message names the field and the fix."""


class Fields:
    """Reads fields of one JSON object. A missing field without a default is refused by name."""

    def __init__(self, raw: Mapping[str, object], where: str = "") -> None:
        self._raw = raw
        self._where = where

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{self._where}{name} is {value!r}; expected an integer of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise ConfigError(f"{self._where}{name} is {value!r}; expected a finite number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._where}{name} is {value!r}; expected true or false")
        return value

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        value = self._get(name, default)
        if value not in allowed:
            expected = " or ".join(repr(choice) for choice in allowed)
            raise ConfigError(f"{self._where}{name} is {value!r}; expected {expected}")
        return str(value)

    def token(self, name: str, vocabulary: int) -> int | None:
        """A token id within the vocabulary, or null."""
        value = self._raw.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocabulary:
            raise ConfigError(f"{self._where}{name} is {value!r}; expected a token id below {vocabulary}")
        return value

    def tokens(self, name: str, vocabulary: int) -> tuple[int, ...]:
        """One token id or a list of them; empty when null."""
        value = self._raw.get(name)
        values = value if isinstance(value, list) else [value]
        found = (Fields({name: item}, self._where).token(name, vocabulary) for item in values)
        return tuple(token for token in found if token is not None)

    def _get(self, name: str, default: object) -> object:
        value = self._raw.get(name)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"{self._where}{name} is missing; expected it in config.json")
        return default
