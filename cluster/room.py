"""Fewer hosts, or none on a node, before nodes go: the same question whether hosts follow nodes or not."""

from collections.abc import Mapping
from typing import Any

from cluster.change import ChangeRefused, Wish
from cluster.conductor import Conductor
from cluster.following import Following, find_node
from cluster.nodes import living_nodes


def make_room(
    conductor: Conductor,
    following: Following | None,
    homes: Mapping[str, str | None],
    hosts: int | None,
    node: str | None,
    now_s: float,
) -> dict[str, Any]:
    """Go on with `hosts` at most, or without any on `node`: {"done", "change"}, the change that is under way.

    Ask again until it is done: what cannot begin beside another change begins then. Raises ChangeRefused when it cannot
    be had at all. `homes` has each member's node.
    """
    if following is not None:
        if hosts is not None:
            following.limit(hosts, conductor.committed.replicas)
        done = following.empty(node, homes) if node is not None else hosts is None or len(homes) <= hosts
    else:
        done = _begin(conductor, homes, hosts, node, now_s)
    change = conductor.change
    return {"done": done and change is None, "change": change.describe() if change is not None else None}


def _begin(
    conductor: Conductor, homes: Mapping[str, str | None], hosts: int | None, node: str | None, now_s: float
) -> bool:
    """Whether nothing needs to be done; else it is begun, unless another change is under way."""
    if node is None:
        wish = Wish("scale", hosts=hosts)
        done = hosts is None or len(homes) <= hosts
    else:
        home = find_node(node, living_nodes(None))
        leaving = tuple(host for host, each in homes.items() if each == home)
        wish = Wish("drain", leaving=leaving)
        done = not leaving
    if not done and conductor.change is None:
        try:
            conductor.request(wish, now_s)
        except ChangeRefused as refused:
            if not refused.busy:
                raise
    return done
