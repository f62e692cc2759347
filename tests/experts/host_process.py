"""An expert host in a process of its own: `python -m tests.experts.host_process CHECKPOINT TOKEN TRANSPORT [GEN]`.

Holds every expert of layer 1, prints its address when it listens, and ends when its standard input does.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from experts.grpc_server import ExpertServer
from experts.host import ExpertHost
from experts.nixl import prepare_environment
from experts.transports import open_door
from model.checkpoint import Checkpoint
from router.placement import Host

ROOT = Path(__file__).parent.parent.parent
READY_TIMEOUT_S = 60.0


class HostProcess:
    """Started and ready when made; `end` it in any case."""

    def __init__(self, checkpoint: Path, token: str, transport: str = "auto", generation: int = 1) -> None:
        command = [sys.executable, "-m", "tests.experts.host_process", checkpoint, token, transport, str(generation)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # the child says something or dies
        assert line, f"the host process ended with {self.process.wait(READY_TIMEOUT_S)}"
        self.host = Host("host-0", generation, line.strip())

    def freeze(self) -> None:
        """SIGSTOP, in force when this returns."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def main(directory: str, token: str, transport: str, generation: str) -> None:
    prepare_environment()
    torch.set_num_threads(1)
    opened = Checkpoint.open(directory)
    host = ExpertHost(opened.config, "host-0", int(generation))
    host.load(opened, [(1, expert) for expert in range(opened.config.n_routed_experts)])
    server = ExpertServer(host, token=token, door=open_door(transport, "host-0", int(generation)))  # type: ignore[arg-type]
    server.start()
    print(server.address, flush=True)
    sys.stdin.read()
    server.stop(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
