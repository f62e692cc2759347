"""Text to ids and back: as transformers does it, also piece by piece and for bytes that are no text."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.checkpoint import CheckpointError
from model.tokenizer import LONG_IDS, LONG_TEXT, Detokenizer, Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand\ttabs \n\n\r\n lines  ",
    "def f(x: int) -> str:\n    return f'{x}'  # comment",
    "Größe, naïve, ångström, 東京タワー, Привет, مرحبا, שלום",
    "🐟🐠🐡 👩‍👩‍👧‍👦 🏳️‍🌈 é é",
    "\u200b\ufeff\u00a0\u3000\x00\x7f",
    "<bos>special<eos> inside < bos >",
    "\U0001d54a\U0001d559 \U0010ffff \ufffd",
    "3.14159265358979 1,000,000",
]


@pytest.fixture(scope="module")
def ours(small: Path) -> Tokenizer:
    return Tokenizer.load(small)


@pytest.fixture(scope="module")
def theirs(small: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(small)


@pytest.fixture(scope="module")
def token_of_byte(ours: Tokenizer) -> dict[int, int]:
    """Token ids of the 256 single bytes."""
    single = {ours.token_bytes(token): token for token in range(ours.vocab_size) if len(ours.token_bytes(token)) == 1}
    return {byte[0]: token for byte, token in single.items()}


def pieces(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_ids_and_text_are_transformers(
    ours: Tokenizer, theirs: PreTrainedTokenizerFast, text: str, special: bool
) -> None:
    ids = ours.encode(text, add_special_tokens=special)
    assert ids == theirs(text, add_special_tokens=special)["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )


@given(text=st.text())
def test_ids_of_any_text_are_transformers(ours: Tokenizer, theirs: PreTrainedTokenizerFast, text: str) -> None:
    assert ours.encode(text) == theirs(text)["input_ids"]


@given(text=st.text())
def test_bytes_of_tokens_joined_are_the_text(ours: Tokenizer, text: str) -> None:
    assert b"".join(ours.token_bytes(token) for token in ours.encode(text)) == text.encode()


LONG = [*TEXTS, "the whale <bos>swims — 東京 🐟 " * 400]


@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("special", [True, False])
def test_long_texts_have_the_ids_offsets_and_words_of_short_ones(
    copy: Path, monkeypatch: pytest.MonkeyPatch, text: str, special: bool
) -> None:
    """They go to the fast tokenizer another way, also where tokens are added to them."""
    configure(copy, add_bos_token=True, add_eos_token=True)
    tokenizer = Tokenizer.load(copy)
    found = []
    for longest in (0, 1 << 30):
        monkeypatch.setattr("model.tokenizer.LONG_TEXT", longest)
        monkeypatch.setattr("model.tokenizer.LONG_IDS", longest)
        ids = tokenizer.encode(text, special)
        words = [tokenizer.decode(ids, skip) for skip in (True, False)]
        found.append((ids, tokenizer.encode_with_offsets(text, special), words))
    assert found[0] == found[1]
    assert (found[0][0][-1:] == [1]) is special


def test_what_is_long_keeps_no_thread_waiting(ours: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast tokenizer lets other threads go on during its batches alone."""

    class Watched:
        """A fast tokenizer that takes nothing long in its other methods."""

        def __init__(self, fast: FastTokenizer) -> None:
            self.encode_batch, self.encode_batch_fast = fast.encode_batch, fast.encode_batch_fast
            self.decode_batch = fast.decode_batch

    text = "the whale swims " * 1000
    ids, offsets = ours.encode_with_offsets(text)
    assert min(len(text), len(ids)) > max(LONG_TEXT, LONG_IDS)
    monkeypatch.setattr(ours, "_fast", Watched(ours._fast))
    assert (ours.encode(text), ours.encode_with_offsets(text), ours.decode(ids)) == (ids, (ids, offsets), text)
    with pytest.raises(AttributeError):
        ours.encode("short")


def test_special_tokens_are_known_by_name(ours: Tokenizer) -> None:
    assert [ours.is_special(token) for token in (0, 1, 2)] == [True, True, False]
    assert ours.token_text(0) == "<bos>"
    assert ours.token_bytes(1) == b"<eos>"


