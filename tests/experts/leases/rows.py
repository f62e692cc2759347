"""Requests of the tests of leases, and the host that answers them."""

import threading
from collections.abc import Callable

import torch

from experts.arena import PAGE_BYTES
from experts.grpc_server import ExpertServer
from experts.host import ExpertHost
from experts.lease_call import LeaseCall
from experts.lease_transport import LeaseTransport
from experts.messages import ForwardReply, ForwardRequest
from kernels.lane import Asked
from router.placement import Host

TOKEN = "the-token-of-this-service"


SLOT_BYTES = 64 * PAGE_BYTES


class Counting(ExpertHost):
    """Counts grouped calls, and can be held up."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.batches: list[int] = []
        self.entered, self.let_go = threading.Event(), threading.Event()
        self.let_go.set()

    def answer_in_place(self, lane: int, asked: Asked) -> bool:
        self.batches.append(1)
        self.entered.set()
        assert self.let_go.wait(20)
        if super().answer_in_place(lane, asked):
            return True
        self.batches.remove(1)
        return False

    def forward_batch(self, requests, outs=None):  # type: ignore[no-untyped-def]
        self.batches.append(len(requests))
        self.entered.set()
        assert self.let_go.wait(20)
        return super().forward_batch(requests, outs)


Make = Callable[..., LeaseTransport]


def at(server: ExpertServer) -> Host:
    return Host("host-0", 1, server.address)


def request(rows: int = 4, seed: int = 0, generation: int = 1) -> ForwardRequest:
    x_RD = torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed))
    return ForwardRequest(1, generation, 1, x_RD, torch.arange(rows).int(), (torch.arange(rows) % 16).int())


def ask(transport: LeaseTransport, host: Host, wanted: ForwardRequest, timeout_s: float = 10) -> ForwardReply:
    """The reply, which must have come by the lease; the tensor is a copy."""
    call = transport.submit(host, wanted)
    assert isinstance(call, LeaseCall)
    reply = call.result(timeout_s)
    copied = ForwardReply(reply.generation, reply.y_PD.clone())
    call.release()
    return copied
