"""What the command remembers of each running service: one small private file a port."""

import contextlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """Enough to find and ask a service, and to stop one that `shoal serve` started here."""

    port: int
    url: str
    pid: int | None  # of the `shoal serve` process; None: it runs elsewhere
    model: str
    admin_token: str
    log: str | None = None
    ray_address: str | None = None  # of its Ray; None: not started yet, or it runs elsewhere
    process: str | None = None  # `identity` of pid, set by `write_record`: the number alone may be another's by now

    @property
    def ended(self) -> bool:
        """Whether it is known to be gone."""
        return self.pid is not None and not (is_running(self.pid) and self.process in (None, identity(self.pid)))

    @property
    def options(self) -> str:
        """What a command must be given to find it again, with a space before."""
        if self.pid is None:
            return f" --address {self.url}"
        return "" if self.port == 8000 else f" --port {self.port}"


def state_dir() -> Path:
    """$XDG_STATE_HOME/shoal, or ~/.local/state/shoal."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "shoal"


def made_state_dir() -> Path:
    """state_dir(), which is made where it is missing; raises ValueError where nothing can be written to it."""
    directory = state_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        reason = None if os.access(directory, os.W_OK | os.X_OK) else "it is read-only"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise ValueError(f"{directory} cannot be written to ({reason}): set XDG_STATE_HOME to a directory that can be")
    return directory


def write_record(record: ServiceRecord) -> None:
    """Save a record readable by its owner alone: it holds the admin token. Raises what `made_state_dir` does."""
    if record.pid is not None:
        record = replace(record, process=identity(record.pid))
    path = made_state_dir() / f"{record.port}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump(asdict(record), file)
    temporary.replace(path)


def read_record(port: int) -> ServiceRecord | None:
    """The running service on a port; None when there is none. Records of dead processes are removed."""
    path = state_dir() / f"{port}.json"
    try:
        record = ServiceRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    if not record.ended:
        return record
    remove_record(port)
    return None


def remove_record(port: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        (state_dir() / f"{port}.json").unlink()


def running_services() -> list[ServiceRecord]:
    """Every service of this user, by port."""
    directory = state_dir()
    ports = sorted(int(path.stem) for path in directory.glob("*.json") if path.stem.isdigit())
    return [record for port in ports if (record := read_record(port)) is not None]


def identity(pid: int) -> str | None:
    """Boot and start of a process, which no other of the same number shares; None when there is none."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {started}"
    except OSError:
        return None


def is_running(pid: int) -> bool:
    """True while a process of this id runs and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
