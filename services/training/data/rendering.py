"""From records to token ids and a mask of what is learned: the tokens that the model itself would write.

In a conversation these are, for each of the assistant's turns that is learned, the tokens between the generation prompt
and the end token, which is learned too. Where they begin and end is asked of the template, by rendering: the
conversation before the turn with the generation prompt, the conversation with the turn, and the same with another
content, whose remainder is what the template puts behind every content.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.chat_template import ChatTemplateError
from services.training.data.formats import Conversation, Document, Message, Record
from services.training.data.training_tokenizer import Encoded, TrainingTokenizer

STAND_IN = "\ue000stand-in\ue000"  # private use, and nothing a template would trim


class NotRendered(ValueError):
    """A record that has no rendering to learn from; `field` is the part at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message


@dataclass(frozen=True, slots=True)
class Rendered:
    """`spans` are the characters [begin, end) to learn; None of a document, which is learned in full."""

    line: int
    field: str
    text: str
    spans: tuple[tuple[int, int], ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Ids, int32, and whether each is learned."""

    ids_T: NDArray[np.int32]
    mask_T: NDArray[np.bool_]


def render(record: Record, tokenizer: TrainingTokenizer) -> Rendered:
    """The record's text and what of it is learned; raises NotRendered."""
    if isinstance(record, Document):
        return Rendered(record.line, "text", record.text, None)
    for message, field in zip(record.messages, record.fields, strict=True):
        spelled = tokenizer.find_control(message["content"])
        if spelled is not None:
            raise NotRendered(
                field, f"spells the special token {spelled.group()!r}, which only the template may write; remove it"
            )
    try:
        text = tokenizer.render(record.messages, add_generation_prompt=False)
        spans = tuple(
            _span(record, index, text, tokenizer)
            for index, message in enumerate(record.messages)
            if message["role"] == "assistant" and index not in record.context
        )
    except ChatTemplateError as error:
        raise NotRendered(record.field, str(error)) from error
    return Rendered(record.line, record.field, text, spans)


def _span(record: Conversation, index: int, text: str, tokenizer: TrainingTokenizer) -> tuple[int, int]:
    """Characters of the turn that the model would write."""
    before, turn = record.messages[:index], record.messages[index]
    where = record.fields[index]
    prompt = tokenizer.render(before, add_generation_prompt=True)
    last = index + 1 == len(record.messages)
    through = text if last else tokenizer.render((*before, turn), add_generation_prompt=False)
    if not text.startswith(through):
        raise NotRendered(
            where, f"the chat template writes the turn otherwise when others follow: {_parting(through, text)}"
        )
    if not through.startswith(prompt):
        raise NotRendered(where, f"the chat template's prompt does not lead to the turn: {_parting(prompt, through)}")
    tail = _tail(before, tokenizer)
    if tail is None or not through.endswith(tail) or len(prompt) + len(tail) > len(through):
        raise NotRendered(where, "what the chat template writes behind a turn depends on the turn's content")
    if not _holds(through[len(prompt) :], turn["content"]):
        raise NotRendered(where, "the chat template leaves out a part of the content, so it would not be learned")
    if not tail:
        raise NotRendered(where, "the chat template writes nothing behind the turn, so its end would not be learned")
    return len(prompt), len(through) - len(tail) + _closing(tail, tokenizer)


def _tail(before: Sequence[Message], tokenizer: TrainingTokenizer) -> str | None:
    """What the template writes behind any content of the next turn; None when it writes no content."""
    sample = tokenizer.render((*before, {"role": "assistant", "content": STAND_IN}), add_generation_prompt=False)
    at = sample.rfind(STAND_IN)
    return None if at < 0 else sample[at + len(STAND_IN) :]


def _closing(tail: str, tokenizer: TrainingTokenizer) -> int:
    """Leading characters of the tail that close the turn: through its first token of the template's own.

    A template without such tokens closes a turn with text, or with a blank line alone.
    """
    token = tokenizer.find_added(tail)
    return token.end() if token is not None else len(tail.rstrip()) or len(tail)


def _holds(text: str, content: str) -> bool:
    """Whether all of the content is printed, spaces apart: templates trim, and put thoughts on lines of their own."""
    return content in text or "".join(content.split()) in "".join(text.split())


def _parting(one: str, other: str) -> str:
    """Where two texts part."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"{one[at : at + 30]!r} becomes {other[at : at + 30]!r}; train with a template that keeps it"


def tokenise(batch: Sequence[Rendered], tokenizer: TrainingTokenizer) -> list[Tokens | NotRendered]:
    """Ids and mask of each; a document ends with the end token. Raises ValueError where the tokenizer has none."""
    documents = [item.text for item in batch if item.spans is None]
    if documents and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token to end documents with; name it in tokenizer_config.json")
    document_ids = iter(tokenizer.encode_documents(documents))
    chats = iter(tokenizer.encode_chats([item.text for item in batch if item.spans is not None]))
    tokens: list[Tokens | NotRendered] = []
    for item in batch:
        if item.spans is None:
            tokens.append(_document(next(document_ids), tokenizer.eos_token_id or 0))
        else:
            tokens.append(_conversation(item, item.spans, next(chats), tokenizer))
    return tokens


def _document(ids_T: NDArray[np.int32], eos: int) -> Tokens:
    if not len(ids_T) or ids_T[-1] != eos:
        ids_T = np.append(ids_T, np.int32(eos))
    return Tokens(ids_T, np.ones(len(ids_T), dtype=np.bool_))


def _conversation(
    item: Rendered, spans: tuple[tuple[int, int], ...], whole: Encoded, tokenizer: TrainingTokenizer
) -> Tokens | NotRendered:
    """A token belongs to the turn in which it begins.

    A token across a turn's beginning is none that the model could write, for the prompt ends within it. Then the
    text is encoded in pieces, which gives the prompt the tokens that it has when it is served.
    """
    if not any(((whole.begin_T < begin) & (whole.end_T > begin)).any() for begin, _ in spans):
        return Tokens(whole.ids_T, _mask(whole, spans))
    if not tokenizer.joins():
        return NotRendered(item.field, "a token lies across the beginning of a turn; the template must end its prompt")
    cuts = [0, *(begin for begin, _ in spans), len(item.text)]
    pieces = tokenizer.encode_chats([item.text[cut:end] for cut, end in itertools.pairwise(cuts)])
    joined = Encoded(
        np.concatenate([piece.ids_T for piece in pieces]),
        np.concatenate([piece.begin_T + cut for piece, cut in zip(pieces, cuts, strict=False)]),
        np.concatenate([piece.end_T + cut for piece, cut in zip(pieces, cuts, strict=False)]),
    )
    return Tokens(joined.ids_T, _mask(joined, spans))


def _mask(encoded: Encoded, spans: tuple[tuple[int, int], ...]) -> NDArray[np.bool_]:
    mask_T = np.zeros(len(encoded.ids_T), dtype=np.bool_)
    for begin, end in spans:
        mask_T |= (encoded.begin_T >= begin) & (encoded.begin_T < end)
    return mask_T