def test_id_beyond_the_vocabulary_is_empty_text(ours: Tokenizer) -> None:
    assert (ours.token_text(10**6), ours.token_bytes(10**6), ours.decode([10**6])) == ("", b"", "")


@given(data=st.data(), skip=st.booleans())
def test_pieces_joined_are_the_whole_whatever_the_tokens(ours: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 3), max_size=30))
    assert "".join(pieces(ours, ids, skip)) == ours.decode(ids, skip)


@given(data=st.data(), skip=st.booleans())
def test_pieces_joined_are_the_whole_for_broken_utf8(
    ours: Tokenizer, token_of_byte: dict[int, int], data: st.DataObject, skip: bool
) -> None:
    """Single bytes that begin, continue and break characters, among special and unknown tokens."""
    lead = st.sampled_from([*"aé€🐌".encode(), 0x80, 0xBF, 0xC0, 0xE0, 0xED, 0xA0, 0xF0, 0xF4, 0x90, 0xFF])
    byte = lead.map(token_of_byte.__getitem__)
    ids = data.draw(st.lists(byte | st.sampled_from([0, 1, 10**6]), max_size=24))
    assert "".join(pieces(ours, ids, skip)) == ours.decode(ids, skip)


@pytest.mark.parametrize(
    "raw", [b"\x80\x80\x80" + "🐌".encode(), b"\x80\x80\x80\xf0\x9f", b"\xf0\x9f\xf0\x9f\xf0\x9f\x90\x8c"]
)
def test_character_after_broken_bytes_arrives_whole(ours: Tokenizer, token_of_byte: dict[int, int], raw: bytes) -> None:
    ids = [token_of_byte[byte] for byte in raw]
    assert "".join(pieces(ours, ids)) == raw.decode(errors="replace")


def test_character_arrives_with_its_last_byte_even_across_special_tokens(
    ours: Tokenizer, token_of_byte: dict[int, int]
) -> None:
    first, second, third = (token_of_byte[byte] for byte in "€".encode())
    assert pieces(ours, [first, second, third]) == ["", "", "€", ""]
    assert pieces(ours, [first, 0, 0, 1, 0, second, third]) == ["", "", "", "", "", "", "€", ""]


def test_plain_text_is_not_held_back(ours: Tokenizer) -> None:
    ids = ours.encode("def f(x): return 1")
    assert pieces(ours, ids) == [*(ours.token_text(token) for token in ids), ""]


