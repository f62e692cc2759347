"""The engine: requests in, tokens out, one step at a time. Plain, single-threaded, no clock of its own."""

import contextlib
from dataclasses import dataclass, field, replace

from torch import Tensor

from attention.admission import check_request
from attention.batch import build_batch, logit_rows
from attention.blocks import BlockPool
from attention.cache import LatentCache
from attention.decoder import Decoder
from attention.finish import finish_reason
from attention.graphs import StepGraphs
from attention.recorder import Recorder
from attention.requests import GenerateRequest, TokenLogprob, Update
from attention.rope import RotaryTable
from attention.sampling import Draw, draw_all, forbid, penalised, restrict, score
from attention.scheduler import Chunk, Scheduler, SchedulerLimits
from attention.sequence import Sequence
from experts.errors import ExpertError
from kernels.native import triton_serves
from model.grammar import Grammar, Grammars


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one attention worker holds and computes at once."""

    cache_blocks: int = 1024
    block_size: int = 16  # tokens
    max_length: int = 4096  # tokens of prompt and answer together
    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment's counts; blocks are of the latent cache."""

    running: int
    waiting: int
    blocks_owned: int
    blocks_total: int
    preemptions: int
    steps: int
    prompt_tokens: int  # computed, reused prefixes not counted
    generated_tokens: int
    reused_tokens: int


