"""When an answer ends."""

from collections.abc import Sequence as Tokens

from attention.sequence import Sequence


def finish_reason(sequence: Sequence, eos_token_ids: Tokens[int]) -> str | None:
    """`stop` after an end token, `length` after max_tokens, None while the answer goes on."""
    params = sequence.params
    last = sequence.tokens[-1]
    if sequence.generated >= params.min_tokens:
        if last in params.stop_token_ids:
            return "stop"
        if last in eos_token_ids and not params.ignore_eos:
            return "stop"
    return "length" if sequence.generated >= params.max_tokens else None
