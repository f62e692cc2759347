"""Parameters that are accepted because clients send them, and that change nothing about an answer."""

from typing import Annotated, Any, Literal

from pydantic import Field

from services.openai.strict import Absent, Strict, lacks

Modality = Annotated[Literal["text"], lacks("audio")]


class StreamOptions(Strict):
    """Obfuscation hides the length of each piece; who asks for it may rely on it, so only its absence is accepted."""

    include_usage: bool | None = False
    include_obfuscation: Annotated[Literal[False] | None, lacks(True)] = False
    continuous_usage_stats: Annotated[Literal[False] | None, lacks(True)] = False


class PromptCacheOptions(Strict):
    mode: Literal["implicit", "explicit"] | None = None
    ttl: Annotated[str, Field(max_length=16)] | None = None


class Hints(Strict):
    """For whoever bills, stores or tells users apart; nothing here does."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class ChatHints(Strict):
    """A null asks for nothing. Another value is accepted where no answer could show that it was ignored.

    A cached prefix changes when an answer comes, never what it says, and caches hold tokens in memory alone.
    `reasoning_effort` bounds the reasoning before an answer; these models do none, so every bound is kept. Of
    `verbosity` and `modalities` there are OpenAI's defaults alone: another length or medium would be missed. So would
    the speed that a `prediction` is sent for.
    """

    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Annotated[Literal["medium"] | None, lacks("low", "high")] = None
    modalities: Annotated[list[Modality], Field(min_length=1, max_length=16)] | None = None
    prediction: Absent = None
    audio: Absent = None
    moderation: Absent = None
    web_search_options: Absent = None
