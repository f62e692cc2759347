"""Chat templates: rendered as transformers renders them, in a sandbox that they cannot leave or exhaust."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import model.chat_template
from model.chat_template import DEFAULT, ChatTemplate, ChatTemplateError
from model.tokenizer import Tokenizer
from tests.checkpoints import CHAT_TEMPLATE

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}
USER: dict[str, Any] = {"role": "user", "content": "Hi <b>there</b> & 🐟\n"}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": " Hello "}, USER],
]
BLOCKS = """{{ bos_token }}
{%- set ns = namespace(turns=0) %}
{% for m in messages %}
    {% if m.role == 'system' %}
        {% continue %}
    {% endif %}
    {% set ns.turns = ns.turns + 1 %}
[{{ ns.turns }}] {{ m.content | trim }} {{ m | tojson }} {{ m | tojson(indent=2) }}
    {{- m | tojson(separators=(',', ':'), sort_keys=True) }}
    {% if ns.turns > 9 %}{% break %}{% endif %}
{% endfor %}
{{ 'Assistant:' if add_generation_prompt and not tools else eos_token }}
"""

MARKED = """{{ bos_token }}
{%- set last = 'none' %}
{% for m in messages %}
    {% if m.role == 'assistant' %}
        {{- 'Assistant:' }}
        {% generation %}
            {%- set last = m.content %}
            {{- last | trim }} {{ loop.index }}
        {% endgeneration %}
        {{- last }}
    {% else %}
[{{ m.role }}] {% generation %}{% if loop.last %}{{ m.content }}{% endif %}{% endgeneration %}

    {% endif %}
{% endfor %}
{{ last }}{% if add_generation_prompt %}Assistant:{% endif %}
"""


@pytest.fixture(scope="module")
def theirs(small: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(small)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["user", "system", "turns"])
@pytest.mark.parametrize(
    "source", [CHAT_TEMPLATE, DEFAULT, BLOCKS, MARKED], ids=["checkpoint", "default", "blocks", "marked"]
)
def test_rendering_is_transformers(
    theirs: PreTrainedTokenizerFast, source: str, messages: list[dict[str, Any]], prompt: bool
) -> None:
    expected = theirs.apply_chat_template(messages, chat_template=source, add_generation_prompt=prompt, tokenize=False)
    assert ChatTemplate(source, SPECIAL).render(messages, prompt) == expected


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["user", "system", "turns"])
def test_ids_of_a_conversation_are_transformers(
    small: Path, theirs: PreTrainedTokenizerFast, messages: list[dict[str, Any]], prompt: bool
) -> None:
    expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert Tokenizer.load(small).apply_chat_template(messages, prompt) == expected


def test_template_that_prints_the_first_token_gets_no_second_one(copy: Path) -> None:
    """Where tokenizer.json itself puts <bos> before a text."""
    raw = json.loads((copy / "tokenizer.json").read_text())
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}},
    }
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(copy)
    assert tokenizer.encode("Hi")[0] == 0
    assert tokenizer.apply_chat_template([USER]).count(0) == 1


def test_default_is_v2_chats_format() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]
    rendered = ChatTemplate(DEFAULT, SPECIAL).render(messages)
    assert rendered == "<bos>S\n\nUser: U\n\nAssistant: A<eos>User: V\n\nAssistant:"


def load_with(copy: Path, template: object, jinja: str | None) -> Tokenizer:
    """A tokenizer whose config carries `template`, beside a chat_template.jinja of `jinja`."""
    raw = json.loads((copy / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (copy / "tokenizer_config.json").write_text(json.dumps(raw))
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    if jinja is not None:
        (copy / "chat_template.jinja").write_text(jinja)
    return Tokenizer.load(copy)


NAMED = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "named"}]


@pytest.mark.parametrize(
    ("template", "jinja", "rendered"),
    [
        ("config", "file", "file"),
        ("config", None, "config"),
        (NAMED, None, "named"),
        ({"tool_use": "tool", "default": "named"}, None, "named"),
        (None, None, "<bos>User: Hi <b>there</b> & 🐟\n\n\nAssistant:"),
    ],
)
def test_template_comes_from_the_file_then_the_config_then_v2s(
    copy: Path, template: object, jinja: str | None, rendered: str
) -> None:
    tokenizer = load_with(copy, template, jinja)
    assert tokenizer.apply_chat_template([USER]) == tokenizer.encode(rendered)


@pytest.mark.parametrize("template", [NAMED[:1], [{"name": "default"}], ["text"], {"tool_use": "tool"}, 3])
def test_a_template_that_is_none_is_named(copy: Path, template: object) -> None:
    with pytest.raises(ChatTemplateError, match=r"tokenizer_config\.json: chat_template is .*expected a template, or"):
        load_with(copy, template, None)
    load_with(copy, template, "file")


def test_a_template_that_is_not_utf8_is_named(copy: Path) -> None:
    load_with(copy, None, "file")
    (copy / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ChatTemplateError, match=r"chat_template\.jinja cannot be read: 'utf-8'"):
        Tokenizer.load(copy)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages[0]['__class__'].__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
    ],
)
def test_sandbox_refuses_escapes_and_mutation(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"refused the messages: .*(unsafe|not safe|no attribute)"):
        ChatTemplate(source, SPECIAL).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{m.__class__}'.format_map({'m': messages}) }}",
        "{{ raise_exception.__globals__ }}",
    ],
)
def test_sandbox_prints_nothing_of_what_is_hidden(source: str) -> None:
    assert ChatTemplate(source, SPECIAL).render([USER]) == ""


@pytest.mark.parametrize("source", ["{% include 'x' %}", "{% import '/etc/passwd' as x %}", "{% extends 'x' %}"])
def test_template_reads_no_files(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, SPECIAL).render([USER])


def test_endless_output_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.chat_template, "MAX_RENDERED_CHARS", 10_000)
    source = "{% for a in range(99999) %}{% for b in range(99999) %}spam{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="wrote more than 10000 characters"):
        ChatTemplate(source, SPECIAL).render([USER])


def test_output_up_to_the_limit_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.chat_template, "MAX_RENDERED_CHARS", 4)
    assert ChatTemplate("{{ 'spam' }}", SPECIAL).render([USER]) == "spam"
    with pytest.raises(ChatTemplateError, match="more than 4 characters"):
        ChatTemplate("{{ 'spams' }}", SPECIAL).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(10 ** 9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ 'x'.split('') }}",
        "{{ 'x'.index('y') }}",
        "{{ undefined.field }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content }}",
    ],
)
def test_template_that_fails_raises_a_chat_template_error(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="the chat template refused the messages: "):
        ChatTemplate(source, SPECIAL).render([USER])


def test_template_refuses_in_its_own_words() -> None:
    source = "{% if messages[0].role != 'system' %}{{ raise_exception('start with a system message') }}{% endif %}"
    with pytest.raises(ChatTemplateError, match="start with a system message"):
        ChatTemplate(source, SPECIAL).render([USER])


@pytest.mark.parametrize("source", ["{% for %}", "{{ unclosed", "{% endif %}", "{{ x | no_such_filter }}"])
def test_template_that_does_not_compile_is_named(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="the checkpoint's chat template does not compile: "):
        ChatTemplate(source, SPECIAL)
