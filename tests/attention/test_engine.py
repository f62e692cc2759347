"""How answers end, what is refused, and that nothing is kept of a request that is over."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attention.engine import Engine, EngineLimits
from attention.requests import GenerateRequest, SamplingParams
from attention.scheduler import SchedulerLimits
from experts.errors import HostUnavailable
from experts.local import LocalTransport
from experts.messages import ForwardRequest
from experts.transport import Pending
from model.checkpoint import Checkpoint
from router.placement import Host
from tests.serving import Answer, greedy, make_engine, make_hosts, run

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def engine(checkpoint: Callable[[str], Path]) -> Engine:
    return make_engine(checkpoint("tiny"), 2)


def ask(engine: Engine, prompt: list[int] = PROMPT, **params: object) -> Answer:
    wanted = SamplingParams(**({"max_tokens": 12, "temperature": 0.0} | params))  # type: ignore[arg-type]
    answer = run(engine, [GenerateRequest("a", tuple(prompt), wanted)])["a"]
    assert engine.stats().blocks_owned == 0
    return answer


def test_max_tokens_ends_with_length(engine: Engine) -> None:
    answer = ask(engine)
    assert (len(answer.tokens), answer.finish_reason) == (12, "length")


def test_a_stop_token_ends_with_stop(engine: Engine) -> None:
    whole = ask(engine).tokens
    stop = next(token for token in whole[2:] if token not in whole[:2])
    answer = ask(engine, stop_token_ids=(stop,))
    assert answer.tokens == whole[: whole.index(stop) + 1]
    assert answer.finish_reason == "stop"


def test_an_end_token_ends_unless_ignored(engine: Engine) -> None:
    eos = ((1, 100.0),)
    assert (ask(engine, logit_bias=eos).tokens, ask(engine, logit_bias=eos).finish_reason) == ([1], "stop")
    assert ask(engine, logit_bias=eos, ignore_eos=True).tokens == [1] * 12
    assert ask(engine, logit_bias=eos, min_tokens=3).tokens.index(1) == 3


def test_an_end_token_of_generation_config_ends_and_waits_for_min_tokens(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint("mini"), tmp_path / "copy")
    (copy / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    engine = make_engine(copy)
    likely = ((9, 100.0),)
    assert ask(engine, logit_bias=likely).finish_reason == "stop"
    assert ask(engine, logit_bias=likely).tokens == [9]
    assert ask(engine, logit_bias=likely, min_tokens=3).tokens.index(9) == 3


def test_nothing_but_the_prompts_scores(engine: Engine) -> None:
    answer = ask(engine, max_tokens=0, prompt_logprobs=2)
    assert (answer.tokens, answer.finish_reason) == ([], "length")
    assert [scored is None for scored in answer.prompt_logprobs] == [True, False, False, False]


def test_a_draw_does_not_depend_on_company(engine: Engine) -> None:
    def request(name: str, seed: int) -> GenerateRequest:
        return GenerateRequest(name, tuple(PROMPT), SamplingParams(max_tokens=12, seed=seed))

    alone = [run(engine, [request("a", seed)])["a"].tokens for seed in range(4)]
    together = run(engine, [request(str(seed), seed) for seed in range(4)])
    assert [together[str(seed)].tokens for seed in range(4)] == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_cancelling_frees_the_blocks_and_ends_the_updates(engine: Engine) -> None:
    engine.submit(greedy("gone", PROMPT, 50))
    engine.step()
    assert engine.stats().blocks_owned == 1
    engine.cancel("gone")
    engine.cancel("never-there")
    assert (engine.stats().blocks_owned, engine.has_work, engine.step()) == (0, False, [])


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (GenerateRequest("x", (), SamplingParams(max_tokens=1)), "prompt_ids is empty"),
        (GenerateRequest("x", (5, 2048), SamplingParams(max_tokens=1)), "token id 2048 is outside"),
        (GenerateRequest("x", (-1,), SamplingParams(max_tokens=1)), "token id -1 is outside"),
        (GenerateRequest("x", (5,), SamplingParams(max_tokens=1), (9999,)), "token id 9999"),
        (GenerateRequest("x", (5,), SamplingParams(max_tokens=1, logit_bias=((4000, 1.0),))), "logit_bias names"),
        (GenerateRequest("x", (5,), SamplingParams(max_tokens=1, stop_token_ids=(2048,))), "stop_token_ids names"),
        (GenerateRequest("x", (5,), SamplingParams(max_tokens=1, stop_token_ids=(-1,))), "stop_token_ids names"),
        (GenerateRequest("x", (5,), SamplingParams(max_tokens=1), (6, 7)), "resumed_ids has 2 tokens"),
        (GenerateRequest("x", (5,) * 10, SamplingParams(max_tokens=4090)), "4100 tokens; this worker's limit is 4096"),
    ],
)
def test_what_can_never_be_served_is_refused(engine: Engine, request_: GenerateRequest, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        engine.submit(request_)
    assert not engine.has_work


class Broken(LocalTransport):
    """Local hosts that are gone while `down`."""

    down = False

    def submit(self, host: Host, request: ForwardRequest) -> Pending:
        return _Gone() if self.down else super().submit(host, request)


class _Gone:
    def result(self, timeout_s: float) -> None:
        raise HostUnavailable("gone")

    def release(self) -> None:
        pass  # it was never open


def test_unreachable_experts_fail_the_step_and_not_the_engine(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("tiny")
    hosts, _ = make_hosts(Checkpoint.open(path), 2)
    transport = Broken(hosts)
    engine = make_engine(path, 2, EngineLimits(cache_blocks=64), transport)
    monkeypatch.setattr(engine._decoder._experts, "_deadline_s", 0.0)
    good = ask(engine).tokens
    transport.down = True
    failed = ask(engine, [9, 9, 9])
    assert (failed.finish_reason, failed.tokens) == ("error", [])
    assert failed.error is not None
    assert "no host answered for experts" in failed.error
    transport.down = False
    assert ask(engine).tokens == good


def test_a_cache_too_small_for_all_still_serves_all(checkpoint: Callable[[str], Path]) -> None:
    limits = EngineLimits(cache_blocks=8, block_size=4, scheduler=SchedulerLimits(running=8))
    small, large = make_engine(checkpoint("tiny"), 1, limits), make_engine(checkpoint("tiny"), 1)
    requests = [greedy(str(n), [10 + n, 20, 30], 20) for n in range(5)]
    crowded, roomy = run(small, requests), run(large, requests)
    assert small.stats().preemptions > 0
    assert all(crowded[name].tokens == roomy[name].tokens for name in roomy)
    assert all(a.logprobs == b.logprobs for a, b in zip(crowded.values(), roomy.values(), strict=True))
    assert torch.is_inference_mode_enabled() is False
