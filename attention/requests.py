"""What an attention worker is asked, and what it answers. Plain data that crosses processes as JSON."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one answer is drawn. Raises ValueError naming the field that is out of range, or no integer where it must."""

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # alternatives a token of the answer; 0: the drawn token alone
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    json_schema: str | None = None  # as JSON: the answer is JSON that fits it

    def __post_init__(self) -> None:
        for name in ("max_tokens", "min_tokens", "seed", "top_k", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if type(value) is not int and not (value is None and name.endswith("logprobs")):
                raise ValueError(f"{name} is {value!r:.100}; expected an integer")
        ranges: tuple[tuple[str, float, float], ...] = (
            ("max_tokens", 0, math.inf),
            ("min_tokens", 0, self.max_tokens),
            ("seed", 0, MAX_SEED),
            ("temperature", 0.0, 2.0),
            ("top_k", 0, math.inf),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        )
        for name, low, high in ranges:
            value = getattr(self, name)
            if not low <= value <= high or value == math.inf:
                raise ValueError(f"{name} is {value}; expected {low} to {high}")
        for name in ("top_p", "repetition_penalty"):
            value = getattr(self, name)
            if not 0 < value < math.inf or (name == "top_p" and value > 1):
                raise ValueError(f"{name} is {value}; expected above 0{' and at most 1' if name == 'top_p' else ''}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; expected at least 0")
        if self.json_schema is not None:
            if not isinstance(self.json_schema, str):
                raise ValueError(f"json_schema is {self.json_schema!r:.100}; expected JSON text")
            if self.ignore_eos or self.min_tokens:
                name = "ignore_eos" if self.ignore_eos else "min_tokens"
                raise ValueError(f"{name} is {getattr(self, name)}; expected it left out: JSON ends where it is whole")
        for token, bias in self.logit_bias:
            if not math.isfinite(bias):
                raise ValueError(f"logit_bias of token {token} is {bias}; expected a finite number")

    @property
    def penalises(self) -> bool:
        """Whether what a token is worth depends on those before it."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def narrows(self) -> bool:
        """Whether some tokens are never drawn because others are likelier."""
        return bool(self.top_k) or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One answer to one prompt. `resumed_ids` are answer tokens of an earlier life, which continue as if drawn here."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    resumed_ids: tuple[int, ...] = ()

    def to_json_dict(self) -> dict[str, Any]:
        return {  # of the whole request, asdict would copy the prompt token by token
            "id": self.id,
            "prompt_ids": self.prompt_ids,
            "params": asdict(self.params),
            "resumed_ids": self.resumed_ids,
        }

    @classmethod
    def from_json_dict(cls, raw: Mapping[str, Any]) -> "GenerateRequest":
        """Inverse of to_json_dict; raises KeyError, TypeError, OverflowError or ValueError on anything else."""
        params = dict(raw["params"])
        params["logit_bias"] = tuple((int(token), float(bias)) for token, bias in params.get("logit_bias", ()))
        params["stop_token_ids"] = _token_ids("stop_token_ids", params.get("stop_token_ids", ()))
        return cls(
            id=str(raw["id"]),
            prompt_ids=_token_ids("prompt_ids", raw["prompt_ids"]),
            params=SamplingParams(**params),
            resumed_ids=_token_ids("resumed_ids", raw.get("resumed_ids", ())),
        )


def _token_ids(name: str, raw: Iterable[Any]) -> tuple[int, ...]:
    """Raises ValueError for anything but integers."""
    tokens = tuple(raw)
    if not set(map(type, tokens)) <= {int}:
        raise ValueError(f"{name} is {raw!r:.100}; expected integers")
    return tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token, and of the likeliest ones at its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def to_json_list(self) -> list[Any]:
        return [self.token_id, self.logprob, [list(pair) for pair in self.top]]

    @classmethod
    def from_json_list(cls, raw: list[Any]) -> "TokenLogprob":
        token, logprob, top = raw
        return cls(int(token), float(logprob), tuple((int(t), float(value)) for t, value in top))


@dataclass(frozen=True, slots=True)
class Update:
    """What a step brought one request: new tokens, scores of its prompt, or its end."""

    id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # of the next prompt tokens, in order
    # "stop": by the last of `token_ids`; "length"; "error"; or "lost": the worker's end, not the request's fault
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0  # prompt tokens that a reused prefix spared

    def to_json_dict(self) -> dict[str, Any]:
        raw: dict[str, Any] = {"id": self.id}
        if self.token_ids:
            raw["token_ids"] = list(self.token_ids)
        if self.logprobs is not None:
            raw["logprobs"] = [score.to_json_list() for score in self.logprobs]
        if self.prompt_logprobs is not None:
            raw["prompt_logprobs"] = [score and score.to_json_list() for score in self.prompt_logprobs]
        if self.finish_reason is not None:
            raw["finish_reason"] = self.finish_reason
        if self.error is not None:
            raw["error"] = self.error
        if self.cached_tokens:
            raw["cached_tokens"] = self.cached_tokens
        return raw

    @classmethod
    def from_json_dict(cls, raw: Mapping[str, Any]) -> "Update":
        """Inverse of to_json_dict; raises KeyError, TypeError or ValueError on anything else."""
        logprobs, prompt_logprobs = raw.get("logprobs"), raw.get("prompt_logprobs")
        return cls(
            id=str(raw["id"]),
            token_ids=tuple(raw.get("token_ids", ())),
            logprobs=None if logprobs is None else tuple(map(TokenLogprob.from_json_list, logprobs)),
            prompt_logprobs=None
            if prompt_logprobs is None
            else tuple(score and TokenLogprob.from_json_list(score) for score in prompt_logprobs),
            finish_reason=raw.get("finish_reason"),
            error=raw.get("error"),
            cached_tokens=int(raw.get("cached_tokens", 0)),
        )
