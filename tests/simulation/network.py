"""A worker's way to the hosts: messages that are late, lost, doubled or out of order, and memory that is used again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experts.errors import ExpertError, HostRefused, HostSlow, HostUnavailable
from experts.messages import ForwardReply, ForwardRequest
from router.placement import Host

if TYPE_CHECKING:
    from tests.simulation.workers import Worker
    from tests.simulation.world import World


class WorkerKilled(BaseException):
    """Unwinds the step of a worker that was killed while it waited."""


@dataclass(slots=True)
class Weather:
    """What may happen to a message between a worker and a host: chances of each."""

    lost: float = 0.0
    doubled: float = 0.0
    late: float = 0.02
    stale: float = 0.05  # that a reply of an older life meets a call to a later one


class Call:
    """A Pending. Its reply lies in memory that is overwritten when it is released."""

    def __init__(self, wire: "Wire", host: Host, pairs: int, width: int) -> None:
        self.host = host
        self.shape = (pairs, width)
        self._wire = wire
        self._answer: ForwardReply | ExpertError | None = None
        self._memory: Tensor | None = None
        self._over = False

    @property
    def waiting(self) -> bool:
        return self._answer is None and not self._over

    def result(self, timeout_s: float) -> ForwardReply:
        if self._over:
            raise HostUnavailable("this call is over: it failed, or its reply was released")
        self._wire.wait(timeout_s, lambda: self._answer is not None)
        if self._answer is None:
            raise HostSlow(f"{self.host.id}: no reply in {timeout_s:.2f} s")
        if isinstance(self._answer, ExpertError):
            self._end()
            raise self._answer
        return self._answer

    def release(self) -> None:
        if self._memory is not None:
            self._wire.give_back(self._memory)
            self._memory = None
        self._end()

    def settle(self, answer: ForwardReply | ExpertError) -> None:
        """What came from the host, or of the connection to it; only the first counts."""
        if not self.waiting:
            return
        if isinstance(answer, ForwardReply):
            self._memory = self._wire.take(answer.y_PD.numel())
            answer = ForwardReply(answer.generation, self._memory.view(answer.y_PD.shape).copy_(answer.y_PD))
        self._answer = answer

    def _end(self) -> None:
        self._over = True
        self._wire.open.pop(self, None)


class Wire:
    """The Transport of one worker."""

    def __init__(self, world: "World", worker: "Worker") -> None:
        self._world = world
        self._worker = worker
        self.open: dict[Call, None] = {}
        self._free: dict[int, list[Tensor]] = {}

    def submit(self, host: Host, request: ForwardRequest) -> Call:
        world = self._world
        world.watch.sent(self._worker, host, request)
        call = Call(self, host, len(request.pair_row_P), request.x_RD.shape[1])
        self.open[call] = None
        self._carry(partial(self._arrive, call, request))
        if host.generation > 1 and world.chance(world.weather.stale):
            nonsense = ForwardReply(host.generation - 1, torch.full(call.shape, torch.nan))
            world.clock.after(self._delay_s(), partial(call.settle, nonsense))
        return call

    def flush(self) -> None:
        pass  # what is submitted is carried already

    def lanes(self, hosts: Sequence[Host]) -> None:
        return None

    def forget(self, host: Host) -> None:
        self._break(host, "the connection was closed")

    def close(self) -> None:
        for call in tuple(self.open):
            call.settle(HostUnavailable("the transport was closed"))

    def host_gone(self, host: Host) -> None:
        """The process at the other end ended: that is soon noticed."""
        self._world.clock.after(self._world.between(0.001, 0.05), partial(self._break, host, "connection reset"))

    def wait(self, timeout_s: float, done: Callable[[], bool]) -> None:
        """Let the world go on until `done`; raises WorkerKilled when the worker dies meanwhile."""
        worker, clock = self._worker, self._world.clock
        clock.run_until(clock.now_s + timeout_s, lambda: done() or not worker.alive)
        if not worker.alive:
            raise WorkerKilled

    def take(self, numbers: int) -> Tensor:
        free = self._free.setdefault(numbers, [])
        return free.pop() if free else torch.empty(numbers)

    def give_back(self, memory: Tensor) -> None:
        memory.fill_(torch.nan)
        self._free[memory.numel()].append(memory)

    def _arrive(self, call: Call, request: ForwardRequest) -> None:
        world = self._world
        process = world.listening(call.host.address)
        if process is None:
            refused = HostUnavailable(f"{call.host.id} at {call.host.address}: connection refused")
            world.clock.after(world.between(0.001, 0.02), partial(call.settle, refused))
            return
        process.compute(request, partial(self._reply, call))

    def _reply(self, call: Call, answer: ForwardReply | HostRefused) -> None:
        self._carry(partial(call.settle, answer))

    def _carry(self, deliver: Callable[[], None]) -> None:
        world, weather = self._world, self._world.weather
        for _ in range(2 if world.chance(weather.doubled) else 1):
            if not world.chance(weather.lost):
                world.clock.after(self._delay_s(), deliver)

    def _delay_s(self) -> float:
        world = self._world
        return world.between(0.002, 0.03) + (world.between(0.1, 1.5) if world.chance(world.weather.late) else 0.0)

    def _break(self, host: Host, reason: str) -> None:
        for call in tuple(self.open):
            if call.host == host:
                call.settle(HostUnavailable(f"{host.id}: {reason}"))
