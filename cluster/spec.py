"""What a service is made of, as its controller is told once."""

from dataclasses import dataclass

from experts.tls import TlsFiles
from experts.transports import TRANSPORT_KINDS, TransportKind


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """Raises ValueError naming the field that is out of range."""

    name: str  # of the Serve application; also names the Ray namespace
    model: str  # directory of the checkpoint, as every node sees it
    hosts: int = 2
    replicas: int = 1  # hosts that hold each expert
    threads: int | None = None  # of each host; None: its share of its node's cores
    cpus: float = 0.0  # Ray CPUs that each host reserves
    gpus: float = 0.0  # Ray GPUs that each host reserves
    transport: TransportKind = "auto"  # of rows between attention workers and expert hosts
    tls: TlsFiles | None = None  # between nodes; the same paths on every node
    follow_application: bool = True  # end when the Serve application of this name is gone

    def __post_init__(self) -> None:
        if self.hosts < 1:
            raise ValueError(f"experts.hosts is {self.hosts}; expected at least 1")
        if not 1 <= self.replicas <= self.hosts:
            raise ValueError(f"experts.replicas is {self.replicas}; expected 1 to experts.hosts ({self.hosts})")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"experts.threads is {self.threads}; expected at least 1")
        if self.transport not in TRANSPORT_KINDS:
            raise ValueError(f"experts.transport is {self.transport!r}; expected one of {', '.join(TRANSPORT_KINDS)}")
        if self.cpus < 0 or self.gpus < 0:
            raise ValueError(f"experts.cpus {self.cpus} and experts.gpus {self.gpus} must not be negative")

    @property
    def namespace(self) -> str:
        return f"shoal-{self.name}"


CONTROLLER_NAME = "controller"


def host_actor_name(host_id: str, generation: int) -> str:
    return f"expert:{host_id}:{generation}"
