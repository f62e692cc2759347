"""What a service is made of, as its controller and its attention workers are told once."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from experts.tls import TlsFiles
from experts.transport_kinds import TRANSPORT_KINDS, TransportKind


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """Raises ValueError naming the field that is out of range."""

    name: str  # of the Serve application; also names the Ray namespace
    model: str  # directory of the checkpoint, as every node sees it
    adapters: tuple[str, ...] = ()  # directories of LoRA adapters and deltas that apply to it, in this order
    hosts: int = 2
    replicas: int = 1  # hosts that hold each expert
    threads: int | None = None  # of each host; None: its share of its node's cores
    cpus: float = 0.0  # Ray CPUs that each host reserves
    gpus: float = 0.0  # Ray GPUs that each host reserves
    resources: Mapping[str, float] = field(default_factory=dict)  # Ray's custom ones that each host reserves
    node_resource: str | None = None  # custom Ray resource: one host lives on each node that has it, and no other
    standby: int = 1  # processes that wait to be a host's next life (on each such node); none where hosts reserve
    auto_rebalance: bool = False  # move experts by themselves when that is worth it
    transport: TransportKind = "auto"  # of rows between attention workers and expert hosts
    tls: TlsFiles | None = None  # between nodes; the same paths on every node
    control_cpus: float = 0.0  # Ray CPUs that the controller reserves
    follow_application: bool = True  # end when the Serve application of this name is gone
    trains: bool = False  # hosts keep their experts in a form that can be stepped, and serve nobody
    idle_end_s: float | None = None  # end when no worker was heard of for so long
    lodges_with: str | None = None  # service whose hosts' processes these hosts live in; None: in their own

    def __post_init__(self) -> None:
        if self.hosts < 1:
            raise ValueError(f"experts.hosts is {self.hosts}; expected at least 1")
        if not 1 <= self.replicas <= self.hosts:
            raise ValueError(f"experts.replicas is {self.replicas}; expected 1 to experts.hosts ({self.hosts})")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"experts.threads is {self.threads}; expected at least 1")
        if self.transport not in TRANSPORT_KINDS:
            raise ValueError(f"experts.transport is {self.transport!r}; expected one of {', '.join(TRANSPORT_KINDS)}")
        if self.standby < 0:
            raise ValueError(f"experts.standby is {self.standby}; expected at least 0")
        if self.node_resource is not None and self.node_resource in self.resources:
            raise ValueError(
                f"experts.resources and experts.node_resource both name {self.node_resource!r}; give one of them"
            )
        if self.cpus < 0 or self.gpus < 0 or any(amount < 0 for amount in self.resources.values()):
            amounts = {"cpus": self.cpus, "gpus": self.gpus, **self.resources}
            raise ValueError(f"experts reserve {amounts}; none may be negative")

    @property
    def reserves(self) -> bool:
        """Whether a host's process takes something of Ray's that others may want."""
        return bool(self.cpus or self.gpus or any(self.resources.values()))

    @property
    def namespace(self) -> str:
        return namespace_of(self.name)


def namespace_of(service: str) -> str:
    """The Ray namespace of a service's actors."""
    return f"shoal-{service}"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What one attention worker holds; raises ValueError naming the field that is out of range."""

    threads: int | None = None  # None: the cores of its node
    max_length: int = 4096  # tokens of prompt and answer
    cache_tokens: int = 32768
    block_size: int = 16
    step_tokens: int = 512
    running: int = 64
    expert_deadline_s: float = 30.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("threads", "max_length", "cache_tokens", "block_size", "step_tokens", "running"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"attention.{name} is {getattr(self, name)}; expected at least 1")
        if self.expert_deadline_s <= 0:
            raise ValueError(f"attention.expert_deadline_s is {self.expert_deadline_s}; expected above 0")


CONTROLLER_NAME = "controller"
