"""Tokens through HTTP, Ray Serve and expert actors are transformers' tokens, with however many hosts."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from attention.decoder import BESIDE, halving_rows
from cluster.attention_worker import HEARTBEAT_S
from model.config import read_config
from model.tokenizer import Tokenizer
from tests import oracle
from tests.certificates import make_certificate
from tests.checkpoints import SHAPES, write_checkpoint
from tests.end_to_end.clients import TOKENS, client, complete, complete_all, wait_until
from tests.end_to_end.deployment import Deployment
from tests.end_to_end.prompts import prompts
from tests.model.adapters import EXPERTS, V2, peft_adapter, peft_merged

pytestmark = pytest.mark.ray

IN_FLIGHT = 20


@pytest.fixture(scope="module")
def path(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("tiny")


@pytest.fixture(scope="module")
def expected(path: Path) -> list[str]:
    """Text of transformers' 64 greedy tokens for each of 16 prompts."""
    tokenizer = Tokenizer.load(path)
    return [tokenizer.decode(oracle.greedy_tokens(path, prompt, TOKENS)) for prompt in prompts(16)]


@pytest.fixture(scope="module")
def service(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two expert hosts and two attention workers, which talk to each other and to the ingress over TLS."""
    arguments: dict[str, Any] = {"experts": {"hosts": 2, "threads": 1}, "attention": {"replicas": 2, "threads": 1}}
    arguments["tls"] = asdict(make_certificate(tmp_path_factory.mktemp("tls")))
    with Deployment(path, max_in_flight=IN_FLIGHT, **arguments) as running:
        yield running


@pytest.mark.parametrize("hosts", [2, 1, 3, 5])
def test_64_greedy_tokens_are_those_of_transformers(service: Deployment, expected: list[str], hosts: int) -> None:
    api = client(service.url)
    if len(service.hosts()) != hosts:
        changes: list[str] = []

        def scale() -> None:
            changes.append(service.change("scale", hosts=hosts)["phase"])

        assert complete_all(api, prompts(16), midway=scale) == expected  # before, meanwhile and after
        assert changes == ["done"]
    report = service.status()
    assert len(report["expert_hosts"]) == hosts
    assert sum(host["experts"] for host in report["expert_hosts"]) == 3 * 16  # 3 MoE layers
    assert len({host["pid"] for host in report["expert_hosts"]}) == hosts  # each in a process of its own
    assert complete(api, prompts(16)[0]) == expected[0]
    assert complete_all(api, prompts(16)) == expected


def dispatches(service: Deployment) -> int:
    """Those that the workers' heartbeats told of; the next tells of all others."""
    time.sleep(2.5 * HEARTBEAT_S)
    return sum(worker["dispatches"] for worker in service.status()["attention_workers"])


def test_a_long_prompt_is_computed_as_halves_in_turn_by_more_than_two_hosts(service: Deployment, path: Path) -> None:
    config = read_config(path)
    rng = random.Random(8)
    prompt = [rng.randrange(2, 2000) for _ in range(halving_rows(config))]
    if len(service.hosts()) <= BESIDE:
        assert service.change("scale", hosts=BESIDE + 1)["phase"] == "done"
    before = dispatches(service)
    assert complete(client(service.url), prompt, 1) == Tokenizer.load(path).decode(
        oracle.greedy_tokens(path, prompt, 1)
    )
    assert dispatches(service) - before == 2 * len(config.moe_layers)


def test_a_chat_streams_to_the_openai_client(service: Deployment, path: Path) -> None:
    messages: Any = [{"role": "user", "content": "What is a shoal?"}]
    chunks = list(
        client(service.url).chat.completions.create(
            model=path.name,
            messages=messages,
            max_completion_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    tokenizer = Tokenizer.load(path)
    prompt = tokenizer.apply_chat_template(messages)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == tokenizer.decode(oracle.greedy_tokens(path, prompt, 12))
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 12)


def blocks_owned(service: Deployment) -> int:
    return sum(worker["blocks_owned"] for worker in service.status()["attention_workers"])


def test_a_client_that_leaves_frees_its_blocks(service: Deployment) -> None:
    api = client(service.url)
    stream = api.completions.create(
        model=api.models.list().data[0].id,
        prompt=prompts(1)[0],
        max_tokens=3000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    wait_until(lambda: blocks_owned(service) > 0)
    stream.close()
    wait_until(lambda: blocks_owned(service) == 0 and service.status()["in_flight"] == 0)


def test_more_requests_than_fit_are_told_to_come_back(service: Deployment, expected: list[str]) -> None:
    api = client(service.url)
    refused: list[openai.RateLimitError] = []

    def ask() -> None:
        try:
            complete(api, prompts(1)[0], 400)
        except openai.RateLimitError as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(IN_FLIGHT + 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) >= 5
    assert int(refused[0].response.headers["Retry-After"]) >= 1
    assert complete(api, prompts(16)[0]) == expected[0]


def test_health_says_whether_a_token_can_be_generated(service: Deployment) -> None:
    frozen = [worker["pid"] for worker in service.status()["attention_workers"]]
    assert httpx.get(f"{service.url}/health", timeout=30).status_code == 200
    for pid in frozen:
        service.freeze(pid, seconds=60)
    try:
        wait_until(lambda: httpx.get(f"{service.url}/health", timeout=30).status_code == 503)
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: httpx.get(f"{service.url}/health", timeout=30).status_code == 200)


def test_new_numbers_are_taken_on_when_the_application_is_deployed_again(
    service: Deployment, expected: list[str]
) -> None:
    before = service.hosts()
    experts = {"hosts": len(before) - 2, "threads": 1}
    service.deploy_again(experts=experts, attention={"replicas": 1, "threads": 1})
    wait_until(lambda: len(service.hosts()) == experts["hosts"])
    assert {host["pid"] for host in service.hosts()} < {host["pid"] for host in before}
    assert complete(client(service.url), prompts(16)[0]) == expected[0]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_another_model_under_the_same_name_never_mixes_with_the_first(
    service: Deployment, path: Path, expected: list[str], tmp_path: Path
) -> None:
    """Nor does an adapter, of attention and of routed experts, with the model that it applies to."""
    other = tmp_path / path.name  # of the same shape, and called the same by clients
    write_checkpoint(SHAPES["tiny"], other, seed=7)
    adapter = peft_adapter(other, tmp_path / "adapter", r=4, target_modules=list(V2), target_parameters=EXPERTS)
    peft_merged(other, adapter, tmp_path / "merged")
    prompt = prompts(1)[0]
    text = Tokenizer.load(other).decode(oracle.greedy_tokens(tmp_path / "merged", prompt, TOKENS))
    assert text not in (expected[0], Tokenizer.load(other).decode(oracle.greedy_tokens(other, prompt, TOKENS)))
    api, answers, over = client(service.url).with_options(max_retries=0), [expected[0]], threading.Event()

    def ask() -> None:
        while not over.is_set():
            with suppress(openai.APIError):  # between the two nobody serves
                answers.append(complete(api, prompt))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        service.deploy_again(model=str(other), adapters=[str(adapter)])
        wait_until(lambda: answers[-1] == text)
    finally:
        over.set()
        asking.join()
    first = answers.index(text)
    assert set(answers[:first]) == {expected[0]}
    assert set(answers[first:]) == {text}
    assert service.status()["model"] == str(other)
