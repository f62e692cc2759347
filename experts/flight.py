"""A dispatch whose hosts all share memory with this client: split, written and announced in one native call, waited for
and summed in another.

It is an ordinary dispatch that goes well. Whatever does not, a late reply, a refusal, a host that is gone, is left to
the calls of which it consists, one a host, as any other transport's.
Shapes: `T` tokens, `K` experts a token, `D` model, `S` = T · K slots.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experts.bell import Bell
from experts.lease_call import LeaseCall
from experts.patience import Patience
from kernels.combine import NoOwner
from kernels.lane import LEG
from kernels.native import native
from router.placement import Host

if TYPE_CHECKING:
    from experts.client_lease import ClientLease

SLOT, PAIRS, ROWS = 0, 4, 5  # of the numbers of a leg


class Lanes:
    """The ways to all hosts of a placement."""

    def __init__(self, hosts: Sequence[Host], leases: Sequence[ClientLease], bell: Bell, cores: int) -> None:
        self.hosts = hosts
        self.leases = tuple(leases)
        self.bell = bell
        self.cores = cores
        self.patience = Patience()
        # what native code is given by address is kept by the leases and the bell
        addresses = [lease.lane.address for lease in leases if lease.lane is not None]
        self.array = (ctypes.c_void_p * len(addresses))(*addresses)
        self.bell_page = bell.page

    @property
    def ready(self) -> bool:
        return all([lease.ready for lease in self.leases])  # noqa: C419 (a generator costs more, once a layer)


class Flight:
    """Under way; `land` ends it, or `calls` hands it on, or `abandon` gives it up."""

    def __init__(
        self, lanes: Lanes, legs: ctypes.Array[ctypes.c_long], kept_S: Tensor, tokens: int, width: int, sent_s: float
    ) -> None:
        self._lanes = lanes
        self._legs = legs
        self._kept_S = kept_S
        self._tokens = tokens
        self.width = width
        self.sent_s = sent_s
        self._flying = True
        self.rows = sum(legs[ROWS::LEG])

    @property
    def slots(self) -> int:
        return self._kept_S.shape[0]

    def land(
        self,
        weights_TK: Tensor,
        shared_TD: Tensor | None,
        residual_TD: Tensor | None,
        timeout_s: float,
    ) -> Tensor | None:
        """residual + (the weighted sum over slots + shared), [T, D] fp32, as `kernels.combine.combine_slots` has it.

        None when not all replies are there after `timeout_s`, or one is not as it should be.
        """
        lanes, library = self._lanes, native()
        assert library is not None
        weights_TK = weights_TK.contiguous()
        residual_TD = None if residual_TD is None else residual_TD.contiguous()
        shared_TD = None if shared_TD is None else shared_TD.contiguous()
        out_TD = torch.empty(self._tokens, self.width)
        crowded = len(lanes.leases) >= lanes.cores  # looking would take a core from a host
        slept = ctypes.c_long()
        fault = library.shoal_receive(
            lanes.array,
            self._legs,
            len(lanes.leases),
            self._kept_S.data_ptr(),
            weights_TK.data_ptr(),
            self._tokens,
            weights_TK.shape[1],
            self.width,
            None if residual_TD is None else residual_TD.data_ptr(),
            None if shared_TD is None else shared_TD.data_ptr(),
            out_TD.data_ptr(),
            lanes.bell_page,
            0 if crowded else int(lanes.patience.look_s * 1e9),
            int(timeout_s * 1e9),
            ctypes.byref(slept),
        )
        if fault:
            return None
        if not crowded:
            lanes.patience.waited(bool(slept.value))
        self._flying = False
        for index, lease in enumerate(lanes.leases):
            if self._legs[index * LEG + PAIRS]:
                lease.slots.release(self._legs[index * LEG + SLOT])
        return out_TD

    def calls(self) -> list[tuple[Host, Tensor, int, LeaseCall]]:
        """Each host that was asked: it, its slots (int64, [P]), rows, and the call, whose reply was not read."""
        self._flying = False
        found: list[tuple[Host, Tensor, int, LeaseCall]] = []
        for index, (host, lease) in enumerate(zip(self._lanes.hosts, self._lanes.leases, strict=True)):
            slot, correlation, _, first, pairs, rows = self._legs[index * LEG : (index + 1) * LEG]
            if pairs:
                found.append((host, self._kept_S[first : first + pairs], rows, LeaseCall(lease, slot, correlation)))
        return found

    def abandon(self) -> None:
        """Nobody waits any more."""
        if self._flying:
            for *_, call in self.calls():
                call.release()

    def __del__(self) -> None:
        if self._flying:  # as when a call is dropped
            for index, lease in enumerate(self._lanes.leases):
                if self._legs[index * LEG + PAIRS]:
                    lease.slots.drop(self._legs[index * LEG + SLOT])


def take_off(
    lanes: Lanes,
    owner_E: Tensor,
    layer: int,
    epoch: int,
    x_TD: Tensor,
    experts_TK: Tensor,
    counted: int | None,
    now_s: float,
) -> Flight | None:
    """Send every slot to its expert's owner, an index of the lanes' hosts; None where a host has no room for it.

    x is fp32 and experts int64, both contiguous and on CPU; owner_E is int32. Rows of each expert are added to the
    int64 numbers at the address `counted`. Raises NoOwner for an expert whose owner is below 0.
    """
    library = native()
    assert library is not None
    assert experts_TK.dtype is torch.int64
    assert experts_TK.is_contiguous()
    assert owner_E.dtype is torch.int32
    numbers: list[int] = []
    for host, lease in zip(lanes.hosts, lanes.leases, strict=True):
        taken = lease.take()
        if taken is None:
            _give_back(lanes, numbers)
            return None
        numbers += (*taken, host.generation, 0, 0, 0)
    legs = (ctypes.c_long * len(numbers))(*numbers)
    tokens, top_k = experts_TK.shape
    width = x_TD.shape[1]
    kept_S = torch.empty(tokens * top_k, dtype=torch.int64)
    fault = library.shoal_send(
        lanes.array,
        legs,
        len(lanes.leases),
        experts_TK.data_ptr(),
        tokens,
        top_k,
        owner_E.data_ptr(),
        x_TD.data_ptr(),
        width,
        layer,
        epoch,
        counted,
        owner_E.shape[0],
        kept_S.data_ptr(),
    )
    if fault:
        _give_back(lanes, numbers)
        if fault > 0:
            raise NoOwner(fault - 1)
        return None
    for index, lease in enumerate(lanes.leases):
        if not legs[index * LEG + PAIRS]:
            lease.slots.release(legs[index * LEG + SLOT])
    return Flight(lanes, legs, kept_S, tokens, width, now_s)


def _give_back(lanes: Lanes, numbers: Sequence[int]) -> None:
    for lease, slot in zip(lanes.leases, numbers[SLOT::LEG], strict=False):
        lease.slots.release(slot)
