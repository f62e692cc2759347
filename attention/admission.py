"""What an engine takes on."""

from attention.requests import GenerateRequest


def check_request(request: GenerateRequest, vocabulary: int, max_length: int) -> None:
    """Raises ValueError, naming the field, for what can never be served.

    `vocabulary` counts tokens; `max_length` those of prompt and answer together.
    """
    if not request.prompt_ids:
        raise ValueError("prompt_ids is empty: send at least one token")
    for token in (*request.prompt_ids, *request.resumed_ids):
        if not 0 <= token < vocabulary:
            raise ValueError(f"token id {token} is outside the vocabulary of {vocabulary} tokens")
    for token, _ in request.params.logit_bias:
        if not 0 <= token < vocabulary:
            raise ValueError(f"logit_bias names token {token}, outside the vocabulary of {vocabulary}")
    for token in request.params.stop_token_ids:
        if not 0 <= token < vocabulary:
            raise ValueError(f"stop_token_ids names token {token}, outside the vocabulary of {vocabulary}")
    if len(request.resumed_ids) > request.params.max_tokens:
        raise ValueError(
            f"resumed_ids has {len(request.resumed_ids)} tokens; expected at most max_tokens, "
            f"{request.params.max_tokens}"
        )
    total = len(request.prompt_ids) + request.params.max_tokens
    if total > max_length:
        raise ValueError(
            f"{len(request.prompt_ids)} prompt tokens and max_tokens {request.params.max_tokens} are "
            f"{total} tokens; this worker's limit is {max_length}"
        )
