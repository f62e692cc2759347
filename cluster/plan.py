"""From a wish to who joins, who leaves, and who shall hold what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.change import ChangeRefused, Wish
from cluster.roster import HostView
from router.balancer import HostCapacity, balance
from router.holding import Holding


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a plan must know of the model."""

    moe_layers: tuple[int, ...]
    experts: int  # a layer
    groups: int  # of routing: 1 where experts are chosen freely


@dataclass(frozen=True, slots=True)
class Membership:
    """Who a change begins with, and what it aims at."""

    joining: int  # hosts to start
    leaving: tuple[str, ...]
    replicas: int
    extra: int


def membership(wish: Wish, members: Sequence[str], replicas: int, extra: int, shape: ModelShape) -> Membership:
    """Who joins and leaves; raises ChangeRefused for a wish that this service cannot have.

    Hosts leave in the order in which they are named, then the youngest first; of `follow`, those that are named.
    """
    unknown = [host_id for host_id in wish.leaving if host_id not in members]
    if unknown:
        raise ChangeRefused(f"there is no expert host {unknown[0]!r}; the hosts are {', '.join(members)}")
    count = len(members) - len(wish.leaving) if wish.kind == "drain" else wish.hosts
    count = len(members) if count is None else count
    limit = shape.experts if shape.moe_layers else count
    if not 1 <= count <= limit:
        raise ChangeRefused(f"{count} expert hosts; this model can be spread over 1 to {limit}")
    copies = replicas if wish.replicas is None else wish.replicas
    if not 1 <= copies <= count:
        raise ChangeRefused(f"{copies} replicas of each expert on {count} hosts; use 1 to {count}, or more hosts")
    more = extra if wish.extra is None else wish.extra
    if more < 0:
        raise ChangeRefused(f"{more} extra replicas a layer; use at least 0")
    if wish.kind == "follow":
        staying = len(members) - len(wish.leaving)
        if count < staying:  # thought of when there were fewer
            raise ChangeRefused(f"{count} expert hosts are wanted and {staying} stay: name those that leave")
        return Membership(count - staying, wish.leaving, copies, more)
    others = [host_id for host_id in reversed(members) if host_id not in wish.leaving]
    gone = (*wish.leaving, *others)[: max(0, len(members) - count)]
    surplus_names = len(wish.leaving) - len(gone)
    if surplus_names > 0:
        raise ChangeRefused(
            f"{len(wish.leaving)} hosts are to leave, but of {len(members)} only {len(gone)} must: "
            f"ask for {len(members) - len(wish.leaving)} hosts, or name fewer"
        )
    return Membership(max(0, count - len(members)), tuple(gone), copies, more)


def new_ids(members: Sequence[str], count: int) -> tuple[str, ...]:
    """Ids for joining hosts: the lowest numbers that are free."""
    free = (f"host-{number}" for number in range(len(members) + count) if f"host-{number}" not in members)
    return tuple(next(free) for _ in range(count))


def capacities(hosts: Sequence[HostView]) -> list[HostCapacity]:
    """What each host can carry, as the balancer reads it."""
    return [HostCapacity(view.id, view.compute, view.max_pairs) for view in hosts]


def target(
    shape: ModelShape,
    hosts: Sequence[HostView],
    current: Holding,
    loads: Mapping[int, Sequence[float]],
    replicas: int,
    extra: int,
) -> Holding:
    """Who shall hold what on these hosts; raises ValueError when their memory is too small."""
    ids = [view.id for view in hosts]
    owners = balance(
        loads={layer: loads[layer] for layer in shape.moe_layers},
        hosts=capacities(hosts),
        groups=shape.groups,
        replicas=replicas,
        extra=extra,
        current=current.holders,
    )
    return Holding.from_owners(owners, ids)
