"""A file that holds one JSON object, as most of a checkpoint's companions do."""

import json
from pathlib import Path
from typing import Any


def read_object(path: Path, error: type[ValueError], absent: str) -> dict[str, Any]:
    """The object in a file. Raises `error` where there is none; `absent` says what to do where there is no file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist: {absent}") from None
    except (OSError, ValueError, RecursionError) as reason:  # nesting may be deeper than Python's stack
        raise error(f"{path} cannot be read as JSON: {reason}") from reason
    if not isinstance(raw, dict):
        raise error(f"{path} holds a JSON {type(raw).__name__}; expected an object")
    return raw
