"""`python -m services.reference`: the tables of fields and metrics in docs/, from the code; --check compares."""

import argparse
import re
import sys
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from services.app_args import AppArgs
from services.backend import Reading
from services.metrics import Exposition
from services.training.recipe import Recipe

DOCS = Path(__file__).parents[1] / "docs"
COMMAND = "python -m services.reference"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
FAR = 2**31  # a bound from there on is the machine's, and no advice


class Row(NamedTuple):
    """A field: its dotted name, its default as YAML has it, which values it takes beside its type's, what it is."""

    name: str
    default: str
    takes: str
    text: str


def field_rows(model: type[BaseModel], path: str = "") -> Iterator[Row]:
    """Every field, those of sections after a row for the section; raises ValueError for one that says nothing."""
    for name, field in model.model_fields.items():
        if (section := _section(field.annotation)) is None:
            yield Row(path + name, _default(field), _takes(field), _text(path + name, field))
        else:
            yield Row(path + name, _default(field), "", _summary(section))
            yield from field_rows(section, f"{path}{name}.")


def field_table(model: type[BaseModel]) -> str:
    lines = ["| field | default | takes | |", "|---|---|---|---|"]
    lines += [f"| `{row.name}` | {row.default} | {row.takes} | {row.text} |" for row in field_rows(model)]
    return "\n".join(lines)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model of `Section` and `Section | None`; nothing is said of a list's items."""
    kinds = typing.get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "" if isinstance(default, BaseModel) else f"`{_yaml(default)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return re.sub(r"e-0+", "e-", str(value))


def _summary(section: type[BaseModel]) -> str:
    return " ".join(str(section.__doc__).split())


def _text(name: str, field: FieldInfo) -> str:
    if not field.description:
        raise ValueError(f"{name} has no description; say what it is for in its Field")
    return field.description.replace("|", "&#124;")


def _takes(field: FieldInfo) -> str:
    """A choice, or what pydantic compares a value with, where that is a person's number."""
    if typing.get_origin(field.annotation) is Literal:
        *others, last = (f"`{choice}`" for choice in typing.get_args(field.annotation))
        return f"{', '.join(others)} or {last}"
    bounds = [
        f"{word} {bound:,}"
        for kind, word in BOUNDS.items()
        for one in field.metadata
        if (bound := getattr(one, kind, None)) is not None and bound < FAR
    ]
    lengths = [getattr(one, "min_length", 0) for one in field.metadata]
    return ", ".join([*bounds, *(f"at least {least} characters" for least in lengths if least > 1)])


def metric_table() -> str:
    """What a scrape of a service of one worker, one host and one event has."""
    one: Mapping[str, Any] = defaultdict(lambda: 1, id="", state="", ways={})
    status = {
        "epoch": 1,
        "load": {"imbalance": 1},
        "nodes": {"wanted": 1, "nodes": 1},
        "change": None,
        "expert_hosts": [one],
        "attention_workers": [one],
        "events_total": {"": 1},
    }
    scraped = Exposition("").render(Reading(0, 0, status)).decode()
    lines = ["| metric | kind | labels | |", "|---|---|---|---|"]
    for family in text_string_to_metric_families(scraped):
        sample = family.samples[0]
        labels = ", ".join(f"`{label}`" for label in sample.labels)
        lines.append(f"| `{sample.name}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(lines)


TABLES: tuple[tuple[str, str, Callable[[], str]], ...] = (
    ("training.md", "recipe", lambda: field_table(Recipe)),
    ("serve.md", "arguments", lambda: field_table(AppArgs)),
    ("serve.md", "metrics", metric_table),
)
"""Document, name of the markers between which the table stands, and the table."""


def renewed(text: str, marker: str, table: str) -> str:
    """The document with the table between its markers; raises ValueError where it lacks them."""
    begin, end = f"<!-- {marker}:start -->\n", f"<!-- {marker}:end -->"
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"no {begin.strip()} and {end}, in lines of their own, between which its table stands")
    return f"{head}{begin}{table}\n{end}{tail}"


def main(arguments: Sequence[str] | None = None, docs: Path = DOCS) -> int:
    """Exit status: 1 where a table has no place, or with --check is another one."""
    parser = argparse.ArgumentParser(COMMAND, description="Write docs/'s tables of fields and metrics.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when a table is not what the code says")
    check, status = parser.parse_args(arguments).check, 0
    for name, marker, table in TABLES:
        document = docs / name
        written = document.read_text()
        try:
            wanted = renewed(written, marker, table())
        except ValueError as error:
            print(f"{document}: {error}", file=sys.stderr)
            status = 1
            continue
        if not check:
            document.write_text(wanted)
        elif written != wanted:
            print(f"{document}: the table `{marker}` is not what the code says: run `{COMMAND}`", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
