"""One budget of threads a node, whoever shares it."""

import os

import pytest

from cluster.spec import ServiceSpec
from cluster.threads import host_threads, thread_environment


@pytest.mark.parametrize(
    ("cores", "hosts", "nodes", "each"),
    [(8, 1, 1, 8), (8, 2, 1, 4), (8, 3, 1, 2), (2, 5, 1, 1), (32, 8, 8, 32), (32, 9, 8, 16), (32, 4, 8, 32)],
)
def test_hosts_share_the_cores_of_their_node(
    monkeypatch: pytest.MonkeyPatch, cores: int, hosts: int, nodes: int, each: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert host_threads(hosts, nodes) == each


def test_idle_threads_sleep() -> None:
    environment = thread_environment(3)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    with pytest.raises(ValueError, match="threads is 0"):
        thread_environment(0)


def test_a_spec_names_the_field_that_is_wrong() -> None:
    for fields, said in (
        ({"hosts": 0}, "experts.hosts is 0"),
        ({"hosts": 2, "replicas": 3}, "experts.replicas is 3"),
        ({"threads": 0}, "experts.threads is 0"),
        ({"transport": "pigeon"}, "transport is 'pigeon'"),
    ):
        with pytest.raises(ValueError, match=said):
            ServiceSpec(name="s", model="m", **fields)  # type: ignore[arg-type]
