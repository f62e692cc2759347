"""Which rows and (row, expert) pairs go to which host: vector work only, as it runs once a layer.

Shapes: `T` tokens, `K` experts a token, `P` pairs of one host, `R` rows of one host.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.placement import Host, Placement

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Share:
    """What one host gets: each row once, and its pairs. `slots` index the flattened [T, K] routing."""

    host: Host
    rows_R: Ints  # token of each row sent
    pair_row_P: Ints  # index into rows_R
    pair_expert_P: Ints
    slots_P: Ints


class UnheldExperts(Exception):
    """Some experts have no holder left that has not failed."""

    def __init__(self, experts: tuple[int, ...]) -> None:
        super().__init__(experts)
        self.experts = experts


def plan_shares(
    experts_TK: Ints, slots_P: Ints, layer: int, placement: Placement, failed: Mapping[Host, str], turn: int
) -> list[Share]:
    """Split the wanted slots over holders, replicas in turn; raises UnheldExperts when every holder has failed."""
    top_k = experts_TK.shape[1]
    wanted_P = experts_TK.reshape(-1)[slots_P]
    index_of: dict[Host, int] = {host: index for index, host in enumerate(placement.hosts)}
    holder_of = np.full(len(placement.owners[layer]), -1, dtype=np.int64)
    for expert in np.unique(wanted_P).tolist():
        able = [host for host in placement.holders(layer, expert) if host not in failed]
        if able:
            holder_of[expert] = index_of[able[turn % len(able)]]
    holder_P = holder_of[wanted_P]
    if (holder_P < 0).any():
        raise UnheldExperts(tuple(np.unique(wanted_P[holder_P < 0]).tolist()))
    shares: list[Share] = []
    for index in np.unique(holder_P).tolist():
        slots = slots_P[holder_P == index]
        rows, pair_row = np.unique(slots // top_k, return_inverse=True)
        shares.append(Share(placement.hosts[index], rows, pair_row, wanted_P[holder_P == index], slots))
    return shares


def hosts_left(before: Sequence[Host], after: Sequence[Host]) -> tuple[Host, ...]:
    """Host lives of an older table that a newer one no longer names."""
    return tuple(host for host in before if host not in after)
