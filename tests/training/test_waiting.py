"""A host that does not answer: its supervisor is asked to look, again and again, and no life is waited for in vain."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experts.errors import HostUnavailable
from experts.training import client, grpc_peer, waiting
from experts.training.messages import BackwardReply, BackwardRequest
from experts.training.spec import ExpertTraining
from experts.training.waiting import SUSPECT_S, Waiting
from model.checkpoint import Checkpoint
from router.placement import Host
from tests.training.rig import Doors, make_rig
from tests.training.test_steps import train

HOST = Host("host-0", 3, "nowhere")


class Supervisor:
    def __init__(self) -> None:
        self.gone = False
        self.reports: list[tuple[Host, str]] = []
        self.reported = threading.Event()

    def names(self, host: Host) -> bool:
        return not self.gone

    def report(self, host: Host, reason: str) -> None:
        self.reports.append((host, reason))
        self.reported.set()


def test_who_waits_reports_from_time_to_time_and_gives_up_at_the_deadline() -> None:
    supervisor, now = Supervisor(), [100.0]
    wait = Waiting(supervisor, HOST, "Norms", 60.0, lambda: now[0])
    for now[0] in (100.5, 100 + 0.9 * SUSPECT_S):
        wait.still()
    assert not supervisor.reports
    for now[0] in (100 + SUSPECT_S, 100 + 1.5 * SUSPECT_S, 100 + 2 * SUSPECT_S):
        wait.still()
    assert supervisor.reports == [(HOST, f"Norms was not answered in {times * SUSPECT_S:.0f} s") for times in (1, 2)]
    now[0] = 160.0
    with pytest.raises(HostUnavailable, match="host-0: Norms was not answered in 60 s"):
        wait.still()


def test_a_life_that_no_table_names_is_not_waited_for() -> None:
    supervisor = Supervisor()
    wait = Waiting(supervisor, HOST, "Norms", 60.0)
    wait.still()
    supervisor.gone = True
    with pytest.raises(HostUnavailable, match="a newer table does not name this life"):
        wait.still()


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    monkeypatch.setattr(waiting, "SUSPECT_S", 0.05)
    monkeypatch.setattr(client, "LOOK_S", 0.02)
    monkeypatch.setattr(grpc_peer, "LOOK_S", 0.02)
    return Supervisor()


@pytest.fixture
def doors(checkpoint: Callable[[str], Path], supervisor: Supervisor) -> Iterator[Doors]:
    made = Doors(Checkpoint.open(checkpoint("mini")), supervisor)
    yield made
    made.close()


def test_a_call_that_hangs_is_reported_and_answered_in_the_end(
    checkpoint: Callable[[str], Path], doors: Doors, supervisor: Supervisor
) -> None:
    rig = make_rig(checkpoint("mini"), 1, doors=doors)
    (host,) = rig.table.placement.hosts
    peer = doors.peers.peer(host)
    asking = threading.Thread(target=lambda: peer.configure(ExpertTraining("run")))
    with rig.hosts["host-0"].reading():
        asking.start()
        assert supervisor.reported.wait(10)
        assert peer.status().run_id is None
    asking.join(10)
    assert peer.status().run_id == "run"
    assert all(said == host and "Configure was not answered" in reason for said, reason in supervisor.reports)


def test_a_call_to_a_life_that_was_replaced_ends(
    checkpoint: Callable[[str], Path], doors: Doors, supervisor: Supervisor
) -> None:
    rig = make_rig(checkpoint("mini"), 1, doors=doors)
    (host,) = rig.table.placement.hosts
    supervisor.gone = True
    with rig.hosts["host-0"].reading(), pytest.raises(HostUnavailable, match="does not name this life"):
        doors.peers.peer(host).configure(ExpertTraining("run"))


def test_backward_that_hangs_is_reported_and_changes_no_bit(
    checkpoint: Callable[[str], Path], doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(make_rig(checkpoint("mini"), 2), 2)
    rig = make_rig(checkpoint("mini"), 2, doors=doors)
    hung, reports, reported = rig.hosts["host-1"], [], threading.Event()
    backward = hung.backward

    def hang(request: BackwardRequest) -> BackwardReply:
        assert reported.wait(10)
        return backward(request)

    def on_report(host: Host, reason: str) -> None:
        reports.append((host.id, reason))
        if "backward was not answered" in reason:
            reported.set()

    monkeypatch.setattr(hung, "backward", hang)
    rig.on_report = on_report
    assert train(rig, 2) == expected
    assert {host for host, reason in reports if reason.startswith("backward")} == {"host-1"}
