"""How the load lies on the hosts, and whether moving experts is worth it."""

import logging
from collections.abc import Mapping, Sequence

from cluster.change import ChangeRefused, Wish
from cluster.conductor import Conductor
from cluster.plan import ModelShape, capacities, target
from router.balance_quality import moves, owners_of, quality, worth_moving
from router.balancer import HostCapacity
from router.load_book import LoadBook
from router.placement import Placement

LOOK_S = 15.0  # between two thoughts of moving experts
REST_S = 60.0  # after a change
log = logging.getLogger("shoal.controller")


class Balance:
    """The aged load of every expert. Times are of a monotonic clock."""

    def __init__(self, shape: ModelShape, automatic: bool) -> None:
        self._shape = shape
        self.automatic = automatic
        self._book = LoadBook(shape.moe_layers, shape.experts)
        self._next_s = 0.0

    def add(self, counts: Mapping[int, Sequence[int]], now_s: float) -> None:
        """Rows that a worker routed since it last told."""
        self._book.add(counts, now_s)

    def loads(self, now_s: float) -> Mapping[int, Sequence[float]]:
        return self._book.loads(now_s)

    def total(self, now_s: float) -> float:
        """Rows of all experts and layers."""
        return self._book.total(now_s)

    def shares(self, placement: Placement | None, now_s: float) -> dict[str, float]:
        """Each host's share of the load, by host id; none while there is no load."""
        total = self.total(now_s)
        if placement is None or total <= 0:
            return {}
        rows = [0.0] * len(placement.hosts)
        for layer, loads in self.loads(now_s).items():
            for load, holders in zip(loads, placement.owners[layer], strict=True):
                for index in holders:
                    rows[index] += load / len(holders)
        return {host.id: row / total for host, row in zip(placement.hosts, rows, strict=True)}

    def imbalance(self, placement: Placement | None, now_s: float) -> float | None:
        """The busiest host's load over the mean one, mean over layers; None while there is no load."""
        if placement is None or self.total(now_s) <= 0:
            return None
        hosts = [HostCapacity(host.id) for host in placement.hosts]
        return quality(placement.owners, self.loads(now_s), hosts, self._shape.groups).mean_imbalance

    def consider(self, conductor: Conductor, now_s: float) -> None:
        """Ask for a rebalancing where that is automatic, nothing else goes on, and it is worth it."""
        if not self.automatic or not self._shape.moe_layers or not conductor.ever_ready:
            return
        if conductor.change is not None:
            self._next_s = now_s + REST_S
            return
        views = [conductor.roster.views[host_id] for host_id in conductor.committed.members]
        if now_s < self._next_s or any(view.state != "ready" for view in views):
            return
        self._next_s = now_s + LOOK_S
        committed, loads, hosts = conductor.committed, self.loads(now_s), capacities(views)
        before = committed.holding.holders
        try:
            after = target(self._shape, views, committed.holding, loads, committed.replicas, committed.extra)
        except ValueError as error:  # hosts began with more than they would be given
            log.info("no automatic rebalancing: %s", error)
            self._next_s = now_s + REST_S
            return
        owners = owners_of(after.holders, hosts)
        verdict = worth_moving(
            quality(owners_of(before, hosts), loads, hosts, self._shape.groups),
            quality(owners, loads, hosts, self._shape.groups),
            moves(before, owners, hosts),
            self.total(now_s) / (len(self._shape.moe_layers) * self._shape.experts),
        )
        log.debug("rebalancing: %s", verdict.reason)
        if verdict.worth:
            try:
                conductor.request(Wish("rebalance", why=verdict.reason), now_s)
            except ChangeRefused as refusal:
                log.info("no automatic rebalancing: %s", refusal)
