"""What Prometheus scrapes, read back by its own parser."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from attention.requests import GenerateRequest, SamplingParams, Update
from attention.service_client import WorkerLost
from cluster.spec import ServiceSpec
from model.generation import GenerationDefaults
from model.tokenizer import Tokenizer
from services.backend import Reading, ServedModel
from services.pool import WorkerPool
from services.replicas import IngressSpec, open_app
from tests.services.script import Script, call, change_document, make_app, service_report
from tests.services.test_errors import assert_error

Samples = dict[tuple[str, ...], float]


def scrape(app: FastAPI, key: str | None = None) -> Samples:
    """Each sample by its name and the values of its labels, in the order of their names."""
    answer = call(app, "GET", "/metrics", headers={"Authorization": f"Bearer {key}"} if key else {})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples: Samples = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        assert family.type in ("gauge", "counter")
        for sample in family.samples:
            place = (sample.name, *(value for _, value in sorted(sample.labels.items())))
            assert place not in samples
            samples[place] = sample.value
    return samples


def test_every_number_is_the_one_that_was_counted(script: Script) -> None:
    script.report = service_report()
    script.replays = 8
    worker = "attention-a"
    assert scrape(make_app(script, ingress="ingress-a")) == {
        ("shoal_controller_up",): 1,
        ("shoal_requests_in_flight", "ingress-a"): 0,
        ("shoal_replays_total", "ingress-a"): 8,
        ("shoal_num_requests_running", worker): 3,
        ("shoal_num_requests_waiting", worker): 2,
        ("shoal_kv_cache_usage_perc", worker): 0.25,
        ("shoal_prompt_tokens_total", worker): 332,
        ("shoal_generation_tokens_total", worker): 90,
        ("shoal_prefix_cache_reused_tokens_total", worker): 32,
        ("shoal_num_preemptions_total", worker): 4,
        ("shoal_dispatches_total", worker): 50,
        ("shoal_rows_sent_total", worker): 800,
        ("shoal_rows_resent_total", worker): 17,
        ("shoal_resends_total", worker): 6,
        ("shoal_hedges_total", worker): 2,
        ("shoal_dispatch_bytes_total", "sent", worker): 4000,
        ("shoal_dispatch_bytes_total", "received", worker): 9000,
        ("shoal_expert_hosts_asked", "shared", worker): 2,
        ("shoal_expert_hosts_asked", "nixl", worker): 0,
        ("shoal_expert_hosts_asked", "grpc", worker): 0,
        ("shoal_expert_hosts", "loading"): 0,
        ("shoal_expert_hosts", "ready"): 1,
        ("shoal_expert_hosts", "dead"): 1,
        ("shoal_expert_host_experts", "host-0"): 8,
        ("shoal_expert_host_experts", "host-1"): 0,
        ("shoal_expert_host_bytes", "host-0"): 640,
        ("shoal_expert_host_bytes", "host-1"): 0,
        ("shoal_expert_host_generation", "host-0"): 1,
        ("shoal_expert_host_generation", "host-1"): 5,
        ("shoal_expert_load_share", "host-0"): 0.75,
        ("shoal_expert_imbalance",): 1.5,
        ("shoal_placement_epoch",): 7,
        ("shoal_expert_hosts_wanted",): 2,
        ("shoal_change_in_progress",): 0,
        ("shoal_events_total", "epoch"): 7,
        ("shoal_events_total", "host_died"): 4,
    }


@pytest.mark.parametrize(
    ("fields", "place", "value"),
    [
        ({"change": change_document()}, ("shoal_change_in_progress",), 1),
        ({"load": {"total": 0.0, "imbalance": None}}, ("shoal_expert_imbalance",), None),
        ({"expert_hosts": []}, ("shoal_expert_hosts", "ready"), 0),
        ({}, ("shoal_expert_nodes",), None),
        ({"nodes": {"nodes": 4, "wanted": 3}}, ("shoal_expert_nodes",), 4),
        ({"nodes": {"nodes": 4, "wanted": 3}}, ("shoal_expert_hosts_wanted",), 3),
        ({"attention_workers": []}, ("shoal_dispatches_total", "attention-a"), None),
        ({"attention_workers": []}, ("shoal_expert_hosts_asked", "shared", "attention-a"), None),
    ],
)
def test_what_is_not_known_has_no_sample(
    app: FastAPI, script: Script, fields: dict[str, Any], place: tuple[str, ...], value: float | None
) -> None:
    script.report = service_report(**fields)
    assert scrape(app).get(place) == value


def test_the_ingress_counts_while_the_controller_is_away(app: FastAPI, script: Script) -> None:
    script.report, script.away, script.replays = service_report(), True, 3
    assert scrape(app) == {
        ("shoal_controller_up",): 0,
        ("shoal_requests_in_flight", "ingress"): 0,
        ("shoal_replays_total", "ingress"): 3,
    }
    script.away = False
    assert scrape(app)["shoal_placement_epoch",] == 7


def test_either_secret_opens_the_metrics_of_a_guarded_service(script: Script) -> None:
    script.away = True
    app = make_app(script, api_key="the-right-key", admin_token="the-admin-token")
    for key in (None, "the-wrong-key"):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        assert_error(call(app, "GET", "/metrics", headers=headers), 401, "Bearer")
    assert scrape(app, "the-right-key") == scrape(app, "the-admin-token")
    assert scrape(make_app(script, admin_token="the-admin-token"))


def test_what_an_ingress_counts_for_itself_is_told_apart_by_its_label_and_no_more(script: Script) -> None:
    """One scrape is answered by one ingress, the next by another: their counters must not be one series."""
    script.report = service_report()
    first, second = (scrape(make_app(script, ingress=name)) for name in ("ingress-a", "ingress-b"))
    own = {"shoal_requests_in_flight", "shoal_replays_total"}
    assert {place for place in first if place not in second} == {(name, "ingress-a") for name in own}
    assert {place for place in second if place not in first} == {(name, "ingress-b") for name in own}


def test_an_ingress_is_named_after_its_serve_replica(
    monkeypatch: pytest.MonkeyPatch, script: Script, bundled: Path
) -> None:
    script.away = True
    here = SimpleNamespace(replica_id=SimpleNamespace(unique_id="abc12def"), app_name="mine")
    monkeypatch.setattr("services.replicas.serve.get_replica_context", lambda: here)
    pools: list[Any] = []
    monkeypatch.setattr("services.replicas.WorkerPool", lambda *given: pools.append(given) or script)
    spec = IngressSpec(ServiceSpec("", str(bundled)), "m", 100, None, None, 4, 60.0)
    assert ("shoal_replays_total", "ingress-abc12def") in scrape(asyncio.run(open_app(spec)))
    assert [service.namespace for _, service, *_ in pools] == ["shoal-mine"]


def test_two_applications_share_no_registry(script: Script) -> None:
    script.away = True
    before = set(REGISTRY._names_to_collectors)
    first, second = make_app(script), make_app(script)
    assert scrape(first) == scrape(second)
    assert set(REGISTRY._names_to_collectors) == before


def test_an_answer_that_goes_on_with_another_worker_is_counted(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    asked: list[GenerateRequest] = []

    async def generate(request: GenerateRequest) -> AsyncGenerator[Update, None]:
        asked.append(request)
        yield Update(request.id, (len(asked),))
        if len(asked) < 3:
            raise WorkerLost("it is gone")
        yield Update(request.id, finish_reason="stop")

    async def choose(pool: WorkerPool, request: GenerateRequest) -> SimpleNamespace:
        return SimpleNamespace(generate=generate, address="127.0.0.1:9")

    def nobody(namespace: str) -> None:
        raise ValueError("there is no controller")

    async def run() -> tuple[list[int], Reading]:
        model = ServedModel("m", 1, 100, 100, "fp", tokenizer, GenerationDefaults(1.0, 1.0))
        pool = WorkerPool(model, ServiceSpec("nowhere", ""), "", 4, 60.0)
        request = GenerateRequest("a", (5,), SamplingParams(max_tokens=9))
        tokens = [token async for update in pool.generate(request) for token in update.token_ids]
        return tokens, await pool.metrics()

    monkeypatch.setattr("services.pool.find_controller", nobody)
    monkeypatch.setattr(WorkerPool, "_choose", choose)
    assert asyncio.run(run()) == ([1, 2, 3], Reading(in_flight=0, replays=2, status=None))
    assert [request.resumed_ids for request in asked] == [(), (1,), (1, 2)]
