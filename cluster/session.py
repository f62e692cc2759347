"""A private Ray on this machine's loopback: started for one service, and gone with it."""

import atexit
import contextlib
import functools
import logging
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

# Ray replaces a loopback address by the machine's outer one, unless it was told before its first import that
# clusters stay on one machine.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray

from cluster.remains import PATIENCE_S, Guard, leave_nothing
from cluster.signals import none_lost

LOOPBACK = "127.0.0.1"
UNWATCHED = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",  # never
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "60",
    # the driver prints no actor's log: files are looked for as if there were too many of them
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "10",
    # not for a dashboard, but Serve's look at its few replicas, 0.1 by default
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    # nobody takes the only node back while a run trains on it
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
VITAL = ("gcs_server", "raylet")  # neither is started again
WATCH_S = 0.5  # at most, until the thread that waits for the end of Ray sees that nobody cares any more
ALONE_S = 1.0  # for workers whose Ray is gone: one that hangs as it exits asks Ray first
OBJECT_STORE_BYTES = 128 * 1024 * 1024  # Ray carries control messages only


def keep_private() -> None:
    """Set what a Ray of our own needs in the environment, before it starts."""
    # The driver must not join a Ray that happens to run here, and its log lines belong to it alone.
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray runs its actors at the lowest priority but four: on a machine that does anything else, they would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Each event of a stream passes from the ingress to Serve's proxy: as a message of gRPC, not as an object of Ray's.
    os.environ.setdefault("RAY_SERVE_PROXY_USE_GRPC", "1")
    # And within the proxy by one event loop, not from one thread's to another's.
    os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "0")
    # A proxy that is not ready in time is killed, and Serve's start fails with it: 5 s are too few for a busy machine.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    # One that has ended is known by three checks that fail, 10 s apart by default, in which nobody is answered.
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")
    # A training run's workers end, or are lost, and Ray Train sees it when it looks: every 2 s by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # tokens are on, as they should be


def keep_quiet() -> None:
    """Have a Ray without a dashboard not collect, ten times a second, what nobody looks at; before it starts."""
    for name, value in UNWATCHED.items():
        os.environ.setdefault(name, value)


def check_authentication() -> None:
    """Raises ValueError where Ray would ask nobody for a token: whoever can call it runs code as its user."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        raise ValueError(f"RAY_AUTH_MODE is {mode!r}, which lets everybody use this Ray: unset it, or set it to token")


def keep_token() -> None:
    """Ray's token is for its user alone; Ray makes it for all to read."""
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # there is none, or it is another's
        token.chmod(0o600)


def children() -> list[int]:
    """Processes that this one started and that are there, dead or alive, until it is told of their end."""
    return [int(pid) for listed in Path("/proc/self/task").glob("*/children") for pid in listed.read_text().split()]


def command(pid: int) -> str | None:
    """What a process runs, in 15 characters; None when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return None


def _leave_nothing(directory: Path, guard: Guard, patience_s: float = PATIENCE_S) -> None:
    leave_nothing(directory, patience_s)
    guard.dismiss()


class LocalCluster:
    """Owns one Ray: own temporary directory, own ports, no dashboard. A context manager."""

    def __init__(
        self, namespace: str, cpus: int | None = None, last_words: str = "", leftovers: Sequence[Path] = ()
    ) -> None:
        """Should this process end without stopping it, `last_words` are said for it, and `leftovers` removed.

        Raises ValueError where the environment has Ray let everybody in.
        """
        check_authentication()
        self._temp_dir = Path(tempfile.mkdtemp(prefix="shoal-ray-", dir="/tmp"))  # short: it holds Unix sockets
        keep_private()
        keep_quiet()
        # Ray ends what it started half as the interpreter exits, and last of all comes what was registered before it
        self._guard = Guard(self._temp_dir, last_words, leftovers)
        self._remove = functools.partial(_leave_nothing, self._temp_dir, self._guard)
        atexit.register(self._remove)
        try:
            with none_lost():  # Ray has a handler for SIGTERM, and forks
                context = ray.init(
                    address="local",
                    namespace=namespace,
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level="WARNING",
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(self._temp_dir),
                )
        except (SystemExit, KeyboardInterrupt):
            ray.shutdown()  # it may have started all the same
            raise
        keep_token()
        self.address: str = context.address_info["gcs_address"]
        # each readable once it has ended, open until this process has
        parts = [(command(pid), os.pidfd_open(pid)) for pid in set(children()) - {self._guard.pid}]
        self._vital = [ended for name, ended in parts if name in VITAL]
        self._others = [ended for name, ended in parts if name not in VITAL]
        self.logs = Path(context.address_info["session_dir"]) / "logs"

    def ends_within(self, timeout_s: float) -> bool:
        """Whether its GCS or its raylet is gone by then; returns as soon as one is."""
        return bool(self._vital) and bool(select.select(self._vital, [], [], timeout_s)[0])

    def end_process_with_it(
        self, over: threading.Event, last: Callable[[], int], asked: Callable[[], bool] = lambda: False
    ) -> threading.Thread:
        """Until `over`, see whether this Ray has ended by itself, and then end the process with the status of `last`.

        Whoever ends a service with all of its processes at once, as systemd does, ends Ray as well; what asks it would
        then wait for a minute, and at last be ended by it; and Ray's own threads end the process without a word when
        they find its object store gone, a tenth of a second later. Ended together, its GCS and its raylet wait for each
        other for ten seconds: when this process was `asked` to end, and a lesser part of Ray just has, all of them
        were. The thread that sees to it is returned.
        """

        def watch() -> None:
            unasked: list[set[int]] = [set(), set()]  # parts that had ended at the last two looks of before
            while self._vital and not over.is_set():
                gone = self.ends_within(WATCH_S)
                ended = set(select.select(self._others, [], [], 0)[0])
                if not asked():
                    unasked = [unasked[1], ended]
                elif ended - unasked[0]:
                    gone = True
                if gone and not over.is_set():
                    status = 1
                    try:
                        status = last()
                        self._guard.said()
                    finally:  # also where nobody reads any more what it prints
                        try:
                            self.abandon()
                            with contextlib.suppress(OSError, ValueError):
                                sys.stdout.flush()
                        finally:
                            os._exit(status)

        watching = threading.Thread(target=watch, name="is-ray-there", daemon=True)
        watching.start()
        return watching

    def keep_logs(self, target: Path) -> Path | None:
        """Copy what its processes wrote, in place of what is there, before it is stopped; None where that fails."""
        shutil.rmtree(target, ignore_errors=True)
        try:
            return Path(shutil.copytree(self.logs, target, ignore_dangling_symlinks=True))
        except OSError:  # Ray still writes there, and a full disk is no reason to say less than what was wrong
            return target if target.is_dir() else None

    def abandon(self) -> None:
        """End what is left of a Ray that does not run, and remove its directory."""
        for pid in set(children()) - {self._guard.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._leave_nothing(ALONE_S)

    def stop(self) -> None:
        """End every process of this Ray and remove its directory."""
        with contextlib.suppress(ConnectionError):
            ray.shutdown()
        self._leave_nothing()

    def _leave_nothing(self, patience_s: float = PATIENCE_S) -> None:
        self._remove(patience_s)
        atexit.unregister(self._remove)  # only now: a signal may end what is being done

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
