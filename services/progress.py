"""What `shoal serve` shows while the service starts, and how it learns that it cannot."""

import threading
import time
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.discovery import find_controller
from services.launch_options import LaunchError

POLL_S = 0.2
SERVE_POLL_S = 1.0  # Serve's answers take some of the cores with which everything starts


def show_progress(name: str, namespace: str, console: Console, stop: threading.Event, patience_s: float) -> None:
    """Draw one bar over all hosts until the application runs.

    Raises LaunchError when it will not, or nothing was loaded for `patience_s` seconds.
    """
    deadline_s, before = time.monotonic() + patience_s, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("loading experts", total=None)
        ask_s = 0.0  # when Serve is to be asked
        while not stop.wait(POLL_S):
            status = _controller_status(namespace)
            if status is not None:
                if status["state"] == "failed":
                    raise LaunchError(f"the expert hosts cannot start: {status['reason']}")
                done = sum(host["progress"][0] for host in status["expert_hosts"])
                total = sum(host["progress"][1] for host in status["expert_hosts"])
                if done > before:
                    deadline_s, before = time.monotonic() + patience_s, done
                bars.update(task, completed=done, total=max(total, 1))
                if status["state"] == "ready":
                    bars.update(task, description="opening the door")
            serves = status is not None and bool(status["attention_workers"])
            application = None
            if serves or time.monotonic() >= ask_s:
                application = serve.status().applications.get(name)
                ask_s = time.monotonic() + SERVE_POLL_S
            if application is not None:
                if application.status == "RUNNING" and serves:
                    return
                if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                    raise LaunchError(f"the application cannot start: {_reason(application)}")
            if time.monotonic() > deadline_s:
                raise LaunchError(f"the service was not ready, and loaded nothing in {patience_s:.0f} s")


def _controller_status(namespace: str) -> dict[str, Any] | None:
    try:
        status: dict[str, Any] = ray.get(find_controller(namespace).status.remote(), timeout=5)
    except (ValueError, RayError, TimeoutError):
        return None
    return status


def _reason(application: Any) -> str:
    messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
    lines = [line for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return str((errors or lines or ["no reason was given"])[-1]).strip()
