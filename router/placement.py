"""Which host holds which expert: an immutable table, stamped with an epoch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from model.config import ModelConfig

Owners = tuple[tuple[int, ...], ...]  # owners[expert] = indexes of hosts, the preferred one first


@dataclass(frozen=True, slots=True)
class Host:
    """One life of one expert host. A restarted host keeps its id and gets the next generation."""

    id: str
    generation: int
    address: str


@dataclass(frozen=True)
class Placement:
    """Holders of every expert of every MoE layer. Raises ValueError when an expert has none."""

    epoch: int
    hosts: tuple[Host, ...]
    owners: Mapping[int, Owners]
    _held: dict[str, tuple[tuple[int, int], ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.epoch < 1:
            raise ValueError(f"epoch is {self.epoch}; expected at least 1")
        ids = [host.id for host in self.hosts]
        if len(set(ids)) != len(ids):
            raise ValueError(f"host ids repeat: {ids}")
        held: dict[str, list[tuple[int, int]]] = {host_id: [] for host_id in ids}
        for layer, experts in self.owners.items():
            for expert, holders in enumerate(experts):
                if not holders or len(set(holders)) != len(holders):
                    raise ValueError(f"layer {layer} expert {expert} has holders {holders}; expected distinct ones")
                for index in holders:
                    if not 0 <= index < len(ids):
                        raise ValueError(f"layer {layer} expert {expert}: no host {index} of {len(ids)}")
                    held[ids[index]].append((layer, expert))
        object.__setattr__(self, "owners", dict(self.owners))
        object.__setattr__(self, "_held", {host: tuple(pairs) for host, pairs in held.items()})

    def holders(self, layer: int, expert: int) -> tuple[Host, ...]:
        """Hosts that can compute an expert, the preferred one first."""
        return tuple(self.hosts[index] for index in self.owners[layer][expert])

    def held_by(self, host_id: str) -> tuple[tuple[int, int], ...]:
        """(layer, expert) pairs that a host holds; raises KeyError for an unknown host."""
        return self._held[host_id]

    def with_hosts(self, hosts: Sequence[Host]) -> "Placement":
        """The next epoch: the same experts at hosts of the same ids, in later lives."""
        if [host.id for host in hosts] != [host.id for host in self.hosts]:
            raise ValueError(f"hosts are {[host.id for host in hosts]}; expected {[host.id for host in self.hosts]}")
        return replace(self, epoch=self.epoch + 1, hosts=tuple(hosts))

    def without(self, lost: Sequence[str]) -> "Placement | None":
        """The next epoch with the lost hosts' experts at their replicas; None when some expert has no other."""
        gone = {index for index, host in enumerate(self.hosts) if host.id in lost}
        owners = {
            layer: tuple(tuple(index for index in holders if index not in gone) for holders in experts)
            for layer, experts in self.owners.items()
        }
        if any(not holders for experts in owners.values() for holders in experts):
            return None
        return Placement(self.epoch + 1, self.hosts, owners)

    def to_json(self) -> str:
        return json.dumps(
            {
                "epoch": self.epoch,
                "hosts": [asdict(host) for host in self.hosts],
                "owners": {str(layer): experts for layer, experts in self.owners.items()},
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Placement":
        """Inverse of to_json; raises ValueError, KeyError or TypeError on anything else."""
        raw = json.loads(text)
        if type(raw["epoch"]) is not int or not isinstance(raw["owners"], dict):
            raise ValueError(f"epoch is {raw['epoch']!r:.40}, owners {raw['owners']!r:.40}; expected int and object")
        return cls(
            epoch=raw["epoch"],
            hosts=tuple(Host(**host) for host in raw["hosts"]),
            owners={
                int(layer): tuple(tuple(holders) for holders in experts) for layer, experts in raw["owners"].items()
            },
        )


def initial_placement(config: ModelConfig, hosts: Sequence[Host], replicas: int = 1, epoch: int = 1) -> Placement:
    """Contiguous runs of experts, whose sizes differ by at most one; the next hosts in turn hold the replicas.

    Routing groups are contiguous too, so a group is split only where hosts do not divide groups evenly.
    Raises ValueError when there are more hosts than experts, or more replicas than hosts.
    """
    experts, count = config.n_routed_experts, len(hosts)
    if not 1 <= count <= experts:
        raise ValueError(f"{count} expert hosts for {experts} experts a layer; use 1 to {experts} hosts")
    if not 1 <= replicas <= count:
        raise ValueError(f"{replicas} replicas of each expert on {count} hosts; use 1 to {count} replicas")
    owners: Owners = tuple(
        tuple((expert * count // experts + copy) % count for copy in range(replicas)) for expert in range(experts)
    )
    return Placement(epoch, tuple(hosts), dict.fromkeys(config.moe_layers, owners))