@pytest.mark.parametrize("token_count", [100, 1000])
@pytest.mark.parametrize("byte", [ord("a"), 0x80, None])
def test_cost_of_a_token_does_not_grow_with_the_answer(
    ours: Tokenizer,
    token_of_byte: dict[int, int],
    monkeypatch: pytest.MonkeyPatch,
    byte: int | None,
    token_count: int,
) -> None:
    decoded: list[int] = []
    decode = ours.decode

    def counting(ids: list[int], skip_special_tokens: bool = True) -> str:
        decoded.append(len(ids))
        return decode(ids, skip_special_tokens)

    monkeypatch.setattr(ours, "decode", counting)
    token = 1 if byte is None else token_of_byte[byte]
    pieces(ours, [token] * token_count)
    assert sum(decoded) <= 12 * token_count


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"model": {"type": "Unknown"}}', "\xff"])
def test_broken_tokenizer_file_is_named(copy: Path, text: str) -> None:
    (copy / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(copy)


def test_absent_tokenizer_file_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(copy)


@pytest.mark.parametrize("text", ["{", "\xff", "[]", '"text"'])
def test_broken_tokenizer_config_is_named(copy: Path, text: str) -> None:
    (copy / "tokenizer_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json (cannot be read as JSON|holds)"):
        Tokenizer.load(copy)


def test_tokenizer_config_may_be_absent(copy: Path, ours: Tokenizer) -> None:
    (copy / "tokenizer_config.json").unlink()
    assert Tokenizer.load(copy).encode("Hello") == ours.encode("Hello")


def test_special_tokens_may_be_written_as_objects(copy: Path, ours: Tokenizer) -> None:
    raw = json.loads((copy / "tokenizer_config.json").read_text())
    raw["bos_token"] = {"content": "<bos>", "lstrip": False, "normalized": True}
    (copy / "tokenizer_config.json").write_text(json.dumps(raw))
    messages = [{"role": "user", "content": "Hello"}]
    assert Tokenizer.load(copy).apply_chat_template(messages) == ours.apply_chat_template(messages)


@pytest.mark.parametrize("trim", [None, False, True])
def test_offsets_are_where_the_texts_of_tokens_begin(copy: Path, trim: bool | None) -> None:
    """Whether tokenizer.json leaves spaces out of its own offsets or not, and beside tokens that are added."""
    raw = json.loads((copy / "tokenizer.json").read_text())
    if trim is not None:
        raw["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": trim, "use_regex": True}
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    plain = Tokenizer.load(copy)
    for text in ("Hello, the  world", "<bos>def f(x): é 東京 🐟<eos> end"):
        ids, offsets = plain.encode_with_offsets(text)
        assert ids == plain.encode(text)
        assert offsets == [
            len(plain.decode(ids[:at], False).rstrip("\N{REPLACEMENT CHARACTER}")) for at in range(len(ids))
        ]
    config = json.loads((copy / "tokenizer_config.json").read_text())
    ends = {"add_bos_token": True, "add_eos_token": True}
    (copy / "tokenizer_config.json").write_text(json.dumps(config | ends))
    assert Tokenizer.load(copy).encode_with_offsets(text) == ([0, *ids, 1], [0, *offsets, len(text)])


def configure(directory: Path, **fields: object) -> None:
    """Set fields of tokenizer_config.json, and the byte-level processor that DeepSeek-V2's tokenizer.json has."""
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    raw = json.loads((directory / "tokenizer.json").read_text())
    raw["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    (directory / "tokenizer.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("flags", "first", "last"),
    [
        ({}, [], []),
        ({"add_bos_token": True, "add_eos_token": False}, [0], []),
        ({"add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ({"add_eos_token": True}, [], [1]),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": None}, [], []),
        ({"add_bos_token": True, "bos_token": None}, [], []),
        ({"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "<bos>", "special": True}}, [0], []),
    ],
)
def test_texts_begin_and_end_as_the_config_says(
    copy: Path, ours: Tokenizer, flags: dict[str, object], first: list[int], last: list[int]
) -> None:
    """transformers 5 takes the flags as arguments alone, and drops them where they are in the file."""
    configure(copy, **flags)
    arguments = {name: value for name, value in flags.items() if name.startswith("add_")}
    tokenizer, theirs = Tokenizer.load(copy), PreTrainedTokenizerFast.from_pretrained(copy, **arguments)
    for text in TEXTS:
        plain = ours.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == theirs(text)["input_ids"] == [*first, *plain, *last]
        assert tokenizer.encode(text, add_special_tokens=False) == plain
    messages = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(messages).count(0) == (flags.get("bos_token", "<bos>") is not None)


def test_the_configs_word_stands_over_the_tokenizers_own(copy: Path, ours: Tokenizer) -> None:
    configure(copy, add_bos_token=False)
    raw = json.loads((copy / "tokenizer.json").read_text())
    adds = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    raw["post_processor"] = json.loads(adds.__getstate__())
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    theirs = PreTrainedTokenizerFast.from_pretrained(copy, add_bos_token=False)
    assert Tokenizer.load(copy).encode("Hello") == theirs("Hello")["input_ids"] == ours.encode("Hello")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'; expected true or false"),
        ({"add_eos_token": 1}, "add_eos_token is 1; expected true or false"),
        ({"add_bos_token": True, "bos_token": "<start>"}, "bos_token is '<start>'; expected a token of tokenizer.json"),
    ],
)
def test_ends_that_cannot_be_added_are_named(copy: Path, fields: dict[str, object], said: str) -> None:
    configure(copy, **fields)
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {said}"):
        Tokenizer.load(copy)


def test_a_file_that_asks_for_cutting_and_padding_neither_cuts_nor_pads(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint("tiny")
    expected = Tokenizer.load(path).encode("the tide comes in and goes out")
    fast = FastTokenizer.from_file(str(path / "tokenizer.json"))
    fast.enable_truncation(3)
    fast.enable_padding(length=64)
    fast.save(str(tmp_path / "tokenizer.json"))
    assert len(expected) > 3
    assert Tokenizer.load(tmp_path).encode("the tide comes in and goes out") == expected
