"""A service on a Ray cluster of several nodes, all on this machine, and the means to harm it."""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from cluster.session import LOOPBACK, OBJECT_STORE_BYTES, keep_private  # before anything that imports ray
from tests.end_to_end.clients import free_port, wait_until

ADMIN = "admin-token-of-the-tests"
NAME = "tested"


class Deployment:
    """Owns one Ray and one Serve application on it. A context manager."""

    def __init__(self, model: Path, **arguments: Any) -> None:
        """`arguments` as `services.app_args.AppArgs` takes them."""
        self._arguments: dict[str, Any] = {"model": str(model), "admin_token": ADMIN, **arguments}
        self._temp_dir = Path(tempfile.mkdtemp(prefix="shoal-ray-", dir="/tmp"))
        self.url = ""
        self._cluster: Any = None

    def __enter__(self) -> "Deployment":
        keep_private()
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster
        from ray.serve.config import HTTPOptions

        from services.app import build
        from services.app_args import AppArgs

        Path("/tmp/ray").mkdir(exist_ok=True)  # where Cluster notes its address, whatever its directory is
        port = free_port()
        self.url = f"http://{LOOPBACK}:{port}/{NAME}"
        try:
            head = {"num_cpus": 4, "temp_dir": str(self._temp_dir), "include_dashboard": False, **_node()}
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
            ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")
            serve.start(http_options=HTTPOptions(host=LOOPBACK, port=port))
            serve.run(build(AppArgs.model_validate(self._arguments)), name=NAME, route_prefix=f"/{NAME}")
            workers = self._arguments.get("attention", {}).get("replicas", 1)
            wait_until(lambda: len(self.status()["attention_workers"]) == workers)
        except BaseException:
            self._end_ray()
            raise
        return self

    def deploy_again(self, **arguments: Any) -> None:
        """The application once more, as `serve run` or a changed config file has it; returns when it runs."""
        from ray import serve

        from services.app import build
        from services.app_args import AppArgs

        self._arguments |= arguments
        serve.run(build(AppArgs.model_validate(self._arguments)), name=NAME, route_prefix=f"/{NAME}")

    def __exit__(self, *exception: object) -> None:
        from ray import serve

        try:
            report = self.status()
            serve.delete(NAME)
            wait_until(lambda: not any(alive(pid) for pid in process_ids(report)), 60)  # nothing outlives it
        finally:
            self._end_ray()

    def _end_ray(self) -> None:
        import ray
        from ray import serve

        with contextlib.suppress(Exception):  # whatever it was, the processes must end
            serve.shutdown()
        ray.shutdown()
        if self._cluster is not None:
            self._cluster.shutdown()
        shutil.rmtree(self._temp_dir, ignore_errors=True)

    def get(self, path: str, **query: Any) -> httpx.Response:
        """An admin route's answer."""
        headers = {"Authorization": f"Bearer {ADMIN}"}
        return httpx.get(f"{self.url}/admin/{path}", headers=headers, params=query, timeout=40)

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = self.get("status").json()
        return document

    def hosts(self) -> list[dict[str, Any]]:
        hosts: list[dict[str, Any]] = self.status()["expert_hosts"]
        return hosts

    def begin(self, route: str, **wish: Any) -> httpx.Response:
        """Ask for a change of the expert hosts."""
        headers = {"Authorization": f"Bearer {ADMIN}"}
        return httpx.post(f"{self.url}/admin/experts/{route}", headers=headers, json=wish, timeout=40)

    def change(self, route: str, seconds: float = 120.0, **wish: Any) -> dict[str, Any]:
        """Have a change, and wait for its end."""
        answer = self.begin(route, **wish)
        assert answer.status_code == 202, answer.text
        change: dict[str, Any] = answer.json()
        deadline_s = time.monotonic() + seconds
        while not change["over"]:
            assert time.monotonic() < deadline_s, change
            change = self.get(f"changes/{change['id']}", seen=change["version"], timeout_s=10).json()
        return change

    def wait_ready(self, standby: bool = False) -> None:
        """Until all hosts serve, and a stand-by waits if wanted."""
        wait_until(lambda: self._ready(standby))

    def _ready(self, standby: bool) -> bool:
        report = self.status()
        return report.get("state") == "ready" and (not standby or bool(report["standby"]))

    def add_node(self) -> Any:
        """Another Ray node, on which new actors may start; `node_id` names it."""
        return self._cluster.add_node(num_cpus=4, **_node())

    def remove_node(self, node: Any) -> None:
        """Kill a node and all that runs on it."""
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_host(self, index: int = 0) -> None:
        os.kill(self.hosts()[index]["pid"], signal.SIGKILL)

    def kill_worker(self, index: int = 0) -> None:
        os.kill(self.status()["attention_workers"][index]["pid"], signal.SIGKILL)

    def kill_controller(self) -> None:
        os.kill(self.status()["controller"]["pid"], signal.SIGKILL)

    def ray_process(self, title: str) -> int:
        """The process of this very Ray whose title contains `title`, such as ServeController."""
        for directory in Path("/proc").glob("[0-9]*"):
            if f"ray::{title}" in _text(directory / "cmdline"):
                parent = _text(directory / "stat").rsplit(")", 1)[-1].split()[1]
                if str(self._temp_dir) in _text(Path("/proc") / parent / "cmdline"):
                    return int(directory.name)
        raise AssertionError(f"no process {title} in {self._temp_dir}")

    def freeze(self, pid: int, seconds: float) -> None:
        """SIGSTOP now, SIGCONT later, if the process is still there."""

        def thaw() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        os.kill(pid, signal.SIGSTOP)
        timer = threading.Timer(seconds, thaw)
        timer.daemon = True
        timer.start()


def _node() -> dict[str, Any]:
    return {"node_ip_address": LOOPBACK, "object_store_memory": OBJECT_STORE_BYTES}


def process_ids(report: dict[str, Any]) -> list[int]:
    """Every process of ours that a status document names."""
    members = [*report["expert_hosts"], *report["attention_workers"], *report["standby"], report["controller"]]
    return [member["pid"] for member in members if member["pid"] is not None]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # it ended meanwhile
        return ""


def alive(pid: int) -> bool:
    """Whether a process runs, or is frozen."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
