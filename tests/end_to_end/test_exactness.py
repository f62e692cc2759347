"""Logits and tokens against transformers, and that nothing a server may do changes a bit of them."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attention.engine import EngineLimits
from attention.requests import GenerateRequest
from attention.scheduler import SchedulerLimits
from tests import oracle
from tests.checkpoints import SHAPES, YARN, write_checkpoint
from tests.serving import Answer, greedy, make_engine, run

TOLERANCE = 1e-4


def prompt(seed: int, length: int, vocabulary: int = 2000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, vocabulary) for _ in range(length)]


def assert_matches_oracle(path: Path, tokens: list[int], hosts: int) -> None:
    answer = run(make_engine(path, hosts), [greedy("a", tokens, 0, prompt_logprobs=20)])["a"]
    expected = torch.log_softmax(oracle.logits(path, tokens).double(), -1)
    assert len(answer.prompt_logprobs) == len(tokens)
    assert answer.prompt_logprobs[0] is None
    for position, scored in enumerate(answer.prompt_logprobs[1:]):
        assert scored is not None
        for token, value in ((scored.token_id, scored.logprob), *scored.top):
            assert abs(value - float(expected[position, token])) < TOLERANCE


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_log_probabilities_match_transformers(checkpoint: Callable[[str], Path], shape: str) -> None:
    assert_matches_oracle(checkpoint(shape), prompt(1, 150), hosts=2)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_64_greedy_tokens_match_transformers(checkpoint: Callable[[str], Path], shape: str) -> None:
    path = checkpoint(shape)
    tokens = prompt(2, 33)
    assert run(make_engine(path, 3), [greedy("a", tokens, 64)])["a"].tokens == oracle.greedy_tokens(path, tokens, 64)


def random_shape(seed: int) -> dict[str, object]:
    """A configuration nobody would choose: awkward sizes, any routing, any number of dense layers."""
    rng = random.Random(seed)
    groups = rng.choice([1, 2, 3, 4])
    per_group = rng.choice([2, 3, 5])
    kept = rng.randint(1, groups)
    rope = rng.choice([2, 6, 16, 64])
    shape: dict[str, object] = SHAPES["tiny"] | {
        "vocab_size": rng.choice([300, 515]),
        "hidden_size": rng.choice([30, 60, 90, 150]),
        "intermediate_size": rng.choice([31, 64, 100]),
        "moe_intermediate_size": rng.choice([7, 24, 33]),
        "num_hidden_layers": rng.randint(2, 4),
        "num_attention_heads": (heads := rng.choice([1, 2, 3, 5])),
        "num_key_value_heads": heads,
        "q_lora_rank": rng.choice([None, 17, 48]),
        "kv_lora_rank": rng.choice([10, 32, 70]),
        "qk_nope_head_dim": rng.choice([6, 16, 32]),
        "qk_rope_head_dim": rope,
        "head_dim": rope,
        "v_head_dim": rng.choice([3, 16, 24]),
        "n_routed_experts": groups * per_group,
        "n_group": groups,
        "topk_group": kept,
        "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
        "num_experts_per_tok": rng.randint(1, kept * per_group),
        "first_k_dense_replace": seed % 3,
        "n_shared_experts": rng.randint(0, 2),
        "routed_scaling_factor": rng.choice([1.0, 2.5, 16.0]),
    }
    if rng.random() < 0.5:
        shape["rope_parameters"] = YARN | {"mscale": rng.choice([0.707, 1.0]), "mscale_all_dim": 0.707}
    return shape


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers' shared experts, of none
@pytest.mark.parametrize("seed", range(12))
def test_random_configurations_match_transformers(seed: int, tmp_path: Path) -> None:
    shape = random_shape(seed)
    written = write_checkpoint(shape, tmp_path / "checkpoint", seed)
    assert_matches_oracle(written.path, prompt(seed, 50, 290), hosts=min(3, int(str(shape["n_routed_experts"]))))


@pytest.mark.parametrize("hosts", [1, 2, 3, 5, 8])
def test_host_count_changes_no_bit(checkpoint: Callable[[str], Path], hosts: int) -> None:
    path = checkpoint("tiny")
    request = greedy("a", prompt(3, 40), 12, logprobs=3)
    alone = run(make_engine(path, 1), [request])["a"]
    assert run(make_engine(path, hosts), [request])["a"].logprobs == alone.logprobs


def mixed_requests(count: int) -> list[GenerateRequest]:
    """Greedy and seeded requests of various lengths, the later ones sharing a prefix with the first."""
    shared = prompt(4, 35)
    requests = []
    for index in range(count):
        tokens = (shared if index % 2 else []) + prompt(100 + index, 3 + 7 * (index % 5))
        temperature = 0.0 if index % 3 else 0.9
        requests.append(greedy(f"r{index}", tokens, 10, logprobs=2, temperature=temperature, seed=index))
    return requests


@pytest.mark.parametrize("shape", ["tiny", "tiny-lite"])
def test_batch_chunks_prefixes_and_preemption_change_no_bit(checkpoint: Callable[[str], Path], shape: str) -> None:
    path = checkpoint(shape)
    requests = mixed_requests(12)
    alone = {}
    for request in requests:
        alone |= run(make_engine(path, 2), [request])
    settings = {
        "together": EngineLimits(cache_blocks=256),
        "chunks of 5": EngineLimits(cache_blocks=256, scheduler=SchedulerLimits(step_tokens=5)),
        "block size 7": EngineLimits(cache_blocks=256, block_size=7),
        "few blocks": EngineLimits(cache_blocks=9, scheduler=SchedulerLimits(step_tokens=64)),
    }
    for name, limits in settings.items():
        engine = make_engine(path, 2, limits)
        for _ in range(2):  # the second time with warm prefixes
            answers = run(engine, requests)
            for request in requests:
                assert answers[request.id].logprobs == alone[request.id].logprobs, (name, request.id)
                assert answers[request.id].tokens == alone[request.id].tokens
        assert engine.stats().blocks_owned == 0
        if name == "few blocks":
            assert engine.stats().preemptions > 0
        if name == "together":
            assert engine.stats().reused_tokens > 0


def test_replayed_tokens_continue_with_the_same_bits(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("tiny")
    request = greedy("a", prompt(5, 20), 16, logprobs=1, temperature=1.0, seed=7, frequency_penalty=0.5)
    whole = run(make_engine(path, 2), [request])["a"]
    for sent in (1, 7, 15):
        resumed = GenerateRequest("a", request.prompt_ids, request.params, tuple(whole.tokens[:sent]))
        rest = run(make_engine(path, 3), [resumed])["a"]
        assert rest.tokens == whole.tokens[sent:]
        assert rest.logprobs == whole.logprobs[sent:]


def test_prompt_scores_do_not_change_with_chunks(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("tiny")
    request = greedy("a", prompt(6, 61), 2, prompt_logprobs=2)
    whole = run(make_engine(path), [request])["a"]
    chunked = EngineLimits(cache_blocks=64, scheduler=SchedulerLimits(step_tokens=9))
    assert run(make_engine(path, 2, chunked), [request])["a"].prompt_logprobs == whole.prompt_logprobs


@pytest.mark.parametrize("seed", range(8))
def test_no_random_mix_changes_a_bit(checkpoint: Callable[[str], Path], seed: int) -> None:
    """Random arrivals, company that is cancelled, chunks, block sizes, preemption and host counts."""
    rng = random.Random(1000 + seed)
    path = checkpoint("tiny")
    requests = mixed_requests(10)
    alone: dict[str, Answer] = {}
    for request in requests:
        alone |= run(make_engine(path, 1), [request])
    size = rng.choice([4, 7, 16])
    limits = EngineLimits(
        cache_blocks=rng.randint(120, 400) // size,
        block_size=size,
        scheduler=SchedulerLimits(step_tokens=rng.choice([1, 3, 17, 64, 512]), running=rng.choice([1, 3, 64])),
    )
    engine = make_engine(path, rng.randint(1, 6), limits)
    arriving = rng.sample(requests, len(requests))
    answers = {request.id: Answer() for request in requests}
    strangers = 0
    for _ in range(5000):
        if arriving and rng.random() < 0.3:
            engine.submit(arriving.pop())
        if rng.random() < 0.1:
            engine.submit(greedy(f"stranger-{strangers}", prompt(rng.randrange(10**6), rng.randint(1, 40)), 20))
            strangers += 1
        elif strangers and rng.random() < 0.2:
            engine.cancel(f"stranger-{rng.randrange(strangers)}")
        for update in engine.step():
            if update.id in answers:
                answers[update.id].add(update)
        if not arriving and all(answer.finish_reason for answer in answers.values()):
            break
    for number in range(strangers):
        engine.cancel(f"stranger-{number}")
    for request in requests:
        assert answers[request.id].tokens == alone[request.id].tokens
        assert answers[request.id].logprobs == alone[request.id].logprobs
    assert engine.stats().blocks_owned == 0
