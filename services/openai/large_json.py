"""JSON of answers that may be megabytes: many log-probabilities are.

The encoder is one C call, during which no thread and no event loop of the process goes on. Here it is many short ones,
made beside the event loop. A list may come as an iterator, whose items need never be there all at once: to free them,
and to look through them for garbage, are such calls too.
"""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from fastapi.responses import JSONResponse

DEPTH = 5  # an answer, its choices, one of them, its log-probabilities, one list of them
RUN = 64  # items that are there at once

EVENT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=list)
RESPONSE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=list, allow_nan=False)


class LargeResponse(JSONResponse):
    """A JSONResponse, to be made in a thread: so written that the event loop goes on meanwhile."""

    def render(self, content: Any) -> bytes:
        return b"".join(part.encode() for part in json_parts(content, RESPONSE))


def json_parts(value: Any, encoder: json.JSONEncoder, depth: int = DEPTH) -> Iterator[str]:
    """What `encoder` makes of a value, in parts. Objects and lists are gone into `depth` deep."""
    if depth and isinstance(value, dict):
        yield "{"
        for at, (key, item) in enumerate(value.items()):
            yield f"{',' if at else ''}{encoder.encode(key)}:"
            yield from json_parts(item, encoder, depth - 1)
        yield "}"
    elif depth and isinstance(value, (list, Iterator)):
        items, before = iter(value), ""
        yield "["
        while run := list(islice(items, RUN)):
            yield from _run(run, encoder, depth - 1, before)
            before = ","
        yield "]"
    else:
        yield encoder.encode(value)


def _run(items: list[Any], encoder: json.JSONEncoder, depth: int, before: str) -> Iterator[str]:
    """Some of a list's items, without its brackets."""
    if not any(isinstance(item, (dict, list, Iterator)) for item in items):
        yield before + encoder.encode(items)[1:-1]
        return
    for item in items:
        yield before
        yield from json_parts(item, encoder, depth)
        before = ","
