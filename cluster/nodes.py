"""The Ray nodes on which expert hosts may run."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from socket import gethostname
from typing import Any

import ray

from cluster.threads import host_threads, node_threads


@dataclass(frozen=True, slots=True)
class Node:
    """A living Ray node; `names` are what people call it: its id, address, host name and name."""

    id: str
    names: frozenset[str]
    cpus: float


def with_cores(nodes: Collection[Node]) -> Collection[Node]:
    """Those that actors are put on: one that was given no cores is to be left alone, as long as another has some."""
    return [node for node in nodes if node.cpus > 0] or nodes


def shared_threads(hosts: int, nodes: Collection[Node]) -> int:
    """Threads of each of so many expert hosts on those of these nodes that actors are put on, by the smallest of them.

    Of this machine it is known what a process may use, and Ray may have been told of more; of others, what Ray counts.
    A node of which neither says anything is taken to be as this machine.
    """
    able, here = with_cores(nodes), gethostname()
    cores = [node_threads() if here in node.names or node.cpus < 1 else int(node.cpus) for node in able]
    return host_threads(hosts, max(1, len(able)), min(cores, default=node_threads()))


def least_crowded(nodes: Collection[Node], crowd: Mapping[str | None, int]) -> str | None:
    """The node `with_cores` that has the fewest of a `crowd` of actors for them; None where there is no node."""
    crowding = {node.id: (crowd.get(node.id, 0) + 1) / max(1.0, node.cpus) for node in with_cores(nodes)}
    return min(crowding, key=lambda node: crowding[node], default=None)


def living_nodes(resource: str | None) -> list[Node]:
    """All that are alive, or those that have the custom resource."""
    return parse_nodes(ray.nodes(), resource)


def parse_nodes(described: Iterable[Mapping[str, Any]], resource: str | None) -> list[Node]:
    """The same from what `ray.nodes` answers."""
    return [
        Node(
            id=str(node["NodeID"]),
            names=frozenset(
                str(node[field])
                for field in ("NodeID", "NodeManagerAddress", "NodeManagerHostname", "NodeName")
                if node.get(field)
            ),
            cpus=float(node["Resources"].get("CPU", 0.0)),
        )
        for node in described
        if node["Alive"] and (resource is None or node["Resources"].get(resource, 0.0) > 0)
    ]
