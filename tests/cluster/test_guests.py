"""A guest leaves its host's process as it found it, and ends when nobody wants it, its host leaves, or it shall."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cluster.expert_life import ExpertLife
from cluster.guests import MAX_GUESTS, Guests
from cluster.resident import Resident
from cluster.spec import ServiceSpec
from experts.loader import LoadAbandoned
from model.checkpoint import Checkpoint
from router.holding import Pair
from tests.end_to_end.clients import wait_until

LODGER = ServiceSpec("run", "m", trains=True, lodges_with="p8000")


class FakeGuest:
    def __init__(self) -> None:
        self.left = threading.Event()
        self.ended = False

    def wait_for_end(self) -> None:
        self.left.wait(10)

    def progress(self) -> tuple[int, int]:
        return (3, 4)

    def leave(self) -> None:
        self.left.set()

    def end(self) -> None:
        self.ended = True


class House:
    """Guests, all of whom a controller wants until `unwanted` is set."""

    def __init__(self) -> None:
        self.made: dict[str, FakeGuest] = {}
        self.unwanted = threading.Event()
        self.asked: list[tuple[str, str]] = []
        self.guests = Guests(self._make, self._wait)

    def _make(self, spec: ServiceSpec, name: str, token: str) -> FakeGuest:
        self.made[name] = FakeGuest()
        return self.made[name]

    def _wait(self, namespace: str, name: str, over: threading.Event) -> None:
        self.asked.append((namespace, name))
        while not over.wait(0.01) and not self.unwanted.is_set():
            pass


def test_the_fakes_method_names_are_those_of_a_resident() -> None:
    from cluster.guests import METHODS

    assert all(callable(getattr(Resident, name)) for name in METHODS)


def test_a_guest_that_its_controller_forgot_ends() -> None:
    house = House()
    assert house.guests.admit(LODGER, "a", "token")
    assert house.guests.call("a", "progress") == (3, 4)
    assert not house.made["a"].ended
    house.unwanted.set()
    wait_until(lambda: house.made["a"].ended, 5)
    assert house.guests.names == ()
    assert house.asked == [("shoal-run", "a")]


def test_an_evicted_guest_is_gone_and_whoever_waits_for_its_end_knows() -> None:
    house = House()
    house.guests.admit(LODGER, "a", "token")
    house.guests.admit(LODGER, "b", "token")
    waiting = threading.Thread(target=house.guests.call, args=("a", "wait_for_end"))
    waiting.start()
    house.guests.evict("a")
    waiting.join(5)
    assert not waiting.is_alive()
    assert (house.made["a"].ended, house.made["b"].ended) == (True, False)
    assert house.guests.names == ("b",)
    house.guests.evict("a")
    house.guests.call("a", "wait_for_end")  # at once
    with pytest.raises(KeyError, match="no guest a here"):
        house.guests.call("a", "progress")
    house.guests.evict("b")


def test_a_host_that_leaves_tells_its_guests_and_takes_no_more() -> None:
    house = House()
    house.guests.admit(LODGER, "a", "token")
    house.guests.leave()
    assert house.made["a"].left.is_set()
    assert not house.guests.admit(LODGER, "b", "token")
    assert list(house.made) == ["a"]
    house.guests.evict("a")


def test_there_is_room_for_so_many_and_only_for_what_guests_do() -> None:
    house = House()
    names = [str(number) for number in range(MAX_GUESTS)]
    assert all(house.guests.admit(LODGER, name, "token") for name in names)
    assert not house.guests.admit(LODGER, "one more", "token")
    house.guests.evict("0")
    assert house.guests.admit(LODGER, "one more", "token")
    with pytest.raises(ValueError, match="'leave' is no method of a guest"):
        house.guests.call("1", "leave")
    for name in house.guests.names:
        house.guests.evict(name)


def life(directory: Path) -> ExpertLife:
    spec = ServiceSpec("run", str(directory), trains=True, lodges_with="p8000", transport="grpc")
    return ExpertLife(spec, "guest", "token", 7)


def test_a_guest_leaves_threads_alone_and_gives_its_memory_back(checkpoint: Callable[[str], Path]) -> None:
    before = torch.get_num_threads()
    pairs = frozenset((layer, 0) for layer in Checkpoint.open(checkpoint("tiny")).config.moe_layers)
    guest = life(checkpoint("tiny"))
    guest.begin("host-0", 1, pairs, 5, None, "127.0.0.1:0")
    host = guest._host
    assert host is not None
    assert frozenset(host.held) == pairs
    assert guest.nbytes > 0
    assert torch.get_num_threads() == before
    guest.end()
    assert host.held == ()
    assert all(host.store(layer).nbytes == 0 for layer, _ in pairs)
    guest.end()


def test_a_guest_that_is_ended_while_it_loads_keeps_nothing(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(layer, 0) for layer in Checkpoint.open(checkpoint("tiny")).config.moe_layers]
    guest = life(checkpoint("tiny"))
    loading, ended = threading.Event(), threading.Event()
    on_progress = guest._on_progress

    def slow(done: int, total: int) -> None:
        loading.set()
        ended.wait(10)
        on_progress(done, total)

    monkeypatch.setattr(guest, "_on_progress", slow)
    errors: list[BaseException] = []

    def begin() -> None:
        try:
            guest.begin("host-0", 1, pairs, 1, None, "127.0.0.1:0")
        except LoadAbandoned as error:
            errors.append(error)

    beginning, ending = threading.Thread(target=begin), threading.Thread(target=guest.end)
    beginning.start()
    assert loading.wait(10)
    ending.start()
    wait_until(lambda: guest._over, 5)
    ended.set()
    beginning.join(10)
    ending.join(10)
    assert len(errors) == 1
    assert "was ended while it was loading" in str(errors[0])
    with pytest.raises(RuntimeError, match="still loading"):
        guest.report()


def test_a_guest_that_was_ended_before_it_began_does_not_begin(checkpoint: Callable[[str], Path]) -> None:
    """Its controller's call was on its way when it was evicted, and a door that opens now would never be closed."""
    guest = life(checkpoint("tiny"))
    guest.end()
    with pytest.raises(LoadAbandoned, match="before it began"):
        guest.begin("host-0", 1, (), 5, None, "127.0.0.1:0")
    assert guest._server is None


