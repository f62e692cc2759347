"""Which host shall hold which expert, from the load that each expert has seen: a pure function, the same every time.

Shapes: `E` experts, `G` routing groups, `H` hosts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from router.copies import count_copies, rooms
from router.holding import Holders
from router.packing import Bools, Floats, Ints, NoRoom, Packing
from router.placement import Owners
from router.territory import own_hosts, whole_groups

KEEP = 1.10  # a layer stays as it is while its busiest host has at most so many times what a fresh packing gives it
AIM = 1.03  # what moving aims at, so that the next small change finds it below KEEP
EVEN = 1.005  # times the mean load is as even as anybody can tell
PRIOR = 0.01  # of the mean load, added to every expert's: those that nobody asked for are spread as well


@dataclass(frozen=True, slots=True)
class HostCapacity:
    """What a host can carry."""

    id: str
    compute: float = 1.0  # relative to the other hosts
    max_experts: int | None = None  # pairs over all layers that its memory holds; None: as many as there are


def balance(
    loads: Mapping[int, Sequence[float]],
    hosts: Sequence[HostCapacity],
    groups: int,
    replicas: int = 1,
    extra: int = 0,
    current: Mapping[int, Holders] | None = None,
) -> dict[int, Owners]:
    """owners[layer][expert]: distinct indexes into `hosts`, the preferred one first.

    loads[layer][expert] is any measure of work; all equal or all zero means that nothing is known. Every expert gets
    `replicas` hosts, and `extra` more copies a layer go one by one to the expert with the most load per copy. A layer's
    load is spread in proportion to `compute`, each expert's equally over its copies. With several groups each is kept
    whole on `replicas` hosts; with more hosts than that, each group is spread over hosts of its own, as long as memory
    allows. Extra copies beyond a group's hosts go anywhere. `current`, by host id, may name hosts that are gone; what
    it says is kept where no more than KEEP is lost by it.

    Raises ValueError for loads, hosts or numbers that make no sense, and when memory is short, by how much.
    """
    experts = _check(loads, hosts, groups, replicas, extra)
    layers = sorted(loads)
    whole = groups > 1 and len(hosts) <= groups * replicas
    room_LH = rooms(
        [host.max_experts for host in hosts],
        layers=len(layers),
        experts=experts,
        copies=experts * replicas,
        extra=extra,
        unit=experts // groups if whole else 1,
    )
    index = {host.id: number for number, host in enumerate(hosts)}
    compute_H = np.array([host.compute for host in hosts], np.float64)
    total_H = np.zeros(len(hosts), np.int64)  # pairs of the layers so far
    owners: dict[int, Owners] = {}
    for layer, room_H in zip(layers, room_LH, strict=True):
        before = (current or {}).get(layer)
        listed = [[index[host_id] for host_id in ids if host_id in index] for ids in before] if before else None
        if listed is not None and len(listed) != experts:
            raise ValueError(f"layer {layer} is held as {len(listed)} experts; its loads name {experts}")
        held_EH = np.zeros((experts, len(hosts)), bool) if listed is not None else None
        for expert, holders in enumerate(listed or ()):
            assert held_EH is not None
            held_EH[expert, holders] = True
        # Where hosts are equally good, what one has too much of in a layer another has in the next.
        turn_H = np.argsort(total_H / compute_H, kind="stable")
        turned_EH = held_EH[:, turn_H] if held_EH is not None else None
        load_E = np.asarray(loads[layer], np.float64)
        one = _Layer(load_E, compute_H[turn_H], room_H[turn_H], groups, replicas, extra, turned_EH)
        placed_EH = one.place()
        if turned_EH is None or not turned_EH.any():
            placed_EH = _exchanged(placed_EH, compute_H[turn_H], room_H[turn_H])
        placed_EH = placed_EH[:, np.argsort(turn_H)]
        owners[layer] = _in_order(placed_EH, listed, one.share_E / one.copies_E, compute_H, groups)
        total_H += placed_EH.sum(0)
    return owners


def _check(
    loads: Mapping[int, Sequence[float]], hosts: Sequence[HostCapacity], groups: int, replicas: int, extra: int
) -> int:
    """Number of experts a layer; raises ValueError."""
    ids = [host.id for host in hosts]
    if len(set(ids)) != len(ids):
        raise ValueError(f"host ids repeat: {ids}")
    if not 1 <= replicas <= len(hosts):
        raise ValueError(f"{replicas} replicas of each expert on {len(hosts)} hosts; use 1 to {len(hosts)} replicas")
    for host in hosts:
        if not (host.compute > 0 and math.isfinite(host.compute)):
            raise ValueError(f"{host.id} has compute {host.compute}; expected a number above 0")
        if host.max_experts is not None and host.max_experts < 0:
            raise ValueError(f"{host.id} has max_experts {host.max_experts}; expected at least 0, or None")
    experts = len(next(iter(loads.values()), ()))
    for layer, load in loads.items():
        if len(load) != experts or not experts:
            raise ValueError(f"layer {layer} has {len(load)} loads, another has {experts}; expected as many, above 0")
        if not all(math.isfinite(value) and value >= 0 for value in load):
            raise ValueError(f"layer {layer} has a load that is negative or no number")
    if groups < 1 or experts % groups:
        raise ValueError(f"{experts} experts in {groups} groups; expected groups of equal size")
    if loads and not 0 <= extra <= experts * (len(hosts) - replicas):
        most = experts * (len(hosts) - replicas)
        raise ValueError(f"{extra} extra copies a layer; {len(hosts)} hosts have use for 0 to {most}")
    return experts


class _Layer:
    """One layer's problem."""

    def __init__(
        self,
        load_E: Floats,
        compute_H: Floats,
        room_H: Ints,
        groups: int,
        replicas: int,
        extra: int,
        current_EH: Bools | None,
    ) -> None:
        self._uniform = bool((load_E == load_E[0]).all())
        raw_E = np.ones_like(load_E) if self._uniform else load_E
        self.share_E = raw_E + PRIOR * raw_E.mean()
        self._compute_H = compute_H
        self._room_H = room_H
        self._groups = groups
        self._replicas = replicas
        self._extra = extra
        self._current_EH = current_EH
        # a host that holds nothing yet has come to take its share
        self._grown = current_EH is not None and bool((~current_EH.any(0) & (room_H > 0)).any())
        held_E = current_EH.sum(1) if current_EH is not None else None
        self.copies_E = count_copies(raw_E, replicas, extra, room_H, held_E)
        hosts, size = len(compute_H), len(load_E) // groups
        self._whole = hosts <= groups * replicas
        self._grouped = groups > 1
        self._most_hosts = size * replicas  # of a group, where it has its own

    def place(self) -> Bools:
        """held_EH: the current one, or as little changed as will do, or a fresh one."""
        fresh_EH = self._fresh()
        current_EH = self._current_EH
        if current_EH is None or not current_EH.any():
            return fresh_EH
        if self._is_valid(current_EH) and self._will_do(current_EH, fresh_EH):
            return current_EH
        aim = 0.0 if self._uniform else AIM * float(self._burden(fresh_EH).max())
        for reach, goal in ((math.inf, math.inf), (math.inf, aim), (aim, aim)):
            try:
                held_EH = self._pack(current_EH, reach, goal)
            except NoRoom:
                continue
            if self._will_do(held_EH, fresh_EH):
                return held_EH
        return self._renamed(fresh_EH, current_EH)

    def _fresh(self) -> Bools:
        even = EVEN * float(self.share_E.sum() / self._compute_H.sum())
        try:
            return self._pack(None, even, even)
        except NoRoom:  # memory is too tight for groups to stay together
            self._grouped = False
            return self._pack(None, even, even)

    def _pack(self, start_EH: Bools | None, reach: float, goal: float) -> Bools:
        """Begin with what is held, and move groups while the busiest host has more than `reach`, experts than `goal`.

        Raises NoRoom.
        """
        experts, hosts = len(self.share_E), len(self._compute_H)
        size = experts // self._groups
        share_E = self.share_E / self.copies_E
        territory_EH = np.ones((experts, hosts), bool)
        if self._grouped:
            overlap_GH = None if start_EH is None else start_EH.reshape(self._groups, size, hosts).sum(1)
            if self._whole:
                load_G = self._replicas * share_E.reshape(self._groups, size).sum(1)
                territory_GH = whole_groups(
                    load_G, self._replicas, self._compute_H, self._room_H // size, overlap_GH, reach
                )
            else:
                load_G = self.share_E.reshape(self._groups, size).sum(1)
                territory_GH = own_hosts(load_G, self._replicas, self._most_hosts, self._compute_H, overlap_GH, reach)
            territory_EH = np.repeat(territory_GH, size, axis=0)
        # experts with more copies than their group has hosts fill these, and have the other copies anywhere else
        full_E = self.copies_E >= territory_EH.sum(1)
        allowed_EH = territory_EH ^ full_E[:, None]
        pinned_EH = territory_EH & full_E[:, None]
        held_EH: Bools = pinned_EH if start_EH is None else pinned_EH | (start_EH & allowed_EH)
        packing = Packing(
            held_IH=held_EH,
            allowed_IH=allowed_EH,
            fills_I=~full_E,
            copies_I=self.copies_E,
            share_I=share_E,
            compute_H=self._compute_H,
            room_H=self._room_H,
        )
        packing.complete()
        packing.improve(goal)
        if (held_EH.sum(0) > self._room_H).any():
            raise NoRoom
        return held_EH

    def _burden(self, held_EH: Bools) -> Floats:
        load_H: Floats = (self.share_E / self.copies_E) @ held_EH / self._compute_H
        return load_H

    def _is_valid(self, held_EH: Bools) -> bool:
        """Whether a placement has the copies that are wanted, within memory, and keeps groups together."""
        count_H = held_EH.sum(0)
        if not (held_EH.sum(1) == self.copies_E).all() or (count_H > self._room_H).any():
            return False
        if not self._grouped:
            return True
        asked = int(held_EH.reshape(self._groups, -1, held_EH.shape[1]).any(1).sum())
        hosts = self._groups * self._replicas if self._whole else held_EH.shape[1]
        return asked <= hosts + self._extra

    def _will_do(self, held_EH: Bools, fresh_EH: Bools) -> bool:
        """Whether a placement is about as good as a fresh one."""
        load_H, fresh_H = self._burden(held_EH), self._burden(fresh_EH)
        if (held_EH.any(0) < fresh_EH.any(0)).sum() > (held_EH.any(0) > fresh_EH.any(0)).sum():
            return False
        if self._uniform:
            return bool(load_H.max() <= fresh_H.max() * (1 + 1e-9) and load_H.min() >= fresh_H.min() * (1 - 1e-9))
        return bool(load_H.max() <= fresh_H.max() * (AIM if self._grown else KEEP))

    def _renamed(self, fresh_EH: Bools, current_EH: Bools) -> Bools:
        """The fresh placement with equal hosts exchanged, so that they hold more of it already."""
        same_HH = (self._compute_H[:, None] == self._compute_H) & (self._room_H[:, None] == self._room_H)
        shared_HH = np.where(same_HH, fresh_EH.T.astype(np.int64) @ current_EH.astype(np.int64), -1)
        renamed_EH = np.zeros_like(fresh_EH)
        for _ in range(len(shared_HH)):
            role, host = divmod(int(shared_HH.argmax()), len(shared_HH))
            renamed_EH[:, host] = fresh_EH[:, role]
            shared_HH[role, :] = shared_HH[:, host] = -2
        return renamed_EH


