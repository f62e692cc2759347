"""One host on each node: what is asked for as nodes come and go, and as operators want it."""

from collections.abc import Sequence

import pytest

from cluster.change import Wish
from cluster.node_follower import GONE_S, RETRY_S, SETTLE_S, Desired, NodeFollower


class Place:
    """Hosts that go where they are asked to, and nodes that come and go."""

    def __init__(self, nodes: str, desired: Desired | None = None, least: int = 1, most: int = 16) -> None:
        self.follower = NodeFollower(desired or Desired())
        self.homes: dict[str, str | None] = {f"host-{number}": node for number, node in enumerate(nodes)}
        self.least, self.most = least, most
        self.now_s = 1000.0
        self.see(nodes)
        self.wait(SETTLE_S)

    def see(self, nodes: Sequence[str]) -> None:
        self.nodes = list(nodes)
        self.follower.see(nodes, self.now_s)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    def wish(self) -> Wish | None:
        return self.follower.wish(self.homes, self.least, self.most, self.now_s)

    def obey(self, after_s: float = 0.0) -> list[Wish]:
        """Wishes until there is none, each carried out as the pool would: joining hosts go to the emptiest nodes."""
        self.wish()
        self.wait(after_s)
        wishes: list[Wish] = []
        while (wish := self.wish()) is not None:
            assert len(wishes) < 10, wishes
            assert wish.kind == "follow"
            wishes.append(wish)
            staying = {host: node for host, node in self.homes.items() if host not in wish.leaving}
            assert wish.hosts is not None
            for number in range(wish.hosts - len(staying)):
                lived = list(staying.values())
                home = min(sorted(self.follower.usable), key=lambda node: lived.count(node))
                staying[f"new-{len(self.homes)}-{number}"] = home
            self.homes = staying
        return wishes


def test_nothing_is_asked_while_each_node_has_its_host() -> None:
    assert Place("abc").wish() is None


def test_hosts_join_on_new_nodes_together_once_no_more_come() -> None:
    place = Place("ab")
    place.see("abc")
    assert place.wish() is None
    place.wait(SETTLE_S / 2)
    place.see("abcd")
    place.wait(SETTLE_S / 2)
    assert place.wish() is None
    place.wait(SETTLE_S)
    wish = place.wish()
    assert wish is not None
    assert wish.why == "2 hosts on 4 nodes"
    assert place.obey() == [Wish("follow", hosts=4)]
    assert sorted(map(str, place.homes.values())) == list("abcd")


def test_a_limit_empties_the_youngest_at_once_and_lasts_until_nodes_have_gone() -> None:
    place = Place("abcd")
    place.follower.limit(2)
    assert place.obey() == [Wish("follow", hosts=2, leaving=("host-2", "host-3"))]
    place.see("abc")
    assert place.obey(after_s=SETTLE_S) == []
    assert place.follower.desired.at_most == 2
    place.see("ab")
    assert place.follower.desired == Desired()
    place.see("abe")
    assert place.obey(after_s=SETTLE_S) == [Wish("follow", hosts=3)]


def test_nodes_other_than_those_that_were_emptied_may_go() -> None:
    """Who removes nodes chooses them: a host that must go then moves to a node that was to be empty."""
    place = Place("abcd")
    place.follower.limit(2)
    place.obey()
    assert list(place.homes.values()) == ["a", "b"]
    place.follower.empty("b")
    place.follower.empty("c")
    assert place.obey() == [Wish("follow", hosts=2, leaving=("host-1",))]
    assert sorted(map(str, place.homes.values())) == ["a", "d"]
    place.see("ad")
    assert place.obey(after_s=SETTLE_S) == []
    assert place.follower.desired == Desired()


def test_a_larger_limit_takes_the_smaller_back() -> None:
    place = Place("abcd")
    place.follower.limit(2)
    place.obey()
    place.follower.limit(4)
    assert place.obey(after_s=SETTLE_S) == [Wish("follow", hosts=4)]
    place.follower.limit(9)
    assert place.follower.desired.at_most is None


def test_an_emptied_node_stays_empty_and_is_forgotten_when_it_is_gone() -> None:
    place = Place("abc")
    place.follower.empty("a")
    assert place.obey() == [Wish("follow", hosts=2, leaving=("host-0",))]
    assert place.obey(after_s=GONE_S + SETTLE_S) == []
    place.see("bc")
    place.see("bca")
    assert place.obey(after_s=SETTLE_S) == [Wish("follow", hosts=3)]


def test_a_lost_nodes_host_shares_another_until_the_node_is_replaced() -> None:
    place = Place("abc")
    place.see("ab")
    place.homes["host-2"] = "a"  # where its next life was begun
    assert place.obey(after_s=GONE_S / 2) == []
    place.see("abd")
    assert place.obey(after_s=SETTLE_S) == [Wish("follow", hosts=3, leaving=("host-2",))]
    assert sorted(map(str, place.homes.values())) == list("abd")


def test_there_are_fewer_hosts_when_a_lost_node_is_not_replaced() -> None:
    place = Place("abc")
    place.see("ab")
    place.homes["host-2"] = "a"
    assert place.wish() is None
    place.wait(GONE_S)
    assert place.obey() == [Wish("follow", hosts=2, leaving=("host-2",))]


def test_two_times_of_crowding_are_not_added_up() -> None:
    place = Place("abc")
    for _ in range(3):
        place.see("ab")
        place.homes["host-2"] = "a"
        assert place.wish() is None
        place.wait(GONE_S * 0.6)
        assert place.wish() is None
        place.see("abc")
        place.homes["host-2"] = "c"
        assert place.wish() is None


@pytest.mark.parametrize(("least", "hosts"), [(1, 1), (2, 2)])
def test_replicas_need_hosts_whatever_nodes_there_are(least: int, hosts: int) -> None:
    place = Place("abc", least=least)
    place.see("a")
    place.homes = {"host-0": "a", "host-1": "a", "host-2": "a"}
    place.obey(after_s=GONE_S)
    assert len(place.homes) == hosts


def test_a_model_has_no_more_hosts_than_experts() -> None:
    place = Place("ab", most=3)
    place.see("abcdef")
    assert place.obey(after_s=SETTLE_S) == [Wish("follow", hosts=3)]


def test_nothing_is_asked_while_a_host_is_between_two_lives() -> None:
    place = Place("abc")
    place.follower.limit(1)
    place.homes["host-1"] = None
    assert place.wish() is None
    place.homes["host-1"] = "b"
    assert place.wish() is not None


def test_after_a_change_that_was_undone_it_rests() -> None:
    place = Place("ab")
    place.follower.limit(1)
    place.follower.undone(place.now_s)
    assert place.wish() is None
    place.wait(RETRY_S)
    assert place.wish() == Wish("follow", hosts=1, leaving=("host-1",))


def test_no_nodes_at_all_are_no_news() -> None:
    place = Place("ab")
    place.follower.limit(1)
    place.see("")
    assert place.follower.desired.at_most == 1
    assert place.follower.usable == {"a", "b"}


def test_what_is_desired_outlives_the_controller() -> None:
    place = Place("abcd")
    place.follower.limit(3)
    place.follower.empty("b")
    saved = Desired.from_json(place.follower.desired.to_json())
    later = Place("abcd", desired=saved)
    assert later.obey() == [Wish("follow", hosts=3, leaving=("host-1",))]
