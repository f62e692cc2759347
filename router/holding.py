"""Who is meant to hold which expert, by host id. A `Placement` is made of it and of the lives that are there."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from router.placement import Host, Owners, Placement

Pair = tuple[int, int]  # (layer, expert)
Holders = tuple[tuple[str, ...], ...]  # holders[expert] = host ids, the preferred one first


@dataclass(frozen=True)
class Holding:
    """Holders of every expert of every MoE layer. Raises ValueError when an expert has none, or one twice."""

    holders: Mapping[int, Holders]
    _held: dict[str, frozenset[Pair]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        held: dict[str, set[Pair]] = {}
        for layer, experts in self.holders.items():
            for expert, ids in enumerate(experts):
                if not ids or len(set(ids)) != len(ids):
                    raise ValueError(f"layer {layer} expert {expert} has holders {ids}; expected distinct ones")
                for host_id in ids:
                    held.setdefault(host_id, set()).add((layer, expert))
        object.__setattr__(self, "holders", dict(self.holders))
        object.__setattr__(self, "_held", {host_id: frozenset(pairs) for host_id, pairs in held.items()})

    @classmethod
    def from_owners(cls, owners: Mapping[int, Owners], ids: Sequence[str]) -> "Holding":
        """The same with host ids instead of indexes into `ids`."""
        return cls(
            {
                layer: tuple(tuple(ids[index] for index in indexes) for indexes in experts)
                for layer, experts in owners.items()
            }
        )

    @classmethod
    def from_json_dict(cls, raw: Mapping[str, Sequence[Sequence[str]]]) -> "Holding":
        """Inverse of to_json_dict."""
        return cls({int(layer): tuple(tuple(ids) for ids in experts) for layer, experts in raw.items()})

    def to_json_dict(self) -> dict[str, Holders]:
        return {str(layer): experts for layer, experts in self.holders.items()}

    def held_by(self, host_id: str) -> frozenset[Pair]:
        """(layer, expert) pairs that a host is meant to hold; none for a host that is not named."""
        return self._held.get(host_id, frozenset())

    def table(self, epoch: int, hosts: Sequence[Host], held: Mapping[str, Collection[Pair]]) -> Placement | None:
        """The table of these lives and what each of them really holds; None while some expert has no holder.

        A host that holds more than it is meant to is asked only for what it is meant to hold.
        """
        index = {host.id: number for number, host in enumerate(hosts)}
        owners: dict[int, Owners] = {}
        for layer, experts in self.holders.items():
            able = tuple(
                tuple(index[host_id] for host_id in ids if host_id in index and (layer, expert) in held[host_id])
                for expert, ids in enumerate(experts)
            )
            if not all(able):
                return None
            owners[layer] = able
        return Placement(epoch, tuple(hosts), owners)
