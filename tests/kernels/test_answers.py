"""Whole answers by every kind of kernels, torch's among them: nobody's company changes a bit."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from attention.engine import EngineLimits
from attention.scheduler import SchedulerLimits
from kernels.threads import set_threads
from tests.serving import Answer, greedy, make_engine, run


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    set_threads(request.param)
    yield request.param
    set_threads(before)


@pytest.mark.usefixtures("threads")
def test_no_company_chunk_preemption_or_number_of_hosts_changes_a_bit(checkpoint: Callable[[str], Path]) -> None:
    path, rng = checkpoint("tiny"), random.Random(11)
    prompts = [[rng.randrange(2, 2000) for _ in range(length)] for length in (3, 20, 21, 30, 9)]
    requests = [
        greedy(str(place), prompt, 24, logprobs=2, temperature=0.7 * (place % 2), seed=place)
        for place, prompt in enumerate(prompts)
    ]
    alone: dict[str, Answer] = {}
    engine = make_engine(path, 1)
    for request in requests:
        alone |= run(engine, [request])
    scheduler = SchedulerLimits(step_tokens=11)
    crowded = make_engine(path, 3, EngineLimits(cache_blocks=24, block_size=4, scheduler=scheduler))
    together = run(crowded, requests)
    assert crowded.stats().preemptions > 0
    for request in requests:
        assert together[request.id].tokens == alone[request.id].tokens
        assert together[request.id].logprobs == alone[request.id].logprobs