@pytest.fixture
def serving(checkpoint: Callable[[str], Path]) -> Iterator[ExpertLife]:
    """A life that holds expert 0 of every layer."""
    made = life(checkpoint("tiny"))
    made.begin("host-0", 1, held_at_first(checkpoint), 1, None, "127.0.0.1:0")
    yield made
    made.end()


def held_at_first(checkpoint: Callable[[str], Path]) -> frozenset[Pair]:
    return frozenset((layer, 0) for layer in Checkpoint.open(checkpoint("tiny")).config.moe_layers)


def test_what_an_earlier_controller_drops_is_gone_when_the_next_is_told_what_is_held(
    serving: ExpertLife, checkpoint: Callable[[str], Path]
) -> None:
    """Else its table would name what is dropped a moment later."""
    told: list[frozenset[Pair]] = []

    def settle() -> None:
        serving.settle()
        told.append(serving.report().held)

    dropping = threading.Thread(target=serving.drop, args=(held_at_first(checkpoint),))
    settling = threading.Thread(target=settle)
    assert serving._host is not None
    with serving._host.computing():
        dropping.start()
        wait_until(serving._host._changes.locked, 5)
        settling.start()
        settling.join(0.2)
    dropping.join(10)
    settling.join(10)
    assert told == [frozenset()]


def test_all_that_an_earlier_controller_began_to_load_is_given_up(
    serving: ExpertLife, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what waits for the load of a change before it to be undone."""
    began: list[threading.Thread] = []

    def load(pairs: object, sources: object, abandoned: Callable[[], bool], progress: object) -> None:
        began.append(threading.current_thread())
        wait_until(abandoned, 5)
        raise LoadAbandoned("it was given up")

    def take(change_id: str) -> None:
        with pytest.raises(LoadAbandoned):
            serving.take(change_id, (), {})

    monkeypatch.setattr(serving._loader, "load", load)
    loads = [threading.Thread(target=take, args=(change_id,)) for change_id in ("change-1", "change-2")]
    for each in loads:
        each.start()
        wait_until(lambda: bool(began), 5)
    loads[1].join(0.1)
    serving.settle()
    for each in loads:
        each.join(2)
    assert not any(each.is_alive() for each in loads)
