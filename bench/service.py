"""A service as `shoal serve` starts it: started, found, asked, and ended with everything that belongs to it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from pydantic import TypeAdapter

from bench.errors import BenchError
from bench.processes import ProcessMemory, command_line, cpu_s, family, memory, role_of, started_ticks

PORTS = range(8400, 8421)
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.05
DOOR_TIMEOUT_S = 120.0
GCS_FLAG = "--gcs-address="


@dataclass(frozen=True, slots=True)
class Door:
    """An attention worker's own gRPC door."""

    address: str
    token: str


@dataclass(frozen=True, slots=True)
class Service:
    """A running service of one attention worker."""

    url: str
    model: str  # name that clients ask for
    pid: int  # of `shoal serve`
    door: Door
    start_up_s: float  # from the command to the first token through HTTP

    def memory(self) -> list[ProcessMemory]:
        """Every process of the service but the one that keeps Ray's logs tidy and the like, by role."""
        found = (memory(pid, "shoal serve" if pid == self.pid else None) for pid in family(self.pid))
        return [process for process in found if process is not None]

    def cpu_s(self) -> dict[str, float]:
        """Processor seconds that its processes have used so far, by role."""
        used_s: dict[str, float] = {}
        for pid in family(self.pid):
            role = "shoal serve" if pid == self.pid else role_of(command_line(pid))
            used_s[role] = used_s.get(role, 0.0) + cpu_s(pid)
        return used_s


@contextlib.contextmanager
def running_service(checkpoint: Path, hosts: int, threads: int | None) -> Iterator[Service]:
    """`shoal serve CHECKPOINT --expert-hosts N` until the block ends; `threads` None leaves the service's default.

    Raises BenchError with the last line of its output when it does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        port = _free_port()
        log = Path(scratch) / "service.log"
        command = [sys.executable, "-m", "services.cli", "serve", str(checkpoint), "--expert-hosts", str(hosts)]
        command += ["--port", str(port), *(["--threads", str(threads)] if threads is not None else [])]
        started_s = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"XDG_STATE_HOME": scratch},
            )
        try:
            url = f"http://127.0.0.1:{port}"
            start_up_s = _wait_for_first_token(process, url, log, started_s)
            door = _find_door(process.pid, f"shoal-p{port}")
            yield Service(url, checkpoint.name, process.pid, door, start_up_s)
        finally:
            _stop(process)


def _wait_for_first_token(process: "subprocess.Popen[bytes]", url: str, log: Path, started_s: float) -> float:
    """Seconds from the command until /health has generated a token, which is what its 200 says."""
    deadline_s = started_s + START_TIMEOUT_S
    with httpx.Client(trust_env=False, timeout=30.0) as client:
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                lines = log.read_text(errors="replace").strip().splitlines()
                raise BenchError(f"the service did not start: {lines[-1] if lines else 'it printed nothing'}")
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{url}/health").status_code == 200:
                    return time.monotonic() - started_s
            time.sleep(POLL_S)
    raise BenchError(f"the service generated no token within {START_TIMEOUT_S:.0f} s")


def _find_door(pid: int, namespace: str) -> Door:
    flags = (word for member in family(pid) for word in command_line(member).split() if word.startswith(GCS_FLAG))
    address = next(flags, GCS_FLAG).removeprefix(GCS_FLAG)
    command = [sys.executable, "-m", "bench.door", address, namespace]
    environment = os.environ | {"RAY_AUTH_MODE": "token"}  # as the service's Ray; an explicit address does not imply it
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=DOOR_TIMEOUT_S, check=False, env=environment
    )
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        raise BenchError(f"the attention worker's door was not found: {lines[-1] if lines else 'no reason given'}")
    fields: Mapping[str, str] = TypeAdapter(dict[str, str]).validate_python(json.loads(result.stdout.splitlines()[-1]))
    return Door(fields["address"], fields["token"])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask, wait, and end by id whatever stayed behind of what this service had started."""
    members = {pid: started_ticks(pid) for pid in family(process.pid)}
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    deadline_s = time.monotonic() + STOP_TIMEOUT_S / 3
    while (left := _alive(members)) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _alive(members: Mapping[int, int | None]) -> list[int]:
    return [pid for pid, started in members.items() if started is not None and started_ticks(pid) == started]


def _free_port() -> int:
    for port in PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise BenchError(f"no port of {PORTS.start} to {PORTS.stop - 1} is free on 127.0.0.1: stop what listens there")
