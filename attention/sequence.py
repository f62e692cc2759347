"""One request as the engine sees it: its tokens, its blocks, and how far its latents are computed."""

from dataclasses import dataclass, field

from attention.blocks import NOTHING, ROOT, Prefix
from attention.requests import GenerateRequest, SamplingParams
from model.grammar import Grammar


@dataclass(slots=True, eq=False)
class Sequence:
    """Grows by one token a step. `tokens` is prompt + answer; the first `computed` have latents in `blocks`."""

    request: GenerateRequest
    arrival: int
    tokens: list[int] = field(init=False)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)  # identities of the full, published blocks
    found: Prefix = NOTHING  # in the cache, when it was last looked for
    cached_tokens: int | None = None  # prompt tokens that a reused prefix spared, known once first scheduled
    grammar: Grammar | None = None  # of the answer, as far as it has come
    fault: str | None = None  # that ends it
    scored_prompt: int = 0  # prompt tokens whose log-probabilities were sent

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_ids, *self.request.resumed_ids]

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def generated(self) -> int:
        """Answer tokens so far, those of an earlier life included."""
        return len(self.tokens) - self.prompt_length

    @property
    def last_content(self) -> int:
        return self.contents[-1] if self.contents else ROOT
