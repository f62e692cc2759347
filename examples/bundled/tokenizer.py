"""A tokenizer that spells: a token is a byte, but for the few pieces of the chat format.

Reversing, sorting and counting letters are then about tokens that the model sees.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from model.chat_template import DEFAULT
from model.tokenizer import byte_alphabet

BOS, EOS = "<|begin_of_sentence|>", "<|end_of_sentence|>"
PIECES = {"User:": "User:", "Assistant:": "Assistant:", "\n\n": "ĊĊ"}
"""What the chat template writes between contents, and how byte-level BPE spells it."""
VOCABULARY_SIZE = 2 + 256 + len(PIECES)


def build_tokenizer() -> Tokenizer:
    """Ids: BOS, EOS, 256 bytes in their order, the pieces."""
    names = [BOS, EOS, *byte_alphabet(), *PIECES.values()]
    tokenizer = Tokenizer(BPE(vocab={name: index for index, name in enumerate(names)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(PIECES)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (BOS, EOS)])
    return tokenizer


def write_companions(out: Path) -> None:
    """Everything of a checkpoint that is neither weights nor config."""
    build_tokenizer().save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": DEFAULT,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")
    generation_config = {"bos_token_id": 0, "eos_token_id": 1, "temperature": 0.0}
    (out / "generation_config.json").write_text(json.dumps(generation_config) + "\n", encoding="utf-8")
