"""The formats of training data: what a record may hold, and what is wrong with one that holds something else."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from services.training.data.problems import Problem, shown
from services.training.data.source import JSON_SUFFIXES, Value, check_readable, read_json, read_text

Message = dict[str, str]
"""`role` and `content`, as chat templates take them."""

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
SHAREGPT_ROLES |= {"user": "user", "assistant": "assistant", "chatgpt": "assistant"}
MARKS: dict[str, tuple[type, str]] = {"weight": (int, "0 or 1"), "train": (bool, "true or false")}
"""How a turn says whether it is learned: the type of the value, and what is expected."""
ABSENT = (None, "")  # of an optional text


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of one record; `field` is where the record has them, and `fields` where it has each one's content.

    `context` has the places of the assistant's messages that are not learned.
    """

    line: int
    field: str
    messages: tuple[Message, ...]
    fields: tuple[str, ...]
    context: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, to be learned from its first token to its last."""

    line: int
    text: str


Record = Conversation | Document


class Faults(list[tuple[str, str]]):
    """Fields of one record and what is wrong with them."""

    def text(self, owner: dict[str, Any], key: str, field: str) -> str:
        """A string that is not blank; else a fault, and ""."""
        if key not in owner:
            self.append((field, f"missing; the record has {', '.join(map(shown, owner)) or 'nothing'}"))
            return ""
        return self.string(owner[key], field)

    def string(self, value: object, field: str) -> str:
        """The same of a value that is there."""
        if not isinstance(value, str):
            self.append((field, f"{shown(value)} given; expected a string"))
            return ""
        if not value.strip():
            self.append((field, "empty; expected text"))
        try:
            value.encode()
        except UnicodeEncodeError:
            self.append((field, "not UTF-8: half of a surrogate pair; write the character itself"))
            return ""
        return value

    def unknown(self, owner: dict[str, Any], known: Sequence[str], prefix: str = "") -> None:
        """What is null says nothing: columns of a table are keys of every record, whether it has them or not."""
        for key, value in owner.items():
            if key not in known and value is not None:
                name = key if key.isidentifier() else shown(key)
                way = "" if prefix else ": take it out, or ignore it (data.ignore, --ignore)"
                self.append((f"{prefix}{name}", f"unknown; expected only {', '.join(known)}{way}"))


@dataclass(frozen=True, slots=True)
class Keys:
    """How a format names a conversation's parts; `roles` are its names of the template's roles."""

    turns: str
    role: str
    content: str
    roles: dict[str, str]


@dataclass(frozen=True, slots=True)
class Format:
    """`sign` is the key that tells the format; `parse` reads one record and adds what is wrong to the faults."""

    sign: str
    parse: Callable[[int, dict[str, Any], Faults], Record]


def _messages(line: int, raw: dict[str, Any], faults: Faults) -> Record:
    faults.unknown(raw, ("messages", "id"))
    return _turns(line, raw, Keys("messages", "role", "content", ROLES), faults)


def _sharegpt(line: int, raw: dict[str, Any], faults: Faults) -> Record:
    """A system text may be the first turn, or stand beside the turns."""
    faults.unknown(raw, ("conversations", "system", "id"))
    found = _turns(line, raw, Keys("conversations", "from", "value", SHAREGPT_ROLES), faults)
    if raw.get("system") in ABSENT:
        return found
    system = {"role": "system", "content": faults.text(raw, "system", "system")}
    if found.messages and found.messages[0]["role"] == "system":
        faults.append(("system", f"given, and {found.fields[0]} is of the system, too; expected one of them"))
    context = frozenset(place + 1 for place in found.context)
    return replace(found, messages=(system, *found.messages), fields=("system", *found.fields), context=context)


def _alpaca(line: int, raw: dict[str, Any], faults: Faults) -> Record:
    """The question is the instruction, and after a blank line the input, where there is one."""
    faults.unknown(raw, ("instruction", "input", "output", "system", "history", "id"))
    turns: list[tuple[str, str, str]] = []  # role, content and field
    if raw.get("system") not in ABSENT:
        turns.append(("system", faults.text(raw, "system", "system"), "system"))
    turns.extend(_history(raw.get("history"), faults))
    question = faults.text(raw, "instruction", "instruction")
    if raw.get("input") not in ABSENT:
        question += f"\n\n{faults.text(raw, 'input', 'input')}"
    turns.append(("user", question, "instruction"))
    turns.append(("assistant", faults.text(raw, "output", "output"), "output"))
    messages = tuple({"role": role, "content": content} for role, content, _ in turns)
    return Conversation(line, "instruction", messages, tuple(field for _, _, field in turns))


def _history(pairs: Any, faults: Faults) -> Iterator[tuple[str, str, str]]:
    """Role, content and field of the questions and answers that came before."""
    if pairs is not None and not isinstance(pairs, list):
        faults.append(("history", f"{shown(pairs)} given; expected a list of [question, answer]"))
        return
    for index, pair in enumerate(pairs or []):
        where = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            faults.append((where, f"{shown(pair)} given; expected [question, answer]"))
            continue
        for place, role in enumerate(("user", "assistant")):
            yield role, faults.string(pair[place], f"{where}[{place}]"), f"{where}[{place}]"


def _text(line: int, raw: dict[str, Any], faults: Faults) -> Record:
    faults.unknown(raw, ("text", "id"))
    return Document(line, faults.text(raw, "text", "text"))


def _turns(line: int, raw: dict[str, Any], keys: Keys, faults: Faults) -> Conversation:
    turns = raw.get(keys.turns)
    if not isinstance(turns, list) or not turns:
        given = f"{shown(turns)} given" if keys.turns in raw else "missing"
        faults.append((keys.turns, f"{given}; expected a list of at least one {{{keys.role}, {keys.content}}}"))
        turns = []
    messages: list[Message] = []
    context: set[int] = set()
    for index, turn in enumerate(turns):
        where = f"{keys.turns}[{index}]"
        if not isinstance(turn, dict):
            faults.append((where, f"{shown(turn)} given; expected an object with {keys.role} and {keys.content}"))
            continue
        faults.unknown(turn, (keys.role, keys.content, *MARKS), f"{where}.")
        role = faults.text(turn, keys.role, f"{where}.{keys.role}")
        if role.strip() and role not in keys.roles:
            faults.append((f"{where}.{keys.role}", f"{shown(role)} given; expected one of {', '.join(keys.roles)}"))
        content = faults.text(turn, keys.content, f"{where}.{keys.content}")
        speaker = keys.roles.get(role, "")
        if not _learned(turn, speaker, where, faults) and speaker == "assistant":
            context.add(len(messages))
        messages.append({"role": speaker, "content": content})
    answers = {place for place, message in enumerate(messages) if message["role"] == "assistant"}
    if not faults and not answers - context:
        speaker = next(name for name, role in keys.roles.items() if role == "assistant")
        which = " is learned" if answers else ""
        faults.append((keys.turns, f"no turn of {speaker}{which}: there is nothing to learn from it"))
    fields = tuple(f"{keys.turns}[{index}].{keys.content}" for index in range(len(messages)))
    return Conversation(line, keys.turns, tuple(messages), fields, frozenset(context))


def _learned(turn: dict[str, Any], speaker: str, where: str, faults: Faults) -> bool:
    """Whether nothing in the turn says that it is not learned."""
    learned = True
    for name, (kind, expected) in MARKS.items():
        value = turn.get(name)
        if value is None:
            continue
        if type(value) is not kind or value not in (0, 1):
            faults.append((f"{where}.{name}", f"{shown(value)} given; expected {expected}"))
        elif value and speaker in ("system", "user"):
            faults.append((f"{where}.{name}", f"{shown(value)} given; only what the assistant writes is learned"))
        learned = learned and bool(value)
    return learned


FORMATS = {
    "messages": Format("messages", _messages),
    "sharegpt": Format("conversations", _sharegpt),
    "alpaca": Format("instruction", _alpaca),
    "text": Format("text", _text),
}


def find_format(path: Path, wanted: str, ignore: Collection[str] = ()) -> str | Problem:
    """The name of the file's format: `wanted`, or when that is `auto` by the file's suffix and first record.

    Of that, the keys in `ignore` tell nothing.

    Raises ValueError for an unknown format, a file that is not there, and a suffix that says nothing.
    """
    if wanted not in ("auto", *FORMATS):
        raise ValueError(f"format {shown(wanted)} given; expected auto, {', '.join(FORMATS)}")
    check_readable(path)
    if wanted != "auto":
        return wanted
    if path.suffix.lower() == ".txt":
        return "text"
    if path.suffix.lower() not in JSON_SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in .jsonl, .json or .txt; for any other, say its format")
    first = next(read_json(path))
    if isinstance(first, Problem):
        return first
    if isinstance(first.value, dict):
        for name, format_ in FORMATS.items():
            if first.value.get(format_.sign) is not None and format_.sign not in ignore:
                return name
    signs = ", ".join(f"{format_.sign} ({name})" for name, format_ in FORMATS.items())
    return Problem(
        path, first.line, "", f"{shown(first.value)} is of no known format; expected one of the keys {signs}"
    )


def read_records(path: Path, format_name: str, ignore: Collection[str] = ()) -> Iterator[Record | Problem]:
    """Each record of the file, or everything that is wrong with it, in the file's order; keys in `ignore` are not read.

    As `text`, a file that is named neither .json nor .jsonl is one document.
    """
    if format_name == "text" and path.suffix.lower() not in JSON_SUFFIXES:
        text = read_text(path)
        yield text if isinstance(text, Problem) else Document(1, text)
        return
    for item in read_json(path):
        if isinstance(item, Problem):
            yield item
        else:
            yield from _parsed(path, item, FORMATS[format_name], ignore)


def _parsed(path: Path, item: Value, format_: Format, ignore: Collection[str]) -> Iterator[Record | Problem]:
    if not isinstance(item.value, dict):
        yield Problem(path, item.line, "", f"{shown(item.value)} given; expected an object with {format_.sign}")
        return
    faults = Faults()
    record = format_.parse(item.line, {key: value for key, value in item.value.items() if key not in ignore}, faults)
    if faults:
        yield from (Problem(path, item.line, field, message) for field, message in faults)
    else:
        yield record
