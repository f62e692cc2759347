"""Tokens through HTTP, Ray Serve and expert actors are transformers' tokens, whatever dies meanwhile."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.session import LocalCluster  # before anything that imports ray
from model.tokenizer import Tokenizer
from tests import oracle
from tests.certificates import make_certificate
from tests.end_to_end.clients import TOKENS, client, complete, complete_all, free_port, wait_until

pytestmark = pytest.mark.ray

ADMIN = "admin-token-of-the-tests"
IN_FLIGHT = 20


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(2, 2000) for _ in range(rng.randint(3, 60))] for _ in range(count)]


@pytest.fixture(scope="module")
def path(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("tiny")


@pytest.fixture(scope="module")
def expected(path: Path) -> list[str]:
    """Text of transformers' 64 greedy tokens for each of 16 prompts."""
    tokenizer = Tokenizer.load(path)
    return [tokenizer.decode(oracle.greedy_tokens(path, prompt, TOKENS)) for prompt in prompts(16)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """One Ray with Serve's proxy, for every application of this module."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    port = free_port()
    with LocalCluster("tests"):
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


Service = Callable[[int, int], str]


@pytest.fixture(scope="module")
def service(address: str, path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`service(hosts, workers)`: the URL of an application with that many expert hosts and attention workers.

    Several workers talk to hosts and ingress over TLS.
    """
    from ray import serve

    from services.app import AppArgs, build

    running: str | None = None
    files = make_certificate(tmp_path_factory.mktemp("tls"))

    def start(hosts: int, workers: int = 1) -> str:
        nonlocal running
        name = f"h{hosts}w{workers}"
        if running != name:
            if running is not None:
                stop(running)
            raw: dict[str, Any] = {"model": str(path), "name": name, "admin_token": ADMIN, "max_in_flight": IN_FLIGHT}
            raw |= {"experts.hosts": hosts, "experts.threads": 1, "attention": {"replicas": workers, "threads": 1}}
            raw["tls"] = asdict(files) if workers > 1 else None
            serve.run(build(AppArgs.model_validate(raw)), name=name, route_prefix=f"/{name}")
            running = name
            wait_until(lambda: len(status(f"{address}/{name}")["attention_workers"]) == workers)
        return f"{address}/{name}"

    def stop(name: str) -> None:
        report = status(f"{address}/{name}")
        serve.delete(name)
        deadline = time.monotonic() + 30
        while left := [pid for pid in process_ids(report) if alive(pid)]:  # nothing outlives its application
            assert time.monotonic() < deadline, f"{left} still run; the service was {report}"
            time.sleep(0.1)

    yield start
    if running is not None:
        stop(running)


def status(url: str) -> dict[str, Any]:
    answer = httpx.get(f"{url}/admin/status", headers={"Authorization": f"Bearer {ADMIN}"}, timeout=10)
    document: dict[str, Any] = answer.json()
    return document


def process_ids(report: dict[str, Any]) -> list[int]:
    members = [*report["expert_hosts"], *report["attention_workers"], report["controller"]]
    return [member["pid"] for member in members]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("hosts", [1, 3, 5, 2])
def test_64_greedy_tokens_are_those_of_transformers(service: Service, expected: list[str], hosts: int) -> None:
    url = service(hosts, 1)
    report = status(url)
    assert len(report["expert_hosts"]) == hosts
    assert sum(host["experts"] for host in report["expert_hosts"]) == 3 * 16  # 3 MoE layers
    assert len(set(process_ids(report))) == hosts + 2  # each in a process of its own
    api = client(url)
    assert complete(api, prompts(16)[0]) == expected[0]
    assert complete_all(api, prompts(16)) == expected


def test_a_chat_streams_to_the_openai_client(service: Service, path: Path) -> None:
    api = client(service(2, 1))
    messages: Any = [{"role": "user", "content": "What is a shoal?"}]
    chunks = list(
        api.chat.completions.create(
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


def test_a_client_that_leaves_frees_its_blocks(service: Service) -> None:
    url = service(2, 1)
    api = client(url)
    stream = api.completions.create(
        model=api.models.list().data[0].id,
        prompt=prompts(1)[0],
        max_tokens=3000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    wait_until(lambda: status(url)["attention_workers"][0]["blocks_owned"] > 0)
    stream.close()
    wait_until(lambda: status(url)["attention_workers"][0]["blocks_owned"] == 0 and status(url)["in_flight"] == 0)


def test_more_requests_than_fit_are_told_to_come_back(service: Service, expected: list[str]) -> None:
    api = client(service(2, 1))
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


def test_a_killed_host_is_replaced_and_no_token_differs(service: Service, expected: list[str]) -> None:
    url = service(2, 1)
    victim = status(url)["expert_hosts"][0]
    assert complete_all(client(url), prompts(16), midway=lambda: os.kill(victim["pid"], signal.SIGKILL)) == expected
    wait_until(lambda: status(url)["state"] == "ready" and status(url)["expert_hosts"][0]["pid"] != victim["pid"])
    assert status(url)["expert_hosts"][0]["generation"] > victim["generation"]
    assert complete(client(url), prompts(16)[0]) == expected[0]


def test_a_killed_controller_comes_back_and_keeps_the_hosts(service: Service, expected: list[str]) -> None:
    url = service(2, 1)
    before = status(url)
    victim = before["controller"]["pid"]
    assert complete_all(client(url), prompts(16), midway=lambda: os.kill(victim, signal.SIGKILL)) == expected

    def recovered() -> bool:
        report = status(url)
        return report.get("state") == "ready" and len(report["attention_workers"]) == 1

    wait_until(recovered)
    after = status(url)
    assert [host["pid"] for host in after["expert_hosts"]] == [host["pid"] for host in before["expert_hosts"]]
    assert after["controller"]["pid"] != before["controller"]["pid"]


def test_health_says_whether_a_token_can_be_generated(service: Service) -> None:
    url = service(2, 1)
    frozen = [host["pid"] for host in status(url)["expert_hosts"]]
    assert httpx.get(f"{url}/health", timeout=30).status_code == 200
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: httpx.get(f"{url}/health", timeout=30).status_code == 503)
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: httpx.get(f"{url}/health", timeout=30).status_code == 200)


def test_a_killed_attention_worker_costs_no_token(service: Service, expected: list[str]) -> None:
    url = service(2, 2)
    victim = status(url)["attention_workers"][0]
    assert complete_all(client(url), prompts(16), midway=lambda: os.kill(victim["pid"], signal.SIGKILL)) == expected
    wait_until(lambda: victim["pid"] not in process_ids(status(url)) and len(status(url)["attention_workers"]) == 2)
