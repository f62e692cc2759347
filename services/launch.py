"""`shoal serve` in the foreground: a private Ray, the Serve application on it, and an orderly end."""

import contextlib
import functools
import logging
import os
import secrets
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cluster.session import LocalCluster  # before anything that imports ray
from services.app_args import service_spec
from services.launch_options import LaunchError, LaunchOptions, application_args, check
from services.state import ServiceRecord, remove_record, state_dir, write_record

if TYPE_CHECKING:
    from ray import serve

PATIENCE_S = 900.0  # with a start in which no more experts were loaded
POLL_S = 0.1  # whether Serve's controller is there
ASKED_S = 1.0  # between the end of Ray and that of the service, where both are asked at once


def serve_foreground(options: LaunchOptions, console: Console) -> int:
    """Serve until SIGINT or SIGTERM; the process's exit status."""
    check(options)
    stop, over = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    directory = Path(options.model).resolve()
    url = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{options.port}"
    admin_token = options.admin_token or secrets.token_urlsafe(24)
    console.print(f"Shoal: {directory.name}, {options.expert_hosts} expert hosts, {url}")
    record = ServiceRecord(options.port, url, os.getpid(), str(directory), admin_token, options.log)
    write_record(record)
    cluster: LocalCluster | None = None
    try:
        cluster = LocalCluster(f"shoal-p{options.port}")
        write_record(replace(record, ray_address=cluster.address))
        for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which sets its own
            signal.signal(number, on_signal)
        cluster.end_process_with_it(over, functools.partial(_without_ray, options.port, stop), stop.is_set)
        _run(options, admin_token, console, stop)
        if not stop.is_set():
            _greet(options, directory, url, console)
            stop.wait()
        console.print("Stopping")
        return 0
    except SystemExit:  # Ray's answer to SIGTERM while it starts
        return 0
    except LaunchError as error:
        kept = cluster.keep_logs(state_dir() / f"{options.port}-logs") if cluster is not None else None
        raise LaunchError(f"{error} (logs: {kept})" if kept is not None else str(error)) from error
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        remove_record(options.port)  # whoever uses this Ray, such as a training run, sees that it has not long
        if cluster is not None:
            _shut_down(cluster, f"p{options.port}", over)


def _run(options: LaunchOptions, admin_token: str, console: Console, stop: threading.Event) -> None:
    from cluster.discovery import get_or_start_controller

    arguments = application_args(options, admin_token)
    get_or_start_controller(service_spec(arguments, f"p{options.port}"))  # hosts load while Serve starts

    from services.app import build
    from services.progress import show_progress

    _deploy(build(arguments), options, stop)
    show_progress(f"p{options.port}", f"shoal-p{options.port}", console, stop, PATIENCE_S)


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
