"""What a Ray has room for: a run's workers and hosts, and how many of `workers.most` it may begin with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.spec import ServiceSpec
from services.training.recipe import Recipe

ANSWER_S = 20.0
UNIT = 10_000  # parts of one of anything, in which Ray counts

Amounts = Mapping[str, float]  # by Ray's names


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """Of one node: what it has, and what of that nobody reserves."""

    has: Amounts
    free: Amounts


@dataclass(frozen=True, slots=True)
class Room:
    """`hosts` of the run's are there, from an earlier life, and reserve already."""

    nodes: tuple[NodeRoom, ...]
    hosts: int = 0


def look(service: ServiceSpec) -> Room:
    """Of this Ray, as it is now."""
    import ray  # after cluster.session, which tells it something first
    from ray._private.state import available_resources_per_node
    from ray.exceptions import GetTimeoutError, RayActorError

    from cluster.discovery import find_controller

    alive = [node for node in ray.nodes() if node["Alive"]]
    free = available_resources_per_node()
    nodes = tuple(NodeRoom(node["Resources"], free.get(node["NodeID"], node["Resources"])) for node in alive)
    try:
        status = ray.get(find_controller(service.namespace).status.remote(), timeout=ANSWER_S)
    except (ValueError, RayActorError, GetTimeoutError):  # the usual: there is no earlier life
        return Room(nodes)
    return Room(nodes, sum(host["pid"] is not None for host in status["expert_hosts"]))


def lacking(recipe: Recipe, room: Room) -> str | None:
    """What the run reserves at least and there is no room for; None where there is."""
    least, each, host, missing = recipe.workers.least, _worker(recipe), _host(recipe), _missing(recipe, room)
    wanted = f"{least} workers with {_named('workers', each)}" if each else f"{least} workers"
    if host and missing:
        wanted += f" and {missing} hosts with {_named('experts', host)}"
    for kind in (*each, *(kind for kind in host if kind not in each)):
        amount = least * each.get(kind, 0.0) + missing * host.get(kind, 0.0)
        has = sum(node.has.get(kind, 0.0) for node in room.nodes)
        free = sum(node.free.get(kind, 0.0) for node in room.nodes)
        if _units(amount) > _units(free):
            what = f"{amount:g} {kind}s" if kind in ("CPU", "GPU") else f"{amount:g} of {kind}"
            there = f"there are {has:g}" if _units(free) == _units(has) else f"{free:g} of {has:g} are free"
            return f"{wanted} reserve {what}, of which {there}: lower one of them"
    placed, left = _after_hosts(host, missing, [node.free for node in room.nodes])
    if placed < missing:
        return f"{wanted}: only {placed} of the hosts fit, each on one node; lower one of these"
    if each and (fitting := _fitting(left, each)) < least:
        return f"{wanted}: only {fitting} of the workers fit, each on one node; lower one of these"
    return None


def most_workers(recipe: Recipe, room: Room, grows: bool) -> int:
    """What of `workers.most` to give Ray Train, so that it begins and comes back; `grows`: there may be more nodes.

    It begins with as many as nodes have the resources for, reserved or not, and tries for ever where they are not free.
    So it may have all of `most`, and use nodes that join, only where nothing else reserves what workers do; otherwise
    as many as there is room for now. Where it would itself count fewer than `least`, as it divides floats, it is given
    exactly that many.
    """
    least, most, each = recipe.workers.least, recipe.workers.most or recipe.workers.least, _worker(recipe)
    if not each or most == least:
        return most
    _, left = _after_hosts(_host(recipe), _missing(recipe, room), [node.free for node in room.nodes])
    fitting = _fitting(left, each)
    grows = grows and not each.keys() & _host(recipe).keys() and not _is_reserved(room, each)
    if grows and fitting < least:
        return most
    most = most if grows else min(most, fitting)
    return most if _planned([node.has for node in room.nodes], each, most) >= least else least


def _worker(recipe: Recipe) -> Amounts:
    workers = recipe.workers
    return _some({"CPU": workers.cpus, "GPU": workers.gpus})


def _host(recipe: Recipe) -> Amounts:
    """Of a host of the run's own; guests reserve nothing."""
    experts = recipe.experts
    return _some({"CPU": experts.cpus, "GPU": experts.gpus, **experts.resources})


def _some(amounts: Amounts) -> Amounts:
    return {kind: amount for kind, amount in amounts.items() if amount > 0}


def _missing(recipe: Recipe, room: Room) -> int:
    """Hosts that have yet to reserve."""
    return max(0, recipe.experts.hosts - room.hosts) if _host(recipe) else 0


def _named(section: str, amounts: Amounts) -> str:
    """In the recipe's words."""
    fields = {"CPU": "cpus", "GPU": "gpus"}
    return ", ".join(f"{section}.{fields.get(kind, f'resources.{kind}')} {each:g}" for kind, each in amounts.items())


def _is_reserved(room: Room, each: Amounts) -> bool:
    return any(
        _units(node.free.get(kind, 0.0)) < _units(node.has.get(kind, 0.0)) for node in room.nodes for kind in each
    )


def _after_hosts(host: Amounts, count: int, free: Sequence[Amounts]) -> tuple[int, list[Amounts]]:
    """How many hosts find a node, each on the one with the fewest, as Ray spreads them; and what nodes have left."""
    left = [dict(node) for node in free]
    held = [0] * len(left)
    for placed in range(count):
        able = [place for place, node in enumerate(left) if _times(node, host) > 0]
        if not able:
            return placed, list(left)
        chosen = min(able, key=held.__getitem__)
        held[chosen] += 1
        for kind, amount in host.items():
            left[chosen][kind] -= amount
    return count, list(left)


def _fitting(free: Sequence[Amounts], each: Amounts) -> int:
    return sum(_times(node, each) for node in free)


def _times(free: Amounts, need: Amounts) -> int:
    """How often a node has room for something, which needs some of anything."""
    times = []
    for kind, amount in need.items():
        there, wanted = _units(free.get(kind, 0.0)), max(1, _units(amount))
        if kind == "GPU" and wanted < UNIT:  # a part of one is all on one
            times.append(there // UNIT * (UNIT // wanted) + there % UNIT // wanted)
        else:
            times.append(there // wanted)
    return min(times)


def _units(amount: float) -> int:
    return round(amount * UNIT)


def _planned(has: Sequence[Amounts], each: Amounts, most: int) -> int:
    """Workers that Ray Train (2.60) counts: it fills nodes with `most`, and divides what it filled, all in floats."""
    planned, waiting = 0, most
    for node in has:
        left, filled = dict(node), dict.fromkeys(each, 0.0)
        while waiting and all(left.get(kind, 0.0) >= amount for kind, amount in each.items()):
            for kind, amount in each.items():
                left[kind] -= amount
                filled[kind] += amount
            waiting -= 1
        planned += int(min(filled[kind] // amount for kind, amount in each.items()))
    return planned
