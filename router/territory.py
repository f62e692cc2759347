"""Which hosts a routing group's experts may live at, so that a token which picks few groups asks few hosts.

Shapes: `G` routing groups, `H` hosts.
"""

import numpy as np

from router.packing import STRICTLY, Bools, Floats, Ints, NoRoom, Packing


def whole_groups(
    load_G: Floats, replicas: int, compute_H: Floats, room_H: Ints, overlap_GH: Ints | None, target: float
) -> Bools:
    """Hosts of each group, where each host holds whole groups: `replicas` hosts a group.

    room_H counts groups. A group stays at the hosts that hold most of it (`overlap_GH` experts), unless the busiest
    host has more than `target` then. Raises NoRoom.
    """
    groups, hosts = len(load_G), len(compute_H)
    territory = Packing(
        held_IH=np.zeros((groups, hosts), bool),
        allowed_IH=np.ones((groups, hosts), bool),
        fills_I=np.ones(groups, bool),
        copies_I=np.full(groups, replicas, np.int64),
        share_I=load_G / replicas,
        compute_H=compute_H,
        room_H=room_H,
    )
    if overlap_GH is not None:
        for group in range(groups):
            most = np.argsort(-overlap_GH[group], kind="stable")[:replicas]
            territory.held_IH[group, most[overlap_GH[group, most] > 0]] = True
    territory.complete()
    territory.improve(target)
    return territory.held_IH


def own_hosts(
    load_G: Floats, least: int, most: int, compute_H: Floats, overlap_GH: Ints | None, target: float
) -> Bools:
    """Hosts of each group, where no host has experts of two: between `least` and `most` hosts a group.

    Groups get compute in proportion to their load, as well as whole hosts allow. A host stays with the group that it
    holds most of (`overlap_GH` experts), unless some group's load over its compute is more than `target` then.
    """
    owned = np.zeros((len(load_G), len(compute_H)), bool)
    if overlap_GH is not None:
        for host in range(len(compute_H)):
            group = int(overlap_GH[:, host].argmax())
            owned[group, host] = overlap_GH[group, host] > 0 and owned[group].sum() < most
    order = np.argsort(-compute_H, kind="stable").tolist()
    for count in range(1, least + 1):
        for group in np.argsort(-load_G, kind="stable").tolist():
            if owned[group].sum() < count:
                free = [host for host in order if not owned[:, host].any()]
                host = free[0] if free else _spare_host(owned, least, load_G, compute_H, overlap_GH)
                owned[:, host] = False
                owned[group, host] = True
    for host in order:
        growing = np.flatnonzero(owned.sum(1) < most)
        if not owned[:, host].any() and len(growing):
            owned[growing[int((load_G / (owned @ compute_H))[growing].argmax())], host] = True
    while _shift(owned, least, most, load_G, compute_H, target):
        pass
    return owned


def _spare_host(owned: Bools, least: int, load_G: Floats, compute_H: Floats, overlap_GH: Ints | None) -> int:
    """A host of a group that has more than it must, the least burdened one; the host that holds the least of it."""
    has_G = owned.sum(1)
    if not (has_G > least).any():
        raise NoRoom
    density_G = load_G / np.maximum(owned @ compute_H, 1e-300)
    giver = int(np.where(has_G > least, density_G, np.inf).argmin())
    held_H = overlap_GH[giver] if overlap_GH is not None else np.zeros(len(compute_H), np.int64)
    return int(np.where(owned[giver], held_H, np.iinfo(np.int64).max).argmin())


def _shift(owned: Bools, least: int, most: int, load_G: Floats, compute_H: Floats, target: float) -> bool:
    """Move one host to the most burdened group, if it is above `target` and that helps."""
    density_G = load_G / (owned @ compute_H)
    needy = int(density_G.argmax())
    if density_G[needy] <= target or owned[needy].sum() >= most:
        return False
    best, step = float(density_G[needy]) * STRICTLY, None
    for giver in np.flatnonzero(owned.sum(1) > least).tolist():
        for host in np.flatnonzero(owned[giver]).tolist() if giver != needy else ():
            left = load_G[giver] / (compute_H[owned[giver]].sum() - compute_H[host])
            worst = max(left, load_G[needy] / (compute_H[owned[needy]].sum() + compute_H[host]))
            if worst < best:
                best, step = float(worst), (giver, host)
    if step is None:
        return False
    owned[step[0], step[1]], owned[needy, step[1]] = False, True
    return True
