"""The balancer: every promise about copies, memory, groups and moves, for loads and hosts of every kind."""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from router.balance_quality import Quality, moves, owners_of, quality, worth_moving
from router.balancer import HostCapacity, balance
from router.copies import count_copies, rooms
from router.holding import Holding
from router.placement import Owners
from router.territory import own_hosts, whole_groups

EPLB_LOADS = {
    0: [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    1: [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
}
EPLB_ANSWER = {  # expert of each of 16 slots; 8 GPUs have two each
    0: [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    1: [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
}
Holders = Mapping[int, tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class Problem:
    loads: dict[int, list[float]]
    hosts: tuple[HostCapacity, ...]
    groups: int
    replicas: int
    extra: int

    @property
    def experts(self) -> int:
        return len(self.loads[0])

    def solve(self, current: Holders | None = None) -> dict[int, Owners]:
        return balance(self.loads, self.hosts, self.groups, self.replicas, self.extra, current)


def make_hosts(count: int, limit: int | None = None) -> tuple[HostCapacity, ...]:
    return tuple(HostCapacity(f"host-{index}", max_experts=limit) for index in range(count))


def by_id(owners: Mapping[int, Owners], hosts: Sequence[HostCapacity]) -> Holders:
    return Holding.from_owners(owners, [host.id for host in hosts]).holders


def host_loads(owners: Owners, load: Sequence[float], hosts: Sequence[HostCapacity]) -> list[float]:
    """Relative to compute."""
    totals = [0.0] * len(hosts)
    for holders, value in zip(owners, load, strict=True):
        for index in holders:
            totals[index] += value / len(holders) / hosts[index].compute
    return totals


def imbalance(owners: Owners, load: Sequence[float], hosts: Sequence[HostCapacity]) -> float:
    return max(host_loads(owners, load, hosts)) * sum(host.compute for host in hosts) / sum(load)


def counts(owners: Owners, hosts: int) -> list[int]:
    held = [index for holders in owners for index in holders]
    return [held.count(index) for index in range(hosts)]


def hosts_of_groups(owners: Owners, groups: int) -> list[set[int]]:
    size = len(owners) // groups
    return [set(itertools.chain(*owners[start : start + size])) for start in range(0, len(owners), size)]


def skewed(experts: int, layers: int, seed: int, exponent: float = 1.0) -> dict[int, list[float]]:
    generator = random.Random(seed)
    ranks = list(range(1, experts + 1))
    return {layer: [1000.0 / rank**exponent for rank in generator.sample(ranks, experts)] for layer in range(layers)}


@st.composite
def problems(draw: st.DrawFn, limited: bool = False, uneven: bool = True) -> Problem:
    groups = draw(st.sampled_from((1, 1, 2, 4)))
    experts = groups * draw(st.integers(1, 6))
    layers = draw(st.integers(1, 3))
    count = draw(st.integers(1, 9))
    replicas = draw(st.integers(1, min(3, count)))
    extra = draw(st.integers(0, min(6, experts * (count - replicas))))
    value = st.one_of(st.just(0.0), st.floats(0.01, 1000.0), st.integers(1, 50).map(float))
    loads = {layer: draw(st.lists(value, min_size=experts, max_size=experts)) for layer in range(layers)}
    compute = st.sampled_from((0.5, 1.0, 2.0)) if uneven and draw(st.booleans()) else st.just(1.0)
    hosts = [replace(host, compute=draw(compute)) for host in make_hosts(count)]
    if limited:
        limits = [draw(st.integers(0, layers * experts)) for _ in hosts]
        short = layers * (experts * replicas + extra) - sum(limits)
        for index in range(count):  # as tight as it can be, unless it was roomy before
            more = min(max(0, short), layers * experts - limits[index])
            limits[index], short = limits[index] + more, short - more
        hosts = [replace(host, max_experts=limit) for host, limit in zip(hosts, limits, strict=True)]
    return Problem(loads, tuple(hosts), groups, replicas, extra)


def check_promises(problem: Problem, owners: Mapping[int, Owners]) -> None:
    """Everything that holds whatever the loads are and whatever was held before."""
    count = len(problem.hosts)
    copies = problem.experts * problem.replicas + problem.extra
    assert sorted(owners) == sorted(problem.loads)
    for experts in owners.values():
        assert len(experts) == problem.experts
        assert all(len(set(holders)) == len(holders) >= problem.replicas for holders in experts)
        assert all(0 <= index < count for holders in experts for index in holders)
        assert sum(map(len, experts)) == copies
    for index, host in enumerate(problem.hosts):
        held = sum(counts(experts, count)[index] for experts in owners.values())
        assert host.max_experts is None or held <= host.max_experts


@given(problems())
def test_copies_are_as_many_as_asked_at_distinct_hosts(problem: Problem) -> None:
    check_promises(problem, problem.solve())


@given(problems(limited=True))
def test_no_host_holds_more_than_its_memory_however_tight(problem: Problem) -> None:
    check_promises(problem, problem.solve())


@given(problems(limited=True), st.randoms(use_true_random=False))
def test_promises_hold_from_any_current_holding(problem: Problem, generator: random.Random) -> None:
    """Also one that names strangers, too few hosts, or too many."""
    ids = [*(host.id for host in problem.hosts), "gone"]
    current = {
        layer: tuple(tuple(generator.sample(ids, generator.randint(1, len(ids)))) for _ in range(problem.experts))
        for layer in problem.loads
    }
    check_promises(problem, problem.solve(current))


@given(problems(limited=True))
def test_same_question_has_the_same_answer(problem: Problem) -> None:
    assert problem.solve() == problem.solve()


@given(problems(limited=True))
def test_own_answer_moves_nothing(problem: Problem) -> None:
    owners = problem.solve()
    assert problem.solve(by_id(owners, problem.hosts)) == owners


@given(problems(), st.integers(0, 9), st.integers(1, 3))
def test_answer_after_a_change_of_hosts_is_as_lasting(problem: Problem, lost: int, joining: int) -> None:
    first = problem.solve()
    left = [host for index, host in enumerate(problem.hosts) if index != lost]
    later = replace(problem, hosts=(*left, *(HostCapacity(f"new-{index}") for index in range(joining))))
    second = later.solve(by_id(first, problem.hosts))
    check_promises(later, second)
    if len(later.hosts) <= later.experts * later.replicas:
        assert all(min(counts(experts, len(later.hosts))) >= 1 for experts in second.values())
    assert later.solve(by_id(second, later.hosts)) == second


@given(problems())
def test_extra_copies_are_of_the_experts_with_the_most_load_per_copy(problem: Problem) -> None:
    for layer, experts in problem.solve().items():
        load = problem.loads[layer]
        copies = [len(holders) for holders in experts]
        given_up = [load[e] / (n - 1) for e, n in enumerate(copies) if n > problem.replicas]
        wanting = [load[e] / n for e, n in enumerate(copies) if n < len(problem.hosts)]
        assert not given_up or not wanting or min(given_up) >= max(wanting) * (1 - 1e-9)


@given(problems())
def test_every_host_has_work_where_there_is_enough(problem: Problem) -> None:
    assume(len(problem.hosts) <= problem.experts * problem.replicas)
    for experts in problem.solve().values():
        assert min(counts(experts, len(problem.hosts))) >= 1


def test_a_very_slow_host_has_the_lightest_expert() -> None:
    hosts = [HostCapacity("slow", 0.01), HostCapacity("fast")]
    owners = balance({0: [5.0, 1.0, 5.0, 5.0]}, hosts, 1)[0]
    assert owners == ((1,), (0,), (1,), (1,))


@given(problems(uneven=False), st.sampled_from((0.0, 7.0)))
def test_uniform_loads_without_groups_give_sizes_that_differ_by_at_most_one(problem: Problem, value: float) -> None:
    uniform = replace(problem, loads={layer: [value] * problem.experts for layer in problem.loads}, groups=1, extra=0)
    first = uniform.solve()
    more = replace(uniform, hosts=(*uniform.hosts[1:], *(HostCapacity(f"new-{index}") for index in range(2))))
    for hosts, owners in ((uniform.hosts, first), (more.hosts, more.solve(by_id(first, uniform.hosts)))):
        for experts in owners.values():
            held = counts(experts, len(hosts))
            assert max(held) - min(held) <= 1


@given(problems())
def test_groups_are_whole_where_hosts_allow_and_never_share_hosts_where_there_are_more(problem: Problem) -> None:
    assume(problem.groups > 1)
    problem = replace(problem, extra=0)
    for experts in problem.solve().values():
        sets = hosts_of_groups(experts, problem.groups)
        if len(problem.hosts) <= problem.groups * problem.replicas:
            assert all(len(hosts) == problem.replicas for hosts in sets)
            size = problem.experts // problem.groups  # and their rows take turns together
            assert len(set(experts)) <= problem.groups
            assert all(len(set(experts[at : at + size])) == 1 for at in range(0, problem.experts, size))
        else:
            assert sum(map(len, sets)) == len(set().union(*sets))


@given(problems(uneven=False))
def test_load_is_packed_within_a_third_of_the_best(problem: Problem) -> None:
    """Graham's bound for heaviest-first: 4/3 of the optimum, which is at least the mean and the heaviest."""
    problem = replace(problem, groups=1, replicas=1, extra=0)
    count = len(problem.hosts)
    for layer, experts in problem.solve().items():
        load = sorted(problem.loads[layer], reverse=True)
        two = sum(load[count - 1 : count + 1]) if len(load) > count else 0.0  # some host has two of so many
        least = max(sum(load) / count, load[0], two)
        prior = 0.02 * sum(load)
        assert max(host_loads(experts, problem.loads[layer], problem.hosts)) <= least * 4 / 3 + prior


def test_a_host_with_twice_the_compute_carries_twice_the_load() -> None:
    hosts = [HostCapacity("slow", 1.0), HostCapacity("fast", 2.0)]
    loads = skewed(60, 3, seed=1, exponent=0.5)
    for layer, experts in balance(loads, hosts, 1).items():
        slow, fast = host_loads(experts, loads[layer], hosts)
        assert fast == pytest.approx(slow, rel=0.03)
    uniform = balance({0: [0.0] * 60}, hosts, 1)[0]
    assert counts(uniform, 2) == [20, 40]


def test_groups_get_compute_in_proportion_to_their_load() -> None:
    loads = {0: [30.0] * 4 + [10.0] * 4}
    sets = hosts_of_groups(balance(loads, make_hosts(8), 2)[0], 2)
    assert [len(hosts) for hosts in sets] == [4, 4]  # an expert cannot be divided
    sets = hosts_of_groups(balance({0: [30.0] * 8 + [10.0] * 8}, make_hosts(8), 2)[0], 2)
    assert [len(hosts) for hosts in sets] == [6, 2]


def test_a_heavy_group_stands_alone() -> None:
    loads = {0: [9.0, 9.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]}
    sets = hosts_of_groups(balance(loads, make_hosts(2), 4)[0], 4)
    assert sets[1] == sets[2] == sets[3] != sets[0]


def test_deepseeks_published_example_is_packed_at_least_as_evenly() -> None:
    """github.com/deepseek-ai/EPLB, README: 16 replicas of 12 experts in 4 groups, 2 nodes of 4 GPUs with 2 slots."""
    hosts = make_hosts(8, limit=4)
    for groups in (1, 4):
        answer = balance(EPLB_LOADS, hosts, groups, extra=4)
        for layer, slots in EPLB_ANSWER.items():
            load = EPLB_LOADS[layer]
            theirs = [sum(load[e] / slots.count(e) for e in slots[at : at + 2]) for at in range(0, 16, 2)]
            assert counts(answer[layer], 8) == [2] * 8
            assert imbalance(answer[layer], load, hosts) <= max(theirs) * 8 / sum(theirs)


@pytest.mark.parametrize(("experts", "groups", "count", "extra"), [(64, 1, 8, 0), (64, 1, 8, 8), (160, 8, 16, 16)])
def test_noise_moves_little_and_nothing_that_is_not_worth_it(experts: int, groups: int, count: int, extra: int) -> None:
    loads, hosts, generator = skewed(experts, 8, seed=3), make_hosts(count), random.Random(4)
    current = by_id(balance(loads, hosts, groups, extra=extra), hosts)
    noisy = {layer: [x * generator.uniform(0.95, 1.05) for x in load] for layer, load in loads.items()}
    after = balance(noisy, hosts, groups, extra=extra, current=current)
    assert moves(current, after, hosts) <= 0.005 * 8 * experts
    best = balance(noisy, hosts, groups, extra=extra)
    for layer, load in noisy.items():
        # the prior of unseen experts is no part of this measure
        assert imbalance(after[layer], load, hosts) <= 1.12 * imbalance(best[layer], load, hosts)


def test_loads_turned_round_are_balanced_anew() -> None:
    loads, hosts = skewed(64, 4, seed=5), make_hosts(8)
    current = by_id(balance(loads, hosts, 1, extra=8), hosts)
    turned = {layer: load[::-1] for layer, load in loads.items()}
    after = balance(turned, hosts, 1, extra=8, current=current)
    best = balance(turned, hosts, 1, extra=8)
    stale = owners_of(current, hosts)
    for layer, load in turned.items():
        assert imbalance(stale[layer], load, hosts) > 1.3
        assert imbalance(after[layer], load, hosts) <= 1.12 * imbalance(best[layer], load, hosts)
    assert moves(current, after, hosts) < moves(current, best, hosts)


def test_layer_packed_anew_stays_where_equal_hosts_can_be_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    loads, hosts = skewed(64, 2, seed=8), make_hosts(8)
    turned = by_id(balance(loads, hosts, 1, extra=4), hosts[3:] + hosts[:3])
    monkeypatch.setattr("router.balancer.KEEP", 0.0)  # nothing that is held will do
    assert moves(turned, balance(loads, hosts, 1, extra=4, current=turned), hosts) == 0


def test_lost_hosts_experts_move_and_few_others() -> None:
    loads, hosts = {layer: [1.0] * 64 for layer in range(4)}, make_hosts(8)
    current = by_id(balance(loads, hosts, 1), hosts)
    after = balance(loads, hosts[1:], 1, current=current)
    assert moves(current, after, hosts[1:]) == 4 * 8


def test_joining_host_takes_its_share_and_no_more() -> None:
    hosts = make_hosts(9)
    for loads in ({layer: [1.0] * 64 for layer in range(4)}, skewed(64, 4, seed=6, exponent=0.5)):
        current = by_id(balance(loads, hosts[:8], 1), hosts)
        after = balance(loads, hosts, 1, current=current)
        assert 4 * 4 <= moves(current, after, hosts) <= 4 * 13
        for layer, load in loads.items():
            share = host_loads(after[layer], load, hosts)[8] * 9 / sum(load)
            assert 0.85 <= share <= 1.15


def test_holders_keep_their_order() -> None:
    hosts = make_hosts(3)
    current = {0: (("host-2", "host-0"), ("host-1", "host-2"), ("host-0", "host-1"))}
    assert balance({0: [1.0] * 3}, hosts, 1, replicas=2, current=current)[0] == ((2, 0), (1, 2), (0, 1))


def test_preferred_holders_are_spread() -> None:
    for experts in balance({0: [1.0] * 64}, make_hosts(8), 1, replicas=2).values():
        preferred = [holders[0] for holders in experts]
        assert max(preferred.count(index) for index in range(8)) <= 10


def test_no_layers_need_no_placement() -> None:
    assert balance({}, make_hosts(2), 4) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replicas": 0}, "0 replicas of each expert on 2 hosts; use 1 to 2 replicas"),
        ({"replicas": 3}, "3 replicas of each expert on 2 hosts; use 1 to 2 replicas"),
        ({"hosts": ()}, "1 replicas of each expert on 0 hosts"),
        ({"groups": 3}, "8 experts in 3 groups; expected groups of equal size"),
        ({"groups": 0}, "8 experts in 0 groups"),
        ({"extra": -1}, "-1 extra copies a layer; 2 hosts have use for 0 to 8"),
        ({"extra": 9}, "9 extra copies a layer; 2 hosts have use for 0 to 8"),
        ({"hosts": make_hosts(2, limit=3)}, "2 hosts have room for 6 experts; 1 layers of 8 copies need 2 more"),
        ({"hosts": make_hosts(2, limit=-1)}, "host-0 has max_experts -1; expected at least 0, or None"),
        ({"hosts": (HostCapacity("a", 0.0),)}, "a has compute 0.0; expected a number above 0"),
        ({"hosts": (HostCapacity("a"), HostCapacity("a"))}, r"host ids repeat: \['a', 'a'\]"),
        ({"loads": {0: [1.0] * 8, 1: [1.0] * 7}}, "layer 1 has 7 loads, another has 8"),
        ({"loads": {0: []}}, "layer 0 has 0 loads"),
        ({"loads": {4: [-1.0] * 8}}, "layer 4 has a load that is negative or no number"),
        ({"loads": {4: [float("nan")] * 8}}, "layer 4 has a load that is negative or no number"),
    ],
)
def test_questions_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    problem = Problem({0: [1.0] * 8}, make_hosts(2), 1, 1, 0)
    with pytest.raises(ValueError, match=message):
        replace(problem, **change).solve()  # type: ignore[arg-type]


def test_holding_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 0 is held as 1 experts; its loads name 8"):
        balance({0: [1.0] * 8}, make_hosts(2), 1, current={0: (("host-0",),)})


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 8))
def test_room_is_spread_over_layers_and_nothing_of_it_lost(limits: list[int], layers: int, experts: int) -> None:
    usable = [min(limit, layers * experts) for limit in limits]
    copies = sum(usable) // layers
    room_LH = rooms(limits, layers, experts, copies, extra=0, unit=1)
    assert [sum(room_H[host] for room_H in room_LH) for host in range(len(limits))] == usable
    assert all(sum(room_H) >= copies and max(room_H) <= experts for room_H in room_LH)
    with pytest.raises(ValueError, match=f"need {layers - sum(usable) % layers} more"):
        rooms(limits, layers, experts, copies, extra=1, unit=1)


def test_groups_stay_whole_in_memory_that_just_holds_them() -> None:
    """5 hosts for 8 groups of 4 experts: in each layer some have two groups and some one."""
    loads = skewed(32, 5, seed=7)
    for extra, limit in ((0, 32), (2, 34)):
        for experts in balance(loads, make_hosts(5, limit), 8, extra=extra).values():
            whole = [set.intersection(*map(set, experts[at : at + 4])) for at in range(0, 32, 4)]
            assert all(whole)


def test_copies_that_distinct_hosts_cannot_hold_go_to_the_next_expert() -> None:
    """One host has room for one expert, the other for all: only one expert can have two copies."""
    load_E = np.array([9.0, 4.0, 1.0])
    assert count_copies(load_E, 1, 1, np.array([1, 3]), None).tolist() == [2, 1, 1]
    assert count_copies(load_E, 1, 2, np.array([1, 1, 3]), None).tolist() == [3, 1, 1]
    assert count_copies(load_E, 1, 2, np.array([2, 3]), None).tolist() == [2, 2, 1]


def test_extra_copy_stays_until_another_expert_has_a_tenth_more_load() -> None:
    room_H, held_E = np.array([4, 4]), np.array([2, 1, 1, 1])
    for other, copies in ((10.9, [2, 1, 1, 1]), (11.1, [1, 2, 1, 1])):
        load_E = np.array([10.0, other, 1.0, 1.0])
        assert count_copies(load_E, 1, 1, room_H, held_E).tolist() == copies
        assert count_copies(load_E, 1, 1, room_H, None).tolist() == [1, 2, 1, 1]


def test_groups_and_hosts_of_groups_move_when_load_does() -> None:
    """Two heavy groups on one host part; a host goes to the group that became heavy."""
    whole = whole_groups(np.array([8.0, 8.0, 1.0, 1.0]), 1, np.ones(2), np.array([4, 4]), np.eye(2).repeat(2, 0), 9.0)
    assert (whole[0] != whole[1]).all()
    overlap_GH = np.array([[1, 1, 1, 0], [0, 0, 0, 1]])
    owned = own_hosts(np.array([1.0, 9.0]), 1, 4, np.ones(4), overlap_GH, 3.0)
    assert owned.sum(1).tolist() == [1, 3]
    joined = own_hosts(np.array([1.0, 9.0]), 1, 4, np.ones(3), np.array([[1, 0, 0], [0, 1, 0]]), 9.0)
    assert joined.sum(1).tolist() == [1, 2]


def test_quality_of_a_placement_worked_by_hand() -> None:
    hosts = (HostCapacity("a"), HostCapacity("b"), HostCapacity("c", compute=2.0))
    owners = {0: ((0,), (0, 1), (2,), (1,)), 1: ((0,), (0,), (2,), (2,))}
    loads = {0: [4.0, 4.0, 6.0, 2.0], 1: [0.0] * 4}
    found = quality(owners, loads, hosts, groups=2, topk_group=1)
    # layer 0: 6, 4 and 6/2 where 4 is even; layer 1, uniform: 2, 0 and 2/2 where 1 is even
    assert found == Quality(mean_imbalance=1.75, worst_imbalance=2.0, hosts_per_group=1.25, hosts_per_token=1.5)
    assert quality(owners, loads, hosts, groups=2).hosts_per_token == 2.5
    assert quality({}, {}, hosts, groups=2).mean_imbalance == 1.0


def test_quality_of_an_expert_without_holder_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 0 expert 1 has no holder among 1 hosts"):
        quality({0: ((0,), ())}, {0: [1.0, 1.0]}, make_hosts(1), groups=1)


def test_moves_are_what_hosts_must_load() -> None:
    hosts = make_hosts(3)
    current = {0: (("host-0",), ("host-1", "gone"), ("host-2",))}
    assert moves(current, {0: ((0,), (1,), (2,))}, hosts) == 0
    assert moves(current, {0: ((0, 2), (2, 1), (0,))}, hosts) == 3
    assert moves({}, {0: ((0, 2), (2, 1), (0,))}, hosts) == 5
    assert owners_of(current, hosts) == {0: ((0,), (1,), (2,))}


@pytest.mark.parametrize(
    ("mean", "worst", "moved", "rows", "worth", "reason"),
    [
        (1.35, 2.0, 5, 100.0, True, "mean imbalance 1.50 to 1.35, worst 2.00 to 2.00, 5 pairs to load"),
        (1.50, 1.8, 5, 100.0, True, "worst 2.00 to 1.80"),
        (1.40, 1.9, 5, 100.0, False, "a gain of 10 % is needed"),
        (1.51, 1.0, 5, 100.0, False, "a gain of 10 % is needed"),
        (1.00, 1.0, 0, 100.0, False, "nothing is to be moved"),
        (1.00, 1.0, 5, 31.0, False, "31.0 rows an expert were seen; 32 are needed"),
    ],
)
def test_moving_must_be_worth_it(mean: float, worst: float, moved: int, rows: float, worth: bool, reason: str) -> None:
    verdict = worth_moving(Quality(1.5, 2.0, 1, 1), Quality(mean, worst, 1, 1), moved, rows)
    assert verdict.worth is worth
    assert reason in verdict.reason


@pytest.mark.parametrize("hosts", [3, 5, 7, 14])
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_what_hosts_hold_evens_out_over_the_layers(hosts: int, skew: float) -> None:
    """One of seven hosts must hold two of eight groups, and it is another one in each layer."""
    rng = np.random.default_rng(0)
    loads = {layer: (rng.random(160) ** skew).tolist() for layer in range(59)}
    owners = balance(loads, [HostCapacity(f"host-{number}") for number in range(hosts)], groups=8)
    held = np.bincount([host for layer in owners.values() for expert in layer for host in expert], minlength=hosts)
    assert held.max() <= 59 * 160 / hosts + 20
