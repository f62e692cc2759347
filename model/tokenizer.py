"""Text to token ids and back: tokenizer.json and the chat template of a checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors

from model.chat_template import ChatTemplate, ChatTemplateError, load_chat_template
from model.least_tokens import longest_token
from model.safetensors_header import CheckpointError
from model.special_tokens import CONFIG, add_special_tokens, named_token, read_tokenizer_config

__all__ = ["ChatTemplateError", "Detokenizer", "Tokenizer"]


CHARACTER_BYTES = 4  # UTF-8's longest
LONG_TEXT = 4096  # characters; those of a shorter one take a millisecond or two
LONG_IDS = 4096


class Tokenizer:
    """A fast tokenizer, its special tokens and its chat template.

    What is long goes to the fast tokenizer as a batch of one: for that it lets other threads go on, an event loop's
    among them. Its batches wait for each other, so what is short does not go with them.
    """

    def __init__(self, fast: FastTokenizer, template: ChatTemplate) -> None:
        self._fast = fast
        self._template = template
        self._special = {token for token, added in fast.get_added_tokens_decoder().items() if added.special}
        self._byte_of_char = {char: byte for byte, char in enumerate(byte_alphabet())}
        self._longest_token = longest_token(fast, byte_alphabet())  # characters
        # texts of single tokens: answers with log-probabilities ask for a few again and again
        self._alone: dict[int, str] = {}

    @classmethod
    def load(cls, directory: Path | str) -> "Tokenizer":
        """Read tokenizer.json and tokenizer_config.json; raises CheckpointError naming what is missing or faulty."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist: a checkpoint is served with its fast tokenizer")
        try:
            fast = FastTokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        fast.no_truncation()  # some files ask for it, and would cut prompts in silence
        fast.no_padding()
        config = read_tokenizer_config(directory)
        add_special_tokens(fast, config)
        _add_ends(fast, config, directory / CONFIG)
        return cls(fast, load_chat_template(directory, config))

    @property
    def vocab_size(self) -> int:
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    def to_json(self) -> str:
        """As tokenizer.json has it, with the special tokens that the configuration adds."""
        return str(self._fast.to_str())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) < LONG_TEXT:
            return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)
        [encoding] = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)  # without offsets
        return list(encoding.ids)

    def least_tokens(self, text: str) -> int:
        """As many tokens `encode` makes of it at least, told without encoding; 0 where that cannot be told."""
        return -(-len(text) // self._longest_token) if self._longest_token else 0

    def encode_with_offsets(self, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[int]]:
        """Token ids, and the character of the text at which each token's own text begins."""
        if len(text) < LONG_TEXT:
            encoding = self._fast.encode(text, add_special_tokens=add_special_tokens)
        else:
            [encoding] = self._fast.encode_batch([text], add_special_tokens=add_special_tokens)
        offsets: list[int] = []
        covered = 0
        for begin, end in encoding.offsets:  # which may leave out spaces, and are (0, 0) for a token that was added
            offsets.append(min(begin, covered) if end else covered)
            covered = max(covered, end)
        return list(encoding.ids), offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if len(ids) < LONG_IDS:
            return str(self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens))
        return str(self._fast.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0])

    def is_special(self, token: int) -> bool:
        return token in self._special

    def is_printed(self, token: int, skip_special_tokens: bool = True) -> bool:
        """Whether decode takes notice of the token: unknown ids it drops, special ones if told to."""
        return self._fast.id_to_token(token) is not None and not (skip_special_tokens and token in self._special)

    def token_text(self, token: int) -> str:
        """What the token alone decodes to, special ones by name; "" for an id the tokenizer lacks."""
        text = self._alone.get(token)
        if text is None:
            special = token in self._special
            text = str(self._fast.id_to_token(token)) if special else self.decode([token], skip_special_tokens=False)
            self._alone[token] = text
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for, also when they are part of a character."""
        name = self._fast.id_to_token(token)
        if name is None:
            return b""
        if token not in self._special and all(char in self._byte_of_char for char in name):
            return bytes(self._byte_of_char[char] for char in name)
        return self.token_text(token).encode()

    def chat_text(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation's text, special tokens included; raises ChatTemplateError when the template refuses it."""
        return self._template.render(messages, add_generation_prompt)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation; raises ChatTemplateError when the template refuses it."""
        return self.encode(self.chat_text(messages, add_generation_prompt), add_special_tokens=False)


class Detokenizer:
    """Text of a growing answer, piece by piece; what was given out never changes.

    Keeps back a replacement character at the end, which may be the beginning of a character, and decodes a few
    tokens before the new one with it, so that the pieces joined equal the whole decoded at once. The cost of a
    token does not grow with the answer.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []  # the last tokens, enough to hold any character in full
        self._given = 0  # leading characters of the window's text that were given out

    def push(self, token: int) -> str:
        """Text that `token` completes, perhaps none."""
        if not self._tokenizer.is_printed(token, self._skip):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window, self._skip)
        held = text.endswith("\N{REPLACEMENT CHARACTER}")  # at most one: each of those before it is final
        piece = text[self._given : len(text) - held]
        # UTF-8 synchronises itself: a window that begins within a character ends in the same text all the same.
        self._window = self._window[-CHARACTER_BYTES:]
        self._given = len(self._tokenizer.decode(self._window, self._skip)) - held
        return piece

    def flush(self) -> str:
        """The text kept back, once the answer has ended."""
        rest = self._tokenizer.decode(self._window, self._skip)[self._given :]
        self._window = []
        self._given = 0
        return rest


def _add_ends(fast: FastTokenizer, config: Mapping[str, Any], path: Path) -> None:
    """Have texts begin and end as add_bos_token and add_eos_token say, in place of what tokenizer.json says of it.

    DeepSeek-V2's tokenizer.json does not put its first token before texts; this flag does, by transformers 4's Llama
    tokenizer, which the model names. transformers 5 reads the flags as arguments alone, and then does what is done
    here. Where neither is in the file, tokenizer.json's own processor stays. Chats are encoded without: their template
    prints such tokens itself.
    """
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    first, last = _added(fast, config, path, "bos_token"), _added(fast, config, path, "eos_token")
    single = [f"{token}:0" for token, _ in first] + ["$A:0"] + [f"{token}:0" for token, _ in last]
    fast.post_processor = processors.TemplateProcessing(single=single, special_tokens=first + last)


def _added(fast: FastTokenizer, config: Mapping[str, Any], path: Path, name: str) -> list[tuple[str, int]]:
    """The token of that name and its id, where it is to be added to texts."""
    wanted = config.get(f"add_{name}")
    if not isinstance(wanted, bool | None):
        raise CheckpointError(f"{path}: add_{name} is {wanted!r}; expected true or false")
    token = named_token(config, name)
    if not wanted or token is None:
        return []
    number = fast.token_to_id(token)
    if number is None:
        raise CheckpointError(f"{path}: {name} is {token!r}; expected a token of tokenizer.json, to add to texts")
    return [(token, int(number))]


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte, in order of the bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    spare = 256
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(spare)
            spare += 1
    return [alphabet[byte] for byte in range(256)]
