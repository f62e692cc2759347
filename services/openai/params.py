"""From a checked request body to what the engine is asked."""

import hashlib
import json
import re
import secrets

from attention.requests import SamplingParams
from model.chat_template import ChatTemplateError
from model.grammar import check_schema
from services.backend import ServedModel
from services.openai.errors import ApiError
from services.openai.schema import ChatRequest, CompletionRequest, Message, Sampling

TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")  # of one spelling, so that no token is named twice
ANY_OBJECT = '{"type": "object"}'
MAX_SCHEMA_CHARS = 1 << 16
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions


def check_model(given: str | None, model: ServedModel) -> None:
    """Raises a 404 ApiError when another model is asked for."""
    if given is not None and given != model.id:
        raise ApiError(
            f"model {given!r} is not served here; ask for {model.id!r}", 404, param="model", code="model_not_found"
        )


def check_choices(choices: int, most: int) -> None:
    """Raises ApiError for more answers than there is ever room for, which no retry would bring."""
    if choices > most:
        raise ApiError(
            f"{choices} answers are asked for at once; this service computes {most}: send fewer prompts, or a lower n",
            param="n",
            code="invalid_value",
        )


def chat_text(messages: list[Message], model: ServedModel, add_generation_prompt: bool) -> str:
    """A conversation as the template writes it, special tokens included; its refusal is the request's fault."""
    plain = [
        {"role": message.role.replace("developer", "system"), "content": message.text}
        | ({} if message.name is None else {"name": message.name})
        for message in messages
    ]
    try:
        return model.tokenizer.chat_text(plain, add_generation_prompt)
    except ChatTemplateError as error:
        raise ApiError(str(error), param="messages", code="invalid_messages") from error


def given_prompts(request: CompletionRequest) -> list[str | list[int]]:
    """Every prompt as it came: text, or token ids."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    tokens = [item for item in prompt if isinstance(item, int)]
    return [tokens] if tokens else [item for item in prompt if not isinstance(item, int)]


def prompt_tokens(given: str | list[int], request: CompletionRequest, model: ServedModel) -> list[int]:
    return encode_fitting(given, model, request.add_special_tokens) if isinstance(given, str) else given


def encode_fitting(text: str, model: ServedModel, add_special_tokens: bool, param: str = "prompt") -> list[int]:
    """Token ids; raises ApiError without making them where the text is too long for the context, whatever they are.

    `param` is the field that the text came in.
    """
    least = model.tokenizer.least_tokens(text)
    if least > model.max_length:
        raise ApiError(
            f"the context is {model.max_length} tokens; the prompt has {least} or more: shorten it",
            param=param,
            code="context_length_exceeded",
        )
    return model.tokenizer.encode(text, add_special_tokens)


def check_prompt(
    tokens: list[int],
    model: ServedModel,
    max_tokens: int | None,
    default: int | None,
    params: tuple[str, str] = ("prompt", "max_tokens"),
) -> int:
    """The answer's token budget; raises ApiError for a prompt that is empty, too long or out of vocabulary.

    `params` are the fields that the prompt and `max_tokens` came in.
    """
    if not tokens:
        raise ApiError("the prompt has no tokens; send at least one", param=params[0], code="invalid_value")
    check_token_ids(tokens, model, params[0])
    left = model.max_length - len(tokens)
    if left < (1 if max_tokens is None else max_tokens):
        asked = "" if max_tokens is None else f" and {max_tokens} tokens of answer"
        raise ApiError(
            f"the context is {model.max_length} tokens; the prompt has {len(tokens)}{asked}: shorten one of them",
            param=params[0] if max_tokens is None or left < 1 else params[1],
            code="context_length_exceeded",
        )
    if max_tokens is not None:
        return max_tokens
    return left if default is None else min(default, left)


def check_token_ids(tokens: list[int], model: ServedModel, param: str) -> None:
    worst = max(tokens, default=0)
    if worst >= model.vocab_size:
        raise ApiError(
            f"token id {worst} is outside the vocabulary of {model.vocab_size}", param=param, code="invalid_value"
        )


def sampling_params(
    request: Sampling, model: ServedModel, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """The engine's parameters; raises ApiError naming what is out of range. The seed is set by the plan."""
    defaults = model.defaults
    bias: list[tuple[int, float]] = []
    for key, value in (request.logit_bias or {}).items():
        if not (TOKEN_ID.fullmatch(key) and int(key) < model.vocab_size):
            raise ApiError(
                f"logit_bias names token {key[:100]!r}; expected an id below {model.vocab_size}",
                param="logit_bias",
                code="invalid_value",
            )
        bias.append((int(key), value))
    stop_ids = request.stop_token_ids or []
    check_token_ids(stop_ids, model, "stop_token_ids")
    schema = answer_schema(request)
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_or(request.temperature, defaults.temperature),
            top_p=_or(request.top_p, defaults.top_p),
            top_k=max(0, int(_or(request.top_k, defaults.top_k))),
            min_p=request.min_p or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
            logit_bias=tuple(sorted(bias)),
            min_tokens=request.min_tokens or 0,
            ignore_eos=request.ignore_eos,
            stop_token_ids=tuple(stop_ids),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            json_schema=schema,
        )
    except ValueError as error:
        raise ApiError(str(error), code="invalid_value") from error


def answer_schema(request: Sampling) -> str | None:
    """The JSON schema that an answer has to fit, as text; raises ApiError for one that has no grammar."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return ANY_OBJECT
    try:
        schema = json.dumps(wanted.json_schema.schema_, ensure_ascii=False)  # its keys in order: the answer's, too
        if len(schema) > MAX_SCHEMA_CHARS:
            raise ValueError(f"it has {len(schema)} characters; expected at most {MAX_SCHEMA_CHARS}")
        check_schema(schema)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"response_format's schema: {error}", param="response_format", code="invalid_value") from error
    return schema


def chat_max_tokens(request: ChatRequest) -> tuple[int | None, str]:
    """The budget that was given, and the field that it came in."""
    if request.max_completion_tokens is not None:
        return request.max_completion_tokens, "max_completion_tokens"
    return request.max_tokens, "max_tokens"


def choice_seed(seed: int | None, choice: int) -> int:
    """Seed of one of a prompt's choices, at least 0; a fresh one where the request has none.

    The first choice has the request's own. The prompt has no part in it: it is answered alike alone and in a list.
    """
    if seed is None:
        return secrets.randbits(62)
    if choice == 0 and seed >= 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
