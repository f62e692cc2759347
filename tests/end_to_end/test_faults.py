"""Whatever dies, freezes, joins, leaves or moves: every stream ends with the tokens it would have had."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.threads import Share
from tests.end_to_end.clients import wait_until
from tests.end_to_end.deployment import Deployment
from tests.end_to_end.prompts import mixed_bodies
from tests.end_to_end.streams import Body, run_streams

pytestmark = pytest.mark.ray

STREAMS = 16
TOKENS = 48
Answers = list[tuple[object, ...]]


@pytest.fixture(scope="module")
def service(checkpoint: Callable[[str], Path]) -> Iterator[Deployment]:
    arguments = {"experts": {"hosts": 2, "threads": 1}, "attention": {"replicas": 2, "threads": 1}}
    with Deployment(checkpoint("tiny"), **arguments) as running:
        yield running


@pytest.fixture(scope="module")
def bodies(checkpoint: Callable[[str], Path]) -> list[Body]:
    return mixed_bodies(checkpoint("tiny").name, STREAMS, TOKENS)


@pytest.fixture(scope="module")
def expected(service: Deployment, bodies: list[Body]) -> Answers:
    """What the streams give when nothing happens."""
    streams, _ = run_streams(service.url, bodies)
    assert [stream.error for stream in streams] == [None] * STREAMS
    assert all(len(told) == TOKENS for stream in streams for told in stream.tokens.values())
    return [stream.answer for stream in streams]


@pytest.fixture
def harmed(service: Deployment, bodies: list[Body], expected: Answers) -> Iterator[Callable[..., None]]:
    """`harmed(harm)`: run the streams, harm the service midway, and compare every token and log-probability."""

    def run(harm: Callable[[], object]) -> None:
        outcome: list[object] = []
        streams, _ = run_streams(service.url, bodies, lambda: outcome.append(harm()))
        assert outcome, "the harm was not done"
        assert [stream.answer for stream in streams] == expected

    yield run
    service.wait_ready()
    wait_until(lambda: len(service.status()["attention_workers"]) == 2)
    wait_until(lambda: sum(worker["blocks_owned"] for worker in service.status()["attention_workers"]) == 0)


def keep_to_their_cores(service: Deployment) -> bool:
    """Whether the hosts, all on one node, compute on its parts."""
    hosts = service.hosts()
    wanted = [Share(1, place, len(hosts)).cores(os.sched_getaffinity(0)) for place in range(len(hosts))]
    return [os.sched_getaffinity(host["pid"]) for host in hosts] == wanted


def both_workers(service: Deployment) -> list[int]:
    """Their pids; a worker whose word is late is missing from a report."""
    found: list[list[int]] = []

    def both() -> bool:
        found.append([worker["pid"] for worker in service.status()["attention_workers"]])
        return len(found[-1]) == 2

    wait_until(both)
    return sorted(found[-1])


def test_a_killed_host_is_replaced(service: Deployment, harmed: Callable[..., None]) -> None:
    wait_until(lambda: keep_to_their_cores(service))
    before = service.hosts()[0]
    harmed(service.kill_host)
    service.wait_ready()
    wait_until(lambda: keep_to_their_cores(service))
    after = service.hosts()[0]
    assert after["generation"] > before["generation"]
    assert after["pid"] != before["pid"]


def test_a_frozen_host_is_replaced_and_cannot_come_back(service: Deployment, harmed: Callable[..., None]) -> None:
    before = service.hosts()[1]
    harmed(lambda: service.freeze(before["pid"], seconds=30))
    wait_until(lambda: service.hosts()[1]["pid"] not in (None, before["pid"]))
    wait_until(lambda: not Path(f"/proc/{before['pid']}").exists())


def test_a_host_that_is_slow_for_a_moment_is_kept(service: Deployment, harmed: Callable[..., None]) -> None:
    before = service.hosts()[1]
    harmed(lambda: service.freeze(before["pid"], seconds=0.6))
    assert service.hosts()[1]["generation"] == before["generation"]


def test_a_killed_attention_worker_loses_no_stream(service: Deployment, harmed: Callable[..., None]) -> None:
    victim = service.status()["attention_workers"][0]["pid"]
    harmed(service.kill_worker)
    wait_until(lambda: victim not in [worker["pid"] for worker in service.status()["attention_workers"]])


def test_a_frozen_attention_worker_loses_no_stream(service: Deployment, harmed: Callable[..., None]) -> None:
    harmed(lambda: service.freeze(service.status()["attention_workers"][0]["pid"], seconds=7))


def test_serves_own_controller_may_die(service: Deployment, harmed: Callable[..., None]) -> None:
    from ray import serve

    before = both_workers(service)
    harmed(lambda: os.kill(service.ray_process("ServeController"), signal.SIGKILL))
    wait_until(lambda: bool(serve.status().applications))  # the next one has looked at every replica, and kept it
    harmed(lambda: True)
    assert both_workers(service) == before


def test_a_killed_proxy_comes_back(service: Deployment, bodies: list[Body], expected: Answers) -> None:
    os.kill(service.ray_process("ProxyActor"), signal.SIGKILL)
    wait_until(lambda: run_streams(service.url, bodies[:1])[0][0].error is None)
    assert [stream.answer for stream in run_streams(service.url, bodies)[0]] == expected


def test_a_killed_controller_comes_back_and_keeps_the_hosts(service: Deployment, harmed: Callable[..., None]) -> None:
    before = service.status()
    harmed(service.kill_controller)
    service.wait_ready()
    after = service.status()
    assert [host["pid"] for host in after["expert_hosts"]] == [host["pid"] for host in before["expert_hosts"]]
    assert after["controller"]["pid"] != before["controller"]["pid"]
    assert after["epoch"] > before["epoch"]


def test_with_replicas_any_host_may_go(service: Deployment, harmed: Callable[..., None]) -> None:
    harmed(lambda: service.change("replicas", replicas=2))
    assert [host["experts"] for host in service.hosts()] == [48, 48]
    harmed(lambda: service.kill_host(1))
    assert sum(worker["rows_resent"] for worker in service.status()["attention_workers"]) > 0
    service.wait_ready()
    harmed(lambda: [service.kill_host(0), service.kill_host(1)])  # nobody is left: wait, never a wrong token


def test_a_node_may_go_and_its_hosts_come_back_elsewhere(service: Deployment, harmed: Callable[..., None]) -> None:
    node = service.add_node()
    assert service.change("scale", hosts=4)["phase"] == "done"
    there = [host for host in service.hosts() if host["node"] == node.node_id]
    assert there
    harmed(lambda: service.remove_node(node))
    wait_until(lambda: all(host["node"] not in (None, node.node_id) for host in service.hosts()))


def test_a_change_that_fails_leaves_everything_as_it_was(service: Deployment, harmed: Callable[..., None]) -> None:
    before = service.status()
    harmed(lambda: refuse_all(service))
    after = service.status()
    assert after["members"] == before["members"]
    assert after["epoch"] == before["epoch"]


def refuse_all(service: Deployment) -> None:
    """Wishes that cannot be had; each says why."""
    wishes = [
        ("scale", {"hosts": 17}, "1 to 16"),
        ("drain", {"host": "host-9"}, "host-9"),
        ("replicas", {"replicas": 9}, "9 replicas"),
        ("scale", {"hosts": 1}, "2 replicas"),
    ]
    for route, wish, words in wishes:
        answer = service.begin(route, **wish)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]


def test_scaling_again_and_again_leaks_nothing(service: Deployment, harmed: Callable[..., None]) -> None:
    def cycle() -> None:
        for hosts in (4, 2, 3, 2):
            assert service.change("scale", hosts=hosts)["phase"] == "done"

    harmed(cycle)
    wait_until(lambda: keep_to_their_cores(service))
    before = descriptors(service)
    harmed(cycle)
    service.wait_ready(standby=True)
    wait_until(lambda: descriptors(service) <= before + 8, 30)  # closed leases end in the background


def descriptors(service: Deployment) -> int:
    """Open files of the controller and the workers."""
    report = service.status()
    pids = [report["controller"]["pid"], *(worker["pid"] for worker in report["attention_workers"])]
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
