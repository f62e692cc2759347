"""A dispatch to hosts of this very process, on the GPU that attention is on: nothing of it waits for the device.

It is an ordinary dispatch that goes well, as `experts/flight.py` has for hosts that share memory.
Shapes: `T` tokens, `K` experts a token, `D` model, `S` = T · K slots, `E` experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.host import ExpertHost
from router.gate import Routing
from router.placement import Host, Placement

Version = tuple[tuple[Host, int], ...]
"""Of each host, its life and how many experts it had loaded or dropped."""


@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    """Which host computes which expert of a layer, found to be held by it at some version."""

    owner_E: Tensor  # as the client has it, on CPU
    near_E: Tensor  # on the device; one of a layer, for a recorded dispatch knows where it lies
    holders: tuple[int, ...]  # indexes of the hosts that hold any expert of the layer, at this version
    version: Version


class NearHosts:
    """All hosts of a placement, in its order."""

    def __init__(self, names: Sequence[Host], hosts: Sequence[ExpertHost]) -> None:
        self._names = tuple(names)
        self._hosts = tuple(hosts)
        self._in_turn = tuple(sorted(hosts, key=lambda host: host.host_id))  # whatever a table's order is
        self._splits: dict[int, _Split] = {}  # the newest of each layer

    def computes_on(self, device: torch.device) -> bool:
        """Whether tensors of a device are where these hosts compute."""
        return _whole(device) == _whole(torch.device(self._hosts[0].device))

    @property
    def version(self) -> Version | None:
        """What a recorded dispatch stays good for; None where a host is not to be asked just now."""
        if any(
            host.closed is not None or host.generation != name.generation
            for name, host in zip(self._names, self._hosts, strict=True)
        ):
            return None
        return tuple((name, host.changes) for name, host in zip(self._names, self._hosts, strict=True))

    def hold(self, placement: Placement) -> bool:
        """Whether each holds all that a table of these hosts says: no dispatch by it is then turned down."""
        return all(
            set(placement.held_by(name.id)) <= set(host.held)
            for name, host in zip(self._names, self._hosts, strict=True)
        )

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Nothing is unloaded from any of them meanwhile."""
        with ExitStack() as locks:
            for host in self._in_turn:
                locks.enter_context(host.computing())
            yield

    def take_off(
        self, owner_E: Tensor, layer: int, x_TD: Tensor, routing: Routing, now_s: float
    ) -> "NearFlight | None":
        """Compute every slot at its expert's owner, an index of the hosts; None where one does not hold it just now."""
        with self.computing():
            split = self._split(owner_E, layer)
            if split is None:
                return None
            experts_TK = routing.experts_TK.contiguous()
            tokens, top_k = experts_TK.shape
            y_SD = torch.empty(tokens * top_k, x_TD.shape[1], dtype=torch.float32, device=x_TD.device)
            for index in split.holders:
                mine_TK = experts_TK
                if len(split.holders) > 1:
                    mine_TK = experts_TK.masked_fill(split.near_E[experts_TK] != index, owner_E.shape[0])
                self._hosts[index].compute_slots(layer, x_TD, mine_TK, y_SD)
        return NearFlight(y_SD, tokens, now_s)

    def _split(self, owner_E: Tensor, layer: int) -> _Split | None:
        version = self.version
        if version is None:
            return None
        found = self._splits.get(layer)
        if found is not None and found.owner_E is owner_E and found.version == version:
            return found
        held = [{expert for held_layer, expert in host.held if held_layer == layer} for host in self._hosts]
        if any(owner < 0 or expert not in held[owner] for expert, owner in enumerate(owner_E.tolist())):
            return None
        near_E = owner_E.to(self._hosts[0].device, copy=True) if found is None else found.near_E.copy_(owner_E)
        holders = tuple(index for index, experts in enumerate(held) if experts)
        self._splits[layer] = split = _Split(owner_E, near_E, holders, version)
        return split


def _whole(device: torch.device) -> torch.device:
    """With its index, where its kind has any."""
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


class NearFlight:
    """Every slot's answer is being computed."""

    def __init__(self, y_SD: Tensor, tokens: int, sent_s: float) -> None:
        self._y_SD = y_SD
        self.rows = tokens
        self.sent_s = sent_s

    @property
    def slots(self) -> int:
        return self._y_SD.shape[0]

    @property
    def width(self) -> int:
        return self._y_SD.shape[1]

    def land(
        self, weights_TK: Tensor, shared_TD: Tensor | None, residual_TD: Tensor | None, timeout_s: float
    ) -> Tensor:
        """residual + (the weighted sum over slots + shared), [T, D], in the residual's dtype or fp32; never late."""
        from kernels.gpu import rows

        dtype = torch.float32 if residual_TD is None else residual_TD.dtype
        return rows.combine(self._y_SD, weights_TK, shared_TD, residual_TD, dtype)

    def abandon(self) -> None:
        pass  # there is nobody to be told
