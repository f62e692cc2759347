"""Hosts follow nodes: one on each Ray node that has a resource. Decides; knows no Ray and no clock of its own.

What an operator wants beforehand (fewer hosts, because nodes will go; a node emptied, because it goes now) is kept here
as what is desired, and becomes a change as soon as one can be had. Times are seconds of a monotonic clock.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from cluster.change import Wish

SETTLE_S = 2.0  # without a change among the nodes before hosts join: nodes come together, and one change is enough
GONE_S = 30.0  # hosts of lost nodes crowd others for so long before there are fewer hosts: nodes are often replaced
RETRY_S = 10.0  # after a change that was refused or undone


@dataclass(frozen=True, slots=True)
class Desired:
    """What operators asked for, until the nodes are so."""

    at_most: int | None = None  # hosts
    emptied: frozenset[str] = frozenset()  # ids of nodes that shall have no host

    def to_json(self) -> str:
        return json.dumps({"at_most": self.at_most, "emptied": sorted(self.emptied)})

    @classmethod
    def from_json(cls, text: str) -> "Desired":
        """Inverse of to_json; raises ValueError, KeyError or TypeError on anything else."""
        raw = json.loads(text)
        return cls(None if raw["at_most"] is None else int(raw["at_most"]), frozenset(map(str, raw["emptied"])))


class NodeFollower:
    """Told of nodes and of where hosts live, asked for the next wish."""

    def __init__(self, desired: Desired) -> None:
        self.desired = desired
        self._nodes: frozenset[str] = frozenset()
        self._changed_s = -math.inf  # when the nodes last did
        self._crowded_s: float | None = None  # since when hosts share a node that should not
        self._rest_until_s = -math.inf

    @property
    def usable(self) -> frozenset[str]:
        """Nodes that may have a host."""
        return self._nodes - self.desired.emptied

    @property
    def wanted(self) -> int:
        """Hosts that there shall be, as far as nodes and operators go."""
        return len(self.usable) if self.desired.at_most is None else min(self.desired.at_most, len(self.usable))

    def see(self, nodes: Collection[str], now_s: float) -> None:
        """The nodes that are alive now; none at all is no news. What was asked for before nodes go ends with them."""
        seen = frozenset(nodes)
        if not seen:
            return
        if seen != self._nodes:
            self._nodes, self._changed_s = seen, now_s
        self.desired = replace(self.desired, emptied=self.desired.emptied & seen)
        if self.desired.at_most is not None and len(self.usable) <= self.desired.at_most:
            self.desired = replace(self.desired, at_most=None)

    def limit(self, hosts: int) -> None:
        """Go on with so many hosts, until there are no more nodes than that."""
        self.desired = replace(self.desired, at_most=hosts if hosts < len(self.usable) else None)

    def empty(self, node: str) -> None:
        """No host on this node any more."""
        self.desired = replace(self.desired, emptied=self.desired.emptied | {node})

    def undone(self, now_s: float) -> None:
        """The last wish was refused, or its change rolled back: wait before the next."""
        self._rest_until_s = now_s + RETRY_S

    def wish(self, homes: Mapping[str, str | None], least: int, most: int, now_s: float) -> Wish | None:
        """What to ask for now; None when all is as it should be, or not known well enough.

        `homes`: each member's node, the oldest member first, None where it is between two lives. There are never fewer
        than `least` hosts nor more than `most`.
        """
        if now_s < self._rest_until_s or not homes or None in homes.values():
            return None
        usable = self.usable
        settled = _first_on_each(homes, usable)
        wanted = max(least, min(self.wanted, most))
        staying = settled[:wanted]
        joining = min(len(usable) - len(settled), wanted - len(staying))
        others = [host for host in homes if host not in settled]  # crowded, or where no host should be
        others.sort(key=lambda host: homes[host] not in usable)
        staying += others[: max(0, wanted - len(staying) - joining)]
        leaving = tuple(host for host in homes if host not in staying)
        if not leaving and not joining:
            self._crowded_s = None
            return None
        urgent = self.desired.at_most is not None or any(homes[host] in self.desired.emptied for host in leaving)
        if not urgent and now_s < self._due_s(joining, now_s):
            return None
        why = f"{len(homes)} hosts on {len(usable)} nodes"
        return Wish("follow", hosts=len(staying) + joining, leaving=leaving, why=why)

    def _due_s(self, joining: int, now_s: float) -> float:
        """When a change that nobody asked for has its time."""
        if joining:
            self._crowded_s = None
            return self._changed_s + SETTLE_S
        self._crowded_s = now_s if self._crowded_s is None else self._crowded_s
        return self._crowded_s + GONE_S


def _first_on_each(homes: Mapping[str, str | None], usable: frozenset[str]) -> list[str]:
    """The oldest host of each usable node."""
    first: dict[str, str] = {}
    for host, node in homes.items():
        if node in usable:
            first.setdefault(str(node), host)
    return list(first.values())
