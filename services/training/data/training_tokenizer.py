"""A checkpoint's tokenizer as training needs it: in batches, and with the characters that each token covers."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors

from model.chat_template import ChatTemplate
from model.config import read_config, read_raw_config
from model.special_tokens import named_token, read_tokenizer_config
from model.tokenizer import Tokenizer


class Encoded(NamedTuple):
    """Token ids of a text, int32, and the characters [begin, end) that each covers."""

    ids_T: NDArray[np.int32]
    begin_T: NDArray[np.int64]
    end_T: NDArray[np.int64]


class TrainingTokenizer(Tokenizer):
    """`Tokenizer`, which renders without encoding, and encodes many texts at once, in full length.

    What tokenizer.json says of truncation and padding is for its author's model; here it would lose data in silence.
    """

    def __init__(self, fast: FastTokenizer, template: ChatTemplate) -> None:
        fast.no_truncation()
        fast.no_padding()
        super().__init__(fast, template)
        self._texts = fast
        self._renderer = template
        # Processors may cut leading spaces off the offsets, by which a token's turn is told. This one changes nothing.
        self._chats = FastTokenizer.from_str(fast.to_str())
        self._chats.post_processor = processors.ByteLevel(trim_offsets=False)
        added = fast.get_added_tokens_decoder().values()
        self._added = _any_of([token.content for token in added])
        self._control = _any_of([token.content for token in added if token.special])
        self.eos_token_id: int | None = None
        self.model_ids: int | None = None  # that the model has, from 0; None where no config.json says

    @classmethod
    def load(cls, directory: Path | str) -> "TrainingTokenizer":
        """As `Tokenizer.load`; the end token is tokenizer_config.json's, else config.json's first; how many ids the
        model has is config.json's `vocab_size`.

        Raises CheckpointError naming what is missing or faulty.
        """
        loaded = super().load(directory)
        assert isinstance(loaded, cls)
        loaded.eos_token_id = _eos(Path(directory), loaded._texts)
        loaded.model_ids = _model_ids(Path(directory))
        return loaded

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation's text; raises ChatTemplateError when the template refuses it."""
        return self._renderer.render(messages, add_generation_prompt)

    def encode_chats(self, texts: Sequence[str]) -> list[Encoded]:
        """Of rendered conversations, which have their special tokens already: none is added."""
        encodings = self._chats.encode_batch(list(texts), add_special_tokens=False)
        encoded = []
        for encoding in encodings:
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            encoded.append(Encoded(np.array(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1]))
        return encoded

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Of plain texts, as a prompt of such text is encoded when it is served."""
        encodings = self._texts.encode_batch_fast(list(texts), add_special_tokens=True)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def find_added(self, text: str) -> re.Match[str] | None:
        """The first token in the text that stands outside the ordinary vocabulary."""
        return self._added.search(text)

    def find_control(self, text: str) -> re.Match[str] | None:
        """The first special token that the text spells."""
        return self._control.search(text)

    def find_foreign(self, ids_T: NDArray[np.int32]) -> tuple[int, str] | None:
        """The first id that the model has no row for, and its token's name."""
        if self.model_ids is None or not (foreign_T := ids_T >= self.model_ids).any():
            return None
        token = int(ids_T[foreign_T.argmax()])
        return token, str(self._texts.id_to_token(token))

    def joins(self) -> bool:
        """Whether texts encoded apart are the text when their tokens are joined: no space is put before a text."""
        apart = [*self.encode("one", add_special_tokens=False), *self.encode("two", add_special_tokens=False)]
        return self.decode(apart) == "onetwo"


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _eos(directory: Path, fast: FastTokenizer) -> int | None:
    named = named_token(read_tokenizer_config(directory), "eos_token")
    token = fast.token_to_id(named) if named is not None else None
    if token is not None:
        return int(token)
    ends = read_config(directory).eos_token_ids if (directory / "config.json").is_file() else ()
    return ends[0] if ends else None


def _model_ids(directory: Path) -> int | None:
    raw = read_raw_config(directory) if (directory / "config.json").is_file() else {}
    size = raw.get("vocab_size")
    return size if isinstance(size, int) else None
