"""JSON values of a file with the lines where they begin: one a line, or the items of one array."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from services.training.data.problems import Problem

BOM = b"\xef\xbb\xbf"
SPACE = " \t\r\n"
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


class Value(NamedTuple):
    """A parsed JSON value and the line where it begins, from 1."""

    line: int
    value: Any


def check_readable(path: Path) -> None:
    """Raises ValueError when there is no such file or it may not be read."""
    if not path.is_file():
        raise ValueError(
            f"{path} is {'a directory' if path.is_dir() else 'not there'}; expected a file of training data"
        )
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def read_json(path: Path) -> Iterator[Value | Problem]:
    """An array when the first character opens one, whatever the file's name; else a value a line, blank lines apart."""
    empty = True
    for item in _items(path) if _holds_an_array(path) else _lines(path):
        empty = False
        yield item
    if empty:
        yield Problem(path, 1, "", "the file is empty; expected at least one record")


def read_text(path: Path) -> str | Problem:
    """The whole file."""
    raw = path.read_bytes().removeprefix(BOM)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return _not_utf8(path, 1 + raw.count(b"\n", 0, error.start), error)
    return text if text.strip() else Problem(path, 1, "", "the file is empty; expected text")


def _holds_an_array(path: Path) -> bool:
    with path.open("rb") as file:
        for raw in file:
            if stripped := raw.removeprefix(BOM).strip():
                return stripped.startswith(b"[")
    return False


def _lines(path: Path) -> Iterator[Value | Problem]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                text = (raw.removeprefix(BOM) if line == 1 else raw).decode()
                if text.strip():
                    yield Value(line, json.loads(text))
            except UnicodeDecodeError as error:
                yield _not_utf8(path, line, error)
            except (ValueError, RecursionError) as error:
                yield _not_json(path, line, error)


def _items(path: Path) -> Iterator[Value | Problem]:
    """Stops at the first fault: nothing says where the next item would begin."""
    text = read_text(path)
    if isinstance(text, Problem):
        yield text
        return
    decoder = json.JSONDecoder()
    line, seen = 1, 0
    at = _after_space(text, text.index("[") + 1)
    closed = text.startswith("]", at)
    while not closed:
        line, seen = line + text.count("\n", seen, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield _not_json(path, line, error)
            return
        yield Value(line, value)
        at = _after_space(text, end)
        closed = text.startswith("]", at)
        if text.startswith(",", at):
            at = _after_space(text, at + 1)
        elif not closed:
            line += text.count("\n", seen, at)
            yield Problem(path, line, "", f"not JSON: expected ',' or ']' after the item, found {text[at : at + 1]!r}")
            return
    at = _after_space(text, at + 1)
    if at < len(text):
        line += text.count("\n", seen, at)
        yield Problem(path, line, "", "not JSON: expected nothing after the array; for one value a line, leave out '['")


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in SPACE:
        at += 1
    return at


def _not_json(path: Path, line: int, error: ValueError | RecursionError) -> Problem:
    where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return Problem(path, line, "", f"not JSON: {where}; expected one record a line, or one array of records")


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> Problem:
    bad = error.object[error.start : error.start + 1].hex()
    return Problem(path, line, "", f"not UTF-8: byte 0x{bad} ({error.reason}); save the file as UTF-8")
