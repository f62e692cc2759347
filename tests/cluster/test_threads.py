"""One budget of threads a node, whoever shares it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

import cluster.threads
from cluster.expert_actor import ExpertActor
from cluster.spec import ServiceSpec, WorkerSpec
from cluster.threads import Share, host_threads, node_threads, thread_environment
from services.replicas import AttentionReplica


@pytest.mark.parametrize(
    ("cores", "hosts", "nodes", "each"),
    [(8, 1, 1, 8), (8, 2, 1, 4), (8, 3, 1, 2), (2, 5, 1, 1), (32, 8, 8, 32), (32, 9, 8, 16), (32, 4, 8, 32)],
)
def test_hosts_share_the_cores_of_their_node(cores: int, hosts: int, nodes: int, each: int) -> None:
    assert host_threads(hosts, nodes, cores) == each


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "350000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_a_containers_quota_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], threads: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(cluster.threads, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert node_threads() == threads


@pytest.mark.parametrize(("cores", "hosts"), [(8, 2), (8, 3), (5, 2), (16, 16), (64, 7)])
def test_the_hosts_of_a_node_have_cores_of_their_own(cores: int, hosts: int) -> None:
    parts = [Share(cores // hosts, place, hosts).cores(range(cores)) for place in range(hosts)]
    assert sorted(core for part in parts for core in part) == list(range(cores))
    assert min(map(len, parts)) >= cores // hosts  # room for all its threads


def test_hosts_that_outnumber_the_cores_are_spread_over_them() -> None:
    parts = [Share(1, place, 5).cores({0, 1}) for place in range(5)]
    assert {len(part) for part in parts} == {1}
    assert {core for part in parts for core in part} == {0, 1}


def test_a_host_alone_or_with_more_threads_than_its_part_has_all_cores() -> None:
    assert Share(4, 0, 1).cores(range(4)) == frozenset(range(4))
    assert Share(4, 1, 2).cores(range(4)) == frozenset(range(4))


def test_both_threads_of_a_physical_core_go_to_one_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for core in range(8):  # numbered as most machines do: the second threads follow all first ones
        topology = tmp_path / f"cpu{core}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{core % 4}\n")
    monkeypatch.setattr(cluster.threads, "TOPOLOGY", tmp_path)
    assert Share(4, 0, 2).cores(range(8)) == {0, 1, 4, 5}
    assert Share(4, 1, 2).cores(range(8)) == {2, 3, 6, 7}


def test_every_thread_of_the_process_keeps_to_its_cores() -> None:
    script = """
import os, threading
from cluster.threads import keep_to
begin, go_on = threading.Barrier(4), threading.Event()
def work(): begin.wait(); go_on.wait()
threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for thread in threads: thread.start()
begin.wait()
first = min(os.sched_getaffinity(0))
keep_to({first})
after = threading.Thread(target=go_on.wait, daemon=True)
after.start()
tasks = os.listdir("/proc/self/task")
print(len(tasks), all(os.sched_getaffinity(int(task)) == {first} for task in tasks))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.split() == ["5", "True"], ran.stderr


def test_idle_threads_sleep() -> None:
    environment = thread_environment(3)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    with pytest.raises(ValueError, match="threads is 0"):
        thread_environment(0)


class Found:
    """Stands for what an actor imports to compute: takes note of what OpenMP would read then."""

    def __init__(self, *given: object) -> None:
        self.environment = {name: os.environ.get(name) for name in thread_environment(1)}


@pytest.fixture
def unsettled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in thread_environment(1):
        monkeypatch.setenv(name, "whatever Ray thinks")


@pytest.mark.usefixtures("unsettled")
def test_an_expert_actor_settles_its_threads_before_it_loads_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.expert_life.ExpertLife", Found)
    monkeypatch.setattr(ExpertActor, "_follow_controller", lambda actor: None)
    life: Any = ExpertActor(ServiceSpec("service", "model"), "expert:1", "token", 3)._life
    assert life.environment == thread_environment(3)


@pytest.mark.usefixtures("unsettled")
def test_an_attention_replica_settles_its_threads_before_it_loads_what_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.attention_worker.AttentionWorker", Found)
    monkeypatch.setattr(Found, "close", lambda worker: None, raising=False)
    monkeypatch.setattr("ray.serve.get_replica_context", MagicMock())
    worker: Any = AttentionReplica(ServiceSpec("service", "model"), WorkerSpec(threads=2))._worker
    assert worker.environment == thread_environment(2)


@pytest.mark.parametrize("module", ["cluster.expert_actor", "services.replicas"])
def test_an_actor_is_there_before_torch_is(module: str) -> None:
    script = f"import sys, {module}; print('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.split() == ["False"], ran.stderr


def test_a_spec_names_the_field_that_is_wrong() -> None:
    for fields, said in (
        ({"hosts": 0}, "experts.hosts is 0"),
        ({"hosts": 2, "replicas": 3}, "experts.replicas is 3"),
        ({"threads": 0}, "experts.threads is 0"),
        ({"transport": "pigeon"}, "transport is 'pigeon'"),
    ):
        with pytest.raises(ValueError, match=said):
            ServiceSpec(name="s", model="m", **fields)  # type: ignore[arg-type]