def _exchanged(held_EH: Bools, compute_H: Floats, room_H: Ints) -> Bools:
    """The same with equal hosts exchanged, so that among these the first hold the most."""
    exchanged_EH = held_EH.copy()
    count_H = held_EH.sum(0)
    for kind in {(compute, room) for compute, room in zip(compute_H.tolist(), room_H.tolist(), strict=True)}:
        (equal,) = np.nonzero((compute_H == kind[0]) & (room_H == kind[1]))
        exchanged_EH[:, equal] = held_EH[:, equal[np.argsort(-count_H[equal], kind="stable")]]
    return exchanged_EH


def _in_order(
    held_EH: Bools, listed: Sequence[Sequence[int]] | None, share_E: Floats, compute_H: Floats, groups: int
) -> Owners:
    """Holders of each expert: first those that it has already, in their order, then the new ones.

    The first of new holders is the one that is preferred for the least load; experts of one group at the same hosts
    have them in the same order, so that a token's rows stay together.
    """
    preferred_H = np.zeros(len(compute_H))
    size = len(held_EH) // groups
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    owners: list[tuple[int, ...]] = []
    for expert, row_H in enumerate(held_EH):
        holders = np.flatnonzero(row_H).tolist()
        kept = [host for host in listed[expert] if host in holders] if listed is not None else []
        new = [host for host in holders if host not in kept]
        new.sort(key=lambda host: (preferred_H[host] / compute_H[host], host))
        order = (*kept, *new)
        if groups > 1 and not (listed is not None and order == tuple(listed[expert])):
            order = known.setdefault((expert // size, *holders), order)
        owners.append(order)
        preferred_H[order[0]] += share_E[expert]
    return tuple(owners)