class Engine:
    """Schedules, computes and samples; `step` returns what every request got."""

    def __init__(self, decoder: Decoder, limits: EngineLimits, grammars: Grammars | None = None) -> None:
        """Without `grammars`, requests for JSON are refused."""
        config = decoder.config
        self._grammars = grammars
        self._decoder = decoder
        self._limits = replace(limits, max_length=min(limits.max_length, config.max_position_embeddings))
        self._pool = BlockPool(limits.cache_blocks, limits.block_size)
        recorded = decoder.device != "cpu" and triton_serves(decoder.device)  # takes a block that no sequence owns
        blocks = limits.cache_blocks + recorded
        self._cache = LatentCache(config, blocks, limits.block_size, decoder.dtype, decoder.device)
        self._graphs: StepGraphs | None = None
        if recorded:
            most_blocks = -(-self.max_length // limits.block_size)
            recorder = Recorder(self._cache.data_LBSW.device)
            self._graphs = StepGraphs(decoder, self._cache, limits.cache_blocks, most_blocks, recorder)
        self._rotary = RotaryTable(config, self.max_length, decoder.device)
        self._scheduler = Scheduler(self._pool, limits.scheduler)
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self._steps = self._prompt_tokens = self._generated_tokens = self._reused_tokens = 0

    @property
    def max_length(self) -> int:
        """Most tokens, prompt and answer together, that a request may ask for."""
        return min(self._limits.max_length, self._limits.cache_blocks * self._limits.block_size)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request; raises ValueError, naming the field, when it can never be served."""
        if request.id in self._sequences:
            raise ValueError(f"request id {request.id!r} is already running")
        check_request(request, self._decoder.config.vocab_size, self.max_length)
        sequence = Sequence(request, self._arrivals)
        sequence.grammar = self._begin_grammar(request)
        self._arrivals += 1
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def prepare(self, request: GenerateRequest) -> None:
        """What of `submit` takes long, and may be done in another thread meanwhile: its schema is compiled."""
        if request.params.json_schema is not None and self._grammars is not None:
            with contextlib.suppress(ValueError):  # as submit says
                self._grammars.begin(request.params.json_schema)

    def cancel(self, request_id: str) -> None:
        """Drop a request and free its blocks; unknown ids (already finished) are fine."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._scheduler.remove(sequence)

    def step(self) -> list[Update]:
        """Compute one batch; the updates of every sequence that got a token or ended."""
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        try:
            logits_LV = self._forward(chunks)
        except ExpertError as error:
            return [self._fail(chunk.sequence, str(error)) for chunk in chunks]
        self._scheduler.complete(chunks)
        self._steps += 1
        logits = logits_LV.split([len(logit_rows(chunk)) for chunk in chunks])  # of each chunk
        draws = [self._draw(chunk, rows_LV) for chunk, rows_LV in zip(chunks, logits, strict=True)]
        tokens = iter(draw_all([one for one in draws if one is not None]))
        updates: list[Update] = []
        for chunk, rows_LV, one in zip(chunks, logits, draws, strict=True):
            update = self._advance(chunk, rows_LV, None if one is None else next(tokens))
            if update is not None:
                updates.append(update)
        return updates

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            blocks_owned=self._pool.owned,
            blocks_total=self._pool.total,
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            reused_tokens=self._reused_tokens,
        )

    def _begin_grammar(self, request: GenerateRequest) -> Grammar | None:
        """The answer's, behind what an earlier life drew; raises ValueError where it cannot be had."""
        schema = request.params.json_schema
        if schema is None:
            return None
        if self._grammars is None:
            raise ValueError("json_schema is given; expected none: this worker knows no tokenizer")
        grammar = self._grammars.begin(schema)
        grammar.take(request.resumed_ids)
        return grammar

    def _forward(self, chunks: list[Chunk]) -> Tensor:
        batch = build_batch(chunks, self._limits.block_size, self._rotary)
        if self._graphs is not None and len(batch) == len(chunks) == len(batch.logit_row_L):
            logits_LV = self._graphs.forward(batch)
            if logits_LV is not None:
                return logits_LV
        return self._decoder.forward(batch, self._cache)

    def _draw(self, chunk: Chunk, logits_LV: Tensor) -> Draw | None:
        """What is to be drawn after a chunk; None where it does not reach the end, or only scores were asked for."""
        sequence, params = chunk.sequence, chunk.sequence.params
        if not chunk.samples or params.max_tokens == sequence.generated:
            return None
        prompt: list[int] = []
        answer: list[int] = []
        if params.penalises:
            prompt, answer = sequence.tokens[: sequence.prompt_length], sequence.tokens[sequence.prompt_length :]
        logits_V = penalised(logits_LV[-1], prompt, answer, params)
        if sequence.generated < params.min_tokens:
            logits_V = forbid(logits_V, (*self._decoder.config.eos_token_ids, *params.stop_token_ids))
        if sequence.grammar is not None:
            try:
                logits_V = restrict(logits_V, sequence.grammar.allowed())
            except ValueError as error:
                sequence.fault = str(error)
                return None
        return Draw(logits_V, params, len(sequence.tokens))

    def _advance(self, chunk: Chunk, logits_LV: Tensor, token: int | None) -> Update | None:
        """Take on the token that was drawn, if one was; None when there is nothing to tell yet."""
        sequence = chunk.sequence
        params = sequence.params
        if sequence.fault is not None:
            return self._fail(sequence, sequence.fault)
        prompt_logprobs = self._score_prompt(chunk, logits_LV)
        self._prompt_tokens += max(0, min(chunk.end, sequence.prompt_length) - chunk.start)
        if not chunk.samples:
            if prompt_logprobs is None:
                return None
            return Update(id=sequence.id, prompt_logprobs=prompt_logprobs, cached_tokens=0)
        self._reused_tokens += (sequence.cached_tokens or 0) if sequence.generated == 0 else 0
        if token is None:
            return self._finish(sequence, (), None, prompt_logprobs, "length")
        sequence.tokens.append(token)
        if sequence.grammar is not None:
            try:
                sequence.grammar.take((token,))
            except ValueError as error:
                return self._fail(sequence, str(error))
        self._generated_tokens += 1
        logprobs = None if params.logprobs is None else (score(logits_LV[-1], token, params.logprobs),)
        reason = finish_reason(sequence, self._decoder.config.eos_token_ids)
        if reason is None:
            return Update(
                id=sequence.id,
                token_ids=(token,),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                cached_tokens=sequence.cached_tokens or 0,
            )
        return self._finish(sequence, (token,), logprobs, prompt_logprobs, reason)

    def _score_prompt(self, chunk: Chunk, logits_LV: Tensor) -> tuple[TokenLogprob | None, ...] | None:
        """Scores of the prompt tokens that this chunk's logits predict, in order; the first token has none."""
        sequence = chunk.sequence
        alternatives = sequence.params.prompt_logprobs
        if alternatives is None or sequence.scored_prompt >= sequence.prompt_length:
            return None
        scores: list[TokenLogprob | None] = []
        if sequence.scored_prompt == 0:
            scores.append(None)
            sequence.scored_prompt = 1
        for offset in range(chunk.count):
            predicted = chunk.start + offset + 1
            if predicted == sequence.scored_prompt and predicted < sequence.prompt_length:
                scores.append(score(logits_LV[offset], sequence.tokens[predicted], alternatives))
                sequence.scored_prompt += 1
        return tuple(scores)

    def _finish(
        self,
        sequence: Sequence,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...] | None,
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None,
        reason: str,
    ) -> Update:
        self.cancel(sequence.id)
        return Update(
            id=sequence.id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            cached_tokens=sequence.cached_tokens or 0,
        )

    def _fail(self, sequence: Sequence, message: str) -> Update:
        self.cancel(sequence.id)
        return Update(id=sequence.id, finish_reason="error", error=message)
