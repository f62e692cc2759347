"""A recipe from its YAML file and from what the command line changes of it."""

import re
from pathlib import Path
from typing import Any

import yaml

from services.training.recipe import Recipe, RecipeError, parse_recipe


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a YAML file, then `key=value` for each of the overrides, with dots into sections.

    No two overrides may be of one key, or of a section and a key in it: the later one would undo the earlier. Paths in
    the file are relative to the working directory. Raises RecipeError naming the first thing that is wrong.
    """
    try:
        raw = _yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist: give a recipe, such as examples/sft.yaml") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: of bytes, and of dates that no month has
        raise RecipeError(f"{path} cannot be read as YAML: {_line(error)}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds a {type(raw).__name__}; expected keys and values")
    _check_once(overrides)
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw)


class _Loader(yaml.SafeLoader):
    """YAML leaves open which of two equal keys counts: here neither does. Its version 1.1 takes 1e-5 for text."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Raises MarkedYAMLError naming a key that is given twice, and both lines."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is given in line {lines[key.value]} and in line {line}; expected it once"
                )
            lines[key.value] = line
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"-+0123456789"]
)


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _line(error: Exception) -> str:
    """What went wrong, in one line: YAML's own errors have several, and show the place."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())


def _check_once(overrides: list[str]) -> None:
    seen: list[tuple[str, str]] = []
    for override in overrides:
        key = f"{override.partition('=')[0]}."
        for earlier, text in seen:
            if key.startswith(earlier) or earlier.startswith(key):
                twice = min(key, earlier, key=len).removesuffix(".")
                raise RecipeError(f"{text} and {override} both give {twice}; expected it once")
        seen.append((key, override))


def _override(raw: dict[str, Any], text: str) -> None:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise RecipeError(f"{text!r} is no override; expected key=value, such as lr=1e-5 or experts.hosts=4")
    *sections, last = key.split(".")
    target = raw
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise RecipeError(f"{key}: {section} is not a section")
    try:
        parsed = _yaml(value)
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{key}: {value!r} cannot be read as YAML: {_line(error)}") from error
    target[last] = parsed
