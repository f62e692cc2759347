"""What /proc tells of processes: who started whom, memory, and processor time."""

import os
from dataclasses import dataclass
from pathlib import Path

CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
EXPERT_HOST = "expert host"
ROLES = (
    (":attention", "attention worker"),
    (":ingress", "ingress"),
    ("ray::ExpertActor", EXPERT_HOST),
    ("ray::Controller", "controller"),
    ("ray::ServeController", "Serve's controller"),
    ("ray::ProxyActor", "HTTP proxy"),
)
"""Part of a command line, and what the process is."""
OTHERS = "Ray itself"
RAYS = (OTHERS, "Serve's controller", "HTTP proxy")
"""Roles whose program is none of ours."""
RAYLET = b"RAY_RAYLET_PID="


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Of one process; pages shared with others count in full in the peak, and in parts in the share."""

    role: str
    peak_bytes: int  # most that was ever resident, mapped files included
    share_bytes: int  # proportional set size now


def family(pid: int) -> list[int]:
    """A process and everything that descends from it, parents first.

    A worker of Ray belongs to the raylet that started it even when it is no longer its child.
    """
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and (fields := _stat(int(path.name))):
            for parent in {int(fields[1]), _raylet(path)}:
                if parent is not None:
                    children.setdefault(parent, []).append(int(path.name))
    members = [pid]
    for member in members:  # grows while it is walked, by those that are not in it
        members.extend(child for child in children.get(member, ()) if child not in members)
    return members


def command_line(pid: int) -> str:
    """Arguments joined by spaces; "" when the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used, in user and kernel mode; 0 when it is gone."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_PER_S if fields else 0.0


def thread_cpu_s(pid: int) -> float:
    """The same of the threads that are there, to the nanosecond."""
    paths = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in paths) / 1e9


def started_ticks(pid: int) -> int | None:
    """When a process started: with its id, what tells it from a later one; None when it is gone."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else None


def memory(pid: int, role: str | None = None) -> ProcessMemory | None:
    """Peak and share of one process; None when it is gone."""
    try:
        peak = _field(Path(f"/proc/{pid}/status").read_text(), "VmHWM:")
        share = _field(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss:")
    except OSError:
        return None
    return ProcessMemory(role or role_of(command_line(pid)), 1024 * peak, 1024 * share)


def role_of(command: str) -> str:
    """What a process of a service is, told by its command line."""
    return next((role for mark, role in ROLES if mark in command), OTHERS)


def _raylet(process: Path) -> int | None:
    """The raylet that a worker was started by, as its environment says."""
    try:
        variables = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    found = next((value for value in variables if value.startswith(RAYLET)), RAYLET).removeprefix(RAYLET)
    return int(found) if found.isdigit() else None


def _field(text: str, name: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(name)), 0)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
