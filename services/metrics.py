"""GET /metrics: what Prometheus scrapes. Where vLLM has a metric of the same name, the meaning is vLLM's."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any

from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from experts.transport_kinds import WAYS
from services.backend import Backend, Reading
from services.openapi import TEXT, refusals

METRICS_PATH = "/metrics"
HOST_STATES = ("loading", "ready", "dead")  # each has a sample, whether any host is in it or not

Row = Mapping[str, Any]
Series = tuple[str, str, Callable[[Row], float | None]]  # name, help, value of one row; None: there is none

WORKER_GAUGES: tuple[Series, ...] = (
    ("shoal_num_requests_running", "Requests in the worker's running batch", itemgetter("running")),
    ("shoal_num_requests_waiting", "Requests that wait for room in the batch", itemgetter("waiting")),
    (
        "shoal_kv_cache_usage_perc",
        "Share of the latent cache's blocks that requests own; 1 is all",
        lambda worker: worker["blocks_owned"] / worker["blocks_total"],
    ),
)
WORKER_COUNTERS: tuple[Series, ...] = (
    (
        "shoal_prompt_tokens",
        "Prompt tokens processed, those of reused prefixes counted",
        lambda worker: worker["prompt_tokens"] + worker["reused_tokens"],
    ),
    ("shoal_generation_tokens", "Tokens generated", itemgetter("generated_tokens")),
    ("shoal_prefix_cache_reused_tokens", "Prompt tokens that a reused prefix spared", itemgetter("reused_tokens")),
    ("shoal_num_preemptions", "Requests that gave their cache up and computed it again", itemgetter("preemptions")),
    ("shoal_dispatches", "Calls to expert hosts", itemgetter("dispatches")),
    ("shoal_rows_sent", "Rows sent to expert hosts", itemgetter("rows_sent")),
    ("shoal_rows_resent", "Rows sent again, to another holder", itemgetter("rows_resent")),
    ("shoal_resends", "Calls repeated because a host was lost or refused", itemgetter("resends")),
    ("shoal_hedges", "Calls repeated because a host was slow", itemgetter("hedges")),
)
HOST_GAUGES: tuple[Series, ...] = (
    ("shoal_expert_host_experts", "(layer, expert) pairs that the host holds", itemgetter("experts")),
    ("shoal_expert_host_bytes", "Bytes of the experts that the host holds", itemgetter("bytes")),
    ("shoal_expert_host_generation", "How many lives the host has had", itemgetter("generation")),
    ("shoal_expert_load_share", "Share of all rows that the host computed; 1 is all", itemgetter("load_share")),
)
SERVICE_GAUGES: tuple[Series, ...] = (
    (
        "shoal_expert_imbalance",
        "Load of the busiest expert host over the hosts' mean; 1 is even",
        lambda status: status["load"]["imbalance"],
    ),
    ("shoal_placement_epoch", "Epoch of the newest placement table", itemgetter("epoch")),
    (
        "shoal_expert_hosts_wanted",
        "Expert hosts that there shall be: where they follow nodes, what nodes and operators want",
        lambda status: status["nodes"]["wanted"] if status["nodes"] else len(status["members"]),
    ),
    (
        "shoal_expert_nodes",
        "Ray nodes for expert hosts, where these follow nodes",
        lambda status: status["nodes"]["nodes"] if status["nodes"] else None,
    ),
    (
        "shoal_change_in_progress",
        "1 while the expert hosts are being changed",
        lambda status: float(status["change"] is not None),
    ),
)


class Exposition(Collector):
    """One application's metrics in Prometheus' text format; nothing is registered elsewhere."""

    def __init__(self, ingress: str) -> None:
        self._ingress = ingress
        self._reading = Reading(0, 0, None)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self, reading: Reading) -> bytes:
        self._reading = reading
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        reading = self._reading
        yield from _own(self._ingress, reading)
        status = reading.status
        yield GaugeMetricFamily("shoal_controller_up", "1 when the controller answers", float(status is not None))
        if status is not None:
            yield from _gauges(SERVICE_GAUGES, [status])
            yield from _gauges(HOST_GAUGES, status["expert_hosts"], "host")
            yield _host_states(status["expert_hosts"])
            yield from _gauges(WORKER_GAUGES, status["attention_workers"], "worker")
            yield from _counters(WORKER_COUNTERS, status["attention_workers"], "worker")
            yield _dispatch_bytes(status["attention_workers"])
            yield _ways(status["attention_workers"])
            yield _events(status["events_total"])


def _own(ingress: str, reading: Reading) -> Iterator[Metric]:
    """What this ingress alone counts; the rest is the controller's, and any ingress tells it alike."""
    in_flight = GaugeMetricFamily("shoal_requests_in_flight", "Requests in the ingress", labels=["ingress"])
    in_flight.add_metric([ingress], reading.in_flight)
    yield in_flight
    replays = CounterMetricFamily(
        "shoal_replays", "Answers of the ingress that went on with another worker", labels=["ingress"]
    )
    replays.add_metric([ingress], reading.replays)
    yield replays


def _gauges(series: Iterable[Series], rows: Iterable[Row], label: str | None = None) -> Iterator[Metric]:
    """A family a series; each row's sample is labelled with its id, unless `label` is None."""
    for name, text, value_of in series:
        family = GaugeMetricFamily(name, text, labels=[label] if label else [])
        for row in rows:
            if (value := value_of(row)) is not None:
                family.add_metric([row["id"]] if label else [], value)
        yield family


def _counters(series: Iterable[Series], rows: Iterable[Row], label: str) -> Iterator[Metric]:
    for name, text, value_of in series:
        family = CounterMetricFamily(name, text, labels=[label])
        for row in rows:
            if (value := value_of(row)) is not None:
                family.add_metric([row["id"]], value)
        yield family


def _host_states(hosts: Iterable[Row]) -> Metric:
    family = GaugeMetricFamily("shoal_expert_hosts", "Expert hosts in each state", labels=["state"])
    counts = Counter(host["state"] for host in hosts)
    for state in (*HOST_STATES, *sorted(counts.keys() - set(HOST_STATES))):
        family.add_metric([state], counts[state])
    return family


def _dispatch_bytes(workers: Iterable[Row]) -> Metric:
    family = CounterMetricFamily(
        "shoal_dispatch_bytes", "Bytes to and from expert hosts", labels=["worker", "direction"]
    )
    for worker in workers:
        family.add_metric([worker["id"], "sent"], worker["bytes_sent"])
        family.add_metric([worker["id"], "received"], worker["bytes_received"])
    return family


def _ways(workers: Iterable[Row]) -> Metric:
    family = GaugeMetricFamily(
        "shoal_expert_hosts_asked",
        "Expert hosts that the worker has asked, by the way that its rows go to them now",
        labels=["worker", "way"],
    )
    for worker in workers:
        counts = Counter(worker.get("ways", {}).values())  # none of an older release's
        for way in WAYS:
            family.add_metric([worker["id"], way], counts[way])
    return family


def _events(counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily("shoal_events", "Faults and steps of changes, by kind", labels=["kind"])
    for kind in sorted(counts):
        family.add_metric([kind], counts[kind])
    return family


def add_metrics_route(app: FastAPI, backend: Backend, ingress: str) -> None:
    """The route, over a registry of this application's own; `ingress` labels what it counts itself."""
    exposition = Exposition(ingress)

    @app.get(METRICS_PATH, response_class=Response, responses=TEXT | refusals(401))
    async def metrics() -> Response:
        reading = await backend.metrics()
        return Response(exposition.render(reading), media_type=CONTENT_TYPE_PLAIN_0_0_4)
