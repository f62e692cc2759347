"""The little that a controller must remember across its own death."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from router.holding import Holding


@dataclass(frozen=True, slots=True)
class Committed:
    """Who is meant to hold what: what the last change that was committed decided."""

    holding: Holding
    members: tuple[str, ...]
    replicas: int  # hosts that hold each expert, at least
    extra: int  # further replicas a layer, of its busiest experts


@dataclass(frozen=True, slots=True)
class SavedState:
    """Epoch last published, each host's last generation, and what is committed.

    `generations` also names hosts that left: an id that comes back begins where it ended.
    """

    epoch: int
    generations: Mapping[str, int]
    committed: Committed
    changes: int  # asked for so far

    def to_json(self) -> str:
        committed = self.committed
        return json.dumps(
            {
                "epoch": self.epoch,
                "generations": dict(self.generations),
                "committed": {
                    "holding": committed.holding.to_json_dict(),
                    "members": committed.members,
                    "replicas": committed.replicas,
                    "extra": committed.extra,
                },
                "changes": self.changes,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "SavedState":
        """Inverse of to_json; raises ValueError, KeyError or TypeError on anything else."""
        raw = json.loads(text)
        committed = raw["committed"]
        return cls(
            epoch=int(raw["epoch"]),
            generations={str(host_id): int(number) for host_id, number in raw["generations"].items()},
            committed=Committed(
                holding=Holding.from_json_dict(committed["holding"]),
                members=tuple(map(str, committed["members"])),
                replicas=int(committed["replicas"]),
                extra=int(committed["extra"]),
            ),
            changes=int(raw["changes"]),
        )
