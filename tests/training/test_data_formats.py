"""Formats of training data: what is read from each, and what is said of each that is wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.training.data.formats import Conversation, Document, find_format, read_records
from services.training.data.problems import DataError, Problem
from services.training.data.reading import Reading, read_samples
from services.training.data.source import Value, read_json
from services.training.data.training_data import TrainingData
from services.training.data.training_tokenizer import TrainingTokenizer
from tests.conftest import MakeCheckpoint

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
HUMAN = {"from": "human", "value": "Hi"}
GPT = {"from": "gpt", "value": "Hello"}
GOOD = {"messages": [USER, ASSISTANT]}
EXAMPLES = Path(__file__).parents[2] / "examples" / "data"


@pytest.fixture(scope="module")
def tokenizer(checkpoint: MakeCheckpoint) -> TrainingTokenizer:
    return TrainingTokenizer.load(checkpoint("tiny"))


def lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def records(path: Path, wanted: str = "auto") -> list[Conversation | Document]:
    """Of a file without faults."""
    name = find_format(path, wanted)
    assert isinstance(name, str), name
    read = list(read_records(path, name))
    assert all(not isinstance(item, Problem) for item in read), read
    return [item for item in read if not isinstance(item, Problem)]


def problems(path: Path, wanted: str = "auto") -> list[Problem]:
    name = find_format(path, wanted)
    if isinstance(name, Problem):
        return [name]
    return [item for item in read_records(path, name) if isinstance(item, Problem)]


def test_messages_of_every_format_are_the_templates(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    given = {
        "a.jsonl": {"id": 7, "messages": [system, USER, ASSISTANT]},
        "b.jsonl": {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
            ]
        },
        "c.jsonl": {"instruction": "Hi", "output": "Hello"},
        "d.jsonl": {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        "e.jsonl": {"instruction": "Hi", "input": "", "output": "Hello"},
        "f.jsonl": {"instruction": "Hi", "input": None, "output": "Hello", "system": None, "history": None},
        "g.jsonl": {"instruction": "Hi", "output": "Hello", "system": "", "history": []},
        "h.jsonl": {"instruction": "And", "output": "so", "system": "Be brief.", "history": [["Hi", "Hello"]]},
        "i.jsonl": {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
        "j.jsonl": {"conversations": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Hello"}]},
        "k.jsonl": {"conversations": [HUMAN, GPT], "system": "Be brief."},
        "l.jsonl": {"conversations": [HUMAN, GPT], "system": ""},
        "m.jsonl": {"messages": [USER | {"name": None}, ASSISTANT | {"tool_calls": None}], "tools": None},
        "n.jsonl": {"conversations": [HUMAN, GPT | {"markdown": None, "text": None}], "system": None, "model": None},
    }
    read = {}
    for name, record in given.items():
        (tmp_path / name).write_bytes(lines(record))
        [conversation] = records(tmp_path / name)
        assert isinstance(conversation, Conversation)
        read[name] = conversation.messages
    assert read == {
        "a.jsonl": (system, USER, ASSISTANT),
        "b.jsonl": (system, USER, ASSISTANT),
        "c.jsonl": (USER, ASSISTANT),
        "d.jsonl": ({"role": "user", "content": "Add.\n\n2 and 3"}, {"role": "assistant", "content": "5"}),
        "e.jsonl": (USER, ASSISTANT),
        "f.jsonl": (USER, ASSISTANT),
        "g.jsonl": (USER, ASSISTANT),
        "h.jsonl": (
            *(system, USER, ASSISTANT),
            *({"role": "user", "content": "And"}, {"role": "assistant", "content": "so"}),
        ),
        "i.jsonl": (USER, ASSISTANT),
        "j.jsonl": (USER, ASSISTANT),
        "k.jsonl": (system, USER, ASSISTANT),
        "l.jsonl": (USER, ASSISTANT),
        "m.jsonl": (USER, ASSISTANT),
        "n.jsonl": (USER, ASSISTANT),
    }


def test_fields_and_context_count_the_system_text_beside_the_turns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"system": "Be brief.", "conversations": [HUMAN, GPT | {"train": False}, HUMAN, GPT]}))
    [found] = records(path)
    assert isinstance(found, Conversation)
    assert found.fields == ("system", *(f"conversations[{index}].value" for index in range(4)))
    assert found.context == {2}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_answers_that_are_marked_are_context(tmp_path: Path, mark: dict[str, object]) -> None:
    learned = {name: True if value is False else 1 for name, value in mark.items()}
    nothing = dict.fromkeys(mark)
    turns = [USER | mark, ASSISTANT | mark, USER, ASSISTANT | learned, USER, ASSISTANT | nothing]
    given = {
        "a.jsonl": {"messages": turns},
        "b.jsonl": {
            "conversations": [
                {{"role": "from", "content": "value"}.get(name, name): value for name, value in turn.items()}
                for turn in turns
            ]
        },
    }
    for name, record in given.items():
        (tmp_path / name).write_bytes(lines(record))
        [conversation] = records(tmp_path / name)
        assert isinstance(conversation, Conversation)
        assert conversation.messages == (USER, ASSISTANT) * 3
        assert conversation.context == {1}


def test_keys_that_are_ignored_are_not_looked_at(tmp_path: Path, tokenizer: TrainingTokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "Hi", **GOOD, "source": {}, "prompt_id": None}))
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: text: unknown; expected only messages, id: take it out, or ignore"
    ):
        TrainingData.load(path, tokenizer, 64)
    ignored = TrainingData.load(path, tokenizer, 64, ignore=("text", "source", "prompt_id", "of no record"))
    plain = tmp_path / "b.jsonl"
    plain.write_bytes(lines(GOOD))
    assert ignored.fingerprint() == TrainingData.load(plain, tokenizer, 64).fingerprint()
    assert find_format(path, "auto") == "messages"
    assert find_format(path, "auto", ("messages",)) == "text"
    path.write_bytes(lines({"messages": None, "conversations": None, "text": "Hi"}))
    assert find_format(path, "auto") == "text"


def test_text_is_a_document_a_line_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne\r\ntwo\n")
    (tmp_path / "b.jsonl").write_bytes(lines({"text": "One"}, {"text": "two"}))
    (tmp_path / "c.md").write_text("# One")
    assert records(tmp_path / "a.txt") == [Document(1, "One\r\ntwo\n")]
    assert records(tmp_path / "b.jsonl") == [Document(1, "One"), Document(2, "two")]
    assert records(tmp_path / "c.md", "text") == [Document(1, "# One")]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_array_is_read_whatever_the_name(tmp_path: Path, name: str, indent: int | None) -> None:
    path = tmp_path / name
    path.write_text("\n " + json.dumps([GOOD, GOOD], indent=indent) + "\n")
    first, second = records(path)
    assert (first.line, second.line) == ((2, 2) if indent is None else (3, 15))


@given(
    values=st.lists(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner)), min_size=1),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
)
def test_array_and_lines_hold_the_same_values(
    tmp_path_factory: pytest.TempPathFactory, values: list[object], indent: int | None, ascii_only: bool
) -> None:
    directory = tmp_path_factory.getbasetemp()
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    (directory / "array").write_bytes(text.encode())
    encoded = [json.dumps(value, ensure_ascii=ascii_only) for value in values]
    (directory / "lines").write_bytes("\n\n".join(["", *(f" {line}\r" for line in encoded)]).encode())
    array = [item for item in read_json(directory / "array") if isinstance(item, Value)]
    assert [item.value for item in array] == values
    if indent is not None:  # each item then begins on a line of its own
        texts = text.split("\n")
        assert all(json.dumps(item.value)[0] == texts[item.line - 1].strip()[0] for item in array)
    if not isinstance(values[0], list):  # else the first line opens an array
        read = [item for item in read_json(directory / "lines") if isinstance(item, Value)]
        assert read == [Value(3 + 2 * place, value) for place, value in enumerate(values)]


CHATS = {
    "bad JSON": (lines(GOOD) + b'{"messages": [}\n', 2, "", "not JSON"),
    "two values on a line": (b"{} {}\n", 1, "", "not JSON"),
    "number of too many digits": (b"9" * 5000, 1, "", "not JSON"),
    "nested too deeply": (b'{"messages": ' + b"[" * 200_000, 1, "", "not JSON"),
    "not UTF-8": (lines(GOOD, GOOD) + b'{"messages": "\xff"}\n', 3, "", "byte 0xff"),
    "empty file": (b"", 1, "", "empty"),
    "blank lines only": (b" \n\n", 1, "", "empty"),
    "a record that is no object": (lines(GOOD, [GOOD]), 2, "", "expected an object"),
    "missing messages": (lines(GOOD, {"id": 1}), 2, "messages", "missing"),
    "messages of the wrong type": (lines({"messages": "Hi"}), 1, "messages", "'Hi' given"),
    "no messages": (lines(GOOD, {"messages": []}), 2, "messages", "at least one"),
    "message of the wrong type": (lines({"messages": ["Hi", ASSISTANT]}), 1, "messages[0]", "'Hi' given"),
    "missing role": (lines({"messages": [{"content": "Hi"}, ASSISTANT]}), 1, "messages[0].role", "missing"),
    "unknown role": (
        lines(GOOD, {"messages": [USER, {"role": "bot", "content": "Hello"}]}),
        2,
        "messages[1].role",
        "'bot' given; expected one of system, user, assistant",
    ),
    "role of the wrong type": (lines({"messages": [{"role": 1, "content": "x"}]}), 1, "messages[0].role", "1 given"),
    "missing content": (lines({"messages": [{"role": "user"}, ASSISTANT]}), 1, "messages[0].content", "missing"),
    "empty content": (
        lines({"messages": [USER, {"role": "assistant", "content": " \n"}]}),
        1,
        "messages[1].content",
        "empty",
    ),
    "content of the wrong type": (
        lines({"messages": [{"role": "user", "content": None}, ASSISTANT]}),
        1,
        "messages[0].content",
        "None given; expected a string",
    ),
    "half a surrogate pair": (
        b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "x"}]}',
        1,
        "messages[0].content",
        "not UTF-8",
    ),
    "nothing to learn": (lines(GOOD, {"messages": [USER]}), 2, "messages", "no turn of assistant"),
    "unknown key": (lines({**GOOD, "weight": 1}), 1, "weight", "unknown; expected only messages, id"),
    "unknown key of a message": (
        lines({"messages": [USER, {**ASSISTANT, "name": "x"}]}),
        1,
        "messages[1].name",
        "unknown",
    ),
    "key of control characters": (lines({**GOOD, "\x1b[2J": 1}), 1, "'\\x1b[2J'", "unknown"),
    "unclosed array": (b"[" + lines(GOOD).strip() + b",\n\n", 3, "", "not JSON"),
    "array without comma": (b"[" + lines(GOOD) + b"\n 2]", 3, "", "expected ',' or ']'"),
    "text after an array": (b"[\n" + lines(GOOD) + b"]\n7", 4, "", "nothing after the array"),
    "array that is not UTF-8": (b'[\n\n"\xe9"]', 3, "", "byte 0xe9"),
    "empty array": (b"[ ]\n", 1, "", "empty"),
    "array with a bad item": (b'[\n{"messages": [}\n]', 2, "", "not JSON"),
}
OTHERS = {
    "alpaca without output": ("alpaca", {"instruction": "x"}, "output", "missing"),
    "alpaca with an empty output": ("alpaca", {"instruction": "x", "output": ""}, "output", "empty"),
    "alpaca without instruction": ("alpaca", {"output": "x"}, "instruction", "missing"),
    "alpaca with an input that is no string": (
        "alpaca",
        {"instruction": "x", "input": ["y"], "output": "z"},
        "input",
        "['y'] given",
    ),
    "alpaca with an unknown key": ("alpaca", {"instruction": "x", "output": "y", "score": 1}, "score", "unknown"),
    "sharegpt of an unknown speaker": (
        "sharegpt",
        {"conversations": [{"from": "bot", "value": "x"}]},
        "conversations[0].from",
        "expected one of system, human, gpt, user, assistant, chatgpt",
    ),
    "sharegpt without value": ("sharegpt", {"conversations": [{"from": "gpt"}]}, "conversations[0].value", "missing"),
    "sharegpt without an answer": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "x"}]},
        "conversations",
        "no turn of gpt",
    ),
    "alpaca with a history of one string": (
        "alpaca",
        {"instruction": "x", "output": "y", "history": [["a", "b"], "c"]},
        "history[1]",
        "'c' given; expected [question, answer]",
    ),
    "alpaca with a history that is no list": (
        "alpaca",
        {"instruction": "x", "output": "y", "history": "c"},
        "history",
        "'c' given; expected a list",
    ),
    "alpaca with an empty answer": (
        "alpaca",
        {"instruction": "x", "output": "y", "history": [["a", ""]]},
        "history[0][1]",
        "empty",
    ),
    "two system texts": (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "A"}, HUMAN, GPT], "system": "B"},
        "system",
        "given, and conversations[0].value is of the system, too",
    ),
    "system text that is blank": ("sharegpt", {"conversations": [HUMAN, GPT], "system": " "}, "system", "empty"),
    "weight beyond 1": (
        "messages",
        {"messages": [USER, ASSISTANT | {"weight": 2}]},
        "messages[1].weight",
        "2 given; expected 0 or 1",
    ),
    "train that is a number": (
        "messages",
        {"messages": [USER, ASSISTANT | {"train": 1}]},
        "messages[1].train",
        "1 given; expected true or false",
    ),
    "a user's turn that shall be learned": (
        "messages",
        {"messages": [USER | {"train": True}, ASSISTANT]},
        "messages[0].train",
        "only what the assistant writes is learned",
    ),
    "no answer that is learned": (
        "messages",
        {"messages": [USER, ASSISTANT | {"weight": 0}]},
        "messages",
        "no turn of assistant is learned",
    ),
    "empty text": ("text", {"text": "\n"}, "text", "empty"),
    "text that is no string": ("text", {"text": 3}, "text", "3 given"),
}


@pytest.mark.parametrize(("raw", "line", "field", "words"), CHATS.values(), ids=CHATS.keys())
def test_wrong_messages_are_named_by_line_and_field(
    tmp_path: Path, raw: bytes, line: int, field: str, words: str
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_bytes(raw)
    [problem] = problems(path, "messages")
    assert (problem.path, problem.line, problem.field) == (path, line, field)
    assert words in problem.message


@pytest.mark.parametrize(("name", "record", "field", "words"), OTHERS.values(), ids=OTHERS.keys())
def test_wrong_records_of_other_formats_are_named(
    tmp_path: Path, name: str, record: dict[str, object], field: str, words: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n" + lines(record))
    [problem] = problems(path, name)
    assert (problem.line, problem.field) == (2, field)
    assert words in problem.message


@pytest.mark.parametrize(("raw", "words"), [(b" \n", "empty"), (b"a\nb\xff", "byte 0xff")])
def test_wrong_text_files_are_named(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    [problem] = problems(path)
    assert problem.line == 1 + raw.rstrip(b"\n ").count(b"\n")
    assert words in problem.message


def test_every_fault_of_a_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_bytes(lines({"messages": [{"role": "bot", "content": ""}, {"role": "user"}], "x": 1}))
    assert [problem.field for problem in problems(path)] == [
        "x",
        "messages[0].role",
        "messages[0].content",
        "messages[1].content",
    ]


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("a.jsonl", lines(GOOD), "messages"),
        ("a.json", lines([{"instruction": "x"}]), "alpaca"),
        ("a.JSONL", b"\xef\xbb\xbf\n" + lines({"conversations": []}), "sharegpt"),
        ("a.jsonl", lines({"text": "x"}), "text"),
        ("a.txt", lines(GOOD), "text"),
    ],
)
def test_format_is_told_from_the_first_record(tmp_path: Path, name: str, raw: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(raw)
    assert find_format(tmp_path / name, "auto") == expected


@pytest.mark.parametrize("raw", [lines({"prompt": "x"}), lines(7), lines([[GOOD]]), b"{", b""])
def test_first_record_of_no_format_is_a_problem(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    found = find_format(tmp_path / "a.json", "auto")
    assert isinstance(found, Problem)
    assert found.line == 1


@pytest.mark.parametrize(
    ("name", "wanted", "words"),
    [
        ("a.csv", "auto", "expected a name that ends in"),
        ("there.jsonl", "auto", "is not there"),
        (".", "auto", "is a directory"),
        ("a.csv", "csv", "expected auto, messages"),
    ],
)
def test_wrong_use_is_refused(tmp_path: Path, name: str, wanted: str, words: str) -> None:
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=words) as caught:
        find_format(tmp_path / name, wanted)
    assert not isinstance(caught.value, DataError)


def test_loading_names_the_first_problem_and_their_number(tmp_path: Path, tokenizer: TrainingTokenizer) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_bytes(lines(GOOD, {"messages": [USER]}, GOOD) + b"{\n" + lines({"messages": 1}))
    with pytest.raises(DataError) as caught:
        TrainingData.load(path, tokenizer, 64)
    assert caught.value.count == 3
    assert str(caught.value).startswith(f"{path}:2: messages: no turn of assistant")
    assert "the first of 3 problems" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "format_name", "count"),
    [
        ("chat.jsonl", "messages", 8),
        ("alpaca.json", "alpaca", 5),
        ("sharegpt.jsonl", "sharegpt", 4),
        ("text.jsonl", "text", 4),
        ("coast.txt", "text", 1),
    ],
)
def test_examples_can_be_trained_on(tokenizer: TrainingTokenizer, name: str, format_name: str, count: int) -> None:
    data = TrainingData.load(EXAMPLES / name, tokenizer, 2048)
    read = read_samples([EXAMPLES / name], tokenizer, Reading(2048))
    assert [source.format for source in read.sources] == [format_name]
    assert len(data) == count
