"""`shoal serve --detach`: the same command in the background, until it answers."""

import argparse
import os
import signal
import subprocess
import sys
import time

import httpx

from services.commands import CommandError
from services.state import made_state_dir, read_record

START_TIMEOUT_S = 6 * 3600.0  # a service that loads nothing more gives up by itself long before


def detach(options: argparse.Namespace) -> int:
    """Raises CommandError when it ends before it answers, and ValueError where its log cannot be written."""
    log = made_state_dir() / f"{options.port}.log"
    command = [sys.executable, "-m", "services.cli", *again(sys.argv[1:])]
    environment = os.environ | {"SHOAL_LOG": str(log)}
    if options.api_key:
        environment["SHOAL_API_KEY"] = options.api_key
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                lines = log.read_text(errors="replace").strip().splitlines()
                raise CommandError(f"the service did not start: {lines[-1] if lines else 'no output'} (log: {log})")
            record = read_record(options.port)
            if record is not None and _healthy(record.url):
                print(f"ready at {record.url} (pid {process.pid}, log {log})")
                return 0
            time.sleep(0.3)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        raise
    process.send_signal(signal.SIGTERM)
    raise CommandError(f"the service was not ready in {START_TIMEOUT_S:.0f} s; see {log}")


def again(arguments: list[str]) -> list[str]:
    """The command line of the service itself: in the foreground, and without its key, which goes by the environment.

    Everybody on this machine can read command lines.
    """
    kept: list[str] = []
    skip = False
    for argument in arguments:
        key = argument == "--api-key"
        if not (skip or key or argument == "--detach" or argument.startswith("--api-key=")):
            kept.append(argument)
        skip = key
    return kept


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
