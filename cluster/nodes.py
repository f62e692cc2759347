"""The Ray nodes on which expert hosts may run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray


@dataclass(frozen=True, slots=True)
class Node:
    """A living Ray node; `names` are what people call it: its id, address, host name and name."""

    id: str
    names: frozenset[str]
    cpus: float


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
