"""What is learned of a conversation: the answers and their end tokens, whatever the template; else a refusal."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.chat_template import DEFAULT
from services.training.data.formats import Conversation, Document
from services.training.data.rendering import NotRendered, Tokens, render, tokenise
from services.training.data.training_tokenizer import TrainingTokenizer
from tests.conftest import MakeCheckpoint

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MARKED = {  # as transformers wants them, which then tells the mask itself
    "default": DEFAULT.replace(
        "Assistant: {{ message.content }}{{ eos_token }}",
        "Assistant:{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}",
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    ),
    "llama": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    ),
}
TEMPLATES = {"default": DEFAULT, "chatml": CHATML, "llama": LLAMA}
ADDED = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHAT = (("system", "Be kind."), ("user", "Hi 🐟"), ("assistant", "Hello: é "), ("user", "Bye"), ("assistant", "Bye!"))

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A directory with the tiny checkpoint's tokenizer, further tokens, and a chat template."""

    def write(template: str, added: tuple[str, ...] = ADDED, edit: Callable[[Any], object] = lambda raw: None) -> Path:
        out = tmp_path_factory.mktemp("tokenizer")
        fast = FastTokenizer.from_file(str(checkpoint("tiny") / "tokenizer.json"))
        fast.add_special_tokens([AddedToken(token, special=True) for token in added])
        raw = json.loads(fast.to_str())
        edit(raw)
        (out / "tokenizer.json").write_text(json.dumps(raw))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
        (out / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        return out

    return write


@pytest.fixture(scope="module")
def theirs(make: Make) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(make(DEFAULT))


@pytest.fixture(scope="module")
def ours(make: Make) -> dict[str, TrainingTokenizer]:
    return {name: TrainingTokenizer.load(make(template)) for name, template in TEMPLATES.items()}


def conversation(*turns: tuple[str, str]) -> Conversation:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Conversation(1, "messages", messages, tuple(f"messages[{index}].content" for index in range(len(turns))))


def tokens_of(record: Conversation | Document, tokenizer: TrainingTokenizer) -> Tokens:
    [tokens] = tokenise([render(record, tokenizer)], tokenizer)
    if isinstance(tokens, NotRendered):
        raise tokens
    return tokens


def pieces(tokens: Tokens, tokenizer: TrainingTokenizer) -> list[tuple[str, bool]]:
    """Text by text, what is learned."""
    pairs = groupby(zip(tokens.ids_T.tolist(), tokens.mask_T.tolist(), strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([token for token, _ in run], skip_special_tokens=False), bool(on)) for on, run in pairs]


def learned(template: str, make: Make, *turns: tuple[str, str], **more: Any) -> list[str]:
    tokenizer = TrainingTokenizer.load(make(template, **more))
    return [text for text, on in pieces(tokens_of(conversation(*turns), tokenizer), tokenizer) if on]


def test_an_answer_that_is_context_is_not_learned(ours: dict[str, TrainingTokenizer]) -> None:
    turns = (("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye!"))
    marked = replace(conversation(*turns), context=frozenset({1}))
    assert pieces(tokens_of(marked, ours["default"]), ours["default"]) == [
        ("<bos>User: Hi\n\nAssistant: Hello<eos>User: Bye\n\nAssistant:", False),
        (" Bye!<eos>", True),
    ]


BY_HAND = {
    "default": [
        ("<bos>Be kind.\n\nUser: Hi 🐟\n\nAssistant:", False),
        (" Hello: é <eos>", True),
        ("User: Bye\n\nAssistant:", False),
        (" Bye!<eos>", True),
    ],
    "chatml": [
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi 🐟<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello: é <|im_end|>", True),
        ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", False),
        ("Bye!<|im_end|>", True),
        ("\n", False),
    ],
    "llama": [
        (
            "<bos><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi 🐟<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("Hello: é<|eot_id|>", True),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("Bye!<|eot_id|>", True),
    ],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_mask_is_the_answers_and_their_end_tokens(ours: dict[str, TrainingTokenizer], name: str) -> None:
    tokens = tokens_of(conversation(*CHAT), ours[name])
    assert pieces(tokens, ours[name]) == BY_HAND[name]
    messages = [{"role": role, "content": content} for role, content in CHAT]
    assert tokens.ids_T.tolist() == ours[name].apply_chat_template(messages, add_generation_prompt=False)


SPECIAL = ("<bos>", "<eos>", *ADDED)  # which a text may not spell
WORDS = st.text(min_size=1, max_size=12).filter(
    lambda text: text.strip() == text and not any(token in text for token in SPECIAL)
)


@given(
    turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3),
    begin=st.booleans(),
    name=st.sampled_from([*MARKED]),
)
def test_ids_and_mask_are_transformers(
    ours: dict[str, TrainingTokenizer],
    theirs: PreTrainedTokenizerFast,
    turns: list[tuple[str, str]],
    begin: bool,
    name: str,
) -> None:
    chat = [turn for user, answer in turns for turn in (("user", user), ("assistant", answer))][begin:]
    expected = theirs.apply_chat_template(
        [{"role": role, "content": content} for role, content in chat],
        chat_template=MARKED[name],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    tokens = tokens_of(conversation(*chat), ours[name])
    assert tokens.ids_T.tolist() == expected["input_ids"]
    assert tokens.mask_T.tolist() == [bool(on) for on in expected["assistant_masks"]]


def test_batch_is_its_conversations(ours: dict[str, TrainingTokenizer]) -> None:
    chats = [conversation(*CHAT[:3]), conversation(*CHAT[1:]), Document(3, "Sea"), conversation(*CHAT)]
    tokenizer = ours["default"]
    together = tokenise([render(chat, tokenizer) for chat in chats], tokenizer)
    for chat, tokens in zip(chats, together, strict=True):
        assert isinstance(tokens, Tokens)
        assert pieces(tokens, tokenizer) == pieces(tokens_of(chat, tokenizer), tokenizer)


def test_document_is_learned_in_full_and_ends(ours: dict[str, TrainingTokenizer], make: Make) -> None:
    tokenizer = ours["default"]
    ids = tokenizer.encode("Sea and sky")
    for text in ("Sea and sky", "Sea and sky<eos>"):
        tokens = tokens_of(Document(1, text), tokenizer)
        assert tokens.ids_T.tolist() == [*ids, 1]
        assert tokens.mask_T.all()

    def beginning(raw: Any) -> None:
        raw["post_processor"] = json.loads(
            processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)]).__getstate__()
        )

    with_bos = TrainingTokenizer.load(make(DEFAULT, edit=beginning))
    assert tokens_of(Document(1, "Sea and sky"), with_bos).ids_T.tolist() == [0, *ids, 1]
    chat = tokens_of(conversation(*CHAT), with_bos)
    assert chat.ids_T.tolist().count(0) == 1


