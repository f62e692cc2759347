"""A host, its door and who asks it, by memory of one machine and by NIXL."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experts.grpc_server import ExpertServer
from experts.lane import lanes_serve
from experts.lease_door import LeaseDoor
from experts.lease_transport import LeaseTransport
from experts.nixl import find_nixl, prepare_environment
from experts.transport_kinds import Ways
from model.checkpoint import Checkpoint
from tests.experts.host_process import HostProcess
from tests.experts.leases.rows import SLOT_BYTES, TOKEN, Counting, Make

prepare_environment()


@pytest.fixture(scope="module")
def opened(checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint("tiny"))


@pytest.fixture(scope="module")
def host(opened: Checkpoint) -> Counting:
    made = Counting(opened.config, "host-0", 1)
    made.load(opened, [(1, expert) for expert in range(16)])
    return made


@pytest.fixture(
    params=[
        pytest.param("shared", marks=pytest.mark.skipif(not lanes_serve(), reason="no native kernels are built")),
        pytest.param("nixl", marks=pytest.mark.skipif(find_nixl() is None, reason="pip install shoal[nixl]")),
    ]
)
def way(request: pytest.FixtureRequest) -> str:
    """To hosts of this machine; others are reached by NIXL."""
    return str(request.param)


@pytest.fixture
def ways(way: str) -> Ways:
    return Ways(shared=way == "shared", nixl=True)


@pytest.fixture
def door(ways: Ways) -> LeaseDoor:
    return LeaseDoor("host-0", 1, ways)


@pytest.fixture
def server(host: Counting, door: LeaseDoor) -> Iterator[ExpertServer]:
    made = ExpertServer(host, token=TOKEN, door=door)
    made.start()
    yield made
    host.let_go.set()
    made.stop(0)


@pytest.fixture
def make(ways: Ways) -> Iterator[Make]:
    made: list[LeaseTransport] = []

    def transport(token: str | None = TOKEN, machine: str | None = None, slot: int = SLOT_BYTES) -> LeaseTransport:
        made.append(LeaseTransport(token, None, slot, slot, ways, machine))
        return made[-1]

    yield transport
    for each in made:
        each.close()


@pytest.fixture
def processes(checkpoint: Callable[[str], Path], way: str) -> Iterator[Callable[..., HostProcess]]:
    started: list[HostProcess] = []

    def start(generation: int = 1) -> HostProcess:
        started.append(HostProcess(checkpoint("tiny"), TOKEN, way, generation))
        return started[-1]

    yield start
    for each in started:
        each.end()
