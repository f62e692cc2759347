"""`shoal serve` in the foreground: a private Ray, the Serve application on it, and an orderly end."""

import contextlib
import functools
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.console import Console

from cluster.session import LocalCluster  # before anything that imports ray
from experts.transport_kinds import check_transport
from model.adapters.overlay import open_with_adapters
from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from services.app_args import AppArgs, service_spec
from services.state import ServiceRecord, remove_record, write_record

if TYPE_CHECKING:
    from ray import serve

START_TIMEOUT_S = 900.0
POLL_S = 0.1  # whether Serve's controller is there
ASKED_S = 1.0  # between the end of Ray and that of the service, where both are asked at once


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
    max_length: int = 4096
    cache_tokens: int = 32768
    threads: int | None = None
    transport: str = "auto"
    auto_rebalance: bool = False
    log: str | None = None


def check(options: LaunchOptions) -> Checkpoint:
    """Everything that can be known to fail before anything is started; raises LaunchError."""
    try:
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
    check_port(options.host, options.port)
    try:
        application_args(options, "not-yet-known")
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][-1]).replace("_", "-")
        raise LaunchError(f"{name} {first['input']}: {first['msg'].lower()}") from error
    return checkpoint


def application_args(options: LaunchOptions, admin_token: str) -> AppArgs:
    """What the Serve application is told; raises pydantic's ValidationError for a value out of range."""
    return AppArgs.model_validate(
        {
            "model": str(Path(options.model).resolve()),
            "adapters": [str(Path(adapter).resolve()) for adapter in options.adapters],
            "name": f"p{options.port}",
            "served_name": options.served_name,
            "api_key": options.api_key,
            "admin_token": admin_token,
            "experts": {
                "hosts": options.expert_hosts,
                "replicas": options.expert_replicas,
                "threads": options.threads,
                "transport": options.transport,
                "auto_rebalance": options.auto_rebalance,
            },
            "attention": {
                "replicas": options.attention_replicas,
                "threads": options.threads,
                "max_length": options.max_length,
                "cache_tokens": options.cache_tokens,
            },
        }
    )


def check_port(host: str, port: int) -> None:
    """Raises LaunchError when something listens there already."""
    if not 1 <= port <= 65535:
        raise LaunchError(f"--port {port}: use 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LaunchError(
                f"port {port} on {host} cannot be used ({error.strerror}): stop what listens there, or give --port"
            ) from error


def serve_foreground(options: LaunchOptions, console: Console) -> int:
    """Serve until SIGINT or SIGTERM; the process's exit status."""
    check(options)
    stop, over = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    directory = Path(options.model).resolve()
    url = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{options.port}"
    admin_token = secrets.token_urlsafe(24)
    console.print(f"Shoal: {directory.name}, {options.expert_hosts} expert hosts, {url}")
    record = ServiceRecord(options.port, url, os.getpid(), str(directory), admin_token, options.log)
    write_record(record)
    cluster: LocalCluster | None = None
    try:
        cluster = LocalCluster(f"shoal-p{options.port}")
        write_record(replace(record, ray_address=cluster.address))
        for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which sets its own
            signal.signal(number, on_signal)
        cluster.end_process_with_it(over, functools.partial(_without_ray, options.port, stop))
        _run(options, admin_token, console, stop)
        if not stop.is_set():
            _greet(options, directory, url, console)
            stop.wait()
        console.print("Stopping")
        return 0
    except SystemExit:  # Ray's answer to SIGTERM while it starts
        return 0
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        remove_record(options.port)  # whoever uses this Ray, such as a training run, sees that it has not long
        if cluster is not None:
            _shut_down(cluster, f"p{options.port}", over)


def _run(options: LaunchOptions, admin_token: str, console: Console, stop: threading.Event) -> None:
    from cluster.discovery import get_or_start_controller

    arguments = application_args(options, admin_token)
    get_or_start_controller(service_spec(arguments))  # hosts load while Serve starts

    from services.app import build
    from services.progress import show_progress

    _deploy(build(arguments), options, stop)
    show_progress(f"p{options.port}", f"shoal-p{options.port}", console, stop, time.monotonic() + START_TIMEOUT_S)


def _deploy(application: "serve.Application", options: LaunchOptions, stop: threading.Event) -> None:
    """Start Serve and give it the application, as soon as its controller takes one: replicas need no proxy to start."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    target = serve.RunTarget(application, name=f"p{options.port}", route_prefix="/", logging_config=_quiet())
    http = HTTPOptions(host=options.host, port=options.port)
    with ThreadPoolExecutor(1, "serve-start") as pool:
        started = pool.submit(serve.start, http_options=http, logging_config=_quiet())
        while not (started.done() or serve.status().proxies or stop.wait(POLL_S)):
            pass
        if started.done():
            started.result()  # raises what went wrong
        if not stop.is_set():
            serve.run_many([target], wait_for_applications_running=False)
        started.result()


def _quiet() -> dict[str, Any]:
    return {"log_level": "WARNING", "enable_access_log": False}


def _greet(options: LaunchOptions, directory: Path, url: str, console: Console) -> None:
    name = options.served_name or directory.name
    port = "" if options.port == 8000 else f" --port {options.port}"
    shoal = Path(sys.executable).parent / "shoal"
    if Path.cwd() in shoal.parents:
        shoal = shoal.relative_to(Path.cwd())
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32}}'
    console.print(f"\nReady at {url}. Try:\n", style="bold")
    console.print(f"  {shoal} chat{port}", soft_wrap=True)
    console.print(f"  {shoal} status{port}", soft_wrap=True)
    console.print(
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    console.print("\nCtrl-C stops it.")


def _shut_down(cluster: LocalCluster, name: str, over: threading.Event) -> None:
    import ray
    from ray import serve
    from ray.exceptions import RayError

    from cluster.discovery import find_controller

    with contextlib.suppress(RayError, ValueError, ConnectionError, TimeoutError, RuntimeError):
        serve.delete(name)
        ray.get(find_controller(f"shoal-{name}").shutdown.remote(), timeout=10)
    over.set()
    cluster.stop()


def _without_ray(port: int, stop: threading.Event) -> int:
    """The exit status when Ray is gone, which may be known before the signal that ended it with this process."""
    asked = stop.wait(ASKED_S)
    remove_record(port)
    if not asked:
        print("shoal serve: Ray has ended, and this service with it", file=sys.stderr, flush=True)
    return 0 if asked else 1
