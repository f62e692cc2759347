"""What the Serve application is told, and the service that it describes. Nothing here needs Serve."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cluster.spec import ServiceSpec
from experts.tls import TlsFiles
from experts.transport_kinds import TransportKind
from model.adapters.overlay import open_with_adapters
from services.keys import check_key

SHORTEST_KEY = 8  # characters


class ExpertArgs(BaseModel):
    """Expert hosts."""

    model_config = ConfigDict(extra="forbid")

    hosts: int = Field(2, ge=1, description="with which the service starts; at most the experts of a layer")
    replicas: int = Field(1, ge=1, description="hosts that hold each expert, at most `experts.hosts`")
    threads: int | None = Field(None, ge=1, description="of each host; default: its share of its node's cores")
    cpus: float = Field(0.0, ge=0, description="Ray CPUs that each host reserves")
    gpus: float = Field(0.0, ge=0, description="Ray GPUs that each host reserves, or a part of one; 0: CPUs compute")
    resources: dict[str, float] = Field({}, description="custom Ray resources that each host reserves")
    node_resource: str | None = Field(
        None,
        min_length=1,
        description="custom Ray resource: one host lives on each node that has it, `experts.hosts` at least, and hosts "
        "follow such nodes",
    )
    transport: TransportKind = Field(
        "auto",
        description="of rows to the hosts; `auto`: shared memory on a machine, NIXL between machines, or else gRPC",
    )
    standby: int = Field(
        1, ge=0, description="processes that wait to be a lost host's next life; none where hosts reserve anything"
    )
    auto_rebalance: bool = Field(False, description="move experts between hosts by itself when the load is uneven")


class AttentionArgs(BaseModel):
    """Attention workers."""

    model_config = ConfigDict(extra="forbid")

    replicas: int = Field(1, ge=1, description="attention workers")
    threads: int | None = Field(None, ge=1, description="of each worker; default: the node's cores")
    max_length: int = Field(4096, ge=1, description="tokens of prompt and answer; default: no more than cache_tokens")
    cache_tokens: int = Field(32768, ge=1, description="of each worker's latent cache")
    block_size: int = Field(16, ge=1, description="tokens of a block of the cache")
    step_tokens: int = Field(512, ge=1, description="that a worker computes in one step, over all its requests")
    running: int = Field(64, ge=1, description="requests in a worker's running batch; others wait")
    expert_deadline_s: float = Field(
        30.0, gt=0, description="seconds that requests wait for lost expert hosts before they end with an error"
    )
    cpus: float = Field(0.0, ge=0, description="Ray CPUs that each worker reserves")
    gpus: float = Field(0.0, ge=0, description="Ray GPUs that each worker reserves, or a part of one; 0: CPUs compute")

    @model_validator(mode="after")
    def _fits_the_cache(self) -> Self:
        if "max_length" in self.model_fields_set and self.max_length > self.cache_tokens:
            raise ValueError(
                f"max_length is {self.max_length}, and a worker's cache holds {self.cache_tokens} tokens: raise "
                "cache_tokens, or lower max_length"
            )
        return self


class TlsArgs(BaseModel):
    """PEM files that guard the calls between nodes, as every node sees them."""

    model_config = ConfigDict(extra="forbid")

    certificate: Path = Field(description="that each node shows, called or calling")
    key: Path = Field(description="the certificate's private key")
    root: Path = Field(description="whoever it signed is let in")
    name: str | None = Field(
        None, description="in every certificate; default: each names the address that its node listens on"
    )


class AppArgs(BaseModel):
    """Arguments of `build`; dotted keys (`experts.hosts=4`) and nested ones mean the same."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="directory of a Hugging Face checkpoint, as every node sees it")
    adapters: tuple[str, ...] = Field((), description="directories of LoRA adapters and deltas, applied in this order")
    served_name: str | None = Field(None, description="model id that clients ask for; default: the directory's name")
    api_key: str | None = Field(
        None, min_length=SHORTEST_KEY, description="that clients send; default: SHOAL_API_KEY where the ingress runs"
    )
    admin_token: str | None = Field(
        None, min_length=SHORTEST_KEY, description="that opens the admin routes; default: SHOAL_ADMIN_TOKEN there"
    )
    control_cpus: float = Field(0.0, ge=0, description="Ray CPUs that the controller and each ingress reserve")
    ingress_replicas: int = Field(1, ge=1, description="ingresses, which answer HTTP; any of them, for all workers")
    max_in_flight: int = Field(256, ge=1, description="requests in one ingress before it answers 429")
    worker_deadline_s: float = Field(
        300.0, gt=0, description="seconds that requests wait for lost attention workers before they end with an error"
    )
    experts: ExpertArgs = ExpertArgs()
    attention: AttentionArgs = AttentionArgs()
    tls: TlsArgs | None = None

    @field_validator("api_key", "admin_token")
    @classmethod
    def _sendable(cls, key: str | None) -> str | None:
        return None if key is None else check_key(key)

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


def service_spec(args: AppArgs, name: str = "") -> ServiceSpec:
    """What the service's controller is told. `name` is the Serve application's, which replicas learn from Serve.

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
        name=name,
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
