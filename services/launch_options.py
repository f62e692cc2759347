"""What `shoal serve` was asked for, and everything that can be known to fail before anything is started."""

import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from experts.transport_kinds import check_transport
from model.adapters.overlay import open_with_adapters
from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from services.app_args import AppArgs

SECRET = {"api_key": "--api-key or $SHOAL_API_KEY", "admin_token": "$SHOAL_ADMIN_TOKEN"}  # whose values are not printed


class LaunchError(Exception):
    """The service cannot start; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What `shoal serve` was asked for."""

    model: str
    adapters: tuple[str, ...] = ()
    expert_hosts: int = 2
    expert_replicas: int = 1
    attention_replicas: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str | None = None
    api_key: str | None = None
    admin_token: str | None = None  # one is made up without
    max_length: int | None = None  # 4096, or what the cache holds
    cache_tokens: int = 32768
    threads: int | None = None
    transport: str = "auto"
    auto_rebalance: bool = False
    gpus: float = 0.0  # of each actor
    log: str | None = None


def _check_kernels() -> None:
    """Raises ValueError where the environment names kernels that cannot serve here."""
    if "SHOAL_KERNELS" in os.environ:  # else torch need not be loaded for it
        from kernels.native import instruction_set

        instruction_set()


def check(options: LaunchOptions) -> Checkpoint:
    """Everything that can be known to fail before anything is started; raises LaunchError."""
    try:
        _check_kernels()
        checkpoint = open_with_adapters(options.model, options.adapters)
        Tokenizer.load(checkpoint.directory)
    except ValueError as error:
        raise LaunchError(str(error)) from error
    experts = checkpoint.config.n_routed_experts
    if not 1 <= options.expert_hosts <= max(1, experts):
        raise LaunchError(f"--expert-hosts {options.expert_hosts}: the model has {experts} experts; use 1 to {experts}")
    if not 1 <= options.expert_replicas <= options.expert_hosts:
        raise LaunchError(f"--expert-replicas {options.expert_replicas}: use 1 to {options.expert_hosts}")
    if options.attention_replicas < 1:
        raise LaunchError(f"--attention-replicas {options.attention_replicas}: use at least 1")
    if options.host not in ("127.0.0.1", "localhost", "::1") and options.api_key is None:
        raise LaunchError(f"--host {options.host} is open to others: set --api-key, or SHOAL_API_KEY, too")
    try:
        check_transport(options.transport)
    except ValueError as error:
        raise LaunchError(f"--transport {options.transport}: {error}") from error
    if options.max_length is not None and options.max_length > options.cache_tokens > 0:
        raise LaunchError(
            f"--max-length {options.max_length}: a worker's cache holds {options.cache_tokens} tokens; "
            "raise --cache-tokens, or lower --max-length"
        )
    check_port(options.host, options.port)
    if options.gpus:
        check_gpus(options)
    try:
        application_args(options, options.admin_token or "not-yet-known")
    except ValidationError as error:
        first = error.errors()[0]
        fault = first["msg"].removeprefix("Value error, ")
        fault = fault[:1].lower() + fault[1:]
        name = "--" + str(first["loc"][-1]).replace("_", "-")
        if first["loc"][-1] in SECRET:
            raise LaunchError(f"{SECRET[str(first['loc'][-1])]}: {fault}") from error
        raise LaunchError(f"{name} {first['input']}: {fault}") from error
    return checkpoint


def application_args(options: LaunchOptions, admin_token: str) -> AppArgs:
    """What the Serve application is told; raises pydantic's ValidationError for a value out of range."""
    return AppArgs.model_validate(
        {
            "model": str(Path(options.model).resolve()),
            "adapters": [str(Path(adapter).resolve()) for adapter in options.adapters],
            "served_name": options.served_name,
            "api_key": options.api_key,
            "admin_token": admin_token,
            "experts": {
                "hosts": options.expert_hosts,
                "replicas": options.expert_replicas,
                "threads": options.threads,
                "transport": options.transport,
                "auto_rebalance": options.auto_rebalance,
                "gpus": options.gpus,
            },
            "attention": {
                "replicas": options.attention_replicas,
                "threads": options.threads,
                **({} if options.max_length is None else {"max_length": options.max_length}),
                "cache_tokens": options.cache_tokens,
                "gpus": options.gpus,
            },
        }
    )


def check_gpus(options: LaunchOptions) -> None:
    """Raises LaunchError unless every host and worker finds its GPUs, or its part of one, on this machine."""
    import torch

    each, actors, here = options.gpus, options.expert_hosts + options.attention_replicas, torch.cuda.device_count()
    if each < 0 or (each > 1 and each != int(each)):
        raise LaunchError(f"--gpus {each:g}: use a whole number, or a part of one below 1")
    needed = actors * int(each) if each >= 1 else -(-actors // int(1 / each))
    if needed > here:
        raise LaunchError(
            f"--gpus {each:g} for {actors} actors takes {needed} GPUs, and {here} are here: "
            "give each a smaller part, such as --gpus 0.3, or leave it out to compute on CPUs"
        )


def check_port(host: str, port: int) -> None:
    """Raises LaunchError when something listens there already, or nothing can."""
    if not 1 <= port <= 65535:
        raise LaunchError(f"--port {port}: use 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise LaunchError(
                    f"--host {host} is no address of this machine ({error.strerror}): give one that is"
                ) from error
            raise LaunchError(
                f"port {port} on {host} cannot be used ({error.strerror}): stop what listens there, or give --port"
            ) from error
