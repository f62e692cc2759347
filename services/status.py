"""How `shoal status` says which way rows really go between attention workers and expert hosts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from experts.transport_kinds import WAYS

WAY_NAMES = {"shared": "shared memory", "nixl": "NIXL", "grpc": "gRPC"}
MOST_NAMED = 8  # hosts of one way, of one worker


def way_lines(workers: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line where all rows go alike, else one for each worker; nothing of workers that have asked no host yet."""
    told = {worker["id"]: worker["ways"] for worker in workers if worker.get("ways")}
    alike = {way for ways in told.values() for way in ways.values()}
    if len(alike) == 1:
        return [f"rows by {_named(*alike)}"]
    return [f"{worker_id}: rows by {', by '.join(_parts(ways))}" for worker_id, ways in told.items()]


def _parts(ways: Mapping[str, str]) -> Iterator[str]:
    """Each way with its hosts, the commonest first and by their number alone."""
    hosts_by_way: dict[str, list[str]] = {way: [] for way in WAYS}  # of two as common, the quicker one first
    for host_id, way in ways.items():
        hosts_by_way.setdefault(way, []).append(host_id)
    used = sorted(((way, hosts) for way, hosts in hosts_by_way.items() if hosts), key=lambda each: -len(each[1]))
    for index, (way, hosts) in enumerate(used):
        count = f"{len(hosts)} host{'s' if len(hosts) > 1 else ''}"
        yield f"{_named(way)} to {count}" + (f" ({_listed(hosts)})" if index > 0 else "")


def _listed(hosts: Sequence[str]) -> str:
    more = len(hosts) - MOST_NAMED
    return ", ".join(hosts[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _named(way: str) -> str:
    return WAY_NAMES.get(way, way)
