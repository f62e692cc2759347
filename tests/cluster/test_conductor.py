"""What the controller decides, told what happened and asked what to do."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import pytest

from cluster.actions import Abandon, Action, GiveUp, Load, Probe, Publish, Retire, Save, StartHost, StopHost
from cluster.change import Change, ChangeRefused, Deadlines, Phase, Wish
from cluster.conductor import WORKERS_HEARD_S, Conductor
from cluster.describe import describe_difference
from cluster.events import EventLog
from cluster.plan import ModelShape
from cluster.roster import MAX_BACKOFF_S, START_ATTEMPTS, HostReport, backoff_s
from cluster.saved import Committed, SavedState
from router.holding import Holding, Pair

LAYER = 1
SHAPE = ModelShape(moe_layers=(LAYER,), experts=4, groups=1)
DEADLINES = Deadlines(plan_s=10.0, prepare_s=20.0, retire_s=5.0)
Kind = TypeVar("Kind", bound=Action)


def even(now_s: float) -> Mapping[int, Sequence[float]]:
    return {LAYER: [1.0] * SHAPE.experts}


def pairs(*experts: int) -> frozenset[Pair]:
    return frozenset((LAYER, expert) for expert in experts)


class Service:
    """A conductor, and hosts that do what they are told when the test says so."""

    def __init__(self, hosts: int = 2, saved: SavedState | None = None) -> None:
        ids = tuple(f"host-{number}" for number in range(hosts))
        owners = tuple((ids[expert * hosts // SHAPE.experts],) for expert in range(SHAPE.experts))
        self.events = EventLog()
        self.conductor = Conductor(
            SHAPE, Committed(Holding({LAYER: owners}), ids, 1, 0), even, self.events, saved, DEADLINES
        )
        self.now_s = 0.0
        self.saved = saved

    def act(self, after_s: float = 0.0) -> list[Action]:
        self.now_s += after_s
        actions = self.conductor.act(self.now_s)
        for action in actions:
            if isinstance(action, Save):
                self.saved = SavedState.from_json(action.state.to_json())
        return actions

    def report(self, host_id: str, generation: int, held: frozenset[Pair]) -> None:
        self.conductor.host_ready(HostReport(host_id, generation, f"{host_id}:{generation}", held), self.now_s)

    def died(self, host_id: str, generation: int) -> None:
        self.conductor.host_died(host_id, generation, "killed", self.now_s)

    def obey(self, action: Action) -> None:
        """Tell that an action was carried out."""
        if isinstance(action, StartHost):
            self.report(action.host_id, action.generation, action.pairs)
        elif isinstance(action, Load):
            self.conductor.loaded(action.change_id, action.host_id, action.generation, action.pairs)
        elif isinstance(action, Retire):
            self.conductor.retired(action.host_id, action.generation, action.pairs)

    def settle(self) -> list[Action]:
        """Everything that follows while all is well, workers included."""
        done: list[Action] = []
        while actions := self.act():
            done += actions
            for action in actions:
                self.obey(action)
            for worker_id in tuple(self.conductor._workers):
                self.conductor.worker_at(worker_id, self.conductor.epoch)
        return done

    def begin(self, wish: Wish) -> Change:
        return self.conductor.request(wish, self.now_s)

    def held(self) -> dict[str, frozenset[Pair]]:
        return {view.id: view.held for view in self.conductor.roster}


def of(kind: type[Kind], actions: Sequence[Action]) -> list[Kind]:
    return [action for action in actions if isinstance(action, kind)]


def ready(hosts: int = 2, workers: int = 0) -> Service:
    """A service that serves."""
    service = Service(hosts)
    service.settle()
    for number in range(workers):
        service.conductor.worker_at(f"worker-{number}", service.conductor.epoch)
    return service


def test_hosts_are_started_and_the_table_names_them_when_they_are_ready() -> None:
    service = Service(2)
    started = of(StartHost, service.act())
    assert [(start.host_id, start.generation, start.pairs) for start in started] == [
        ("host-0", 1, pairs(0, 1)),
        ("host-1", 1, pairs(2, 3)),
    ]
    service.obey(started[0])
    assert of(Publish, service.act()) == []  # two experts have no holder
    service.obey(started[1])
    (published,) = of(Publish, service.act())
    assert published.placement.epoch == 1
    assert [host.address for host in published.placement.hosts] == ["host-0:1", "host-1:1"]
    assert service.act() == []


def test_what_must_be_remembered_is_saved_first() -> None:
    service = Service(2)
    for _ in range(3):
        actions = service.act()
        if of(StartHost, actions) or of(Publish, actions):
            assert isinstance(actions[0], Save)
            assert actions[0].state.epoch == service.conductor.epoch
            assert actions[0].state.generations == service.conductor.roster.generations
        for action in actions:
            service.obey(action)


def test_a_dead_host_begins_again_in_a_later_generation_and_waits_longer_each_time() -> None:
    service = ready(2)
    assert backoff_s(40) == MAX_BACKOFF_S
    for generation in range(1, 6):
        service.died("host-1", generation)
        wait_s = backoff_s(generation)
        if wait_s:
            assert of(StartHost, service.act(wait_s - 0.01)) == []
        (start,) = of(StartHost, service.act(0.02))
        assert (start.host_id, start.generation) == ("host-1", generation + 1)
        service.obey(start)
        assert len(of(Publish, service.act())) == 1


def test_only_a_service_that_never_was_ready_is_given_up() -> None:
    new, old = Service(2), ready(2)
    for generation in range(1, START_ATTEMPTS + 1):
        new.act(MAX_BACKOFF_S)
        new.died("host-1", generation)
        old.died("host-1", generation)
        assert of(StartHost, old.act(MAX_BACKOFF_S))
    (given_up,) = new.act(MAX_BACKOFF_S)
    assert isinstance(given_up, GiveUp)
    assert "host-1 died 3 times" in given_up.reason


def test_a_host_that_cannot_load_at_first_says_why_the_service_cannot_start() -> None:
    service = Service(2)
    service.act()
    service.conductor.host_failed("host-0", 1, "model.safetensors is cut short", service.now_s)
    assert service.act() == [GiveUp("model.safetensors is cut short")]


def test_a_scale_up_loads_then_commits_then_retires() -> None:
    service = ready(1, workers=1)
    change = service.begin(Wish("scale", hosts=2))
    (start,) = of(StartHost, service.act())
    assert (start.host_id, start.generation, start.pairs) == ("host-1", 1, frozenset())
    service.obey(start)
    actions = service.act()
    (load,) = of(Load, actions)
    assert (load.host_id, len(load.pairs)) == ("host-1", 2)
    assert {host.id for host in load.sources.values()} == {"host-0"}
    assert change.phase is Phase.PREPARE
    assert of(Publish, [*actions, *service.act()]) == []
    service.obey(load)
    actions = service.act()
    (published,) = of(Publish, actions)
    assert published.placement.epoch == 2
    assert frozenset(published.placement.held_by("host-1")) == load.pairs
    assert isinstance(actions[0], Save)
    assert actions[0].state.committed.members == ("host-0", "host-1")
    assert of(Retire, actions) == []
    service.conductor.worker_at("worker-0", 2)
    (retire,) = of(Retire, service.act())
    assert (retire.host_id, retire.pairs) == ("host-0", load.pairs)
    service.obey(retire)
    service.settle()
    assert (change.phase, change.epoch, service.conductor.change) == (Phase.DONE, 2, None)
    assert service.held() == {"host-0": pairs(0, 1, 2, 3) - load.pairs, "host-1": load.pairs}


def test_a_drained_host_is_stopped_once_no_worker_uses_it() -> None:
    service = ready(2, workers=1)
    service.begin(Wish("drain", leaving=("host-0",)))
    (load,) = of(Load, service.act())
    assert (load.host_id, load.pairs) == ("host-1", pairs(0, 1))
    service.obey(load)
    (published,) = of(Publish, service.act())
    assert [host.id for host in published.placement.hosts] == ["host-1"]
    assert service.act() == []
    service.conductor.worker_at("worker-0", 2)
    assert of(StopHost, service.act()) == [StopHost("host-0", 1)]
    assert (service.conductor.committed.members, service.conductor.change) == (("host-1",), None)


def test_surplus_is_retired_only_after_every_worker_moved_or_much_later() -> None:
    service = ready(1, workers=2)
    service.begin(Wish("scale", hosts=2))
    for _ in range(3):
        for action in service.act():
            service.obey(action)
    assert service.conductor.change is not None
    assert service.conductor.change.phase is Phase.RETIRE
    service.conductor.worker_at("worker-0", 2)
    assert of(Retire, service.act(DEADLINES.retire_s - 0.1)) == []
    assert len(of(Retire, service.act(0.2))) == 1  # worker-1 will be refused, and find the new table
    service.conductor.worker_left("worker-1")


@pytest.mark.parametrize("fault", ["load failed", "joiner died", "joiner cannot load", "too late"])
def test_a_change_that_fails_leaves_everything_as_it_was(fault: str) -> None:
    service = ready(2, workers=1)
    before = service.conductor.committed
    change = service.begin(Wish("scale", hosts=4))
    starts = of(StartHost, service.act())
    assert [start.host_id for start in starts] == ["host-2", "host-3"]
    service.obey(starts[0])
    if fault == "joiner cannot load":
        service.conductor.host_failed("host-3", 1, "no memory", service.now_s)
        actions = service.act()
    elif fault == "joiner died":
        service.died("host-3", 1)
        actions = service.act()
    else:
        service.obey(starts[1])
        loads = of(Load, service.act())
        service.obey(loads[0])
        if fault == "load failed":
            service.conductor.load_failed(change.id, "host-3", 1, "the disk cannot be read", service.now_s)
        actions = service.act(DEADLINES.prepare_s if fault == "too late" else 0.0)
    assert change.phase is Phase.ROLLED_BACK
    assert change.reason
    assert {stop.host_id for stop in of(StopHost, actions)} == {"host-2", "host-3"}
    assert service.conductor.committed is before
    assert service.conductor.change is None
    assert of(Publish, actions) == []
    assert set(service.held()) == {"host-0", "host-1"}


def test_a_life_that_loads_steadily_is_waited_for_however_long_it_takes() -> None:
    service = Service(2)
    service.act()
    for loaded in range(1, 10):
        service.now_s += DEADLINES.prepare_s - 1.0
        service.conductor.host_progress("host-1", 1, loaded, service.now_s)
        service.act()
    views = service.conductor.roster.views
    assert views["host-1"].generation == 1
    assert views["host-0"].generation > 1  # which never said anything
    service.conductor.host_progress("host-1", 1, 9, service.now_s)
    assert StopHost("host-1", 1, insist=True) not in service.act(DEADLINES.prepare_s - 0.1)
    service.conductor.host_progress("host-1", 1, 9, service.now_s)  # no further than before
    assert StopHost("host-1", 1, insist=True) in service.act(0.2)
    assert views["host-1"].state == "dead"


def test_a_life_has_its_own_time_to_load_whatever_an_earlier_one_had_loaded() -> None:
    service = Service(1)
    service.act()
    service.conductor.host_progress("host-0", 1, 3, 1.0)
    service.now_s = 15.0
    service.died("host-0", 1)
    (start,) = of(StartHost, service.act())
    assert start.generation == 2
    assert service.act(DEADLINES.prepare_s - 1.0) == []
    service.conductor.host_progress("host-0", 1, 4, service.now_s)  # late, of the earlier one
    assert of(StopHost, service.act(1.0)) == [StopHost("host-0", 2, insist=True)]
    (start,) = of(StartHost, service.act())
    service.now_s += DEADLINES.prepare_s - 1.0
    service.conductor.host_progress("host-0", 3, 1, service.now_s)  # fewer than the first had
    assert service.act(DEADLINES.prepare_s - 1.0) == []
    assert of(StopHost, service.act(1.0)) == [StopHost("host-0", 3, insist=True)]


def test_a_change_that_loads_steadily_is_waited_for_however_long_it_takes() -> None:
    service = ready(2)
    change = service.begin(Wish("replicas", replicas=2))
    assert len(of(Load, service.act())) == 2
    for loaded in (1, 2):
        service.act(DEADLINES.prepare_s - 1.0)
        service.conductor.load_progress(change.id, "host-1", loaded, service.now_s)
    version = change.version
    service.act(DEADLINES.prepare_s - 1.0)
    service.conductor.load_progress(change.id, "host-1", 2, service.now_s)  # no further than before
    assert (change.phase, change.version) == (Phase.PREPARE, version)
    assert {abandon.host_id for abandon in of(Abandon, service.act(1.0))} == {"host-0", "host-1"}
    assert change.phase is Phase.ROLLED_BACK


def test_what_a_load_says_late_gives_a_change_no_more_time_to_retire() -> None:
    service = ready(2, workers=1)
    change = service.begin(Wish("replicas", replicas=2))
    for action in service.act():
        service.obey(action)
    service.act()
    assert change.phase is Phase.RETIRE
    deadline_s = change.deadline_s
    service.conductor.load_progress(change.id, "host-1", 2, service.now_s)
    assert change.deadline_s == deadline_s


def test_a_change_is_undone_at_once_when_a_host_dies_with_what_it_had_loaded() -> None:
    service = ready(3)
    change = service.begin(Wish("drain", leaving=("host-0",)))
    loads = of(Load, service.act())
    service.obey(loads[0])
    service.died(loads[0].host_id, 1)
    actions = service.act()
    if len(loads) > 1:
        assert of(Abandon, actions) == [Abandon(change.id, loads[1].host_id, 1)]
    assert change.phase is Phase.ROLLED_BACK


def test_what_an_undone_change_had_loaded_is_retired() -> None:
    service = ready(2)
    change = service.begin(Wish("replicas", replicas=2))
    loads = of(Load, service.act())
    assert len(loads) == 2
    service.obey(loads[0])
    service.conductor.load_failed(change.id, loads[1].host_id, 1, "the disk cannot be read", service.now_s)
    retired = of(Retire, service.settle())
    assert [(retire.host_id, retire.pairs) for retire in retired] == [(loads[0].host_id, loads[0].pairs)]
    assert service.held() == {"host-0": pairs(0, 1), "host-1": pairs(2, 3)}


def test_a_new_change_waits_for_what_is_still_being_dropped() -> None:
    service = ready(2)
    change = service.begin(Wish("replicas", replicas=2))
    loads = of(Load, service.act())
    service.obey(loads[0])
    service.conductor.load_failed(change.id, loads[1].host_id, 1, "the disk cannot be read", service.now_s)
    (retire,) = of(Retire, service.act())
    service.begin(Wish("replicas", replicas=2))
    assert of(Load, service.act()) == []
    service.obey(retire)
    assert {load.host_id: load.pairs for load in of(Load, service.act())} == {
        load.host_id: load.pairs for load in loads
    }


def test_a_second_change_is_refused_as_busy_and_changes_nothing() -> None:
    service = ready(1)
    first = service.begin(Wish("scale", hosts=2))
    with pytest.raises(ChangeRefused, match=r"change-1 \(scale, phase 'plan'\) is under way") as refused:
        service.begin(Wish("scale", hosts=3))
    assert refused.value.busy
    assert service.conductor.change is first
    service.settle()
    with pytest.raises(ChangeRefused, match="0 expert hosts") as impossible:
        service.begin(Wish("scale", hosts=0))
    assert not impossible.value.busy


def test_no_change_is_begun_before_the_service_is_ready() -> None:
    service = Service(1)
    with pytest.raises(ChangeRefused, match="not ready: ask again") as refused:
        service.begin(Wish("scale", hosts=2))
    assert refused.value.busy
    service.conductor.give_up("there is no room")
    with pytest.raises(ChangeRefused, match="cannot start: there is no room") as impossible:
        service.begin(Wish("scale", hosts=2))
    assert not impossible.value.busy


def test_a_controller_that_comes_back_takes_over_its_hosts() -> None:
    before = ready(2)
    after = Service(2, before.saved)
    after.report("host-0", 1, pairs(0, 1))
    actions = after.act()
    assert of(StartHost, actions) == [StartHost("host-1", 2, pairs(2, 3))]  # it did not come back: a later life
    assert of(Publish, actions) == []
    after.obey(of(StartHost, actions)[0])
    (published,) = of(Publish, after.act())
    assert published.placement.epoch == 2
    assert [host.generation for host in published.placement.hosts] == [1, 2]


def test_a_controller_that_comes_back_ends_what_a_change_had_begun() -> None:
    before = ready(2)
    before.begin(Wish("scale", hosts=3))
    assert of(StartHost, before.act())
    after = Service(2, before.saved)
    for host_id, held in (("host-0", pairs(0, 1)), ("host-1", pairs(2, 3)), ("host-2", frozenset())):
        after.report(host_id, 1, held)
    assert of(StopHost, after.act()) == []  # not before it is known which workers there are
    assert after.conductor.wants("host-2", 1)
    after.conductor.worker_at("worker-0", 1)
    assert of(StopHost, after.act(WORKERS_HEARD_S)) == []  # it uses the earlier controller's table
    after.conductor.worker_at("worker-0", 2)
    assert of(StopHost, after.act()) == [StopHost("host-2", 1)]
    assert not after.conductor.wants("host-2", 1)
    assert after.conductor.request(Wish("scale", hosts=3), after.now_s).joining == {"host-2": 2}


def test_a_controller_that_comes_back_retires_nothing_that_only_an_unpublished_table_drops() -> None:
    before = ready(2)
    held = {"host-0": pairs(0, 1), "host-1": pairs(1, 2, 3)}  # its committed table was saved and never published
    after = Service(2, before.saved)
    after.report("host-1", 1, held["host-1"])
    assert of(StartHost, after.act())
    assert of(Retire, after.act(2 * WORKERS_HEARD_S)) == []  # workers use the older table, in which host-1 holds 1
    after.report("host-0", 2, held["host-0"])
    actions = after.act()
    assert of(Publish, actions)
    assert of(Retire, actions) == [Retire("host-1", 1, pairs(1))]


def test_a_suspect_is_asked_once_and_ended_only_when_it_does_not_answer() -> None:
    service = ready(2)
    for _ in range(2):
        service.conductor.suspected("host-1", 1, "no reply in 0.4 s", service.now_s)
    assert of(Probe, service.act()) == [Probe("host-1", 1)]
    service.conductor.suspected("host-1", 1, "no reply in 0.4 s", service.now_s)
    assert service.act() == []
    service.conductor.probed("host-1", 1, True, service.now_s)
    assert service.act() == []
    service.conductor.suspected("host-1", 1, "no reply in 0.4 s", service.now_s)
    assert of(Probe, service.act()) == [Probe("host-1", 1)]
    service.conductor.probed("host-1", 1, False, service.now_s)
    actions = service.act()
    assert of(StopHost, actions) == [StopHost("host-1", 1, insist=True)]
    assert [(start.host_id, start.generation) for start in of(StartHost, actions)] == [("host-1", 2)]
    assert not service.conductor.wants("host-1", 1)


def test_a_life_that_was_declared_dead_cannot_come_back() -> None:
    service = ready(2)
    service.conductor.suspected("host-1", 1, "no reply", service.now_s)
    service.act()
    service.conductor.probed("host-1", 1, False, service.now_s)
    service.act()
    service.report("host-1", 1, pairs(2, 3))
    assert of(StopHost, service.act()) == [StopHost("host-1", 1)]
    assert service.conductor.roster.views["host-1"].generation == 2


def test_what_older_lives_and_changes_tell_is_ignored() -> None:
    service = ready(2)
    service.died("host-1", 1)
    (start,) = of(StartHost, service.act())
    service.obey(start)
    service.settle()
    held = service.held()
    for tell in (
        lambda: service.died("host-1", 1),
        lambda: service.conductor.loaded("change-7", "host-1", 1, pairs(0)),
        lambda: service.conductor.retired("host-1", 1, pairs(2)),
        lambda: service.conductor.probed("host-1", 1, False, service.now_s),
        lambda: service.conductor.suspected("host-1", 1, "no reply", service.now_s),
        lambda: service.conductor.load_failed("change-7", "host-1", 2, "?", service.now_s),
    ):
        tell()
        assert of(StartHost, service.act()) == []
    assert service.held() == held


def test_hosts_that_follow_nodes_leave_and_come_in_one_change() -> None:
    service = Service(2)
    service.settle()
    change = service.begin(Wish("follow", hosts=2, leaving=("host-0",)))
    assert (list(change.joining), change.leaving) == (["host-2"], ("host-0",))
    service.settle()
    assert change.phase is Phase.DONE
    assert service.conductor.committed.members == ("host-1", "host-2")
    placement = service.conductor.placement
    assert placement is not None
    assert [host.id for host in placement.hosts] == ["host-1", "host-2"]
    assert service.conductor.committed.holding.held_by("host-2")


def test_a_stale_wish_of_the_nodes_is_refused_and_changes_nothing() -> None:
    """It names nobody who leaves, and was thought of when there were fewer hosts than there are now."""
    service = Service(3)
    service.settle()
    with pytest.raises(ChangeRefused, match="2 expert hosts are wanted and 3 stay"):
        service.begin(Wish("follow", hosts=2))
    assert service.conductor.change is None
    assert service.conductor.committed.members == ("host-0", "host-1", "host-2")


def test_hosts_that_compute_otherwise_than_others_are_told_of() -> None:
    service = Service(3)
    kinds = iter(("fused", "torch", "fused"))
    for start in of(StartHost, service.act()):
        report = HostReport(start.host_id, start.generation, "a:1", start.pairs, arithmetic=next(kinds))
        service.conductor.host_ready(report, service.now_s)
    told = [event.fields for event in service.events.recent if event.kind == "hosts_differ"]
    assert told == [{"host": "host-1", "arithmetic": "torch"}, {"host": "host-2", "arithmetic": "fused"}]
    said = describe_difference(service.conductor)
    assert said is not None
    assert "host-0, host-2 with fused and host-1 with torch: a token may change with who answers" in said
    service.died("host-1", 1)
    assert describe_difference(service.conductor) is None
    assert describe_difference(ready(2).conductor) is None
    assert describe_difference(None) is None
