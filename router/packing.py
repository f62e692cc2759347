"""Items packed into hosts: heaviest first, then moved and swapped away from the busiest host.

Shapes: `I` items (experts or routing groups), `H` hosts. A copy of an item is a true cell of held_IH.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NEARLY = 0.95  # of the mean load, which is enough for a host that joins
STRICTLY = 1.0 - 1e-9  # a step that gains less than this is no gain: sums of floats differ by their order


class NoRoom(Exception):
    """The copies do not fit where they are allowed."""


@dataclass(slots=True)
class Packing:
    """Copies of items at hosts, and the rules for more of them; changed in place.

    Cells of `held_IH` outside `allowed_IH` are pinned: they are never moved.
    """

    held_IH: Bools
    allowed_IH: Bools
    fills_I: Bools  # items of which an empty host may be given one
    copies_I: Ints
    share_I: Floats  # load of one copy
    compute_H: Floats
    room_H: Ints  # items that each host has room for

    @property
    def burden(self) -> Floats:
        """Load of each host, relative to its compute."""
        load_H: Floats = self.share_I @ self.held_IH / self.compute_H
        return load_H

    def complete(self) -> None:
        """Place every copy that is missing, heaviest first, each at the host that it burdens least; fill empty hosts.

        Surplus copies are dropped, from the busiest hosts first. Raises NoRoom.
        """
        self._drop()
        load = [float(value) for value in self.share_I @ self.held_IH]
        count = [int(value) for value in self.held_IH.sum(0)]
        compute, room = self.compute_H.tolist(), self.room_H.tolist()
        missing = (self.copies_I - self.held_IH.sum(1)).tolist()
        for item in np.argsort(-self.share_I, kind="stable").tolist():
            share = float(self.share_I[item])
            for _ in range(missing[item]):
                able = np.flatnonzero(self.allowed_IH[item] & ~self.held_IH[item]).tolist()
                able = [host for host in able if count[host] < room[host]]
                if able:
                    host = min(able, key=lambda host: ((load[host] + share) / compute[host], count[host], host))
                    self.held_IH[item, host] = True
                    load[host] += share
                    count[host] += 1
                else:
                    self._make_way(item)
                    load = [float(value) for value in self.share_I @ self.held_IH]
                    count = [int(value) for value in self.held_IH.sum(0)]
        self._fill()

    def improve(self, target: float) -> None:
        """Move or swap copies while that lowers the busiest host's load, until it is at most `target`."""
        for _ in range(16 * len(self.compute_H)):
            load_H = self.burden
            busiest = int(load_H.argmax())
            if load_H[busiest] <= target:
                return
            step = self._best_step(busiest, load_H)
            if step is None:
                return
            given, host, taken = step
            self.held_IH[given, busiest], self.held_IH[given, host] = False, True
            if taken is not None:
                self.held_IH[taken, host], self.held_IH[taken, busiest] = False, True

    def _best_step(self, busiest: int, load_H: Floats) -> tuple[int, int, int | None] | None:
        """The item that the busiest host gives, to whom, and what it takes instead; None when nothing helps."""
        movable_IH = self.held_IH & self.allowed_IH
        given = np.flatnonzero(movable_IH[:, busiest])
        if not len(given):
            return None
        may_take_IH = self.allowed_IH & ~self.held_IH
        count_H, compute_H = self.held_IH.sum(0), self.compute_H
        best, step = float(load_H[busiest]) * STRICTLY, None
        if count_H[busiest] > 1:
            share = self.share_I[given][:, None]
            worst = np.maximum(load_H[busiest] - share / compute_H[busiest], load_H + share / compute_H)
            worst[~may_take_IH[given] | (count_H >= self.room_H)] = np.inf
            row, host = divmod(int(worst.argmin()), worst.shape[1])
            if worst[row, host] < best:
                best, step = float(worst[row, host]), (int(given[row]), host, None)
        taken, hosts = np.nonzero(movable_IH & may_take_IH[:, busiest][:, None])
        if not len(taken):
            return step
        gain = self.share_I[given][:, None] - self.share_I[taken]
        worst = np.maximum(load_H[busiest] - gain / compute_H[busiest], load_H[hosts] + gain / compute_H[hosts])
        worst[~may_take_IH[given][:, hosts]] = np.inf
        row, column = divmod(int(worst.argmin()), worst.shape[1])
        if worst[row, column] < best * STRICTLY:
            return int(given[row]), int(hosts[column]), int(taken[column])
        return step

    def _drop(self) -> None:
        """Leave no more copies than are wanted, nor more items at a host than it has room for."""
        for item in np.flatnonzero(self.held_IH.sum(1) > self.copies_I).tolist():
            for _ in range(int(self.held_IH[item].sum() - self.copies_I[item])):
                movable_H = self.held_IH[item] & self.allowed_IH[item]
                host = int(np.where(movable_H, self.burden, -np.inf).argmax())
                self.held_IH[item, host] = False
        for host in np.flatnonzero(self.held_IH.sum(0) > self.room_H).tolist():
            movable = np.flatnonzero(self.held_IH[:, host] & self.allowed_IH[:, host])
            lightest = movable[np.argsort(self.share_I[movable], kind="stable")]
            excess = int(self.held_IH[:, host].sum() - self.room_H[host])
            self.held_IH[lightest[:excess], host] = False

    def _fill(self) -> None:
        """Give each empty host its share: the heaviest copies that the busiest hosts can spare, as few as will do."""
        filling_IH = self.allowed_IH & self.fills_I[:, None]
        for host in np.flatnonzero(~self.held_IH.any(0) & (self.room_H > 0)).tolist():
            near_H = filling_IH[filling_IH[:, host]].any(0)  # with whom it shares the work
            enough = NEARLY * float(self.burden[near_H].mean()) if near_H.any() else 0.0
            while self.held_IH[:, host].sum() < self.room_H[host]:
                load_H, share = self.burden, self.share_I[:, None]
                fits_IH = load_H[host] + share / self.compute_H[host] < load_H - share / self.compute_H
                spare_IH = self.held_IH & filling_IH & (self.held_IH.sum(0) > 1)
                spare_IH &= (filling_IH & ~self.held_IH)[:, host][:, None]
                able_IH, weight_I = spare_IH & fits_IH, self.share_I
                if not able_IH.any() and not self.held_IH[:, host].any():
                    able_IH, weight_I = spare_IH, -self.share_I  # a slow host gets something, but not much
                if load_H[host] >= enough or not able_IH.any():
                    break
                donor = int(np.where(able_IH.any(0), load_H, -np.inf).argmax())
                item = int(np.where(able_IH[:, donor], weight_I, -np.inf).argmax())
                self.held_IH[item, donor], self.held_IH[item, host] = False, True

    def _make_way(self, item: int) -> None:
        """Place a copy though every host that may take it is full: by the shortest chain of moves. Raises NoRoom."""
        free_H = self.held_IH.sum(0) < self.room_H
        came: dict[int, tuple[int, int] | None] = {}  # host -> (item, the host that gives it up)
        for host in np.flatnonzero(self.allowed_IH[item] & ~self.held_IH[item]).tolist():
            came[host] = None
        queue = deque(came)
        while queue:
            host = queue.popleft()
            if free_H[host]:
                while (step := came[host]) is not None:
                    moved, giver = step
                    self.held_IH[moved, giver], self.held_IH[moved, host] = False, True
                    host = giver
                self.held_IH[item, host] = True
                return
            for moved in np.flatnonzero(self.held_IH[:, host] & self.allowed_IH[:, host]).tolist():
                for taker in np.flatnonzero(self.allowed_IH[moved] & ~self.held_IH[moved]).tolist():
                    if taker not in came:
                        came[taker] = (moved, host)
                        queue.append(taker)
        raise NoRoom
