"""Chat templates, rendered in a sandbox: a template is a program that came with the checkpoint."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.special_tokens import NAMES, named_token

MAX_RENDERED_CHARS = 8_000_000
RENDERING_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What a template's own expressions may raise."""

DEFAULT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}User: {{ message.content }}\n\n"
    "{% elif message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""DeepSeek-V2-Chat's format, for checkpoints that bring no template."""


class ChatTemplateError(ValueError):
    """The template refused the messages, or is itself faulty."""


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, with which templates mark for transformers what the model writes.

    Here it is what stands in it, in a scope of its own.
    """

    tags = {"generation"}  # noqa: RUF012  # as Extension has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """A compiled template and the special tokens it may print."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the checkpoint's chat template does not compile: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt's text; raises ChatTemplateError with the template's own words when it refuses."""
        try:
            parts: list[str] = []
            length = 0
            for part in self._template.generate(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            ):
                parts.append(part)
                length += len(part)
                if length > MAX_RENDERED_CHARS:
                    raise ChatTemplateError(f"the chat template wrote more than {MAX_RENDERED_CHARS} characters")
            return "".join(parts)
        except ChatTemplateError:
            raise
        except RENDERING_ERRORS as error:
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from error


def load_chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate:
    """chat_template.jinja, else tokenizer_config.json's chat_template, else DeepSeek-V2's format.

    Raises ChatTemplateError for what is no template, and for several of which none is the default.
    """
    special = {name: token for name in NAMES if (token := named_token(tokenizer_config, name)) is not None}
    source = _source(directory / "chat_template.jinja", tokenizer_config.get("chat_template"))
    return ChatTemplate(source or DEFAULT, {"bos_token": "", "eos_token": ""} | special)


def _source(path: Path, configured: Any) -> str | None:
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ChatTemplateError(f"{path} cannot be read: {error}") from error
    match configured:
        case None | str():
            return configured
        case [*items] if all(isinstance(item, dict) for item in items):  # several named templates
            source = {str(item.get("name")): item.get("template") for item in items}.get("default")
        case {**named}:
            source = named.get("default")
        case _:
            source = None
    if not isinstance(source, str):
        raise ChatTemplateError(
            f"tokenizer_config.json: chat_template is {configured!r:.200}; expected a template, or several by name "
            "with one called default"
        )
    return source


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)