def test_document_begins_as_a_prompt_does_where_the_config_asks_for_it(make: Make) -> None:
    directory = make(DEFAULT)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    tokenizer = TrainingTokenizer.load(directory)
    assert tokens_of(Document(1, "Sea"), tokenizer).ids_T.tolist() == [*tokenizer.encode("Sea"), 1]
    assert tokenizer.encode("Sea")[0] == 0
    assert tokens_of(conversation(*CHAT), tokenizer).ids_T.tolist().count(0) == 1


def test_documents_need_an_end_token(make: Make) -> None:
    directory = make(DEFAULT)
    (directory / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no eos_token"):
        tokens_of(Document(1, "Sea"), TrainingTokenizer.load(directory))


def test_end_token_may_be_config_jsons(make: Make, checkpoint: MakeCheckpoint) -> None:
    directory = make(DEFAULT)
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "config.json").write_bytes((checkpoint("tiny") / "config.json").read_bytes())
    assert TrainingTokenizer.load(directory).eos_token_id == 1


def test_an_end_token_that_the_config_alone_names_is_learned_whole(make: Make) -> None:
    def unlisted(raw: Any) -> None:
        raw["added_tokens"] = []

    directory = make(DEFAULT, (), unlisted)
    tokenizer = TrainingTokenizer.load(directory)
    tokens = tokens_of(conversation(*CHAT), tokenizer)
    assert (tokens.ids_T[-1], tokens.mask_T[-1]) == (tokenizer.eos_token_id, True) == (1, True)
    assert tokenizer.find_control("a<eos>b") is not None
    config = json.loads((directory / "tokenizer_config.json").read_text())
    named = {name: config.pop(name) for name in ("bos_token", "eos_token")}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps(named))
    older = TrainingTokenizer.load(directory)
    assert older.eos_token_id == 1
    assert tokens_of(conversation(*CHAT), older).ids_T.tolist() == tokens.ids_T.tolist()


