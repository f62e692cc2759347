"""Request bodies of the OpenAI routes: strict types, caps on everything, unknown fields refused by name.

A list is read up to its first fault: an error for each of a hundred thousand items takes the event loop seconds.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from services.openai.hints import ChatHints, Hints, StreamOptions
from services.openai.strict import Absent, EmptyList, EmptyText, Strict, at_most, lacks

MAX_CHOICES = 128
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_TEXT_CHARS = 4_000_000
MAX_TOKENS = 1 << 20
MAX_TOP_LOGPROBS = 20
MAX_BIASED = 1024  # tokens of logit_bias
MAX_SEED = (1 << 63) - 1  # of an int64

Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_TOKENS)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
ModelId = Annotated[str, Field(max_length=1024)]


class NamedSchema(Strict):
    """A JSON schema. What `strict` asks for is so in any case; name and description change nothing."""

    name: Annotated[str, Field(max_length=256)]
    description: Annotated[str, Field(max_length=MAX_TEXT_CHARS)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class Format(Strict):
    """`json_object` is any JSON object, `json_schema` JSON that fits the schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _agree(self) -> "Format":
        if (self.json_schema is None) is (self.type == "json_schema"):
            raise ValueError("json_schema and type 'json_schema' come together: send both, or neither")
        return self


class Sampling(Hints):
    """Fields that both kinds of completion share. Absent sampling fields take the checkpoint's own defaults."""

    model: ModelId
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = 0
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = Field(None, description="0 or -1: no limit")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASED), at_most(MAX_BIASED)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: Stop | Stops | None = None
    response_format: Format | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=256)] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream to true or leave it out")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TextPart(Strict):
    type: Annotated[
        Literal["text"], lacks("image_url", "input_audio", "file", "refusal", instead="send parts of type 'text'")
    ]
    text: Text


class Message(Strict):
    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        lacks("tool", "function", instead="these models call no tools; send 'system', 'user' or 'assistant'"),
    ]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True, max_length=1024)]
    type: Literal["text"] | None = None  # lm-eval puts it here
    name: Annotated[str, Field(max_length=256)] | None = None
    # An answer has these, and clients send it back as it came; empty, they say nothing.
    refusal: None = None
    audio: None = None
    function_call: Absent = None
    tool_calls: EmptyList = None
    annotations: EmptyList = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]


class ChatRequest(Sampling, ChatHints):
    """POST /v1/chat/completions"""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: EmptyList = None
    functions: EmptyList = None
    # Without tools, these two say the same.
    tool_choice: Annotated[Literal["none", "auto"] | None, lacks("required", "function", "custom", "allowed_tools")] = (
        None
    )
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; send max_completion_tokens alone")
        if self.max_tokens == 0:
            raise ValueError("max_tokens must be at least 1 for a chat completion")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: EmptyText = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _agree(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not supported; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 needs echo: true, otherwise there is nothing to answer")
        return self


class TokenizeRequest(Strict):
    """POST /tokenize: a prompt, or messages rendered by the chat template."""

    model: ModelId | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="default: to a prompt; a chat template writes its own")
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize"""

    model: ModelId | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_TOKENS)]
