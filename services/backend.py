"""What the HTTP doors need of the machinery behind them; tests put a script in its place."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

from attention.requests import GenerateRequest, Update
from cluster.change import Wish
from model.generation import GenerationDefaults
from model.tokenizer import Tokenizer


class Overloaded(Exception):
    """No room for another request; try again after `retry_after_s` seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"no room for another request; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class GenerationFailed(Exception):
    """A request that was accepted cannot be finished."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is served, and under which name."""

    id: str
    created: int  # seconds since the epoch
    vocab_size: int
    max_length: int  # tokens of prompt and answer
    fingerprint: str
    tokenizer: Tokenizer
    defaults: GenerationDefaults


@dataclass(frozen=True, slots=True)
class Reading:
    """A moment's counts: this ingress's own, and what the controller knows."""

    in_flight: int  # requests
    replays: int  # answers that went on with another worker, since the ingress started
    status: dict[str, Any] | None  # None while the controller is away


class Backend(Protocol):
    """Generates tokens; knows nothing of text or HTTP."""

    @property
    def model(self) -> ServedModel:
        """What is served."""

    @property
    def most_in_flight(self) -> int:
        """Answers that there is room for when nothing else runs."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Update, None]:
        """Updates until one has a finish_reason; closing the iterator cancels the request.

        Raises Overloaded before the first update, or GenerationFailed.
        """

    async def unhealthy(self) -> str | None:
        """Why no request could be served now; None when one could."""

    async def status(self) -> dict[str, Any]:
        """Hosts, workers and epoch, as the controller tells them."""

    async def begin_change(self, wish: Wish) -> dict[str, Any]:
        """Change the expert hosts; the document of the change that has begun.

        Raises ChangeRefused when the wish cannot be had, and GenerationFailed while the controller is away.
        """

    async def make_room(self, hosts: int | None, node: str | None) -> dict[str, Any]:
        """Go on with `hosts` at most, or without any on `node`: {"done", "change"}; asked again until it is done.

        Raises ChangeRefused when it cannot be had, and GenerationFailed while the controller is away.
        """

    async def watch_change(self, change_id: str, seen: int, timeout_s: float) -> dict[str, Any] | None:
        """A change's document once its version is another than `seen`, or after `timeout_s`; None: no such change.

        Raises GenerationFailed while the controller is away.
        """

    async def events(self, after: int, limit: int) -> list[dict[str, Any]]:
        """Events numbered above `after`, the newest last; raises GenerationFailed while the controller is away."""

    async def metrics(self) -> Reading:
        """What can be counted now, whether the controller is there or not."""
