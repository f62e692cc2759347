"""How good a placement is, what it costs to get there, and whether that is worth it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from router.balancer import HostCapacity
from router.holding import Holders
from router.placement import Owners

LEAST_GAIN = 0.10  # share by which imbalance must fall for pairs to be moved
LEAST_ROWS = 32.0  # per expert: its share of the load is then known to a fifth, and a host's of 20 experts to 4 %
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Quality:
    """Of a placement under given loads. A layer waits for its busiest host, so its time grows with its imbalance."""

    mean_imbalance: float  # over layers: the busiest host's load over the mean one, relative to compute; 1 is even
    worst_imbalance: float  # the same of the worst layer
    hosts_per_group: float  # that hold the preferred copies of a routing group: mean over layers and groups
    hosts_per_token: float  # at most, that hold those of the topk_group groups with the most hosts: mean over layers


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to move pairs, and why or why not, in words for people."""

    worth: bool
    reason: str


def owners_of(holders: Mapping[int, Holders], hosts: Sequence[HostCapacity]) -> dict[int, Owners]:
    """Holders by index into `hosts`; those that are not among them are left out."""
    index = {host.id: number for number, host in enumerate(hosts)}
    return {
        layer: tuple(tuple(index[host_id] for host_id in ids if host_id in index) for ids in experts)
        for layer, experts in holders.items()
    }


def quality(
    owners: Mapping[int, Owners],
    loads: Mapping[int, Sequence[float]],
    hosts: Sequence[HostCapacity],
    groups: int,
    topk_group: int | None = None,
) -> Quality:
    """Each expert's load is divided equally over its holders; a layer without load counts as uniform.

    `topk_group` groups are chosen by a token, None: any number. Raises ValueError when an expert has no holder.
    """
    imbalances: list[float] = []
    spreads: list[float] = []
    asked: list[int] = []
    for layer, experts in owners.items():
        imbalances.append(_imbalance(layer, experts, loads[layer], hosts))
        size = len(experts) // groups
        starts = range(0, len(experts), size)
        sets = [{holders[0] for holders in experts[start : start + size]} for start in starts]
        spreads.append(sum(map(len, sets)) / groups)
        widest = sorted(map(len, sets), reverse=True)[: topk_group or groups]
        asked.append(min(sum(widest), len(set.union(*sets))))
    if not imbalances:
        return Quality(1.0, 1.0, 1.0, 1.0)
    count = len(imbalances)
    return Quality(sum(imbalances) / count, max(imbalances), sum(spreads) / count, sum(asked) / count)


def _imbalance(layer: int, experts: Owners, loads: Sequence[float], hosts: Sequence[HostCapacity]) -> float:
    compute_H = np.array([host.compute for host in hosts])
    load_H = np.zeros(len(hosts))
    known = any(loads)
    for expert, holders in enumerate(experts):
        if not holders:
            raise ValueError(f"layer {layer} expert {expert} has no holder among {len(hosts)} hosts")
        load_H[list(holders)] += (loads[expert] if known else 1.0) / len(holders)
    return float((load_H / compute_H).max() / (load_H.sum() / compute_H.sum()))


def moves(current: Mapping[int, Holders], new: Mapping[int, Owners], hosts: Sequence[HostCapacity]) -> int:
    """Pairs that some host must load: copies that it shall hold and does not, counted for each host."""
    count = 0
    for layer, experts in new.items():
        held = current.get(layer, ((),) * len(experts))
        for before, after in zip(held, experts, strict=True):
            count += len({hosts[index].id for index in after} - set(before))
    return count


def worth_moving(
    before: Quality,
    after: Quality,
    moves: int,
    rows_per_expert: float,
    least_gain: float = LEAST_GAIN,
    least_rows: float = LEAST_ROWS,
) -> Verdict:
    """Whether a controller should move `moves` pairs now. A layer's time is that of its busiest host.

    It is worth it when the mean imbalance over layers, or that of the worst layer, falls by at least the share
    `least_gain`, neither rises, and each expert has seen `least_rows` rows on average, so that loads are no accident.
    """
    if not moves:
        return Verdict(False, "nothing is to be moved")
    if rows_per_expert < least_rows:
        return Verdict(False, f"{rows_per_expert:.1f} rows an expert were seen; {least_rows:.0f} are needed")
    gain = 1 - after.mean_imbalance / before.mean_imbalance
    worst_gain = 1 - after.worst_imbalance / before.worst_imbalance
    told = (
        f"mean imbalance {before.mean_imbalance:.2f} to {after.mean_imbalance:.2f}, "
        f"worst {before.worst_imbalance:.2f} to {after.worst_imbalance:.2f}, {moves} pairs to load"
    )
    if max(gain, worst_gain) >= least_gain - ROUNDING and min(gain, worst_gain) >= -ROUNDING:
        return Verdict(True, told)
    return Verdict(False, f"{told}; a gain of {100 * least_gain:.0f} % is needed")