def test_offsets_without_their_spaces_change_no_mask(make: Make, ours: dict[str, TrainingTokenizer]) -> None:
    """Some tokenizer.json cut leading spaces off a token's characters: the line feed before an answer is then empty."""

    def trim(raw: Any) -> None:
        raw["post_processor"] = json.loads(processors.ByteLevel(trim_offsets=True).__getstate__())

    trimming = TrainingTokenizer.load(make(CHATML, edit=trim))
    assert pieces(tokens_of(conversation(*CHAT), trimming), trimming) == BY_HAND["chatml"]


def test_tokenizers_own_truncation_and_padding_are_left_aside(make: Make) -> None:
    def shorten(raw: Any) -> None:
        raw["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        raw["padding"] = {
            "strategy": {"Fixed": 99},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<bos>",
        }

    tokenizer = TrainingTokenizer.load(make(DEFAULT, edit=shorten))
    assert pieces(tokens_of(conversation(*CHAT), tokenizer), tokenizer) == BY_HAND["default"]


def test_prompt_that_ends_in_a_space_keeps_the_tokens_it_is_served_with(make: Make) -> None:
    """In the whole text the space belongs to the answer's first word, a token that the model cannot write there."""
    template = DEFAULT.replace("{% if add_generation_prompt %}Assistant:", "{% if add_generation_prompt %}Assistant: ")
    tokenizer = TrainingTokenizer.load(make(template))
    tokens = tokens_of(conversation(("user", "Hi"), ("assistant", "Hello"), *CHAT[3:]), tokenizer)
    expected = ["<bos>User: Hi\n\nAssistant: ", "Hello<eos>", "User: Bye\n\nAssistant: ", "Bye!<eos>"]
    assert [text for text, _ in pieces(tokens, tokenizer)] == expected
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert tokens.ids_T.tolist()[: len(prompt)] == prompt
    assert not tokens.mask_T[: len(prompt)].any()
    assert tokens.mask_T[len(prompt)]


