"""How many copies each expert gets, and how many each host has room for in each layer."""

from collections.abc import Sequence

import numpy as np

from router.packing import Floats, Ints

STAYS = 1.10  # an expert with an extra copy keeps it until another has so many times its load per copy


def rooms(limits: Sequence[int | None], layers: int, experts: int, copies: int, extra: int, unit: int) -> list[Ints]:
    """room_H of every layer, whose sum over layers keeps each host's limit, and whose sum over hosts is enough.

    A layer has `copies` copies and `extra` more. Room is spread evenly over layers: for the copies in multiples of
    `unit` experts, where that leaves enough. It depends on none of the loads, so that what was placed once can stay.
    Raises ValueError when the hosts together are short of room.
    """
    most = layers * experts
    whole = np.array([most if limit is None else min(limit, most) for limit in limits], np.int64)
    short = layers * (copies + extra) - int(whole.sum())
    if short > 0:
        raise ValueError(
            f"{len(limits)} hosts have room for {whole.sum()} experts; {layers} layers of {copies + extra} copies need "
            f"{short} more: use more hosts, hosts with more memory, or fewer replicas"
        )
    if not layers:
        return []
    plain_LH = _spread(whole, np.zeros((layers, len(limits)), np.int64))
    if not _are_too_small(plain_LH, copies, extra, unit):
        return list(plain_LH)
    units = np.where(whole == most, most, np.maximum(0, whole - -(-layers * extra // len(limits)))) // unit
    room_LH = _spread(units, np.zeros_like(plain_LH)) * unit
    room_LH = np.minimum(experts, room_LH + _spread(whole - units * unit, room_LH))
    return list(plain_LH if _are_too_small(room_LH, copies, extra, unit) else room_LH)


def _spread(total_H: Ints, begun_LH: Ints) -> Ints:
    """[layers, H], whose sums over layers are the total; the remainders go where least was begun."""
    layers = len(begun_LH)
    part_LH = np.zeros_like(begun_LH)
    for host, total in enumerate(total_H.tolist()):
        part_LH[:, host] = total // layers
        emptiest = np.argsort((begun_LH + part_LH).sum(1), kind="stable")
        part_LH[emptiest[: total % layers], host] += 1
    return part_LH


def _are_too_small(room_LH: Ints, copies: int, extra: int, unit: int) -> bool:
    """Whether some layer has no room for its copies in whole units, or for the extra ones besides."""
    short_L = (room_LH // unit * unit).sum(1) < copies
    return bool((short_L | (room_LH.sum(1) < copies + extra)).any())


def count_copies(load_E: Floats, replicas: int, extra: int, room_H: Ints, held_E: Ints | None) -> Ints:
    """copies_E: `replicas` each, and `extra` one by one to the expert with the most load per copy.

    Experts that hold extra copies (`held_E`) keep them while others have at most STAYS times their load per copy. An
    expert is passed over when there are no distinct hosts with room for one more of it.
    """
    copies_E = np.full(len(load_E), replicas, np.int64)
    open_E = np.full(len(load_E), replicas < int((room_H > 0).sum()))
    for _ in range(extra):
        while True:
            held = copies_E < held_E if held_E is not None else np.zeros(len(load_E), bool)
            urgency_E = load_E / copies_E * np.where(held, STAYS, 1.0)
            expert = int(np.lexsort((copies_E, ~held, -urgency_E, ~open_E))[0])
            copies_E[expert] += 1
            if _fits(copies_E, room_H):
                break
            copies_E[expert] -= 1
            open_E[expert] = False
        open_E[expert] = copies_E[expert] < int((room_H > 0).sum())
    return copies_E


def _fits(copies_E: Ints, room_H: Ints) -> bool:
    """Whether so many copies can be at distinct hosts within their room (the theorem of Gale and Ryser)."""
    experts = len(copies_E)
    if (room_H >= experts).all():
        return True
    most = np.sort(copies_E)[::-1].cumsum()
    held = np.minimum(room_H[:, None], np.arange(1, experts + 1)).sum(0)
    return bool((most <= held).all())
