"""KubeRay's and the kubelet's part, played with real processes: each Ray node of a RayCluster is a `ray start`.

What is read is what the chart wrote: replicas, resources, labels and environment of the groups, the preStop of a pod
that goes, the scripts of hooks and tests. Names that only a cluster resolves are replaced by where things really are.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from tests.end_to_end import ray_nodes
from tests.end_to_end.clients import free_port, wait_until
from tests.end_to_end.ray_nodes import COMMANDS, HEAD, RayNode, start_node
from tests.helm.fake_api import FakeApi, finish
from tests.helm.fake_store import Object, Place

NAMESPACE = "default"
RELEASE = "shoal"
LOOK_S = 0.3
JOB_TRIES = 3  # backoffLimit, and the first


class LocalKubernetes:
    """Give its `run` to a FakeApi as kubelet, and that to `follow`. A context manager that ends all nodes."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="shoal-ray-", dir="/tmp"))
        self._ports = {name: free_port() for name in ("http", "gcs", "dashboard")}
        self._api: FakeApi | None = None
        self._head: RayNode | None = None
        self._groups: dict[str, list[RayNode]] = {}  # the oldest first
        self._submitted: set[str] = set()  # RayJobs
        self._pool = ThreadPoolExecutor(8)
        self._closed = threading.Event()
        self.logs: list[str] = []  # of hooks and preStops

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports['http']}"

    def follow(self, api: FakeApi) -> None:
        """Act on what is in the store, from now on."""
        self._api = api
        threading.Thread(target=self._reconcile, daemon=True).start()

    def __enter__(self) -> "LocalKubernetes":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._pool.shutdown(wait=True)
        for node in (*(node for group in self._groups.values() for node in group), self._head):
            if node is not None:
                node.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def run(self, made: Object) -> None:
        """A job or pod was made: run its container's command, and tell how it ended."""
        made["status"] = {"active": 1} if made["kind"] == "Job" else {"phase": "Running"}
        self._pool.submit(self._run, made).add_done_callback(lambda run: self._note(run.exception()))

    def nodes(self, group: str) -> list[RayNode]:
        """The nodes of a group that are there."""
        return list(self._groups.get(group, ()))

    def _run(self, made: Object) -> None:
        spec = made["spec"]["template"]["spec"] if made["kind"] == "Job" else made["spec"]
        (container,) = spec["containers"]
        wait_until(lambda: self._head is not None, 240)
        ended = any(self._execute(container) for _ in range(JOB_TRIES if made["kind"] == "Job" else 1))
        status: Object = {"kind": made["kind"]}
        finish(status, ok=ended)
        assert self._api is not None
        resource = "jobs.batch" if made["kind"] == "Job" else "pods"
        self._api.store.merge(Place(resource, NAMESPACE, made["metadata"]["name"]), {"status": status["status"]})

    def _note(self, error: BaseException | None) -> None:
        if error is not None:
            self.logs.append(f"this stand-in failed: {error!r}")

    def _execute(self, container: Object) -> bool:
        script = [self._local(word) for word in (*container["command"], *container.get("args", []))]
        done = subprocess.run(
            script, env=self._environment(container, HEAD), capture_output=True, text=True, timeout=600, check=False
        )
        self.logs.append(f"{container['name']}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 0

    def _environment(self, container: Object, address: str) -> dict[str, str]:
        """As the kubelet resolves it, with what this machine needs."""
        variables = {name: os.environ[name] for name in ("LANG", "VIRTUAL_ENV") if name in os.environ}
        variables |= {"PATH": f"{COMMANDS}:{os.environ['PATH']}", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
        for each in container["env"]:
            source = each.get("valueFrom", {})
            if "secretKeyRef" in source:
                data = self._get("secrets", source["secretKeyRef"]["name"])["data"]
                variables[each["name"]] = base64.b64decode(data[source["secretKeyRef"]["key"]]).decode()
            elif "fieldRef" in source:
                variables[each["name"]] = address
            else:
                variables[each["name"]] = self._local(each["value"])
        return variables | {"HOME": str(self._directory)}

    def _local(self, text: str) -> str:
        """Names of services, and files that are mounted, where they are here."""
        text = text.replace(f"http://{RELEASE}.{NAMESPACE}:8000", self.url)
        text = text.replace(f"http://{RELEASE}-head-svc.{NAMESPACE}:8265", f"http://{HEAD}:{self._ports['dashboard']}")
        if "/etc/shoal/serve/serve.yaml" in text:
            text = text.replace("/etc/shoal/serve/serve.yaml", str(self._serve_config()))
        if "/etc/shoal/recipes/" in text:
            for name, recipe in self._get("configmaps", f"{RELEASE}-recipes")["data"].items():
                (self._directory / name).write_text(recipe)
            text = text.replace("/etc/shoal/recipes/", f"{self._directory}/")
        return text

    def _serve_config(self) -> Path:
        """All nodes share this machine's ports: one proxy, on the head, listens for all."""
        config = yaml.safe_load(self._get("configmaps", f"{RELEASE}-serve")["data"]["serve.yaml"])
        config["http_options"] = {"host": "127.0.0.1", "port": self._ports["http"]}
        config["proxy_location"] = "HeadOnly"
        path = self._directory / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def _get(self, resource: str, name: str) -> Object:
        assert self._api is not None
        return self._api.store.get(Place(resource, NAMESPACE, name))

    def _reconcile(self) -> None:
        """As KubeRay does: as many pods a group as it has replicas, those that died replaced."""
        while not self._closed.wait(LOOK_S):
            try:
                cluster = self._get("rayclusters.ray.io", RELEASE)
            except LookupError:
                continue
            if self._head is None:
                self._start_head(cluster["spec"]["headGroupSpec"])
            for group in cluster["spec"]["workerGroupSpecs"]:
                self._scale(group)
            for job in self._api.store.list("rayjobs.ray.io", NAMESPACE)[0] if self._api is not None else ():
                if job["metadata"]["name"] not in self._submitted:
                    self._submitted.add(job["metadata"]["name"])
                    self._pool.submit(self._submit, job).add_done_callback(lambda run: self._note(run.exception()))

    def _submit(self, job: Object) -> None:
        """The submitter's pod: the entrypoint becomes a job of Ray's, and the RayJob says how it ended."""
        assert self._api is not None
        (container,) = job["spec"]["submitterPodTemplate"]["spec"]["containers"]
        address = f"http://{HEAD}:{self._ports['dashboard']}"
        line = f"ray job submit --address {address} -- {self._local(job['spec']['entrypoint'])}"
        done = self._execute(container | {"command": ["/bin/bash", "-ec", line]})
        status = {"jobStatus": "SUCCEEDED" if done else "FAILED", "jobDeploymentStatus": "Complete"}
        self._api.store.merge(Place("rayjobs.ray.io", NAMESPACE, job["metadata"]["name"]), {"status": status})

    def _start_head(self, group: Object) -> None:
        assert self._api is not None
        secret: Object = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": RELEASE}}
        token = base64.b64encode(os.urandom(24).hex().encode()).decode()
        with contextlib.suppress(ValueError):
            self._api.store.create(Place("secrets", NAMESPACE, RELEASE), secret | {"data": {"auth_token": token}})
        arguments = [
            "--head",
            f"--port={self._ports['gcs']}",
            "--include-dashboard=true",
            f"--dashboard-host={HEAD}",
            f"--dashboard-port={self._ports['dashboard']}",
            f"--temp-dir={self._directory}",
            *_marks(group),
        ]
        self._head = start_node(HEAD, arguments, self._pod_environment(group, HEAD))

    def _pod_environment(self, group: Object, address: str) -> dict[str, str]:
        """A Ray container's, with what KubeRay adds."""
        (container,) = group["template"]["spec"]["containers"]
        token = base64.b64decode(self._get("secrets", RELEASE)["data"]["auth_token"]).decode()
        return self._environment(container, address) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}

    def _scale(self, group: Object) -> None:
        nodes = self._groups.setdefault(group["groupName"], [])
        nodes[:] = [node for node in nodes if node.alive]
        while len(nodes) < group["replicas"]:
            nodes.append(self._start(group))
        surplus = nodes[: len(nodes) - group["replicas"]]  # the oldest: not those that the service would choose
        del nodes[: len(surplus)]
        for stop in [self._pool.submit(self._stop, group, node) for node in surplus]:
            stop.result()

    def _start(self, group: Object) -> RayNode:
        address = f"127.0.0.{next(ray_nodes.NUMBERS)}"
        arguments = [f"--address={HEAD}:{self._ports['gcs']}", *_marks(group)]
        return start_node(address, arguments, self._pod_environment(group, address))

    def _stop(self, group: Object, node: RayNode) -> None:
        """The preStop, for as long as the pod may take, then the end."""
        (container,) = group["template"]["spec"]["containers"]
        head = f"{HEAD}:{self._ports['gcs']}"
        command = [  # where one machine has several nodes, which of them a command means must be said
            word.replace("ray drain-node ", f"ray drain-node --address {head} --node-id {node.id} ")
            for word in container["lifecycle"]["preStop"]["exec"]["command"]
        ]
        began_s = time.monotonic()
        done = subprocess.run(
            command,
            env=self._pod_environment(group, node.address),
            capture_output=True,
            text=True,
            timeout=group["template"]["spec"]["terminationGracePeriodSeconds"],
            check=False,
        )
        took_s = time.monotonic() - began_s
        self.logs.append(
            f"preStop of {node.address}: {done.returncode} after {took_s:.1f} s\n{done.stdout}{done.stderr}"
        )
        node.kill()


def _marks(group: Object) -> Iterator[str]:
    """A group's resources and labels, as KubeRay passes them to `ray start`."""
    (container,) = group["template"]["spec"]["containers"]
    resources = {name: float(amount) for name, amount in group.get("resources", {}).items()}
    cpus = resources.pop("CPU", None)
    yield f"--num-cpus={container['resources']['limits']['cpu'] if cpus is None else int(cpus)}"
    if resources:
        yield f"--resources={json.dumps(resources)}"
    if group.get("labels"):
        yield "--labels=" + ",".join(f"{name}={value}" for name, value in group["labels"].items())
