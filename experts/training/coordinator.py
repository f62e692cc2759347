"""One of the workers' hold on the expert hosts: all at the same step before it begins, all stepped when it ends."""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from experts.errors import ExpertError, HostRefused, HostUnavailable
from experts.training.host import HostState
from experts.training.peer import Peer, Peers
from experts.training.spec import ExpertTraining
from experts.training.step_hosts import StepHosts, StepLost
from model.snapshots.manifest import Shard
from router.holding import Pair
from router.placement import Host, Placement

MAX_HOSTS_AT_ONCE = 32
Result = TypeVar("Result")


class Behind(ExpertError):
    """No host has an expert as it should be at this step: go back to a snapshot."""


class Coordinator:
    """Used by one thread, `save` aside, which asks many hosts at once."""

    LOST = (HostUnavailable, HostRefused)  # what a host raises that does not take part, and another life may

    def __init__(self, peers: Peers, training: ExpertTraining) -> None:
        self._peers = peers
        self._training = training
        self._before: Placement | None = None
        self._pool = ThreadPoolExecutor(MAX_HOSTS_AT_ONCE, "hosts")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def bring_level(self, placement: Placement, step: int) -> None:
        """See that every holder of a table has its experts at `step`: who joined takes them from who has them.

        Hosts of the table before are asked as well: they are not ended before this one is in use. Raises Behind when
        nobody has an expert, and HostUnavailable or HostRefused when a host of the table does not take part.
        """
        sources: dict[Pair, Host] = {}
        behind: dict[Host, list[Pair]] = {}
        for host, state in zip(placement.hosts, self._ask(placement.hosts, self._configured), strict=True):
            level = {pair for pair, version in state.versions.items() if version == step}
            sources = dict.fromkeys(level, host) | sources
            lacking = [pair for pair in placement.held_by(host.id) if pair not in level]
            if lacking:
                behind[host] = lacking
        if behind and self._before is not None:
            self._add_earlier(sources, self._before, placement, step)
        missing = {pair for pairs in behind.values() for pair in pairs} - sources.keys()
        if missing:
            raise Behind(f"no host has expert {min(missing)} at step {step}, nor {len(missing) - 1} others")
        for host, pairs in behind.items():
            for source in dict.fromkeys(sources[pair] for pair in pairs):
                self._peers.peer(host).pull([pair for pair in pairs if sources[pair] == source], source)
        self._before = placement

    def _add_earlier(self, sources: dict[Pair, Host], before: Placement, now: Placement, step: int) -> None:
        for host in before.hosts:
            if host in now.hosts:
                continue
            try:
                versions = self._peers.peer(host).status().versions
            except self.LOST:
                continue
            for pair, version in versions.items():
                if version == step:
                    sources.setdefault(pair, host)

    def begin(self, placement: Placement, step: int, micros: int, ranks: int) -> None:
        """Begin a step on every host; raises HostUnavailable or HostRefused when one cannot."""
        self._ask(
            placement.hosts,
            lambda host, peer: peer.begin(step, micros, ranks, placement.held_by(host.id)),
        )

    def squared_norm(self, hosts: StepHosts) -> float:
        """Of the gradients of every expert, in the order of (layer, expert); raises StepLost when some are lost."""
        norms: dict[Pair, float] = {}
        for _, found in self._ask_alive(hosts, lambda _, peer: peer.squared_norms(hosts.step)):
            for pair, squared in found.items():
                other = norms.setdefault(pair, squared)
                if other != squared and not (math.isnan(other) and math.isnan(squared)):
                    raise ExpertError(f"replicas of expert {pair} have gradients of {other} and {squared}")
        self._check_all(hosts, norms)
        return sum(norms[pair] for pair in sorted(norms))

    def apply(self, hosts: StepHosts, learning_rate: float, grad_scale: float) -> None:
        """Step every expert at every host that is left; raises StepLost when none of an expert's holders did."""
        stepped: set[Pair] = set()
        for host, _ in self._ask_alive(hosts, lambda _, peer: peer.apply(hosts.step, learning_rate, grad_scale)):
            stepped.update(hosts.placement.held_by(host.id))
        self._check_all(hosts, stepped)

    def restart(self, placement: Placement) -> None:
        """Every expert at the checkpoint's weights; raises what `begin` raises."""
        self._ask(placement.hosts, self._configured)
        self._ask(placement.hosts, lambda host, peer: peer.restart(placement.held_by(host.id)))

    def load(self, placement: Placement, snapshot: Path) -> None:
        """Every expert as a snapshot has it; raises what `begin` raises."""
        self._ask(placement.hosts, self._configured)
        self._ask(placement.hosts, lambda host, peer: peer.load(snapshot, placement.held_by(host.id)))

    def save(self, hosts: StepHosts, staging: Path, step: int) -> list[Shard]:
        """Have every expert written once, by one of its holders that made the step; raises StepLost for one with none.

        May be called beside the rest, in a thread of its own, while the next step computes: every host is asked at
        once, since one that has stepped refuses, in threads that nothing else waits for. Raises what `begin` raises
        when a host does not do it, and SnapshotError.
        """
        writers: dict[Host, list[Pair]] = {}
        for layer, owners in hosts.placement.owners.items():
            for expert, holders in enumerate(owners):
                able = [hosts.placement.hosts[index] for index in holders]
                able = [host for host in able if host not in hosts.failed]
                if not able:
                    raise StepLost(f"no holder of expert {(layer, expert)} is left to save it")
                writers.setdefault(able[0], []).append((layer, expert))
        with ThreadPoolExecutor(max(1, len(writers)), "save") as pool:
            parts = self._ask(list(writers), lambda host, peer: peer.save(staging, writers[host], step), pool)
        return [shard for part in parts for shard in part]

    def _configured(self, host: Host, peer: Peer) -> HostState:
        peer.configure(self._training)
        return peer.status()

    def _check_all(self, hosts: StepHosts, found: Iterable[Pair]) -> None:
        missing = {
            (layer, expert) for layer, owners in hosts.placement.owners.items() for expert in range(len(owners))
        } - set(found)
        if missing:
            failures = "; ".join(hosts.failed.values())
            raise StepLost(f"step {hosts.step}: {len(missing)} experts, {min(missing)} first, are lost: {failures}")

    def _ask(
        self, hosts: Sequence[Host], call: Callable[[Host, Peer], Result], pool: ThreadPoolExecutor | None = None
    ) -> list[Result]:
        return [future.result() for future in self._submit(hosts, call, pool)]

    def _ask_alive(self, hosts: StepHosts, call: Callable[[Host, Peer], Result]) -> list[tuple[Host, Result]]:
        """Who answers; who does not takes no part any more."""
        alive = hosts.alive()
        answers: list[tuple[Host, Result]] = []
        for host, future in zip(alive, self._submit(alive, call), strict=True):
            try:
                answers.append((host, future.result()))
            except self.LOST as error:
                hosts.failed[host] = str(error)
                self._peers.forget(host)
        return answers

    def _submit(
        self, hosts: Sequence[Host], call: Callable[[Host, Peer], Result], pool: ThreadPoolExecutor | None = None
    ) -> "list[Future[Result]]":
        def ask(host: Host) -> Result:
            return call(host, self._peers.peer(host))

        return [(pool or self._pool).submit(ask, host) for host in hosts]