def test_prompt_within_a_token_is_refused_where_texts_do_not_join(tmp_path: Path) -> None:
    fast = FastTokenizer(models.BPE(vocab={c: i for i, c in enumerate("▁HiAs:<e>")}, merges=[], unk_token="<"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fast.decoder = decoders.Metaspace(prepend_scheme="always")
    fast.add_tokens([AddedToken("s: H", normalized=False)])
    fast.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}As: {{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}As: {% endif %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(NotRendered) as caught:
        tokens_of(conversation(("assistant", "Hi")), TrainingTokenizer.load(tmp_path))
    assert "across the beginning" in caught.value.message


def test_turn_may_be_closed_by_text(make: Make) -> None:
    template = (
        "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n# end\n\n{% endfor %}"
        "{% if add_generation_prompt %}# assistant\n{% endif %}"
    )
    assert learned(template, make, *CHAT[1:]) == ["Hello: é \n# end", "Bye!\n# end"]
    blank = template.replace("\n# end", "")
    assert learned(blank, make, *CHAT[3:]) == ["Bye!\n\n"]


def test_first_of_several_closing_tokens_ends_the_turn(make: Make) -> None:
    template = CHATML.replace("<|im_end|>\n'", "<|im_end|>' + eos_token + '\n'")
    assert learned(template, make, *CHAT[3:]) == ["Bye!<|im_end|>"]


def test_words_of_the_end_within_an_answer_do_not_end_it(make: Make) -> None:
    """The content may be a part of the end token's name, or of the header's."""
    for content in ("e", "eos", "im_end", "assistant", "<", "s: H"):
        assert learned(DEFAULT, make, ("user", "e"), ("assistant", content)) == [f" {content}<eos>"]
        assert learned(CHATML, make, ("user", "e"), ("assistant", content)) == [f"{content}<|im_end|>"]


def test_empty_thoughts_of_the_template_are_learned_with_the_answer(make: Make) -> None:
    """What the template puts between prompt and content, the model must write when it is served."""
    template = CHATML.replace(
        "m.role + '\n' + m.content", "m.role + '\n' + ('<think>\n\n' if m.role == 'assistant' else '') + m.content"
    )
    assert learned(template, make, *CHAT[3:]) == ["<think>\n\nBye!<|im_end|>"]


def test_answers_without_a_question_between_are_each_learned(make: Make) -> None:
    turns = (("user", "Hi"), ("assistant", "One"), ("assistant", "Two"))
    assert learned(DEFAULT, make, *turns) == [" One<eos>", " Two<eos>"]


def test_question_at_the_end_is_not_learned(make: Make) -> None:
    assert learned(DEFAULT, make, *CHAT[1:4]) == [" Hello: é <eos>"]


FORGETFUL = (  # strips thoughts of all turns but the last
    "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content.split('</think>')[-1] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
REFUSED = {
    "later turns change earlier ones": (FORGETFUL, "messages[1].content", "otherwise when others follow"),
    "the prompt is not the turn's beginning": (
        DEFAULT.replace("%}Assistant:{% endif %}", "%}Assistant:<think>{% endif %}"),
        "messages[1].content",
        "does not lead to the turn",
    ),
    "a part of the content is left out": (
        DEFAULT.replace("Assistant: {{ message.content }}", "Assistant: {{ message.content.split('</think>')[-1] }}"),
        "messages[1].content",
        "leaves out a part",
    ),
    "the content is left out": (
        DEFAULT.replace("Assistant: {{ message.content }}", "Assistant: yes"),
        "messages[1].content",
        "depends on",
    ),
    "nothing closes the turn": (DEFAULT.replace("{{ eos_token }}", ""), "messages[1].content", "nothing behind"),
    "the end depends on the content": (
        DEFAULT.replace("{{ eos_token }}", "{{ message.content | length }}{{ eos_token }}"),
        "messages[1].content",
        "depends on",
    ),
    "the template itself refuses": (
        "{{ raise_exception('roles must alternate') }}",
        "messages",
        "roles must alternate",
    ),
}


@pytest.mark.parametrize(("template", "field", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_template_whose_answers_cannot_be_told_is_refused(make: Make, template: str, field: str, words: str) -> None:
    chat = (("user", "Hi"), ("assistant", "<think>hm</think>Hello"), ("user", "Bye"), ("assistant", "Bye"))
    with pytest.raises(NotRendered) as caught:
        learned(template, make, *chat)
    assert caught.value.field == field
    assert words in caught.value.message


@pytest.mark.parametrize("place", [0, 1])
def test_content_that_spells_a_special_token_is_refused(ours: dict[str, TrainingTokenizer], place: int) -> None:
    chat = [["user", "Hi"], ["assistant", "Hello"]]
    chat[place][1] += "<eos>"
    with pytest.raises(NotRendered) as caught:
        render(conversation(*((role, content) for role, content in chat)), ours["default"])
    assert caught.value.field == f"messages[{place}].content"
    assert "'<eos>'" in caught.value.message
