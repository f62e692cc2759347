"""A host in a process of its own, without Ray, that answers with the rows it got: the far end of the round trip.

`python -m bench.dispatch_host DIR TRANSPORT TOKEN` prints its address and serves until its standard input ends.
"""

import sys
from typing import cast

from torch import Tensor

from experts.grpc_server import ExpertServer
from experts.host import ExpertHost
from experts.nixl import prepare_environment
from experts.transport_kinds import TransportKind
from experts.transports import open_door
from kernels.threads import set_threads
from model.checkpoint import Checkpoint


class EchoHost(ExpertHost):
    """Checks and batches as a host does, and computes nothing."""

    def _apply(
        self, layer: int, x_RD: Tensor, pair_row_P: Tensor, pair_expert_P: Tensor, out_PD: Tensor | None
    ) -> Tensor:
        return x_RD.clone() if out_PD is None else out_PD.copy_(x_RD)


def main() -> None:
    directory, transport, token = sys.argv[1:]
    prepare_environment()
    set_threads(1)
    checkpoint = Checkpoint.open(directory)
    config = checkpoint.config
    host = EchoHost(config, "host-0", 1)
    host.load(checkpoint, [(layer, expert) for layer in config.moe_layers for expert in range(config.n_routed_experts)])
    server = ExpertServer(host, token=token, door=open_door(cast(TransportKind, transport), "host-0", 1))
    server.start()
    print(server.address, flush=True)
    sys.stdin.read()
    server.stop(0)


if __name__ == "__main__":
    main()
