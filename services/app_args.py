"""What the Serve application is told, and the service that it describes. Nothing here needs Serve."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.spec import ServiceSpec
from experts.tls import TlsFiles
from experts.transport_kinds import TransportKind
from model.adapters.overlay import open_with_adapters

SHORTEST_KEY = 8  # characters


class ExpertArgs(BaseModel):
    """Expert hosts."""

    model_config = ConfigDict(extra="forbid")

    hosts: int = Field(2, ge=1)
    replicas: int = Field(1, ge=1, description="hosts that hold each expert")
    threads: int | None = Field(None, ge=1, description="of each host; default: its share of its node's cores")
    cpus: float = Field(0.0, ge=0, description="Ray CPUs that each host reserves")
    gpus: float = Field(0.0, ge=0)
    resources: dict[str, float] = Field({}, description="custom Ray resources that each host reserves")
    node_resource: str | None = Field(
        None,
        min_length=1,
        description="custom Ray resource: one host lives on each node that has it, hosts at least, and follows nodes",
    )
    transport: TransportKind = Field("auto", description="of rows to the hosts: shared memory on a machine, nixl, grpc")
    standby: int = Field(1, ge=0, description="that wait to replace a lost host; none where hosts reserve anything")
    auto_rebalance: bool = Field(False, description="move experts between hosts by themselves when the load is uneven")


class AttentionArgs(BaseModel):
    """Attention workers."""

    model_config = ConfigDict(extra="forbid")

    replicas: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1, description="of each worker; default: the node's cores")
    max_length: int = Field(4096, ge=1, description="tokens of prompt and answer")
    cache_tokens: int = Field(32768, ge=1)
    block_size: int = Field(16, ge=1)
    step_tokens: int = Field(512, ge=1)
    running: int = Field(64, ge=1)
    expert_deadline_s: float = Field(30.0, gt=0)
    cpus: float = Field(0.0, ge=0)
    gpus: float = Field(0.0, ge=0)


class TlsArgs(BaseModel):
    """PEM files that guard the calls between nodes, as every node sees them."""

    model_config = ConfigDict(extra="forbid")

    certificate: Path
    key: Path
    root: Path = Field(description="whoever it signed is let in")
    name: str | None = Field(None, description="in every certificate, when they do not name the nodes' addresses")


class AppArgs(BaseModel):
    """Arguments of `build`; dotted keys (`experts.hosts=4`) and nested ones mean the same."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="directory of a Hugging Face checkpoint")
    adapters: tuple[str, ...] = Field((), description="directories of LoRA adapters and deltas, applied in this order")
    name: str = Field("shoal", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the Serve application's")
    served_name: str | None = Field(None, description="model id that clients ask for; default: the directory's name")
    api_key: str | None = Field(
        None, min_length=SHORTEST_KEY, description="default: SHOAL_API_KEY where the ingress runs"
    )
    admin_token: str | None = Field(None, min_length=SHORTEST_KEY, description="default: SHOAL_ADMIN_TOKEN there")
    control_cpus: float = Field(0.0, ge=0, description="Ray CPUs that the controller and each ingress reserve")
    ingress_replicas: int = Field(1, ge=1)
    max_in_flight: int = Field(256, ge=1, description="requests in one ingress before it answers 429")
    experts: ExpertArgs = ExpertArgs()
    attention: AttentionArgs = AttentionArgs()
    tls: TlsArgs | None = None

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        nested: dict[str, Any] = {}
        for key, value in raw.items():
            head, _, rest = str(key).partition(".")
            if not rest:
                nested[head] = value
            elif isinstance(group := nested.setdefault(head, {}), dict):
                group[rest] = value
            else:
                raise ValueError(f"{head} is given both as a whole and as {key}")
        return nested


def service_spec(args: AppArgs) -> ServiceSpec:
    """What the service's controller is told.

    Raises ValueError (ConfigError, CheckpointError) when the checkpoint or the TLS files cannot be used.
    """
    directory = Path(args.model).resolve()
    adapters = tuple(str(Path(adapter).resolve()) for adapter in args.adapters)
    checkpoint = open_with_adapters(directory, adapters)
    experts = checkpoint.config.n_routed_experts
    if checkpoint.config.moe_layers and args.experts.hosts > experts:
        raise ValueError(f"experts.hosts is {args.experts.hosts}; the model has {experts} experts a layer: use fewer")
    tls = TlsFiles(**args.tls.model_dump()) if args.tls is not None else None
    if tls is not None:
        tls.read()
    return ServiceSpec(
        name=args.name,
        model=str(directory),
        adapters=adapters,
        hosts=args.experts.hosts,
        replicas=args.experts.replicas,
        threads=args.experts.threads,
        cpus=args.experts.cpus,
        gpus=args.experts.gpus,
        resources=args.experts.resources,
        node_resource=args.experts.node_resource,
        transport=args.experts.transport,
        tls=tls,
        standby=args.experts.standby,
        auto_rebalance=args.experts.auto_rebalance,
        control_cpus=args.control_cpus,
    )
