"""Keeps hosts and Ray's nodes together, where a service is told to: the node follower's body in the controller."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from cluster.change import Change, ChangeRefused, Phase
from cluster.conductor import Conductor
from cluster.node_follower import Desired, NodeFollower
from cluster.nodes import Node, living_nodes

LOOK_S = 1.0  # between two looks at the nodes
log = logging.getLogger("shoal.controller")


class Following:
    """Looks at the nodes that have a resource, and asks the conductor for what follows."""

    def __init__(self, resource: str, desired: Desired, save: Callable[[Desired], None]) -> None:
        """`save` is called with what an operator asked for before anybody is told that it will be done."""
        self._resource = resource
        self._follower = NodeFollower(desired)
        self._save = save
        self._saved = desired
        self._nodes: list[Node] = []
        self._change: Change | None = None  # the last that was begun for the nodes' sake

    def usable(self) -> list[Node]:
        """Where hosts may live, as Ray knows it now."""
        return [node for node in living_nodes(self._resource) if node.id not in self._follower.desired.emptied]

    async def first_hosts(self, least: int, most: int, tell: Callable[[str | None], None]) -> int:
        """With how many hosts a service begins: as many as nodes, once there are `least`; `tell` what is waited for."""
        while len(there := living_nodes(self._resource)) < least:
            tell(f"waiting for {least} nodes with the resource {self._resource}; there are {len(there)}")
            await asyncio.sleep(LOOK_S)
        tell(None)
        return max(least, min(len(there), most))

    async def follow(self, conductor: Conductor, homes: Callable[[], Mapping[str, str | None]]) -> bool:
        """Wait a while, look, and return whether a change was begun; `homes` has each member's node."""
        await asyncio.sleep(LOOK_S)
        await self.look()
        most = conductor.shape.experts if conductor.shape.moe_layers else len(conductor.committed.members)
        return self.consider(conductor, homes(), most)

    async def look(self) -> None:
        """See which nodes there are now."""
        self._nodes = await asyncio.to_thread(living_nodes, self._resource)
        self._follower.see([node.id for node in self._nodes], time.monotonic())
        self._remember()

    def consider(self, conductor: Conductor, homes: Mapping[str, str | None], most: int) -> bool:
        """Begin what the nodes ask for, if no change is under way; whether one was begun."""
        if conductor.change is not None or not conductor.ever_ready:
            return False
        now_s = time.monotonic()
        if self._change is not None and self._change.phase is Phase.ROLLED_BACK:
            self._follower.undone(now_s)
        self._change = None
        wish = self._follower.wish(homes, conductor.committed.replicas, most, now_s)
        if wish is None:
            return False
        try:
            self._change = conductor.request(wish, now_s)
        except ChangeRefused as refused:
            log.warning("hosts do not follow the nodes: %s", refused)
            self._follower.undone(now_s)
        return self._change is not None

    def limit(self, hosts: int, least: int) -> None:
        """Go on with so many hosts at most, before nodes go; raises ChangeRefused for fewer than `least`."""
        if hosts < least:
            raise ChangeRefused(f"{hosts} hosts cannot hold {least} replicas of each expert; keep at least {least}")
        self._follower.limit(hosts)
        self._remember()

    def empty(self, name: str, homes: Mapping[str, str | None]) -> bool:
        """No host on the node of this name any more; whether that is so already.

        Raises ChangeRefused for a name that is none, or several nodes', and when hosts have nowhere else to go.
        """
        node = find_node(name, self._nodes)
        if not self._follower.usable - {node}:
            raise ChangeRefused(f"node {name} is the last one for expert hosts: add another before it is emptied")
        self._follower.empty(node)
        self._remember()
        return node not in homes.values()

    def describe(self) -> dict[str, Any]:
        """What is there and what shall be, for people and scripts."""
        desired = self._follower.desired
        return {
            "resource": self._resource,
            "nodes": len(self._nodes),
            "wanted": self._follower.wanted,
            "at_most": desired.at_most,
            "emptied": sorted(desired.emptied),
        }

    def _remember(self) -> None:
        if self._follower.desired != self._saved:
            self._saved = self._follower.desired
            self._save(self._saved)


def find_node(name: str, nodes: list[Node]) -> str:
    """The id of the node that somebody calls so; raises ChangeRefused when none or several are called so."""
    found = [node.id for node in nodes if name in node.names]
    if len(found) != 1:
        known = ", ".join(sorted(min(node.names - {node.id}, key=len, default=node.id) for node in nodes)) or "none"
        problem = "several nodes are called" if found else "there is no node for expert hosts called"
        raise ChangeRefused(f"{problem} {name!r}; name one by its id or address (there are: {known})")
    return found[0]
